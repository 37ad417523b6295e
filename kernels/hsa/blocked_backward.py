"""The backward pass of hierarchical sparse attention: fetch again, attend again, one chunk at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from retrofit.kernels.dense import blocked as dense
from retrofit.kernels.dense.scores import PLAIN, ScoreRules
from retrofit.kernels.hsa import blocked_execute as execute
from retrofit.kernels.hsa import blocked_summaries as summaries
from retrofit.kernels.hsa import blocked_tile as executed
from retrofit.kernels.hsa.blocked_call import Call, block_leaves
from retrofit.kernels.hsa.blocked_tile import Tile, opened, rules_by_query
from retrofit.kernels.hsa.geometry import Geometry


def hsa_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    length: Tensor,
    nodes: Sequence[Tensor],
    value_nodes: Sequence[Tensor],
    gate: Tensor | None,
    spans: Tensor,
    choices: Tensor,
    *,
    scale: float,
    causal: bool,
    sliding_window: int,
    geometry: Geometry,
    rules: ScoreRules = PLAIN,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor], Tensor | None, Tensor | None]:
    """Returns the gradients of q, k, v, nodes, value_nodes, gate and sinks; the selection itself has none.

    Args:
        grad: Gradient of the output, [B, Hq, T, Dv].
        q: As in the forward pass, and so all that follow.
        k: Keys.
        v: Values.
        start: Index of each row's first real token.
        length: Number of real tokens of each row.
        nodes: Pooled keys per level.
        value_nodes: Pooled values per level.
        gate: Weight of the summaries, or None.
        spans: As the forward pass returned it.
        choices: As the forward pass returned it.
        scale: Factor on the scores.
        causal: Whether a query sees only itself and what lies before it.
        sliding_window: A query sees no keys this far or farther before it; 0 for no limit.
        geometry: The sizes.
        rules: What else happens to the scores.
    """
    call = Call.of(q, k, start, length, scale, causal, sliding_window, geometry)
    grad_q = torch.zeros_like(q)
    grad_k, grad_v = (torch.zeros_like(x, dtype=call.dtype) for x in (k, v))
    grad_sinks = None if rules.sinks is None else torch.zeros_like(rules.sinks, dtype=call.dtype)
    for rows, queries, keys, *at in call.dense_parts():
        parts = dense.dense_attention_backward(
            grad[rows, :, queries],
            q[rows, :, queries],
            k[rows, :, keys],
            v[rows, :, keys],
            *at,
            scale=scale,
            causal=causal,
            sliding_window=sliding_window,
            rules=rules,
        )
        if grad_sinks is not None and parts[3] is not None:
            grad_sinks += parts[3]
        grad_q[rows, :, queries] = parts[0]
        grad_k[rows, :, keys] += parts[1]
        grad_v[rows, :, keys] += parts[2]
    grad_nodes, grad_value_nodes = ([torch.zeros_like(x) for x in levels] for levels in (nodes, value_nodes))
    grad_gate = None if gate is None else torch.zeros_like(gate)
    if not call.is_dense:
        _sparse_backward(
            call,
            grad,
            (q, k, v),
            (nodes, value_nodes, gate),
            (spans, choices),
            (grad_q, grad_k, grad_v),
            (grad_nodes, grad_value_nodes, grad_gate),
            rules,
            grad_sinks,
        )
    if grad_sinks is not None and rules.sinks is not None:
        grad_sinks = grad_sinks.to(rules.sinks.dtype)
    grads = grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)
    return *grads, grad_nodes, grad_value_nodes, grad_gate, grad_sinks


def _sparse_backward(
    call: Call,
    grad: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor],
    pooled: tuple[Sequence[Tensor], Sequence[Tensor], Tensor | None],
    selection: tuple[Tensor, Tensor],
    grads: tuple[Tensor, Tensor, Tensor],
    pooled_grads: tuple[list[Tensor], list[Tensor], Tensor | None],
    rules: ScoreRules,
    grad_sinks: Tensor | None,
) -> None:
    """Adds the gradients of the query blocks that are not dense."""
    q, k, v = inputs
    sources = call.sources(k, v, *pooled, copy=True)
    sums = [torch.zeros_like(rows.table, dtype=call.dtype) for rows in sources.tables]
    heads = pooled_grads[2], grad_sinks
    for block in call.chunks(call.sparse, call.chunk_size(sources.gate is not None)):
        spans, choices = (call.pick(x, block) for x in selection)
        tile = executed.fetch(
            sources,
            execute.exact_plan(block, call.length, dtype=call.dtype, **call.rules),
            block_leaves(spans, block, call.length, call.causal, call.geometry),
            spans,
            choices,
            block,
            call.length,
            tiles=None,
            **call.rules,
        )
        queries = call.queries(q, call.places(block))
        given = call.by_block(grad, call.places(block)).to(call.dtype)
        found = _tile_backward(
            given.flatten(0, 2),
            queries.flatten(0, 2),
            tile,
            opened(sources.gate, queries),
            execute.widths(call.geometry, call.causal),
            rules_by_query(rules, queries),
        )
        call.write(grads[0], block, found[0].view_as(queries) * call.scale)
        for total, at, part in zip(sums, tile.rows, found[1 : len(sums) + 1], strict=True):
            total.index_add_(0, at, part.reshape(-1, total.shape[1]))
        by_head = [
            x.unflatten(0, queries.shape[:3]).unflatten(3, (-1, call.geometry.query_block))
            for x in found[len(sums) + 1 :]
        ]
        for total, part in zip((x for x in heads if x is not None), by_head, strict=True):
            total.add_(part.sum((0, 2, 4, 5)).flatten())

    call.add_by_index(grads[1], sums[0])
    call.add_by_index(grads[2], sums[1])
    levels = len(sources.nodes)
    targets = [*pooled_grads[0][:levels], *pooled_grads[1][:levels]]
    for x, total in zip(targets, sums[2:], strict=True):
        x += total.reshape(*x.shape[:2], -1, x.shape[3])[:, :, : x.shape[2]]


def _tile_backward(
    grad: Tensor,
    queries: Tensor,
    tile: Tile,
    gate: Tensor | None,
    widths: tuple[int, int],
    rules: ScoreRules,
) -> list[Tensor]:
    """Gradients of the queries [X, G·Q, D], of each member of the tile and, per query, of the gate and the sink.

    Args:
        grad: Gradient of the output, [X, G·Q, Dv].
        queries: Times the scale, [X, G·Q, D].
        tile: What the blocks execute.
        gate: Weight of the summaries per query, at least 0, [X, G·Q, 1]; None without.
        widths: Keys before the list, and in a tile of it.
        rules: What else happens to the scores; the sinks by query, [X, G·Q, 1].
    """
    keys, values = tile.members[:2]
    logits = execute.scores(queries, tile.bias, keys, rules)
    if gate is None or tile.node_bias is None:
        weights, sinks = logits.softmax(-1), []
        products = torch.bmm(grad, values.transpose(1, 2))
        if rules.sinks is not None:
            kept = execute.kept(logits, weights, rules.sinks)
            weights = weights * kept
            sinks = [(kept - 1) * (weights * products).sum(-1, keepdim=True)]
        slopes = weights * (products - (weights * products).sum(-1, keepdim=True))
        slopes = _before_the_cap(slopes, logits, tile.bias, rules)
        return [
            torch.bmm(slopes, keys),
            torch.bmm(slopes.transpose(1, 2), queries),
            torch.bmm(weights.transpose(1, 2), grad),
            *sinks,
        ]
    levels = len(tile.members) // 2
    nodes, value_nodes = torch.cat(tile.members[2 : levels + 1], 1), torch.cat(tile.members[levels + 1 :], 1)
    scored = execute.scores(queries, tile.node_bias, nodes, rules)
    weights, pooled = summaries.shares(logits, scored, gate, *widths, rules.sinks)
    products, pooled_products = (torch.bmm(grad, x.transpose(1, 2)) for x in (values, value_nodes))
    mean = (weights * products).sum(-1, keepdim=True)
    mean = mean + gate * (pooled * pooled_products).sum(-1, keepdim=True)
    slopes, pooled_slopes = weights * (products - mean), pooled * (pooled_products - mean)
    grad_gate = pooled_slopes.sum(-1, keepdim=True)
    lost = 1 - weights.sum(-1, keepdim=True) - gate * pooled.sum(-1, keepdim=True)
    slopes = _before_the_cap(slopes, logits, tile.bias, rules)
    pooled_slopes = _before_the_cap(gate * pooled_slopes, scored, tile.node_bias, rules)
    pooled = gate * pooled
    lengths = [x.shape[1] for x in tile.members[2 : levels + 1]]
    return [
        torch.bmm(slopes, keys) + torch.bmm(pooled_slopes, nodes),
        torch.bmm(slopes.transpose(1, 2), queries),
        torch.bmm(weights.transpose(1, 2), grad),
        *torch.split(torch.bmm(pooled_slopes.transpose(1, 2), queries), lengths, 1),
        *torch.split(torch.bmm(pooled.transpose(1, 2), grad), lengths, 1),
        grad_gate,
        *([] if rules.sinks is None else [-lost * mean]),
    ]


def _before_the_cap(slopes: Tensor, logits: Tensor, bias: Tensor, rules: ScoreRules) -> Tensor:
    """Gradient of the scores [X, G·Q, W] from that of the logits: capped scores to which ``bias`` was added."""
    if not rules.softcap:
        return slopes
    capped = logits.unflatten(1, (-1, bias.shape[1])) - bias[:, None]
    return slopes * rules.slope(capped).flatten(1, 2)
