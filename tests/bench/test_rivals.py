"""What HSA is timed against attends to the same keys."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from retrofit.attention_call import AttentionCall
from retrofit.bench.inputs import Inputs
from retrofit.bench.rivals import dense_runs, flex_mask
from retrofit.cache import RetrofitLayer
from retrofit.configs import HSAConfig
from retrofit.kernels.hsa.state import HSAState
from retrofit.targets.hsa import HSAAttention

CONFIG = HSAConfig(
    window=16, sink=8, budget=16, block=8, node=2, fanout=4, nodes_per_span=8, beam=2, query_block=8
)


def _inputs(heads: int, kv_heads: int, tokens: int) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, tokens, 16, generator=generator) for h in (heads, kv_heads, kv_heads))
    return Inputs(q, k, v, 0.25)


@pytest.mark.usefixtures("whole_leaves")
def test_flex_attention_is_given_the_blocks_that_were_selected() -> None:
    inputs = _inputs(4, 2, 192)
    target = HSAAttention(
        CONFIG,
        heads=4,
        kv_heads=2,
        head_dim=16,
        value_dim=16,
        scale=inputs.scale,
        causal=True,
        sliding_window=0,
    )
    layer, zero = RetrofitLayer(), torch.zeros(1, dtype=torch.int64)
    with torch.no_grad():
        out = target(inputs.q, inputs.k, inputs.v, AttentionCall(zero, zero + 192, layer))
    assert isinstance(layer.state, HSAState)
    mask = flex_mask(inputs, layer.state.spans, layer.state.choices, target.geometry)

    at = torch.arange(192)
    seen = mask.mask_mod(torch.tensor(0), torch.arange(4)[:, None, None], at[:, None], at)
    assert seen.sum() < 0.8 * 4 * 192 * 193 / 2
    k, v = (x.repeat_interleave(2, 1) for x in (inputs.k, inputs.v))
    expected = F.scaled_dot_product_attention(inputs.q, k, v, attn_mask=seen[None], scale=inputs.scale)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)

    by_block = seen.unflatten(1, (-1, 8)).unflatten(3, (-1, 8))
    assert torch.equal(mask.to_dense()[0].bool(), by_block.any(4).any(2))
    full = torch.zeros_like(by_block.any(4).any(2))
    assert mask.full_kv_num_blocks is not None and mask.full_kv_indices is not None
    for h, i in torch.cartesian_prod(torch.arange(4), torch.arange(24)).tolist():
        full[h, i, mask.full_kv_indices[0, h, i, : int(mask.full_kv_num_blocks[0, h, i])].long()] = True
    whole = by_block.all(4).all(
        2
    )  # some of them in the window of the first queries, chosen by the later ones
    assert not (full & ~whole).any()
    assert full.sum() > 0.8 * whole.sum()


def test_another_shape_has_the_same_attention() -> None:
    inputs = _inputs(6, 2, 32)
    shaped = inputs.shaped(8, 4, 32)
    assert shaped.q.shape == (1, 8, 32, 32)
    assert shaped.k.shape == shaped.v.shape == (1, 4, 32, 32)
    before, after = (dense_runs(x, causal=True)["sdpa"] for x in (inputs, shaped))
    once, again = before.call(*before.inputs), after.call(*after.inputs)
    torch.testing.assert_close(again[:, 3, :, :16], once[:, 4])  # the second head of the second kv head
    torch.testing.assert_close(again[:, 3, :, :16], again[:, 3, :, 16:])
