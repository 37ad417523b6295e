"""Hierarchical sparse attention by Triton kernels.

    top_scores, refine, keep   per level, from the top down  →  spans
    choose                     spans                         →  first
    list_leaves                spans, first                  →  the list of leaves of each block
    attend                     list                          →  out

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
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the output [B, Hq, T, Dv] and the selection (spans, first); arguments as in ``ops``."""
    g, (batch, heads, tokens, dim) = geometry, q.shape
    kv_heads, slots, value_dim = k.shape[1], k.shape[2], v.shape[3]
    group = heads // kv_heads
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    nodes = [x.contiguous() for x in nodes]
    total_blocks = g.blocks(slots)
    blocks = (tokens + 2 * g.query_block - 2) // g.query_block
    spans, first = g.selection(k, past_spans, past_first)

    width = g.beam * g.fanout + g.fanout
    scores = torch.empty(batch * kv_heads, blocks, group, width, dtype=torch.float32, device=q.device)
    by_query = (q.stride(0), q.stride(1), q.stride(2))
    extent = (slots, tokens, blocks)
    shared = {
        "KV_HEADS": kv_heads,
        "WINDOW": g.window,
        "SINK": g.sink,
        "BLOCK": g.block,
        "QUERY_BLOCK": g.query_block,
        "DENSE_END": g.dense_end,
    }
    coarse = {
        **shared,
        "LEVELS": g.levels,
        "GROUP": group,
        "FANOUT": g.fanout,
        "BEAM": g.beam,
        "WIDTH": width,
    }
    precision = "ieee" if q.dtype == torch.float32 else "tf32"
    product = {"DIM": dim, "DIM_PAD": _padded(dim), "PRECISION": precision}
    group_pad = _power(group)
    rows = TILE_ROWS if max(dim, value_dim) <= 128 else TILE_ROWS // 2
    heads_per_tile = max(1, min(group_pad, rows // g.query_block))
    large = heads_per_tile * g.query_block >= 128
    highest = g.top_level(g.covered(slots - 1))
    for level in range(highest, 0, -1):
        at_nodes = (nodes[level].stride(0), nodes[level].stride(1))
        count = nodes[level].shape[2]
        per_tile = 64 // group_pad
        select.top_scores[(-(-blocks // per_tile), batch * kv_heads)](
            q, nodes[level], start, length, scores, *by_query, *at_nodes, *extent, count,
            LEVEL=level, GROUP_PAD=group_pad, PER_SPAN=g.nodes_per_span, TILE=64, **product, **coarse,
            num_warps=4,
        )  # fmt: skip
        if level < highest:
            select.refine[(blocks, batch * kv_heads)](
                q, nodes[level], start, length, spans, scores, *by_query, *at_nodes,
                *extent, total_blocks, count,
                LEVEL=level, PER_SPAN=g.nodes_per_span, TILE=max(16, group_pad), **product, **coarse,
                num_warps=4,
            )  # fmt: skip
        select.keep[(blocks, batch * kv_heads)](
            start, length, spans, scores, *extent, total_blocks, scale,
            LEVEL=level, WIDTH_PAD=_power(width), BEAM_PAD=min(_power(g.beam), _power(width)), **coarse, num_warps=4,
        )  # fmt: skip

    ordered = torch.empty(batch * kv_heads, blocks, g.leaf_width, dtype=torch.int32, device=q.device)
    counts = torch.zeros(batch * kv_heads, blocks, g.query_block, dtype=torch.int32, device=q.device)
    tiles = blocks * batch * kv_heads
    programs = min(tiles, PROGRAMS * _processors(q.device))
    width = _power(g.leaf_width)
    scratch = torch.empty(
        programs, group, g.query_block, width + g.fanout, dtype=torch.float32, device=q.device
    )
    leaves = {"FANOUT": g.fanout, "BEAM": g.beam, "WIDTH": g.leaf_width, "WIDTH_PAD": width}
    select.choose[(programs,)](
        q, nodes[0], start, length, spans, first, scratch, *by_query,
        nodes[0].stride(0), nodes[0].stride(1), *extent, total_blocks, nodes[0].shape[2], tiles, scale,
        PER_LEAF=g.nodes_in_span(0), CHOICES=g.leaves_per_query, SPANS=SPANS,
        CHOICES_PAD=min(_power(g.leaves_per_query), width), GROUP=group, HEADS=heads_per_tile,
        **product, **shared, **leaves, **(CHOOSE if large else SMALL),
    )  # fmt: skip
    select.list_leaves[(blocks, batch * kv_heads)](
        start, length, spans, first, ordered, counts, *extent, total_blocks, **shared, **leaves, num_warps=1,
    )  # fmt: skip

    out = torch.zeros(batch, heads, tokens, value_dim, dtype=q.dtype, device=q.device)
    parts = -(-group // heads_per_tile)
    keys = KEYS if max(dim, value_dim) * q.element_size() <= 256 else KEYS // 2
    execute.attend[(blocks, parts * batch * kv_heads)](
        q, k, v, start, length, ordered, counts, out, *by_query,
        k.stride(0), k.stride(1), k.stride(2), v.stride(0), v.stride(1), v.stride(2), *extent, scale,
        LIST=g.leaf_width, GROUP=group, HEADS=heads_per_tile,
        VALUE_DIM=value_dim, VALUE_PAD=_padded(value_dim), KEYS=max(g.block, keys), **product, **shared,
        **(ATTEND if large else SMALL),
    )  # fmt: skip
    return out, spans, first


@cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _padded(dim: int) -> int:
    return max(16, _power(dim))
