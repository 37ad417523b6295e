"""One frozen configuration per target.

HSAConfig(budget=256)  →  to_dict()  →  {"target": "hsa", "budget": 256, …}  →  config_from_dict()
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from retrofit.checks import at_least, check_types, multiple, nearest, one_of
from retrofit.errors import ConfigError

POOLINGS = ("mean", "max", "attention", "learned")
AGGREGATIONS = ("convex", "nash")
REGULARIZERS = ("entropy", "euclidean")
SMALLEST_QUERY_BLOCK, LARGEST_QUERY_BLOCK = 32, 128
"""Of sites whose configuration leaves it to the heads. Larger ones execute more keys, of smaller ones fewer rows share
each key."""


@dataclass(frozen=True, kw_only=True)
class DenseConfig:
    """The identity target: canonical dense attention, for verification and for undoing decisions."""

    target: ClassVar[str] = "dense"


@dataclass(frozen=True, kw_only=True)
class HSAConfig:
    """Hierarchical sparse attention: sinks, a window, and leaves found by a top-down search.

    All lengths are in tokens unless said.

    Attributes:
        window: The most recent tokens, attended to exactly; a multiple of ``block``.
        sink: The first tokens, attended to exactly; a multiple of ``block``.
        budget: Tokens each query selects for itself, at most; a multiple of ``block``.
        block: Size of a leaf, the unit of selection.
        node: Size of the pooled nodes by which leaves are scored; divides ``block``.
        fanout: Spans of level j hold ``block * fanout**j`` tokens.
        nodes_per_span: Nodes by which a coarse span is scored.
        beam: Spans kept at each coarse step.
        query_block: Consecutive queries that share the coarse steps and the executed leaves. None means as many as
            make up 128 rows with the query heads of a kv head, which a GPU multiplies at once: between 32 and 128, and
            fewer where other sizes do not allow so many.
        pooling: How a level is pooled from the one below: ``mean``, ``max``, ``attention`` or ``learned``.
        summaries: Whether what is not executed takes part as gated summaries.
        dense_until: Queries at positions before it attend densely; a multiple of ``query_block``, of 128 where that is
            None. None means ``sink + window + budget``.
        threshold: A query selects the leaves of which a token is estimated to weigh at least this much of what
            sinks and window weigh together, for some head of the group; 0 selects by ``budget`` alone. In float32
            leaves that weigh about as much as the best one for which the budget has no room count in part.
        spread: Weight of the second-order term of a leaf's score, which says how much the keys that a node stands
            for may differ from it; 0 scores by the nodes alone.

    Raises:
        ConfigError: If a value is out of its range or contradicts another.
    """

    target: ClassVar[str] = "hsa"

    window: int = 128
    sink: int = 32
    budget: int = 736
    block: int = 32
    node: int = 8
    fanout: int = 8
    nodes_per_span: int = 16
    beam: int = 30  # the candidates of any query block are then 256 at most
    query_block: int | None = None
    pooling: str = "mean"
    summaries: bool = False
    dense_until: int | None = None
    threshold: float = 0.00125
    spread: float = 1.8

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("threshold", "spread"):
            if not 0 <= (value := getattr(self, name)) < float("inf"):
                raise ConfigError(f"{name} must be a number of at least 0, got {value}")
        for name in ("window", "budget", "block", "node", "nodes_per_span", "beam"):
            at_least(self, name, 1)
        at_least(self, "sink", 0)
        at_least(self, "fanout", 2)
        for name in ("window", "sink", "budget"):
            multiple(self, name, "block")
        multiple(self, "block", "node")
        span_node = self.block * self.fanout
        if span_node % self.nodes_per_span or (span_node // self.nodes_per_span) % self.node:
            raise ConfigError(
                f"nodes_per_span must divide block*fanout={span_node} into nodes that are a multiple of "
                f"node={self.node}, got {self.nodes_per_span}"
            )
        one_of(self, "pooling", POOLINGS)
        if self.query_block is not None and not 1 <= self.query_block <= 255:
            raise ConfigError(f"query_block must be between 1 and 255, got {self.query_block}")
        step = self.largest_query_block
        if self.dense_until is not None and (self.dense_until < 0 or self.dense_until % step):
            raise ConfigError(
                f"dense_until must be a multiple of query_block={step} and at least 0, got {self.dense_until}"
            )

    @property
    def largest_query_block(self) -> int:
        """``query_block``, or the largest that a site may have where that is None."""
        return self.query_block or LARGEST_QUERY_BLOCK

    def query_block_of(self, group: int) -> int:
        """``query_block`` of a site that has so many query heads to a kv head."""
        if self.query_block is not None:
            return self.query_block
        queries = max(LARGEST_QUERY_BLOCK // group, SMALLEST_QUERY_BLOCK)
        return 1 << queries.bit_length() - 1


@dataclass(frozen=True, kw_only=True)
class MAHAConfig:
    """Multiscale aggregated hierarchical attention: scales that partition the past.

    Attributes:
        scales: Number of scales L; scale l pools keys and values into cells of ``ratio**l`` tokens.
        ratio: Downsampling ratio r between neighbouring scales.
        widths: Tokens covered by each scale before the last (``scales - 1`` values, or one for all);
            the last scale reaches the sinks unless ``last_width`` bounds it.
        last_width: Tokens covered by the last scale; None means all that is left.
        sink: The first tokens, kept at full resolution in scale 0; a multiple of ``ratio**(scales-1)``.
        downsampling: ``conv`` (strided depthwise convolution, initialised to the mean), ``max`` or ``mean``.
        aggregation: ``convex`` or ``nash``.
        regularizer: Of the convex aggregation: ``entropy`` or ``euclidean``.
        dilated_branch: Whether a gated causal dilated depthwise convolution runs beside the attention.
        mode: ``causal`` (the efficient form) or ``paper`` (the published form; encoders only).

    Raises:
        ConfigError: If a value is out of its range or contradicts another.
    """

    target: ClassVar[str] = "maha"

    scales: int = 4
    ratio: int = 2
    widths: tuple[int, ...] = (600, 8, 8)
    last_width: int | None = None
    sink: int = 64
    downsampling: str = "conv"
    aggregation: str = "convex"
    regularizer: str = "entropy"
    dilated_branch: bool = False
    mode: str = "causal"

    def __post_init__(self) -> None:
        widths = (self.widths,) if isinstance(self.widths, int) else tuple(self.widths)
        object.__setattr__(self, "widths", widths)
        check_types(self)
        at_least(self, "scales", 1)
        at_least(self, "ratio", 2)
        at_least(self, "sink", 0)
        if len(self.widths) == 1 and self.scales > 2:
            object.__setattr__(self, "widths", self.widths * (self.scales - 1))
        if len(self.widths) != self.scales - 1:
            raise ConfigError(f"widths must have scales-1={self.scales - 1} values, got {len(self.widths)}")
        if any(width < 1 for width in self.widths):
            raise ConfigError(f"widths must all be at least 1, got {self.widths}")
        if self.last_width is not None:
            at_least(self, "last_width", 1)
        if self.sink % self.ratio ** (self.scales - 1):
            raise ConfigError(
                f"sink must be a multiple of ratio**(scales-1)={self.ratio ** (self.scales - 1)}, got {self.sink}"
            )
        one_of(self, "downsampling", ("conv", "max", "mean"))
        one_of(self, "aggregation", AGGREGATIONS)
        one_of(self, "regularizer", REGULARIZERS)
        one_of(self, "mode", ("causal", "paper"))


TargetConfig = DenseConfig | HSAConfig | MAHAConfig
TARGETS: dict[str, type[DenseConfig] | type[HSAConfig] | type[MAHAConfig]] = {
    config.target: config for config in (DenseConfig, HSAConfig, MAHAConfig)
}


def config_to_dict(config: TargetConfig) -> dict[str, Any]:
    """Returns the JSON form of ``config``, which names its target."""
    return {"target": config.target, **asdict(config)}


def config_from_dict(record: dict[str, Any]) -> TargetConfig:
    """Returns the configuration whose JSON form is ``record``.

    Raises:
        ConfigError: If the target or a key is unknown, with the nearest names.
    """
    values = dict(record)
    name = values.pop("target", None)
    if name not in TARGETS:
        raise ConfigError(
            f"unknown target {name!r}{nearest(str(name), TARGETS)}; known: {', '.join(TARGETS)}"
        )
    config = TARGETS[name]
    known = [field.name for field in fields(config)]
    for key, value in values.items():
        if key not in known:
            raise ConfigError(f"{name} has no option {key!r}{nearest(key, known)}; known: {', '.join(known)}")
        if isinstance(value, list):
            values[key] = tuple(value)
    return config(**values)
