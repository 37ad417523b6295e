"""Which arguments that were None may be a tensor, as nothing is computed from them then either.

attn(x, position_ids=None)   and   attn(x, position_ids=positions)   →   the same graph
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from retrofit.capture.call import Signature, tensor_leaves
from retrofit.capture.export import Captured, capture
from retrofit.capture.observe import Normalized
from retrofit.capture.record import OwnerCall
from retrofit.capture.training import skeleton
from retrofit.capture.unread import unread_parameters
from retrofit.errors import CaptureError

_POSITIONS = "position_ids"  # handed on to kernels that none of these modules ends up with


def ignored_arguments(
    module: nn.Module, call: OwnerCall, evaluated: Normalized, normalized: Callable[[Captured], Normalized]
) -> frozenset[str]:
    """The arguments of ``module`` that its graph is the same with, tensor or None.

    Args:
        module: The module.
        call: A call of it.
        evaluated: Its graph in that call.
        normalized: Finds the one attention of a graph.
    """
    signature = Signature.of(module)
    values = signature.bind(call.args, call.kwargs)
    if _POSITIONS not in signature.names or values.get(_POSITIONS) is not None:
        return frozenset()
    if _POSITIONS in unread_parameters(module):
        return frozenset({_POSITIONS})
    first = next(iter(tensor_leaves(values).values()))
    positions = torch.arange(first.shape[1], device=first.device).expand(first.shape[0], -1)
    try:
        found = normalized(capture(module, replace(call, kwargs={**call.kwargs, _POSITIONS: positions})))
    except CaptureError:
        return frozenset()
    same = found.attention is not None and skeleton(found.captured) == skeleton(evaluated.captured)
    return frozenset({_POSITIONS}) if same else frozenset()
