"""Which arguments may be something else than they were, as the graph is the same with them.

attn(x, position_ids=None)   and   attn(x, position_ids=positions)   →   the same graph
attn(x, deterministic=True)  and   attn(x, deterministic=False)      →   the same graph
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from retrofit.capture.call import Signature, tensor_leaves
from retrofit.capture.export import Captured, capture
from retrofit.capture.observe import Normalized
from retrofit.capture.record import OwnerCall
from retrofit.capture.training import same_graph
from retrofit.capture.unread import unread_parameters

GOES_AROUND = ("use_cache", "output_attentions", "output_hidden_states", "return_dict")
"""Arguments about what the graph has no part in, or what is refused elsewhere."""

MEANINGFUL = ("is_causal", "position_bias", "softcap", "cu_seq_lens_q", "cu_seq_lens_k", "block_mask")
"""Arguments that change what attention means, also where nobody sees who reads them."""

_POSITIONS = "position_ids"  # handed on to kernels that none of these modules ends up with


def ignored_arguments(
    module: nn.Module, call: OwnerCall, evaluated: Normalized, normalized: Callable[[Captured], Normalized]
) -> frozenset[str]:
    """The arguments of ``module`` that its graph is the same with, true or false, or tensor or None.

    Args:
        module: The module.
        call: A call of it.
        evaluated: Its graph in that call.
        normalized: Finds the one attention of a graph.
    """
    values = Signature.of(module).bind(call.args, call.kwargs)
    others = _others(values)
    unread = unread_parameters(module) & others.keys()
    found = set(unread)
    for name in others.keys() - unread:
        try:
            other = normalized(capture(module, replace(call, args=(), kwargs={**values, name: others[name]})))
        except Exception:  # a value that the module cannot take
            continue
        if other.attention is not None and same_graph(other.captured, evaluated.captured):
            found.add(name)
    return frozenset(found)


def _others(values: Mapping[str, Any]) -> dict[str, Any]:
    """The other value of each argument that is true or false, and positions if they were left out."""
    found: dict[str, Any] = {
        name: not value
        for name, value in values.items()
        if isinstance(value, bool) and name not in (*GOES_AROUND, *MEANINGFUL)
    }
    if _POSITIONS in values and values[_POSITIONS] is None:
        first = next(iter(tensor_leaves(values).values()))
        positions = torch.arange(first.shape[1], device=first.device)
        found[_POSITIONS] = positions.expand(first.shape[0], -1)
    return found
