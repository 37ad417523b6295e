import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from retrofit.errors import ConfigError
from retrofit.kernels.maha import backward, blocked
from retrofit.kernels.maha.account import keys_per_query, mean_keys, visible_pairs
from retrofit.kernels.maha.bands import Bands
from retrofit.kernels.maha.ops import maha_attention
from retrofit.kernels.pyramid.blocked import extend_pyramid

IMPLEMENTATIONS = ("reference", "blocked")
AGGREGATIONS = (("convex", "entropy"), ("convex", "euclidean"), ("nash", "entropy"))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks short enough that short rows have several of them."""
    monkeypatch.setattr(blocked, "CHUNK", 24)
    monkeypatch.setattr(backward, "CHUNK", 24)


def cells(x, start, scales, ratio):
    return extend_pyramid(
        x,
        None,
        start,
        new=x.shape[2],
        ratios=(ratio,) * (scales - 1),
        offset=0,
        pooling="mean",
        weights=[None] * (scales - 1),
    )


def attend(q, k, v, start, length, bands, offsets=None, **options):
    if offsets is None:
        offsets = torch.linspace(-0.5, 0.5, q.shape[1] * bands.scales, dtype=q.dtype)
        offsets = offsets.view(q.shape[1], bands.scales)
    return maha_attention(
        q,
        k,
        v,
        start,
        length,
        options.pop("keys", None) or cells(k, start, bands.scales, bands.ratio),
        options.pop("values", None) or cells(v, start, bands.scales, bands.ratio),
        offsets,
        scale=q.shape[-1] ** -0.5,
        widths=bands.widths,
        last_width=bands.last_width,
        sink=bands.sink,
        ratio=bands.ratio,
        **options,
    )


def tensors(batch, heads, kv_heads, tokens, dim=8, dtype=torch.float32, value_dim=None):
    return (
        torch.randn(batch, heads, tokens, dim, dtype=dtype),
        torch.randn(batch, kv_heads, tokens, dim, dtype=dtype),
        torch.randn(batch, kv_heads, tokens, value_dim or dim, dtype=dtype),
    )


def unpadded(batch, tokens):
    return torch.zeros(batch, dtype=torch.int64), torch.full((batch,), tokens)


@st.composite
def geometries(draw):
    ratio = draw(st.sampled_from([2, 3]))
    scales = draw(st.integers(1, 4 if ratio == 2 else 3))
    widths = tuple(draw(st.integers(1, 24)) for _ in range(scales - 1))
    last = draw(st.sampled_from([None, None, 7, 20]))
    sink = draw(st.integers(0, 2)) * ratio ** (scales - 1)
    return Bands(widths, last, sink, ratio)


def three_times(bands, spare):
    return min(3 * (bands.sink + sum(bands.widths) + (bands.last_width or 0)), 200) + spare


@settings(max_examples=20, deadline=None)
@given(bands=geometries(), position=st.integers(0, 300))
def test_every_key_is_counted_exactly_once(bands, position):
    t = torch.tensor(position)
    seen = list(range(min(bands.sink, position + 1)))
    counted = len(seen)
    for scale in range(bands.scales):
        low, high = int(bands.edge(scale, t).clamp(min=bands.sink)), int(bands.edge(scale - 1, t))
        assert low % bands.cell(scale) == 0 or scale == 0
        assert high % bands.cell(scale) == 0
        if high > low:
            assert low % bands.cell(scale) == 0
            seen += range(low, high)
            counted += (high - low) // bands.cell(scale)
    assert len(set(seen)) == len(seen)
    if bands.last_width is None:
        assert sorted(seen) == list(range(position + 1))
    else:
        assert set(seen) >= set(range(max(0, position + 1 - sum(bands.widths) - bands.last_width), position))
    assert int(keys_per_query(bands, t)) == counted


@pytest.mark.parametrize(("aggregation", "regularizer"), AGGREGATIONS)
@settings(max_examples=6, deadline=None)
@given(
    bands=geometries(),
    spare=st.integers(1, 40),
    group=st.sampled_from([1, 2, 3, 4]),
    starts=st.lists(st.integers(0, 30), min_size=1, max_size=3),
    right=st.integers(0, 20),
)
def test_blocked_equals_reference(aggregation, regularizer, bands, spare, group, starts, right):
    tokens = three_times(bands, spare)
    start = torch.tensor(starts).clamp(max=tokens - 1)
    length = (tokens - start - right).clamp(min=1)
    q, k, v = tensors(len(starts), 2 * group, 2, tokens, dtype=torch.float64, value_dim=5)
    if regularizer == "entropy" and aggregation == "convex":
        v = torch.randn_like(q[:, :2])
    options = dict(aggregation=aggregation, regularizer=regularizer)
    expected = attend(q, k, v, start, length, bands, implementation="reference", **options)
    actual = attend(q, k, v, start, length, bands, implementation="blocked", **options)
    torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-8)
    assert expected.isfinite().all()


@pytest.mark.parametrize("tokens", [1, 63, 65, 200])
@pytest.mark.parametrize("group", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_odd_lengths_against_float64(tokens, group, dtype):
    bands = Bands((16, 8, 8), None, 8, 2)
    q, k, v = tensors(2, 2 * group, 2, tokens, dim=16, dtype=dtype)
    start, length = unpadded(2, tokens)
    keys, values = cells(k, start, 4, 2), cells(v, start, 4, 2)
    expected = attend(
        q.double(),
        k.double(),
        v.double(),
        start,
        length,
        bands,
        keys=[x.double() for x in keys],
        values=[x.double() for x in values],
        implementation="reference",
    )
    actual = attend(q, k, v, start, length, bands, keys=keys, values=values)
    assert actual.dtype == dtype
    error = (actual.double() - expected).norm() / expected.norm()
    assert error < (1e-6 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("aggregation", "regularizer"), AGGREGATIONS)
@settings(max_examples=6, deadline=None)
@given(bands=geometries(), spare=st.integers(2, 20), data=st.data())
def test_causal_to_the_bit(implementation, aggregation, regularizer, bands, spare, data):
    tokens = three_times(bands, spare)
    changed = data.draw(st.sampled_from([tokens - 1, tokens // 2, min(tokens - 1, 23)]))
    start, length = unpadded(1, tokens)
    q, k, v = tensors(1, 4, 2, tokens)
    options = dict(implementation=implementation, aggregation=aggregation, regularizer=regularizer)
    before = attend(q, k, v, start, length, bands, **options)
    for x in (q, k, v):
        x[:, :, changed:] = 9 * torch.randn_like(x[:, :, changed:])
    after = attend(q, k, v, start, length, bands, **options)
    assert torch.equal(before[:, :, :changed], after[:, :, :changed])
    assert not torch.equal(before[:, :, changed:], after[:, :, changed:])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("aggregation", "regularizer"), AGGREGATIONS)
def test_dense_limit(implementation, aggregation, regularizer):
    q, k, v = tensors(2, 6, 2, 90, dtype=torch.float64)
    start, length = unpadded(2, 90)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    out = attend(
        q,
        k,
        v,
        start,
        length,
        Bands((90, 8, 8), None, 8, 2),
        implementation=implementation,
        aggregation=aggregation,
        regularizer=regularizer,
    )
    torch.testing.assert_close(out, dense)


@pytest.mark.parametrize("aggregation", ["convex", "nash"])
def test_equal_keys_give_the_dense_output(aggregation):
    """With zero offsets it is one softmax over all keys, if all members of a cell are alike."""
    q, k, v = tensors(1, 4, 2, 160, dtype=torch.float64)
    k, v = (x[:, :, ::8].repeat_interleave(8, 2) for x in (k, v))
    start, length = unpadded(1, 160)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    zero = torch.zeros(4, 4, dtype=torch.float64)
    out = attend(q, k, v, start, length, Bands((16, 16, 16), None, 8, 2), zero, aggregation=aggregation)
    torch.testing.assert_close(out, dense)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("aggregation", "regularizer"), AGGREGATIONS)
@settings(max_examples=6, deadline=None)
@given(
    bands=geometries(),
    chunks=st.lists(st.integers(1, 60), min_size=1, max_size=6),
    starts=st.lists(st.integers(0, 20), min_size=1, max_size=2),
)
def test_prefill_equals_decode_equals_chunks(implementation, aggregation, regularizer, bands, chunks, starts):
    chunks = [*chunks, 1, 1]
    tokens, start = sum(chunks), torch.tensor(starts).clamp(max=sum(chunks) - 1)
    q, k, v = tensors(len(starts), 4, 2, tokens, dtype=torch.float64)
    options = dict(implementation=implementation, aggregation=aggregation, regularizer=regularizer)
    whole = attend(q, k, v, start, tokens - start, bands, **options)
    seen, parts = 0, []
    for chunk in chunks:
        before, seen = seen, seen + chunk
        past = [x[:, :, :seen] for x in (k, v)]
        parts.append(
            attend(q[:, :, before:seen], *past, start, (seen - start).clamp(min=0), bands, **options)
        )
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("aggregation", "regularizer"), AGGREGATIONS)
@settings(max_examples=6, deadline=None)
@given(bands=geometries(), spare=st.integers(5, 30), left=st.integers(0, 30), right=st.integers(0, 30))
def test_padding_is_inert(implementation, aggregation, regularizer, bands, spare, left, right):
    tokens = three_times(bands, spare)
    q, k, v = tensors(1, 4, 2, tokens, dtype=torch.float64)
    options = dict(implementation=implementation, aggregation=aggregation, regularizer=regularizer)
    alone = attend(q, k, v, *unpadded(1, tokens), bands, **options)
    slots = left + tokens + right
    padded = [torch.randn(2, x.shape[1], slots, x.shape[3], dtype=x.dtype) for x in (q, k, v)]
    for x, own in zip(padded, (q, k, v), strict=True):
        x[:1, :, left : left + tokens] = own
    start, length = torch.tensor([left, 0]), torch.tensor([tokens, slots])
    out = attend(*padded, start, length, bands, **options)
    torch.testing.assert_close(out[:1, :, left : left + tokens], alone, rtol=1e-7, atol=1e-8)
    assert not out[0, :, :left].any()
    assert not out[0, :, left + tokens :].any()


def test_cost_grows_slower_than_the_row():
    bands = Bands((64, 32, 32), None, 8, 2)
    t = torch.tensor([1000, 2000, 4000, 100_000])
    keys = keys_per_query(bands, t)
    assert (keys <= bands.sink + 64 + 2 + 20 + 12 + t // 8).all()
    bounded = Bands((64, 32, 32), 128, 8, 2)
    assert keys_per_query(bounded, t).max() - keys_per_query(bounded, t).min() <= 4


@pytest.mark.parametrize(("aggregation", "regularizer"), AGGREGATIONS)
@pytest.mark.parametrize("last_width", [None, 20])
def test_gradients_against_float64(aggregation, regularizer, last_width):
    bands = Bands((10, 8), last_width, 4, 2)
    start, length = torch.tensor([0, 7]), torch.tensor([70, 60])
    options = dict(aggregation=aggregation, regularizer=regularizer)
    inputs = [x.double() for x in tensors(2, 4, 2, 70, dim=4)]
    inputs += [y for x in inputs[1:] for y in cells(x, start, 3, 2)] + [torch.randn(4, 3).double() / 4]
    grads = []
    for implementation, dtype in (("reference", torch.float64), ("blocked", torch.float32)):
        leaves = [x.to(dtype).detach().requires_grad_() for x in inputs]
        q, k, v, *levels, offsets = leaves
        call = dict(keys=levels[:2], values=levels[2:], implementation=implementation, **options)
        if implementation == "reference":
            # The definition's own gradients, not the op's.
            from retrofit.kernels.maha.reference import maha_attention as definition

            out = definition(
                q,
                k,
                v,
                start,
                length,
                levels[:2],
                levels[2:],
                offsets,
                scale=0.5,
                widths=bands.widths,
                last_width=last_width,
                sink=4,
                ratio=2,
                **options,
            )
        else:
            out = attend(q, k, v, start, length, bands, offsets, **call)
        weight = torch.linspace(-1, 1, out.numel()).view_as(out).to(dtype)
        grads.append(torch.autograd.grad((out * weight).sum(), leaves))
    for exact, found in zip(*grads, strict=True):
        assert (found.double() - exact).norm() <= 2e-4 * exact.norm()


@pytest.mark.parametrize(("aggregation", "regularizer"), AGGREGATIONS)
def test_opcheck(aggregation, regularizer):
    start, length = torch.tensor([0, 3]), torch.tensor([40, 35])
    q, k, v = (x.requires_grad_() for x in tensors(2, 4, 2, 40))
    keys, values = ([y.detach().requires_grad_() for y in cells(x, start, 3, 2)] for x in (k, v))
    offsets = torch.zeros(4, 3, requires_grad=True)
    torch.library.opcheck(
        torch.ops.retrofit.maha_attention.default,
        (q, k, v, start, length, keys, values, offsets),
        dict(
            scale=0.3,
            causal=True,
            widths=[8, 8],
            last_width=None,
            sink=4,
            ratio=2,
            aggregation=aggregation,
            regularizer=regularizer,
            implementation="blocked",
        ),
    )


def test_flops_are_the_visible_pairs():
    from torch.utils.flop_counter import FlopCounterMode

    bands = Bands((10, 8), None, 4, 2)
    start, length = torch.tensor([0, 7]), torch.tensor([70, 60])
    q, k, v = (x.requires_grad_() for x in tensors(2, 4, 2, 70))
    pairs = sum(
        int(keys_per_query(bands, torch.tensor(t))) for count in length.tolist() for t in range(count)
    )
    assert pairs == visible_pairs(bands, start, length, queries=70, slots=70)
    with FlopCounterMode(display=False) as counter:
        out = attend(q, k, v, start, length, bands)
    assert counter.get_total_flops() == 4 * 8 * 4 * pairs
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 10 * 8 * 4 * pairs


class LargestTensor(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return result


@pytest.mark.parametrize(("aggregation", "regularizer"), AGGREGATIONS)
@pytest.mark.parametrize("last_width", [None, 32])
def test_memory_is_linear(aggregation, regularizer, last_width):
    bands = Bands((16, 8), last_width, 4, 2)
    largest = []
    for tokens in (500, 2000):
        start, length = unpadded(1, tokens)
        q, k, v = tensors(1, 2, 1, tokens, dim=4)
        inputs = (q, k, v, start, length, cells(k, start, 3, 2), cells(v, start, 3, 2), torch.zeros(2, 3))
        options = dict(scale=1.0, bands=bands, aggregation=aggregation, regularizer=regularizer)
        with LargestTensor() as mode:
            out = blocked.maha_attention(*inputs, **options)
            backward.maha_attention_backward(torch.ones_like(out), *inputs, **options)
        largest.append(mode.elements)
    assert largest[1] <= 5 * largest[0]
    assert largest[1] < 2000 * 2000 / 4


def test_mean_keys():
    assert mean_keys(Bands((), None, 0, 2), 101) == 51


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"implementation": "fast"}, "implementation must be one of"),
        ({"causal": False}, 'mode="paper"'),
        ({"aggregation": "sum"}, "aggregation must be"),
        ({"regularizer": "l1"}, "regularizer must be"),
    ],
)
def test_unknown_options_are_refused(changes, message):
    q, k, v = tensors(1, 2, 1, 16)
    with pytest.raises(ConfigError, match=message):
        attend(q, k, v, *unpadded(1, 16), Bands((4,), None, 4, 2), **changes)


def test_what_is_no_tensor_and_what_is_no_integer_are_named():
    q, k, v = tensors(1, 2, 1, 16)
    start, length = unpadded(1, 16)
    with pytest.raises(ConfigError, match=r"widths\[0\] must be an integer, got 4\.5"):
        attend(q, k, v, start, length, Bands((4.5,), None, 4, 2))
    given = {"keys": cells(k, start, 2, 2), "values": cells(v, start, 2, 2)}
    with pytest.raises(ConfigError, match="length must be a tensor or None, got int"):
        attend(q, k, v, start, 16, Bands((4,), None, 4, 2), **given)
