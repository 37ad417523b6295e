"""What inspecting, converting and reverting a model say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class SiteInfo:
    """One attention-owning module.

    Attributes:
        path: Where it is in the model.
        cls: Its class's name.
        kind: ``self``, ``cross`` or ``unknown``.
        spelling: Which rule recognised its attention.
        mask: Its mask's class: ``none``, ``causal``, ``key padding``, ``causal+padding``, ….
        convertible: Whether it can be converted.
        reason: Why not.
        target: The target it has, if it is converted.
    """

    path: str
    cls: str
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    mask: str | None = None
    spelling: str | None = None
    kind: str = "unknown"
    convertible: bool = False
    reason: str | None = None
    target: str | None = None


@dataclass(frozen=True)
class InspectReport:
    """What attention a model has.

    Attributes:
        sites: One entry for each module that owns attention.
        observed: Number of modules in which a softmax or SDPA call was seen, counted independently.
    """

    sites: tuple[SiteInfo, ...]
    observed: int


@dataclass(frozen=True)
class Verification:
    """How far the dense round trip is from the original, relative to the largest value.

    Attributes:
        sites: Largest relative error of each site over its recorded calls.
        prefill: Of the whole model's output.
        decode: Of the logits of cached steps; None for a model without a cache.
    """

    sites: Mapping[str, float]
    prefill: float | None
    decode: float | None


@dataclass(frozen=True)
class ConvertReport:
    """What a conversion did.

    Attributes:
        converted: The converted sites.
        skipped: The other modules with attention, and why each was left, by path.
        verification: The errors measured before the targets went in.
    """

    converted: tuple[SiteInfo, ...]
    skipped: Mapping[str, str]
    verification: Verification


@dataclass(frozen=True)
class RevertReport:
    """What ``revert`` did.

    Attributes:
        reverted: Paths of the sites whose original attention is back.
        weights_changed: Whether base weights are not those of before the conversion.
    """

    reverted: tuple[str, ...]
    weights_changed: bool
