import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retrofit.errors import ConfigError
from retrofit.kernels.pyramid import ops
from retrofit.kernels.pyramid.blocked import POOLINGS, crop_pyramid, extend_pyramid, extend_spreads
from retrofit.kernels.pyramid.reference import build_pyramid, spreads

RATIOS = (2, 4, 3)


def make_weights(pooling, heads, dim, dtype=torch.float32, ratios=RATIOS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if pooling == "attention":
        return [torch.randn(heads, dim, generator=generator, dtype=dtype) for _ in ratios]
    if pooling == "learned":
        return [torch.randn(heads, dim, ratio, generator=generator, dtype=dtype) for ratio in ratios]
    return [None] * len(ratios)


def complete(level, size, tokens, start, offset):
    return [
        level[row, :, : max(tokens - first - offset, 0) // size] for row, first in enumerate(start.tolist())
    ]


@pytest.mark.parametrize("pooling", POOLINGS)
@settings(max_examples=15, deadline=None)
@given(
    tokens=st.integers(1, 100),
    starts=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    offset=st.sampled_from([0, 8]),
    heads=st.integers(1, 3),
    dim=st.sampled_from([1, 5, 16]),
)
def test_matches_reference(pooling, tokens, starts, offset, heads, dim):
    start = torch.tensor(starts).clamp(max=tokens - 1)
    x = torch.randn(len(starts), heads, tokens, dim, dtype=torch.float64)
    options = dict(
        ratios=RATIOS,
        offset=offset,
        pooling=pooling,
        weights=make_weights(pooling, heads, dim, torch.float64),
    )
    expected = build_pyramid(x, start, **options)
    actual = extend_pyramid(x, None, start, new=tokens, **options)
    size = 1
    for ratio, one, other in zip(RATIOS, actual, expected, strict=True):
        size *= ratio
        assert one.shape == other.shape
        assert one.isfinite().all()
        for a, b in zip(
            complete(one, size, tokens, start, offset),
            complete(other, size, tokens, start, offset),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=10, deadline=None)
@given(
    chunks=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    starts=st.lists(st.integers(0, 60), min_size=1, max_size=3),
    offset=st.sampled_from([0, 8]),
    dim=st.sampled_from([3, 16, 64]),
)
def test_chunks_equal_at_once_to_the_bit(pooling, dtype, chunks, starts, offset, dim):
    tokens, start = sum(chunks), torch.tensor(starts)
    x = torch.randn(len(starts), 2, tokens, dim).to(dtype)
    options = dict(ratios=RATIOS, offset=offset, pooling=pooling, weights=make_weights(pooling, 2, dim))
    whole = extend_pyramid(x, None, start, new=tokens, **options)
    levels, seen = None, 0
    for chunk in chunks:
        seen += chunk
        levels = extend_pyramid(x[:, :, :seen], levels, start, new=chunk, **options)
    size = 1
    for ratio, one, other in zip(RATIOS, levels, whole, strict=True):
        size *= ratio
        assert one.shape == other.shape
        for a, b in zip(
            complete(one, size, tokens, start, offset),
            complete(other, size, tokens, start, offset),
            strict=True,
        ):
            assert torch.equal(a, b)


def test_neutral_weights_are_the_mean():
    x, start = torch.randn(2, 3, 50, 8), torch.tensor([0, 7])
    options = dict(new=50, ratios=RATIOS, offset=0)
    mean = extend_pyramid(x, None, start, pooling="mean", weights=[None] * 3, **options)
    zeros = [torch.zeros(3, 8)] * 3
    attention = extend_pyramid(x, None, start, pooling="attention", weights=zeros, **options)
    taps = [torch.full((3, 8, ratio), 1 / ratio) for ratio in RATIOS]
    learned = extend_pyramid(x, None, start, pooling="learned", weights=taps, **options)
    for a, b, c in zip(mean, attention, learned, strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(a, c)


def test_crop_then_extend_equals_at_once():
    x, start = torch.randn(2, 2, 90, 8), torch.tensor([0, 11])
    options = dict(ratios=RATIOS, offset=8, pooling="mean", weights=[None] * 3)
    levels = crop_pyramid(extend_pyramid(x, None, start, new=90, **options), 61, ratios=RATIOS, offset=8)
    again = extend_pyramid(x, levels, start, new=29, **options)
    whole = extend_pyramid(x, None, start, new=90, **options)
    size = 1
    for ratio, one, other in zip(RATIOS, again, whole, strict=True):
        size *= ratio
        for a, b in zip(complete(one, size, 90, start, 8), complete(other, size, 90, start, 8), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_gradients(pooling):
    x = torch.randn(2, 2, 26, 3, dtype=torch.float64, requires_grad=True)
    start = torch.tensor([0, 2])
    weights = [
        weight if weight is None else weight.requires_grad_()
        for weight in make_weights(pooling, 2, 3, torch.float64)
    ]

    def build(x, *weights):
        options = dict(ratios=RATIOS, offset=0, pooling=pooling, weights=weights)
        levels = extend_pyramid(x[:, :, :11], None, start, new=11, **options)
        levels = extend_pyramid(x, levels, start, new=15, **options)
        return tuple(levels[i][:, :, : 24 // size] for i, size in enumerate((2, 8, 24)))

    assert torch.autograd.gradcheck(build, (x, *weights))


@pytest.mark.parametrize(("offset", "pooling"), [(0, "mean"), (8, "mean"), (8, "attention")])
def test_exports_with_dynamic_sizes(offset, pooling):
    options = dict(
        ratios=(2, 4), offset=offset, pooling=pooling, weights=make_weights(pooling, 2, 4, ratios=(2, 4))
    )

    class Build(torch.nn.Module):
        def forward(self, x, start):
            return extend_pyramid(x, None, start, new=x.shape[2], **options)

    class Step(torch.nn.Module):
        def forward(self, x, new, fine, coarse, start):
            return extend_pyramid(x, [fine, coarse], start, new=new.shape[2], **options)

    batch, dynamic = torch.export.Dim("batch", min=2, max=64), torch.export.Dim.DYNAMIC
    x, start = torch.randn(2, 2, 57, 4), torch.tensor([0, 3])
    build = torch.export.export(
        Build(), (x, start), dynamic_shapes={"x": {0: batch, 2: dynamic}, "start": {0: batch}}
    ).module()
    fine, coarse = Build()(x[:, :, :40], start)
    step = torch.export.export(
        Step(),
        (x, x[:, :, 40:], fine, coarse, start),
        dynamic_shapes={name: {0: batch, 2: dynamic} for name in ("x", "new", "fine", "coarse")}
        | {"start": {0: batch}},
        prefer_deferred_runtime_asserts_over_guards=True,
    ).module()
    for before, after in ((60, 2), (40, 31), (100, 9), (30, 77)):
        x, start = torch.randn(3, 2, before + after, 4), torch.tensor([0, 1, 0])
        levels = build(x[:, :, :before], start)
        whole = Build()(x, start)
        for i, level in enumerate(step(x, x[:, :, before:], *levels, start)):
            cells = (before + after - 1 - offset) // (2, 8)[i]
            assert torch.equal(level[:, :, :cells], whole[i][:, :, :cells])
            assert level.shape == whole[i].shape


@pytest.mark.parametrize("new", [None, 7])
def test_operators_say_what_they_return(new):
    x, start = torch.randn(2, 3, 101, 8), torch.tensor([0, 5])
    options = {"ratios": [4, 4], "offset": 5, "pooling": "mean"}
    levels, past, recent = [], None, x
    if new is not None:
        before, recent = x[:, :, :-new], x[:, :, -new:]
        levels = ops._extend_pyramid(before, before, start, [], [], **options)
        past = ops._extend_spreads(before, before, levels[0], None, start, ratio=4, offset=5)
    torch.library.opcheck(ops._extend_pyramid, (x, recent, start, levels, []), options)
    cells = ops._extend_pyramid(x, recent, start, levels, [], **options)[0]
    of_spreads = (x, recent, cells, past, start)
    torch.library.opcheck(ops._extend_spreads, of_spreads, {"ratio": 4, "offset": 5})


def test_unknown_pooling_is_refused():
    with pytest.raises(ConfigError, match="pooling must be one of"):
        extend_pyramid(
            torch.zeros(1, 1, 4, 2),
            None,
            torch.zeros(1, dtype=torch.int64),
            new=4,
            ratios=(2,),
            offset=0,
            pooling="median",
            weights=[None],
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=15, deadline=None)
@given(
    chunks=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    starts=st.lists(st.integers(0, 60), min_size=1, max_size=3),
    offset=st.sampled_from([0, 8]),
    ratio=st.sampled_from([1, 2, 4]),
    dim=st.sampled_from([3, 16]),
)
def test_spreads_in_chunks_equal_those_at_once_and_the_definition(dtype, chunks, starts, offset, ratio, dim):
    tokens, start = sum(chunks), torch.tensor(starts)
    x = torch.randn(len(starts), 2, tokens, dim).to(dtype)
    pooled = dict(ratios=(ratio,), offset=offset, pooling="mean", weights=[None])
    options = dict(ratio=ratio, offset=offset)
    (cells,) = extend_pyramid(x, None, start, new=tokens, **pooled)
    whole = extend_spreads(x, cells, None, start, new=tokens, **options)
    assert whole.dtype == torch.float32 and whole.isfinite().all()
    parts, seen = None, 0
    for chunk in chunks:
        seen += chunk
        (known,) = extend_pyramid(x[:, :, :seen], None, start, new=seen, **pooled)
        parts = extend_spreads(x[:, :, :seen], known, parts, start, new=chunk, **options)
    expected = spreads(x, cells, start, **options)
    for a, b, c in zip(
        *(complete(y, ratio, tokens, start, offset) for y in (parts, whole, expected)), strict=True
    ):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c)
