"""Examples for tiny models: what each takes, at random, in the sizes that its configuration gives.

a causal language model  →  {"input_ids": [2, 21]}
Whisper                  →  {"input_features": [2, 80, 3000], "decoder_input_ids": [2, 9]}
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

ROWS, LENGTH = 2, 21
"""Sequences of an example, and the tokens of each."""

Maker = Callable[[Any, torch.Generator], torch.Tensor]
"""An input from the configuration of a model."""


def example(model: Any) -> dict[str, torch.Tensor]:
    """Returns what ``model`` takes: token ids, an image, a waveform or its features, or text with an image."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    taken = inspect.signature(model.forward).parameters
    needed = {name for name, one in taken.items() if one.default is one.empty}
    name = _main_input(model, needed)
    inputs: dict[str, torch.Tensor] = {}
    if name == "input_ids" or (hasattr(config, "text_config") and "input_ids" in taken):
        rows = ROWS * config.num_codebooks if config.model_type in WITH_CODEBOOKS else ROWS
        inputs["input_ids"] = torch.randint(10, 500, (rows, LENGTH), generator=generator)
    pictured = name == "pixel_values" or "text_model" in dict(model.named_children())
    if pictured or name == "pixel_values_videos" or config.model_type in WITH_IMAGE:
        vision = getattr(config, "vision_config", getattr(config, "encoder", config))
        size = _image(vision)
        if name == "pixel_values_videos" or config.model_type in ("timesformer", "videomae", "vivit"):
            name = name if name.startswith("pixel_values") else "pixel_values_videos"
            size = [getattr(vision, "num_frames", getattr(vision, "frames_per_clip", 8)), *size]
        if config.model_type.startswith("siglip2"):
            size = [vision.num_patches, vision.patch_size**2 * vision.num_channels]
            side = int(vision.num_patches**0.5)
            inputs["pixel_attention_mask"] = torch.ones(ROWS, vision.num_patches, dtype=torch.long)
            inputs["spatial_shapes"] = torch.full((ROWS, 2), side)
        name = name if name.startswith("pixel_values") else "pixel_values"
        inputs[name] = torch.randn(ROWS, *size, generator=generator)
    if name == "input_values":
        bins, frames = getattr(config, "num_mel_bins", None), getattr(config, "max_length", None)
        size = [8000] if bins is None or frames is None else [frames, bins]
        if config.model_type in WITH_CHANNEL:
            size = [1, *size]
        inputs["input_values"] = torch.randn(ROWS, *size, generator=generator)
    if name == "input_features":
        inputs["input_features"] = torch.randn(ROWS, *_features(config), generator=generator)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in taken:
        books = getattr(getattr(config, "decoder", None), "num_codebooks", 1)
        inputs["decoder_input_ids"] = torch.randint(10, 500, (ROWS * books, 9), generator=generator)
    needed -= set(inputs)
    made = {name: make for name, make in NEEDED.items() if name in needed}
    made |= EXTRA.get(type(model).__name__, EXTRA.get(config.model_type, {}))
    return inputs | {name: make(config, generator) for name, make in made.items()}


def _main_input(model: Any, needed: set[str]) -> str:
    """The input that a model names as its main one, or the image that its forward cannot do without."""
    names = getattr(model, "main_input_name", "input_ids")
    name = names[0] if isinstance(names, list) else names
    return "pixel_values" if name not in needed and "pixel_values" in needed else name


def _image(vision: Any) -> list[int]:
    """The shape of an image: [channels, height, width]."""
    size = getattr(vision, "image_size", 128)
    sides = list(size) if isinstance(size, (tuple, list)) else [size, size]
    return [getattr(vision, "num_channels", 3), *sides]


def _features(config: Any) -> list[int]:
    """The shape of a spectrogram: [bins, frames] for what is built as Whisper is, else [frames, bins]."""
    encoder = getattr(config, "encoder_config", config)
    names = ("num_mel_bins", "input_dim", "feature_projection_input_dim", "input_feat_per_channel")
    bins = next((size for name in names for size in [getattr(encoder, name, None)] if size), 80)
    if hasattr(config, "feature_projection_input_dim"):
        return [64, config.feature_projection_input_dim]
    if config.model_type == "speech_to_text":
        return [64, bins]
    if config.model_type == "granite_speech5_ctc":  # four frames of mel bins and their deltas in one
        return [64, 4 * bins]
    if hasattr(config, "max_source_positions"):
        return [bins, 2 * config.max_source_positions]
    return [64, bins]


def _ids(*shape: int) -> Maker:
    return lambda config, generator: torch.randint(10, 500, (ROWS, *shape), generator=generator)


def _pictured(token: Callable[[Any], int], count: int) -> Maker:
    """Text behind as many tokens of an image."""

    def make(config: Any, generator: torch.Generator) -> torch.Tensor:
        text = torch.randint(10, 500, (ROWS, LENGTH - count), generator=generator)
        return torch.cat([torch.full((ROWS, count), token(config)), text], dim=1)

    return make


def _normal(shape: Callable[[Any], list[int]]) -> Maker:
    return lambda config, generator: torch.randn(ROWS, *shape(config), generator=generator)


def _ones(shape: Callable[[Any], list[int]], dtype: torch.dtype = torch.long) -> Maker:
    return lambda config, generator: torch.ones(ROWS, *shape(config), dtype=dtype)


def _boxes(config: Any, generator: torch.Generator) -> torch.Tensor:
    """A box [left, top, right, bottom] for each token, in parts of the page."""
    corner, size = torch.rand(2, ROWS, LENGTH, 2, generator=generator) / 2
    return torch.cat([corner, corner + size], dim=-1)


def _patches(config: Any, generator: torch.Generator) -> torch.Tensor:
    """Patches of an image, each behind the number of its row and of its column."""
    vision = config.vision_config
    places = torch.cartesian_prod(torch.arange(1, 5), torch.arange(1, 5)).float()
    pixels = torch.randn(ROWS, len(places), vision.patch_embed_hidden_size, generator=generator)
    return torch.cat([places.expand(ROWS, -1, -1), pixels], dim=-1)


def _image_places(config: Any, generator: torch.Generator) -> torch.Tensor:
    """Where in the text the image is: behind the first token."""
    places = torch.arange(LENGTH)
    return ((places > 0) & (places <= config.latent_query_num)).expand(ROWS, LENGTH)


NEEDED: Mapping[str, Maker] = {
    "aspect_ratio_ids": _ones(lambda config: [1]),
    "aspect_ratio_mask": _ones(lambda config: [1, config.max_num_tiles]),
    "input_features": _normal(lambda config: [25, 160]),
    "qformer_input_ids": _ids(7),
    "state": _normal(lambda config: [config.max_state_dim]),
    "task_inputs": _ids(77),
}
"""What the forward of some models cannot do without, beside their main input."""

EXTRA: Mapping[str, Mapping[str, Maker]] = {
    "dia": {"decoder_input_ids": _ids(9, 9)},
    "PerceiverForImageClassificationLearned": {"inputs": _normal(_image)},
    "PerceiverForMaskedLM": {"inputs": _ids(LENGTH)},
    "idefics": {
        "image_attention_mask": _ones(lambda config: [LENGTH, 1]),
        "pixel_values": _normal(lambda config: [1, *_image(config.vision_config)]),
    },
    "instructblip": {"input_ids": _pictured(lambda config: config.image_token_index, 8)},
    "instructblipvideo": {
        "input_ids": _pictured(lambda config: config.video_token_index, 16),
        "pixel_values": _normal(lambda config: [2, *_image(config.vision_config)]),
    },
    "kosmos-2": {"image_embeds_position_mask": _image_places},
    "kyutai_speech_to_text": {"input_ids": _ids(LENGTH, 33)},
    "mllama_vision_model": {
        "pixel_values": _normal(lambda config: [1, config.max_num_tiles, *_image(config)])
    },
    "musicgen": {"decoder_attention_mask": _ones(lambda config: [9])},
    "musicgen_decoder": {"attention_mask": _ones(lambda config: [LENGTH])},
    "musicgen_melody": {"decoder_attention_mask": _ones(lambda config: [9])},
    "musicgen_melody_decoder": {"attention_mask": _ones(lambda config: [LENGTH])},
    "pi0": {
        "input_ids": _pictured(lambda config: config.vlm_config.image_token_id, 16),
        "noise": _normal(lambda config: [config.chunk_size, config.max_action_dim]),
        "pixel_attention_mask": _ones(lambda config: [1], torch.bool),
        "pixel_values": _normal(lambda config: [1, *_image(config.vlm_config.vision_config)]),
        "timestep": _ones(lambda config: [], torch.float32),
    },
    "pix2struct": {"flattened_patches": _patches},
    "speech-encoder-decoder": {"input_values": _normal(lambda config: [8000])},
    "udop": {"bbox": _boxes, "pixel_values": _normal(_image)},
    "voxtral_realtime": {
        "input_features": _normal(lambda config: [config.audio_config.num_mel_bins, 8 * LENGTH])
    },
}
"""What a model needs although its forward has a default, and what is in another shape than elsewhere."""

WITH_IMAGE = ("git", "vilt")
"""Models of text that are nothing without an image."""

WITH_CODEBOOKS = ("musicgen_decoder", "musicgen_melody_decoder")
"""Models of audio tokens, a row for each codebook."""

WITH_CHANNEL = (
    "dac",
    "pocket_tts_audio_tokenizer",
    "higgs_audio_v2_tokenizer",
    "neucodec",
    "vibevoice_acoustic_tokenizer",
    "xcodec2",
)
"""Models of waveforms [B, 1, T]."""
