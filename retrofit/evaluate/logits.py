"""The logits of a language model piece by piece, so that [n, vocabulary] never exists at once.

    outputs = run(model, ids)            # the decoder once: hidden states [B, n, d]
    outputs.logits(0, 512)               # the model's own head on positions 0 … 511

The head is whatever the model's ``forward`` does after its decoder (soft caps, scales): ``forward`` itself is
called with the decoder answering from memory.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

LogitsFunction = Callable[[Tensor], Any]
"""From token ids int64 [B, n] to logits [B, n, vocabulary], as a tensor or an array: an ONNX session, say."""


@dataclass(frozen=True)
class Outputs:
    """What one run of a model left: its hidden states, or its logits if it has no decoder to stop at."""

    batch: int
    length: int
    whole: Tensor | None = None
    hidden: Tensor | None = None
    model: nn.Module | None = None
    decoder: nn.Module | None = None
    output_type: Any = None

    def logits(self, first: int, last: int) -> Tensor:
        """Logits of positions ``first`` to ``last`` (exclusive) [B, last - first, vocabulary]."""
        if self.whole is not None:
            return self.whole[:, first:last]
        assert self.hidden is not None
        return self.head(self.hidden[:, first:last])

    def head(self, hidden: Tensor) -> Tensor:
        """The model's head on hidden states [B, c, d]; differentiable in both."""
        assert self.model is not None
        assert self.decoder is not None
        unread = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
        with _answering(self.decoder, self.output_type(last_hidden_state=hidden)):
            logits: Tensor = self.model(input_ids=unread, use_cache=False).logits
        return logits


def run(model: nn.Module | LogitsFunction, ids: Tensor) -> Outputs:
    """Runs ``model`` on ``ids`` [B, n].

    Args:
        model: A Hugging Face causal language model (stopped before its head), any module or callable that
            returns logits.
        ids: int64 [B, n], on the model's device.
    """
    if not isinstance(model, nn.Module):
        return Outputs(ids.shape[0], ids.shape[1], whole=torch.as_tensor(model(ids)))
    found = _decoder(model)
    if found is None:
        return Outputs(ids.shape[0], ids.shape[1], whole=_logits_of(model(ids)))
    decoder, accepted = found
    caught: list[Any] = []
    handle = decoder.register_forward_hook(lambda module, args, output: caught.append(output))
    try:
        result = model(input_ids=ids, use_cache=False, **accepted)
    finally:
        handle.remove()
    if len(caught) != 1 or not hasattr(caught[0], "last_hidden_state") or not accepted:
        return Outputs(ids.shape[0], ids.shape[1], whole=_logits_of(result))
    return Outputs(
        ids.shape[0],
        ids.shape[1],
        hidden=caught[0].last_hidden_state,
        model=model,
        decoder=decoder,
        output_type=type(caught[0]),
    )


def run_without_logits(model: nn.Module, ids: Tensor) -> None:
    """Runs ``model`` on ``ids`` [B, n] for what its sites see, sparing the head where the model can."""
    found = _decoder(model)
    if found is None:
        model(ids)
    else:
        model(input_ids=ids, use_cache=False, **found[1])


def _decoder(model: nn.Module) -> tuple[nn.Module, dict[str, int]] | None:
    """The part of a Hugging Face model before its head, and how to ask for few logits."""
    inner: Any = model
    if hasattr(model, "get_base_model"):  # a PEFT wrapper
        inner = inner.get_base_model()
    if not hasattr(inner, "base_model_prefix"):
        return None
    accepted = "logits_to_keep" in inspect.signature(inner.forward).parameters
    decoder = inner.base_model
    # A model without a head is its own decoder; without logits_to_keep the whole logits exist anyway.
    if decoder is inner or not isinstance(decoder, nn.Module):
        return inner, {}
    return decoder, {"logits_to_keep": 1} if accepted else {}


def _logits_of(result: Any) -> Tensor:
    if isinstance(result, Tensor):
        return result
    logits = getattr(result, "logits", None)
    if logits is None:
        raise TypeError(
            f"the model must return logits, got {type(result).__name__}; load it with its language-model head"
        )
    return torch.as_tensor(logits)


@contextmanager
def _answering(decoder: nn.Module, output: Any) -> Iterator[None]:
    before = decoder.__dict__.get("forward")
    decoder.__dict__["forward"] = lambda *args, **kwargs: output
    try:
        yield
    finally:
        if before is None:
            del decoder.__dict__["forward"]
        else:
            decoder.__dict__["forward"] = before
