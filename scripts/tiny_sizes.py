"""The sizes of tiny models: those of every architecture, and what single ones need beside them."""

from __future__ import annotations

from typing import Any

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

PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

ROPE_BY_LAYER = {"full_attention": {**PLAIN_ROPE, "mrope_section": [2, 3, 3]}}

AS_IT_IS: dict[str, Any] = dict.fromkeys(SIZES, ...)
"""For a part whose default sizes depend on each other."""

DETECTOR: dict[str, Any] = dict.fromkeys(
    ("backbone_config", "encoder_layers", "layer_types", "num_hidden_layers"), ...
)
"""For a detector behind a backbone, whose ``layer_types`` are those of a ResNet."""

CROSS_ATTENDING: dict[str, Any] = {"decoder": {"is_decoder": True, "add_cross_attention": True}}
"""For a decoder that is put behind an encoder."""

INDEXED: dict[str, Any] = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}
"""For attention to the blocks of keys that an indexer selects."""

INTRACLASS: dict[str, Any] = {
    "reduce_channel": [1, 1, 0],
    "return_channel": [1, 1, 0],
    **{
        f"{direction}_{ratio}ratio": [
            [size if direction != "horizontal_small_to_long_conv" else 1, size if direction[0] != "v" else 1],
            [1, 1],
            [
                size // 2 if direction != "horizontal_small_to_long_conv" else 0,
                size // 2 if direction[0] != "v" else 0,
            ],
        ]
        for direction in (
            "vertical_long_to_small_conv",
            "horizontal_small_to_long_conv",
            "symmetric_conv_long",
        )
        for ratio, size in (("long", 7), ("mid", 5), ("short", 3))
    },
}
"""Convolutions of a text detector: kernel, stride and padding of each."""

STAGES = ["stage1", "stage2", "stage3", "stage4"]

HALVING: dict[str, Any] = {
    "model_type": "pp_lcnet_v4",
    "out_features": STAGES,
    "block_configs": [
        [[3, 96, 96, 1, True]],
        [[3, 96, 96, 2, False]],
        [[3, 96, 192, 2, False]],
        [[3, 192, 384, 2, False]],
    ],
}
"""A backbone of which each stage has half the pixels of the last one, both ways."""

OVERRIDES: dict[str, dict[str, Any]] = {
    "bark": {"semantic_config": {"block_size": 256, "window_size": ...}},
    "blt": {
        "num_hidden_layers": 2,
        "encoder_hash_byte_group_vocab": 64,
        "local_attention_window_len": 24,
        "patcher_config": {"vocab_size": 512},
        "global_config": {"hidden_size": 128, "head_dim": 32},
        "encoder_config": {"hidden_size_global": 128},
        "decoder_config": {"hidden_size_global": 128},
    },
    "blip-2": {"qformer_config": {"use_qformer_text_input": True}},
    "chameleon": {"vocabulary_map": {"<image>": 7, "IMGIMGAAAZ": 8}},
    "chmv2": {"backbone_config": ...},
    "convnext": AS_IT_IS,
    "convnextv2": AS_IT_IS,
    "csm": {"codec_config": AS_IT_IS},
    "dots3_note": {
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
        "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64, "pyramid_num_routed": [-1, 4]},
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "d_fine": {"backbone_config": ..., "encoder_layers": ...},
    "deimv2": {"backbone_config": ..., "encoder_layers": ...},
    "depth_anything": {"backbone_config": ..., "patch_size": ...},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2}},
    "diffusion_gemma": {"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 48}},
    "cohere_compass": {"text_config": {"rope_parameters": ROPE_BY_LAYER}},
    "cohere_compass_text": {"rope_parameters": ROPE_BY_LAYER},
    "conditional_detr": DETECTOR,
    "dab-detr": DETECTOR,
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4}},
    "deformable_detr": DETECTOR,
    "depth_pro": {"patch_size": 32, "intermediate_hook_ids": [1, 0]},
    "detr": DETECTOR,
    "dia": {
        "decoder_config": {
            "cross_num_attention_heads": 4,
            "cross_num_key_value_heads": 4,
            "cross_head_dim": 16,
            "cross_hidden_size": 64,
        }
    },
    "donut-swin": {**AS_IT_IS, "depths": [1, 1, 2, 1]},
    "emu3": {"vocabulary_map": {"<image>": 7, "<|extra_200|>": 8}},
    "eomt": {"num_blocks": 1},
    "eomt_dinov3": {"num_blocks": 1},
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": {**PLAIN_ROPE, "mrope_section": [3, 3, 2]}}},
    "esm": {"vocab_size": 512, "pad_token_id": 1, "mask_token_id": 2},
    "encoder-decoder": CROSS_ATTENDING,
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 16}},
    "funnel": {"num_hidden_layers": ..., "block_sizes": [1, 1, 1]},
    "hunyuan_vl": {"text_config": {"head_dim": 16}},
    "instructblip": {"image_token_index": 7, "num_query_tokens": 8},
    "instructblipvideo": {"video_token_index": 7, "num_query_tokens": 8},
    "kosmos-2": {"latent_query_num": 8},
    "kyutai_speech_to_text": {"codec_config": AS_IT_IS},
    "glm5_next": {"text_config": {"qk_rope_head_dim": 0, "head_dim": 0}},
    "granite4_vision": {
        "downsample_rate": "1/2",
        "deepstack_layer_map": [[0, 0]],
        "spatial_target_layers": [1],
    },
    "gradium_phonon_tts": {"flow_head_config": {"condition_dim": 64}},
    "levit": AS_IT_IS,
    "llama4": {
        "vision_config": {
            "intermediate_size": 256,
            "projector_input_dim": 64,
            "projector_output_dim": 64,
            "vision_output_dim": 64,
        }
    },
    "lw_detr": {
        "backbone_config": {"image_size": 64, "window_block_indices": [0], "out_indices": [1]},
        "projector_scale_factors": [1.0],
        "decoder_self_attention_heads": 4,
        "decoder_cross_attention_heads": 4,
    },
    "mllama": {"vision_config": {"intermediate_layers_indices": [0, 1], "vision_output_dim": 192}},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "mamba2": {"head_dim": 32, "n_groups": 1},
    "mask2former": {"backbone_config": ...},
    "maskformer": {"backbone_config": ...},
    "mobilevit": AS_IT_IS,
    "mobilevitv2": AS_IT_IS,
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "pocket_tts": {"flow_head_config": {"condition_dim": 64}},
    "pocket_tts_audio_tokenizer": AS_IT_IS,
    "pp_doclayout_v2": {**DETECTOR, "class_thresholds": [0.5, 0.5], "class_order": [0, 1]},
    "pp_doclayout_v3": DETECTOR,
    "pp_doclayout_v4": {"backbone_config": ..., "encoder_layers": ...},
    "neucodec": {"quantization_dim": 128},
    "oneformer": {"backbone_config": ...},
    "pi0": {"vlm_config": {"image_token_id": 7, "projection_dim": 64}},
    "perceiver": {"num_latents": 16, "d_latents": 64, "num_self_attends_per_block": 2},
    "paddleocr_vl": {"text_config": {"rope_parameters": {**PLAIN_ROPE, "mrope_section": [2, 3, 3]}}},
    "pp_formulanet": {"vision_config": {"decoder_hidden_size": 64}},
    "pp_ocrv5_mobile_det": {"backbone_config": ...},
    "pp_ocrv5_server_det": {
        "intraclass_block_config": INTRACLASS,
        "kernel_list": [3, 2, 2],
        "scale_factor_list": [1, 2, 4, 8],
        "backbone_config": {"model_type": "hgnet_v2", "out_features": STAGES},
    },
    "pp_ocrv6_medium_det": {
        "intraclass_block_config": INTRACLASS,
        "kernel_list": [3, 2, 2],
        "scale_factor_list": [1, 2, 4, 8],
        "backbone_config": HALVING,
    },
    "pp_ocrv6_small_det": {"backbone_config": HALVING, "layer_list_out_channels": [96, 96, 192, 384]},
    "prompt_depth_anything": {"backbone_config": ..., "patch_size": ...},
    "pvt": {"image_size": ..., "patch_size": ...},
    "qwen2_5_omni": {"thinker_config": {"vision_start_token_id": 7}},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 7},
    "qwen3_omni_moe": {
        "thinker_config": {"vision_start_token_id": 7},
        "talker_config": {
            "spatial_merge_size": 2,
            "text_config": {"shared_expert_intermediate_size": 48},
        },
    },
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 7},
    "qwen4_exp": {"text_config": INDEXED},
    "qwen4_exp_text": INDEXED,
    "rt_detr": {"backbone_config": ..., "encoder_layers": ...},
    "rt_detr_v2": {"backbone_config": ..., "encoder_layers": ...},
    "sapiens2": {"head_config": {"upsample_out_channels": [16], "conv_out_channels": [16]}},
    "shieldgemma2": {"yes_token_index": 5, "no_token_index": 6},
    "speech-encoder-decoder": CROSS_ATTENDING,
    "step3p7": {"text_config": {"sliding_window": 24}},
    "swin": {**AS_IT_IS, "depths": [1, 1, 2, 1]},
    "swin2sr": {**AS_IT_IS, "depths": [2, 2], "num_heads": [6, 6]},
    "swinv2": {**AS_IT_IS, "depths": [1, 1, 2, 1]},
    "table-transformer": DETECTOR,
    "timm_backbone": {"backbone": "resnet18"},
    "tipsv2_dpt": {"backbone_config": ...},
    "vision-encoder-decoder": CROSS_ATTENDING,
    "videoprism": {"vision_config": {"image_size": 54}},  # 3 × 3 patches of 18 × 18
    "videoprism_vision_model": {"image_size": 54},
    # By default it has 8,192 tokens, more than the budget of HSA's dense limit.
    "vjepa2": {"crop_size": 32, "frames_per_clip": 8},
    "upernet": {"backbone_config": ...},
    "voxtral_realtime": {"text_config": {"sliding_window": 12}},  # shorter than the example
    "wav2vec2-bert": {"vocab_size": 512},
    "wav2vec2-conformer": {"vocab_size": 512},
    "xcodec2": {"quantization_dim": 128},
    "yolos": {"image_size": [64, 64]},
    "zoedepth": {"backbone_config": ...},
    "ReformerForMaskedLM": {"axial_pos_embds": False, "is_decoder": False},
    "T5GemmaEncoderModel": {"is_encoder_decoder": False},
    "bamba": {"attn_layer_indices": [1]},
    "big_bird": {"attention_type": "original_full"},  # the other one is for texts of 700 tokens and more
    "bigbird_pegasus": {"attention_type": "original_full"},
    "deepseek_v2": {"num_experts_per_tok": 2, "moe_intermediate_size": 48},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma3n": {"text_config": {"num_kv_shared_layers": 0}},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
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
    "reformer": {"axial_pos_embds": False},
    "xlnet": {"max_position_embeddings": ...},
    "xlstm": {"hidden_size": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layer_types": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3},
    "zamba2": {"layer_types": ..., "layers_block_type": ["linear_attention", "hybrid"], "n_mamba_heads": 4},
    "zaya": {"num_experts_per_tok": 1},
}
"""What the sizes alone do not settle, by architecture or class; ``...`` leaves an argument out."""
