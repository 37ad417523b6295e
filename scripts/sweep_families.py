"""The architectures of transformers by family: which class stands for each."""

from __future__ import annotations

FAMILIES = {
    "causal-lm": ("Causal language models", ("CAUSAL_LM",)),
    "encoder": ("Text encoders", ("MASKED_LM", "TEXT_ENCODING")),
    "encoder-decoder": ("Encoder-decoders of text", ("SEQ_TO_SEQ_CAUSAL_LM",)),
    "vision": (
        "Vision models",
        (
            "IMAGE",
            "IMAGE_CLASSIFICATION",
            "OBJECT_DETECTION",
            "DEPTH_ESTIMATION",
            "SEMANTIC_SEGMENTATION",
            "UNIVERSAL_SEGMENTATION",
            "VIDEO_CLASSIFICATION",
        ),
    ),
    "audio": (
        "Audio models",
        ("CTC", "AUDIO_CLASSIFICATION", "SPEECH_SEQ_2_SEQ", "TEXT_TO_WAVEFORM", "AUDIO_TOKENIZATION"),
    ),
    "multimodal": (
        "Models of text and images",
        (
            "ZERO_SHOT_IMAGE_CLASSIFICATION",
            "IMAGE_TEXT_TO_TEXT",
            "VISUAL_QUESTION_ANSWERING",
            "MULTIMODAL_LM",
        ),
    ),
}
"""Titles, and the mappings of transformers whose architectures belong to a family; the first that has one counts."""


def architectures(family: str, names: list[str] | None = None) -> list[tuple[str, type, type]]:
    """Returns the architectures of a family with their classes: all of them, or those of ``names``."""
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    mappings = [getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING", {}) for name in FAMILIES[family][1]]
    found = []
    for name, config_class in CONFIG_MAPPING.items():
        mapping = next((mapping for mapping in mappings if config_class in mapping), None)
        if mapping is not None and (not names or name in names):
            cls = mapping[config_class]
            found.append((name, config_class, cls[0] if isinstance(cls, tuple) else cls))
    return found
