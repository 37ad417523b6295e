"""What every target is: a module that takes queries, keys and values and gives the attention's output.

It lives as the child ``retrofit`` of the site it serves, so that its learned parameters are ordinary
parameters of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from retrofit.errors import ConfigError
from retrofit.kernels.dense.scores import ScoreRules

if TYPE_CHECKING:
    from retrofit.attention_call import AttentionCall
    from retrofit.configs import TargetConfig


class TargetAttention(nn.Module):
    """Attention of one site; subclasses give ``forward`` and, if they can be trained, ``layer_loss``.

    Args:
        config: The target's configuration.
        heads: Query heads; a multiple of ``kv_heads``.
        kv_heads: Key and value heads; query head h uses kv head ``h // (heads // kv_heads)``.
        head_dim: Width of queries and keys.
        value_dim: Width of values.
        scale: Factor on the scores.
        softcap: Bound c of the scores, which become c·tanh(score / c); 0 for none.
        sinks: Whether ``call`` brings one more logit for each query head.
        causal: Whether a query sees only keys up to itself.
        sliding_window: A query sees only the last so many keys, itself included; 0 means all.
        implementation: ``auto``, or the name of one of the op's implementations.

    Attributes:
        observer: If set, receives per forward ``{"keys": [B, Hkv, T], "nodes": [B, Hkv, T],
            "valid": bool [B, T]}``: keys executed and nodes scored by each query.
        keeps_state: Whether a cache layer gets its state with the first token, though nothing needs it yet: an
            exported model takes it as an input.
    """

    observer: Callable[[Mapping[str, Tensor]], None] | None = None
    keeps_state: bool = False

    def __init__(
        self,
        config: TargetConfig,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        value_dim: int,
        scale: float,
        causal: bool,
        sliding_window: int,
        softcap: float = 0.0,
        sinks: bool = False,
        implementation: str = "auto",
    ) -> None:
        super().__init__()
        if heads % kv_heads:
            raise ConfigError(f"heads must be a multiple of kv_heads={kv_heads}, got {heads}")
        self.config = config
        self.heads = heads
        self.kv_heads = kv_heads
        self.head_dim = head_dim
        self.value_dim = value_dim
        self.scale = scale
        self.softcap = softcap
        self.sinks = sinks
        self.causal = causal
        self.sliding_window = sliding_window
        self.implementation = implementation

    @property
    def drops_weights(self) -> bool:
        """Whether dropout of attention weights can be had in training."""
        return False

    def rules(self, call: AttentionCall) -> ScoreRules:
        """What happens to the scores in ``call`` besides the mask."""
        return ScoreRules(self.softcap, call.sinks)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
        """Attends; with ``call.layer`` the new keys and values go into the cache first.

        Args:
            q: Queries [B, Hq, T, D], the last T of the N index slots.
            k: New keys [B, Hkv, T, D].
            v: New values [B, Hkv, T, Dv].
            call: Where each row's tokens start, how many there are, and the cache layer.

        Returns:
            [B, Hq, T, Dv]; rows that are padding are zero.
        """
        raise NotImplementedError(f"{type(self).__name__} must define forward")

    def layer_loss(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
        """The loss of this site alone against dense attention on the same q, k, v; a scalar.

        Only the target's own parameters get gradients. A target without such parameters has none.
        """
        raise ConfigError(f"the target {self.config.target!r} has no parameters of its own to train")

    def extra_repr(self) -> str:
        """Names the target and its shape in ``print(model)``."""
        window = f", sliding_window={self.sliding_window}" if self.sliding_window else ""
        return (
            f"{self.config.target}, heads={self.heads}, kv_heads={self.kv_heads}, "
            f"head_dim={self.head_dim}, causal={self.causal}{window}"
        )
