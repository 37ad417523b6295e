"""Hierarchical sparse attention by Triton kernels.

    top_scores, refine, keep   per level, from the top down  →  spans
    choose                     spans                         →  first
    list_leaves                spans, first                  →  the list of leaves of each block
    attend                     list                          →  out, lse

Nothing is read back from the device, and every buffer's size follows from shapes: a call can be captured in a
CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from retrofit.kernels.hsa import triton_execute as execute
from retrofit.kernels.hsa import triton_select as select
from retrofit.kernels.hsa.geometry import Geometry
from retrofit.kernels.hsa.triton_backward import hsa_attention_backward
from retrofit.kernels.hsa.triton_call import Call, power

__all__ = ["hsa_attention", "hsa_attention_backward", "unsupported"]

TILE_ROWS = 128
"""Queries times heads in a tile of 128 dims or fewer."""
KEYS = 64
"""Keys of one step of the softmax, for rows of at most 256 bytes."""
SPANS = 2
"""Spans whose leaves are scored in one product."""
PROGRAMS = 2
"""Programs to a multiprocessor that share the choosing."""
CHOOSE = {"num_warps": 8, "num_stages": 2, "maxnreg": 128}
ATTEND = {"num_warps": 8, "num_stages": 2, "maxnreg": 128}
"""Found on an H200 for 32 and 8 heads of 128 dims in bfloat16: two programs fit into a multiprocessor."""
SMALL = {"num_warps": 4, "num_stages": 2}
"""For tiles of fewer rows."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unsupported(
    q: Tensor, v: Tensor, *, causal: bool, sliding_window: int, gate: Tensor | None, geometry: Geometry
) -> str | None:
    """Returns what these kernels cannot do of a call, or None."""
    if not causal:
        return "attention that is not causal"
    if sliding_window:
        return f"a sliding window, got {sliding_window}"
    if gate is not None:
        return "summaries"
    if q.dtype not in DTYPES:
        return f"{q.dtype}"
    for name, dim in (("head_dim", q.shape[3]), ("the values' head_dim", v.shape[3])):
        if dim > 256:
            return f"{name} above 256, got {dim}"
    for name in ("block", "fanout", "query_block"):
        if (size := getattr(geometry, name)) & (size - 1):
            return f"a {name} that is no power of two, got {size}"
    for name, size in (
        ("block / node", geometry.nodes_in_span(0)),
        ("nodes_per_span", geometry.nodes_per_span),
    ):
        if size & (size - 1):
            return f"{name} that is no power of two, got {size}"
    if (
        SPANS * geometry.fanout * geometry.nodes_in_span(0) < 16
        or geometry.fanout * geometry.nodes_per_span < 16
    ):
        return "fewer than 16 nodes to a product"
    return None


def hsa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    length: Tensor,
    nodes: Sequence[Tensor],
    value_nodes: Sequence[Tensor],
    gate: Tensor | None,
    past_spans: Tensor | None,
    past_first: Tensor | None,
    *,
    scale: float,
    causal: bool,
    sliding_window: int,
    geometry: Geometry,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the output [B, Hq, T, Dv], the selection (spans, first), and the log-sum-exp of each query's scores.

    Arguments are as in ``ops``; the last output is float32 [B, Hq, T].
    """
    g, device = geometry, q.device
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    nodes = [x.contiguous() for x in nodes]
    call = Call.of(q, k, v, geometry)
    spans, first = g.selection(k, past_spans, past_first)

    width = g.beam * g.fanout + g.fanout
    scores = torch.empty(call.rows, call.blocks, call.group, width, dtype=torch.float32, device=device)
    by_query = (q.stride(0), q.stride(1), q.stride(2))
    coarse = {
        **call.shared,
        "LEVELS": g.levels,
        "GROUP": call.group,
        "FANOUT": g.fanout,
        "BEAM": g.beam,
        "WIDTH": width,
    }
    group_pad = power(call.group)
    wide = max(call.dim, call.value_dim) > 128
    heads_per_tile = call.heads_per_tile(TILE_ROWS // 2 if wide else TILE_ROWS)
    large = heads_per_tile * g.query_block >= 128
    highest = g.top_level(g.covered(call.slots - 1))
    for level in range(highest, 0, -1):
        at_nodes = (nodes[level].stride(0), nodes[level].stride(1))
        count = nodes[level].shape[2]
        per_tile = 64 // group_pad
        select.top_scores[(-(-call.blocks // per_tile), call.rows)](
            q, nodes[level], start, length, scores, *by_query, *at_nodes, *call.extent, count,
            LEVEL=level, GROUP_PAD=group_pad, PER_SPAN=g.nodes_per_span, TILE=64, **call.product, **coarse,
            num_warps=4,
        )  # fmt: skip
        if level < highest:
            select.refine[(call.blocks, call.rows)](
                q, nodes[level], start, length, spans, scores, *by_query, *at_nodes,
                *call.extent, call.total_blocks, count,
                LEVEL=level, PER_SPAN=g.nodes_per_span, TILE=max(16, group_pad), **call.product, **coarse,
                num_warps=4,
            )  # fmt: skip
        select.keep[(call.blocks, call.rows)](
            start, length, spans, scores, *call.extent, call.total_blocks, scale,
            LEVEL=level, WIDTH_PAD=power(width), BEAM_PAD=min(power(g.beam), power(width)), **coarse, num_warps=4,
        )  # fmt: skip

    tiles = call.blocks * call.rows
    programs = min(tiles, PROGRAMS * _processors(device))
    width = power(g.leaf_width)
    scratch = torch.empty(
        programs, call.group, g.query_block, width + g.fanout, dtype=torch.float32, device=device
    )
    select.choose[(programs,)](
        q, nodes[0], start, length, spans, first, scratch, *by_query,
        nodes[0].stride(0), nodes[0].stride(1), *call.extent, call.total_blocks, nodes[0].shape[2], tiles, scale,
        PER_LEAF=g.nodes_in_span(0), CHOICES=g.leaves_per_query, SPANS=SPANS,
        CHOICES_PAD=min(power(g.leaves_per_query), width), GROUP=call.group, HEADS=heads_per_tile,
        **call.product, **call.shared, **call.leaves, **(CHOOSE if large else SMALL),
    )  # fmt: skip
    ordered, counts = call.list_leaves(start, length, spans, first)

    out = torch.zeros(*q.shape[:3], call.value_dim, dtype=q.dtype, device=device)
    lse = torch.zeros(q.shape[:3], dtype=torch.float32, device=device)
    parts = -(-call.group // heads_per_tile)
    keys = KEYS if max(call.dim, call.value_dim) * call.bytes <= 256 else KEYS // 2
    execute.attend[(call.blocks, parts * call.rows)](
        q, k, v, start, length, ordered, counts, out, lse, *by_query,
        k.stride(0), k.stride(1), k.stride(2), v.stride(0), v.stride(1), v.stride(2), *call.extent, scale,
        LIST=g.leaf_width, GROUP=call.group, HEADS=heads_per_tile, KEYS=max(g.block, keys),
        **call.product, **call.values, **call.shared, **(ATTEND if large else SMALL),
    )  # fmt: skip
    return out, spans, first, lse


@cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count
