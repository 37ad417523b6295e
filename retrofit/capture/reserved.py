"""Names that a module must not give to a child, a parameter or a buffer if a site is to take its place.

self.plan = nn.Linear(…)   →   a refusal: a site has its own ``plan``
"""

from __future__ import annotations

from torch import nn

RESERVED = frozenset(
    (
        "dense_mode",
        "fingerprint",
        "layer_idx",
        "original",
        "path",
        "plan",
        "restored",
        "retrofit",
        "retrofit_attend",
        "retrofit_bias_of_step",
        "tap",
    )
)
"""What sites are asked by name, besides what every module has."""


def taken(module: nn.Module) -> str | None:
    """Why a site cannot take the place of ``module``: what has a name that it needs; None if nothing has."""
    kinds = (("child", module._modules), ("parameter", module._parameters), ("buffer", module._buffers))
    for kind, named in kinds:
        for name in dict(named.items()):
            if name in RESERVED:
                return f"it has a {kind} named {name}, which a site needs for itself; rename it"
    return None
