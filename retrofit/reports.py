"""What inspecting, converting and reverting a model say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class SiteInfo:
    """One attention-owning module.

    Attributes:
        path: Where it is in the model.
        cls: Its class's name.
        number: Its place among the attention modules, by which it can be selected; None if it is none.
        kind: ``self``, ``cross`` or ``unknown``; ``other`` for a softmax that no rule takes for attention.
        side: ``encoder`` or ``decoder``; None if that is not known.
        spelling: Which rule recognised its attention.
        mask: Its mask's class: ``none``, ``causal``, ``key padding``, ``causal+padding``, ….
        convertible: Whether it can be converted.
        reason: Why not.
        source: File and line of the model's code that the reason is about.
        near_miss: The rule that came nearest, and the first of its conditions that does not hold.
        flops: Operations of its attention in the example, counted as it ran.
        target: The target it has, if it is converted.
    """

    path: str
    cls: str
    number: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    mask: str | None = None
    spelling: str | None = None
    kind: str = "unknown"
    side: str | None = None
    convertible: bool = False
    reason: str | None = None
    source: str | None = None
    near_miss: str | None = None
    target: str | None = None
    flops: int = 0


@dataclass(frozen=True)
class InspectReport:
    """What attention a model has.

    Attributes:
        sites: One entry for each module that owns attention.
        observed: Number of modules in which a softmax or SDPA call was seen, counted independently.
    """

    sites: tuple[SiteInfo, ...]
    observed: int

    @property
    def coverage(self) -> float | None:
        """The share of the example's attention operations that can be converted; None if it has none."""
        return _share(self.sites, [site for site in self.sites if site.convertible])


def _share(sites: Sequence[SiteInfo], some: Sequence[SiteInfo]) -> float | None:
    whole = sum(site.flops for site in sites)
    return sum(site.flops for site in some) / whole if whole else None


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
        left: What is known of those.
        verification: The errors measured before the targets went in.
    """

    converted: tuple[SiteInfo, ...]
    skipped: Mapping[str, str]
    left: tuple[SiteInfo, ...]
    verification: Verification

    @property
    def coverage(self) -> float | None:
        """The share of the example's attention operations that was converted; None if it has none."""
        return _share((*self.converted, *self.left), self.converted)


@dataclass(frozen=True)
class RevertReport:
    """What ``revert`` did.

    Attributes:
        reverted: Paths of the sites whose original attention is back.
        weights_changed: Whether base weights are not those of before the conversion.
    """

    reverted: tuple[str, ...]
    weights_changed: bool
