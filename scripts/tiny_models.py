"""Tiny models of transformers' architectures, built offline from their default configurations.

LlamaConfig  →  the same with 64 channels, 2 layers, 4 heads, 512 tokens  →  a random model and an example for it
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

SIZES = {
    "hidden_size": 64,
    "embed_dim": 64,
    "n_embd": 64,
    "d_model": 64,
    "dim": 64,
    "embedding_size": 64,
    "word_embed_proj_dim": 64,
    "emb_dim": 64,
    "intermediate_size": 96,
    "n_inner": 96,
    "ffn_dim": 96,
    "d_ff": 96,
    "d_inner": 96,
    "dim_ff": 96,
    "dff": 96,
    "decoder_ffn_dim": 96,
    "encoder_ffn_dim": 96,
    "moe_intermediate_size": 48,
    "shared_intermediate_size": 96,
    "shared_expert_intermediate_size": 48,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "num_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4,
    "head_dim": 16,
    "attention_head_dim": 16,
    "dim_head": 16,
    "d_kv": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "rotary_dim": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "vocab_size": 512,
    "char_vocab_size": 512,
    "max_position_embeddings": 256,
    "n_positions": 256,
    "n_ctx": 256,
    "max_seq_len": 256,
    "sliding_window": 24,
    "attention_window": 24,
    "local_attention": 24,
    "window_size": 24,
    "attention_chunk_size": 24,
    "mamba_d_state": 16,
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "state_size": 16,
    "ssm_state_size": 16,
    "mamba_num_heads": 4,
    "mamba_head_dim": 32,
    "mamba_headdim": 32,
    "n_mamba_heads": 1,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "chunk_size": 16,
    "image_size": 32,
    "patch_size": 8,
    "out_hidden_size": 64,
    "text_hidden_size": 64,
    "audio_hidden_size": 64,
    "num_queries": 10,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 512,
}


def tiny_config(cls: type, overrides: dict[str, Any] | None = None) -> Any:
    """Returns a configuration of ``cls`` with every size reduced that its default one has."""
    default = cls()
    given = {name: value for name in _settable(cls, default) if (value := _read(default, name)) is not None}
    kwargs: dict[str, Any] = {name: size for name, size in SIZES.items() if isinstance(given.get(name), int)}
    if "qk_rope_head_dim" in kwargs:
        kwargs.pop("head_dim", None)
        if "head_dim" in given:
            kwargs["head_dim"] = kwargs["qk_rope_head_dim"]
        if "num_key_value_heads" in given:
            kwargs["num_key_value_heads"] = 4
    for name in ("num_key_value_heads", "n_head_kv", "num_kv_heads", "swa_num_key_value_heads"):
        value = given.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and name not in kwargs:
            heads = given.get("num_attention_heads", value)
            kwargs[name] = 1 if value == 1 else 4 if value == heads else 2
    if given.get("is_decoder") is False and not given.get("is_encoder_decoder"):
        kwargs["is_decoder"] = True
    kinds = given.get("layer_types")
    if isinstance(kinds, (list, tuple)) and kinds:
        kinds = list(dict.fromkeys(kinds))
        kinds += kinds[-1:] * (len(kinds) == 1)
        kwargs["layer_types"] = kinds
        kwargs["num_hidden_layers"] = len(kinds)
    for name, value in given.items():
        if name.endswith("token_id") and isinstance(value, int) and value >= SIZES["vocab_size"]:
            kwargs[name] = 7
    for name in getattr(cls, "sub_configs", {}):
        sub = given.get(name)
        if hasattr(sub, "to_dict"):
            of_part = (overrides or {}).get(name)
            kwargs[name] = tiny_config(type(sub), of_part if isinstance(of_part, dict) else None).to_dict()
    if "mrope_section" in getattr(cls, "ignore_keys_at_rope_validation", ()):
        kwargs["rope_parameters"] = _rope(given, kwargs)
    parts = getattr(cls, "sub_configs", {})
    kwargs.update(
        {
            name: value
            for name, value in (overrides or {}).items()
            if name not in parts or not isinstance(value, dict)
        }
    )
    return cls(**{name: value for name, value in kwargs.items() if value is not ...})


def _rope(given: dict[str, Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Rotary sections of time, height and width that fill the heads."""
    rope = dict(given.get("rope_parameters") or PLAIN_ROPE)
    width = kwargs.get("head_dim") or kwargs["hidden_size"] // kwargs["num_attention_heads"]
    half = int(width * rope.get("partial_rotary_factor", 1.0)) // 2
    side = 3 * half // 8
    return {**rope, "mrope_section": [half - 2 * side, side, side]}


def _settable(cls: type, default: Any) -> list[str]:
    """Names that a configuration may be given."""
    names = {*vars(default), *getattr(cls, "attribute_map", {}), *getattr(cls, "__dataclass_fields__", {})}
    names |= {name for name in SIZES if _read(default, name) is not None}
    mapped = getattr(cls, "attribute_map", {})
    return sorted(
        name
        for name in names
        for kept in [getattr(cls, mapped.get(name, name), None)]
        if not (isinstance(kept, property) and kept.fset is None)
    )


def _read(config: Any, name: str) -> Any:
    try:
        return getattr(config, name)
    except Exception:  # per-layer attributes have no one value
        return None


PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

AS_IT_IS: dict[str, Any] = dict.fromkeys(SIZES, ...)
"""For a part whose default sizes depend on each other."""

OVERRIDES: dict[str, dict[str, Any]] = {
    "chameleon": {"vocabulary_map": {"<image>": 7, "IMGIMGAAAZ": 8}},
    "chmv2": {"backbone_config": ...},
    "convnext": AS_IT_IS,
    "convnextv2": AS_IT_IS,
    "csm": {"codec_config": AS_IT_IS},
    "d_fine": {"backbone_config": ..., "encoder_layers": ...},
    "deimv2": {"backbone_config": ..., "encoder_layers": ...},
    "depth_anything": {"backbone_config": ..., "patch_size": ...},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2}},
    "diffusion_gemma": {"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 48}},
    "donut-swin": {**AS_IT_IS, "depths": [1, 1, 2, 1]},
    "emu3": {"vocabulary_map": {"<image>": 7, "<|extra_200|>": 8}},
    "eomt": {"num_blocks": 1},
    "eomt_dinov3": {"num_blocks": 1},
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": {**PLAIN_ROPE, "mrope_section": [3, 3, 2]}}},
    "esm": {"vocab_size": 512, "pad_token_id": 1, "mask_token_id": 2},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 16}},
    "funnel": {"num_hidden_layers": ..., "block_sizes": [1, 1, 1]},
    "hunyuan_vl": {"text_config": {"head_dim": 16}},
    "kyutai_speech_to_text": {"codec_config": AS_IT_IS},
    "levit": AS_IT_IS,
    "mask2former": {"backbone_config": ...},
    "maskformer": {"backbone_config": ...},
    "mobilevit": AS_IT_IS,
    "mobilevitv2": AS_IT_IS,
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "pocket_tts_audio_tokenizer": AS_IT_IS,
    "pp_doclayout_v2": {"backbone_config": ..., "encoder_layers": ...},
    "pp_doclayout_v3": {"backbone_config": ..., "encoder_layers": ...},
    "pp_doclayout_v4": {"backbone_config": ..., "encoder_layers": ...},
    "paddleocr_vl": {"text_config": {"rope_parameters": {**PLAIN_ROPE, "mrope_section": [2, 3, 3]}}},
    "prompt_depth_anything": {"backbone_config": ..., "patch_size": ...},
    "pvt": {"image_size": ..., "patch_size": ...},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 7},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 7},
    "rt_detr": {"backbone_config": ..., "encoder_layers": ...},
    "rt_detr_v2": {"backbone_config": ..., "encoder_layers": ...},
    "shieldgemma2": {"yes_token_index": 5, "no_token_index": 6},
    "step3p7": {"text_config": {"sliding_window": 24}},
    "swin": {**AS_IT_IS, "depths": [1, 1, 2, 1]},
    "swin2sr": {**AS_IT_IS, "depths": [2, 2], "num_heads": [6, 6]},
    "swinv2": {**AS_IT_IS, "depths": [1, 1, 2, 1]},
    "tipsv2_dpt": {"backbone_config": ...},
    "vision-encoder-decoder": {"decoder": {"is_decoder": True, "add_cross_attention": True}},
    # By default it has 8,192 tokens, more than the budget of HSA's dense limit.
    "vjepa2": {"crop_size": 32, "frames_per_clip": 8},
    "wav2vec2-bert": {"vocab_size": 512},
    "wav2vec2-conformer": {"vocab_size": 512},
    "yolos": {"image_size": [64, 64]},
    "zoedepth": {"backbone_config": ...},
    "bamba": {"attn_layer_indices": [1]},
    "big_bird": {"attention_type": "original_full"},  # the other one is for texts of 700 tokens and more
    "bigbird_pegasus": {"attention_type": "original_full"},
    "deepseek_v2": {"num_experts_per_tok": 2, "moe_intermediate_size": 48},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "ministral": {"head_dim": 16},
    "moshi": {
        "sliding_window": 256
    },  # as in the real one, no shorter than the positions: its mask has no window
    "muse_spark": {"audio_config": {"num_hidden_layers": ...}},
    "nemotron": {"num_key_value_heads": 2},
    "nemo_speechlm": {"text_config": {"n_groups": 1, "layers_block_type": ["mamba", "attention"]}},
    "nemotron_h_omni": {
        "text_config": {"n_groups": 1, "layers_block_type": ["mamba", "attention"]},
        "vision_config": {"video_temporal_patch_size": 2},
    },
    "nemotron_h": {"n_groups": 1, "layers_block_type": ["mamba", "attention"]},
    "prophetnet": {"num_hidden_layers": ...},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "xlnet": {"max_position_embeddings": ...},
    "xmod": {"default_language": "en_XX"},
}
"""What the sizes alone do not settle; ``...`` leaves an argument out."""


def built(name: str, config_class: type, model_class: Any) -> Any:
    """Returns a random model of the architecture ``name``."""
    config = tiny_config(config_class, OVERRIDES.get(name))
    torch.manual_seed(0)
    model = model_class(_part(config, model_class)).eval()
    generation = getattr(model, "generation_config", None)
    if (
        generation is not None
        and getattr(generation, "decoder_start_token_id", 0) is generation.bos_token_id is None
    ):
        generation.decoder_start_token_id = 1
    return model


def _part(config: Any, model_class: Any) -> Any:
    """The part of a configuration that a model is made from: the whole, or that of its text or its images."""
    parts = [config, config.get_text_config(decoder=True), getattr(config, "vision_config", None)]
    wanted = model_class.config_class or object
    return next((part for part in parts if isinstance(part, wanted)), config)


def example(model: Any) -> dict[str, torch.Tensor]:
    """Returns what ``model`` takes: token ids, an image, a waveform or its features, or text with an image."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    name = getattr(model, "main_input_name", "input_ids")
    taken = inspect.signature(model.forward).parameters
    inputs: dict[str, torch.Tensor] = {}
    if name == "input_ids" or (hasattr(config, "text_config") and "input_ids" in taken):
        rows = 2 * config.num_codebooks if config.model_type in WITH_CODEBOOKS else 2
        inputs["input_ids"] = torch.randint(10, 500, (rows, 21), generator=generator)
    pictured = name == "pixel_values" or "text_model" in dict(model.named_children())
    if pictured or name == "pixel_values_videos" or config.model_type in WITH_IMAGE:
        vision = getattr(config, "vision_config", getattr(config, "encoder", config))
        image = getattr(vision, "image_size", 128)
        size = list(image) if isinstance(image, (tuple, list)) else [image, image]
        size = [getattr(vision, "num_channels", 3), *size]
        if name == "pixel_values_videos" or config.model_type in ("timesformer", "videomae", "vivit"):
            name = name if name.startswith("pixel_values") else "pixel_values_videos"
            size = [getattr(vision, "num_frames", getattr(vision, "frames_per_clip", 8)), *size]
        if config.model_type.startswith("siglip2"):
            size = [vision.num_patches, vision.patch_size**2 * vision.num_channels]
            side = int(vision.num_patches**0.5)
            inputs["pixel_attention_mask"] = torch.ones(2, vision.num_patches, dtype=torch.long)
            inputs["spatial_shapes"] = torch.full((2, 2), side)
        name = name if name.startswith("pixel_values") else "pixel_values"
        inputs[name] = torch.randn(2, *size, generator=generator)
    if name == "input_values":
        bins = getattr(config, "num_mel_bins", None)
        size = [8000] if bins is None else [config.max_length, bins]
        if config.model_type in WITH_CHANNEL:
            size = [1, *size]
        inputs["input_values"] = torch.randn(2, *size, generator=generator)
    if name == "input_features":
        inputs["input_features"] = torch.randn(2, *_features(config), generator=generator)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in taken:
        books = getattr(getattr(config, "decoder", None), "num_codebooks", 1)
        inputs["decoder_input_ids"] = torch.randint(10, 500, (2 * books, 9), generator=generator)
    return inputs


WITH_IMAGE = ("git", "vilt")
"""Models of text that are nothing without an image."""

WITH_CODEBOOKS = ("musicgen_decoder", "musicgen_melody_decoder")
"""Models of audio tokens, a row for each codebook."""

WITH_CHANNEL = (
    "dac",
    "pocket_tts_audio_tokenizer",
    "higgs_audio_v2_tokenizer",
    "vibevoice_acoustic_tokenizer",
)
"""Models of waveforms [B, 1, T]."""


def _features(config: Any) -> list[int]:
    """The shape of a spectrogram: [bins, frames] for what is built as Whisper is, else [frames, bins]."""
    encoder = getattr(config, "encoder_config", config)
    names = ("num_mel_bins", "input_dim", "feature_projection_input_dim", "input_feat_per_channel")
    bins = next((size for name in names for size in [getattr(encoder, name, None)] if size), 80)
    if hasattr(config, "feature_projection_input_dim"):
        return [64, config.feature_projection_input_dim]
    if config.model_type == "speech_to_text":
        return [64, bins]
    if hasattr(config, "max_source_positions"):
        return [bins, 2 * config.max_source_positions]
    return [64, bins]
