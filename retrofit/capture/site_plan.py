"""What is known of a module that owns attention: all that a site needs to run, or why it has to stay as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from retrofit.capture.call import LeafPath, Signature
from retrofit.capture.guards import Guard
from retrofit.capture.mask_argument import MaskArgument
from retrofit.capture.position_bias import StepBias
from retrofit.capture.slots import Slot
from retrofit.passes.attention.masks import MaskClass


@dataclass(frozen=True)
class CallPlan:
    """How a module is run by a graph of it.

    Attributes:
        source: Python source of ``forward(self, *tensors)``, for a site with ``context`` at the end.
        training: Source of the forward in training, if it drops something out; takes and gives the same.
        untrainable: Why it cannot be trained as it is; None if it can.
        inputs: Where the tensors are found in a call.
        sizes: The sizes that the graph is made for, of tensors in a call; None where it takes any.
        guards: Conditions on sizes by which the module chose what it does.
        same: Arguments that must be the same tensor as another one.
        rows: Inputs that are expanded to the rows of the first.
        signature: The original's parameters.
        known: Leaves that were not tensors when the graph was made, by path.
        only: Names of all arguments of the call that the graph was made from, if no other may be given; None if any may.
        output: The result with ``TENSOR`` in the place of tensors.
        lost: Which of the tensors in the result become None: attention weights.
        constants: Tensors that the forward made once, by the name that the graph has for them.
        unkept: Attributes that the original changes in a call, and nobody reads; they are None then.
    """

    source: str
    training: str | None
    untrainable: str | None
    inputs: tuple[LeafPath, ...]
    sizes: tuple[tuple[LeafPath, tuple[int | None, ...]], ...]
    guards: tuple[Guard, ...]
    same: tuple[tuple[LeafPath, LeafPath], ...]
    rows: tuple[LeafPath, ...]
    signature: Signature
    known: tuple[tuple[LeafPath, Any], ...]
    only: frozenset[str] | None
    output: Any
    lost: tuple[int, ...]
    constants: tuple[tuple[str, Tensor], ...]
    unkept: frozenset[str]

    def __deepcopy__(self, memo: dict[int, Any]) -> CallPlan:
        """A plan never changes; copies of a model share it."""
        return self


@dataclass(frozen=True)
class SitePlan(CallPlan):
    """What a site runs.

    Attributes:
        keys: Of cross-attention, the source of a function from ``key_inputs`` to keys and values; None elsewhere.
        key_inputs: Where its tensors are found in a call.
        mask_argument: Where the mask is found in a call, and how it is read; None if there is none.
        keep_mask: Whether the graph computes the mask and hands it to the target call.
        spelling: Which rule recognised the attention.
        pooled: Whether it is of the kind ``cross``, yet keys and queries come from the same input, or queries from none.
        dropout: Where the probability of dropping an attention weight is read from, or the number.
        slot: Its place in the key-value cache.
        step: How its position bias is computed for new tokens where the cache holds earlier ones; None if it has none,
            or is handed one.
    """

    keys: str | None
    key_inputs: tuple[LeafPath, ...]
    mask_argument: MaskArgument | None
    keep_mask: bool
    mask: MaskClass
    spelling: str
    kind: str
    pooled: bool
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    softcap: float
    sinks: bool
    dropout: str | float
    slot: Slot
    step: StepBias | None


@dataclass(frozen=True)
class Refused:
    """Why a module has no plan, and what is known of it anyway.

    Attributes:
        kind: ``self``, ``cross``, ``unknown``, or ``other`` for a softmax that is not attention.
        source: File and line of the model's code that the reason is about.
        near_miss: The rule that came nearest, and the first of its conditions that does not hold.
        several: Whether it is that the module has several attentions, which were all recognised.
        spelling: Which rule recognised the attention, if one did and something else stands in the way.
    """

    reason: str
    kind: str = "unknown"
    source: str | None = None
    near_miss: str | None = None
    spelling: str | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    several: bool = False


def compiled(source: str) -> Any:
    """Compiles the source of a plan into its function."""
    from torch.fx.graph_module import _forward_from_src

    return _forward_from_src(source, {})
