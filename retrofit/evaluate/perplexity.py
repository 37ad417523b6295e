"""Perplexity of a converted model against its own weights with dense attention, on the same text.

report = evaluate(model, "book.txt", tokenizer=tokenizer)
report.after.ratio      # how many times the dense perplexity, over positions from the dense start on
report.keys             # keys a query attends to, counted, over the same positions
"""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from retrofit.data import DEFAULT_SOURCE, Source, tokens
from retrofit.errors import DataError
from retrofit.evaluate.account import Counts, SiteAccount, counting, dense_until
from retrofit.evaluate.logits import LogitsFunction, run
from retrofit.progress import track

CHUNK = 512


@dataclass(frozen=True, kw_only=True)
class Span:
    """Perplexity over the queries at positions ``first`` to ``last`` (exclusive) of every sequence.

    Attributes:
        tokens: Tokens predicted there.
        perplexity: Of the model as it is.
        dense: Of the same weights with dense attention; None where it was not measured.
        ratio: ``perplexity / dense``.
    """

    first: int
    last: int
    tokens: int
    perplexity: float
    dense: float | None = None
    ratio: float | None = None


@dataclass(frozen=True, kw_only=True)
class EvalReport:
    """What ``evaluate`` measured.

    Attributes:
        length: Tokens of a sequence.
        stride: Tokens by which neighbouring sequences are apart.
        sequences: Number of sequences.
        start: First position of ``after`` and of the counts.
        all: Over all positions.
        after: Over positions from ``start`` on; None if the sequences end before.
        bins: By position.
        sites: Counted work of each converted site, over positions from ``start`` on (all if there are none).
        keys: Mean of the sites' keys; None where nothing is converted.
        nodes: Mean of the sites' nodes.
        dense_keys: Mean of the keys that dense attention takes there.
        seconds: Time of the model's runs.
        dense_seconds: Time of the dense runs.
        warnings: What makes the numbers say less than they seem to.
    """

    length: int
    stride: int
    sequences: int
    start: int
    all: Span
    after: Span | None
    bins: tuple[Span, ...]
    sites: tuple[SiteAccount, ...]
    keys: float | None
    nodes: float | None
    dense_keys: float | None
    seconds: float
    dense_seconds: float | None
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON takes it."""
        return asdict(self)


@torch.no_grad()
def evaluate(
    model: nn.Module | LogitsFunction,
    data: Source | Tensor = DEFAULT_SOURCE,
    *,
    tokenizer: Any = None,
    length: int | None = None,
    stride: int | None = None,
    sequences: int | None = None,
    against_dense: bool = True,
    start: int | None = None,
    bins: int = 8,
    field: str = "text",
) -> EvalReport:
    """Measures perplexity and counts work.

    Args:
        model: A causal language model, converted or not, or a function from token ids int64 [1, n] to logits
            [1, n, vocabulary] (an exported model, say).
        data: See ``retrofit.data.tokens``; or token ids. A text shorter than ``length`` is one sequence.
        tokenizer: The model's tokenizer; may be left out if ``data`` is token ids.
        length: Tokens of a sequence; None takes 8,192, or the model's positions if they are fewer.
        stride: Tokens by which sequences are apart; below ``length``, a token that an earlier sequence has
            scored is not scored again. None means ``length``.
        sequences: Use at most so many sequences; None means all.
        against_dense: Whether to run a converted model with dense attention too. A model of which nothing is
            converted, and a function, have no such second run.
        start: First position of ``report.after``; None takes the largest ``dense_until`` of the sites.
        bins: Number of bins by position.
        field: See ``retrofit.data.documents``.

    Raises:
        DataError: If the data cannot be used, or the length is beyond the model's positions.
    """
    positions = positions_of(model)
    if length is None:
        length = 8192 if positions is None else min(8192, positions)
    if positions is not None and length > positions:
        raise DataError(
            f"length must be at most the model's {positions} positions, got {length}; pass length=…"
        )
    if length < 2:
        raise DataError(f"length must be at least 2 tokens, got {length}")
    stride = length if stride is None else stride
    if not 1 <= stride <= length:
        raise DataError(f"stride must lie between 1 and length={length}, got {stride}")
    limit = None if sequences is None else length + stride * (sequences - 1)
    windows = _windows(tokens(data, tokenizer, field=field, limit=limit), length, stride)[:sequences]
    asked, length = length, windows.shape[1]

    module = model if isinstance(model, nn.Module) else None
    found = _sites(module)
    if any(not site.retrofit.causal for _, site in found):
        raise DataError(
            "perplexity needs a causal model, got sites that are not causal; compare outputs instead"
        )
    if start is None:
        start = max((dense_until(site.retrofit) for _, site in found), default=0)
    scored = torch.ones(windows.shape[0], length - 1, dtype=torch.bool)
    scored[1:, : max(0, length - 1 - stride)] = False
    warnings = []
    if start >= length - 1:
        warnings.append(
            f"sequences of {length} tokens end before position {start}, where the counts should start; "
            "all positions are counted: use a longer text or length"
        )

    first = start if start < length - 1 else 0
    counter = counting(module, first) if module is not None and found else nullcontext(None)
    own, seconds, counts = _losses(model, windows, counter, "perplexity")
    dense: Tensor | None = None
    dense_seconds: float | None = None
    if found and against_dense and module is not None:
        from retrofit.api import dense as dense_attention

        dense, dense_seconds, _ = _losses(module, windows, dense_attention(module), "dense")

    accounts = counts.sites() if counts is not None else ()
    if counts is not None and not counts.sparse:
        warnings.append(
            f"no query of these {length} tokens was sparse at any site: the numbers say nothing about the "
            "conversion; use a longer text or length"
        )
    if length < asked:
        warnings.append(f"the data has {length} tokens, fewer than the length of {asked}; use a longer text")
    edges = [round(index * (length - 1) / bins) for index in range(bins + 1)]
    return EvalReport(
        length=length,
        stride=stride,
        sequences=windows.shape[0],
        start=start,
        all=_span(own, dense, scored, 0, length - 1),
        after=_span(own, dense, scored, start, length - 1) if start < length - 1 else None,
        bins=tuple(
            _span(own, dense, scored, low, high) for low, high in pairwise(edges) if scored[:, low:high].any()
        ),
        sites=accounts,
        keys=_mean([site.keys for site in accounts]),
        nodes=_mean([site.nodes for site in accounts]),
        dense_keys=_mean([site.dense_keys for site in accounts]),
        seconds=seconds,
        dense_seconds=dense_seconds,
        warnings=tuple(warnings),
    )


def _windows(stream: Tensor, length: int, stride: int) -> Tensor:
    if stream.dim() == 2:
        if stream.shape[1] > length:
            raise DataError(
                f"sequences must have at most length={length} tokens, got {stream.shape[1]}; pass length=…"
            )
        return stream
    if stream.numel() < 2:
        raise DataError(f"perplexity needs at least 2 tokens, got {stream.numel()}; use a longer text")
    return stream.unfold(0, min(length, stream.numel()), stride)


def _losses(
    model: nn.Module | LogitsFunction, windows: Tensor, context: AbstractContextManager[Any], name: str
) -> tuple[Tensor, float, Counts | None]:
    """Negative log-likelihood float64 [S, n − 1] of each next token, the time, and what ``context`` gives."""
    losses = torch.empty(windows.shape[0], windows.shape[1] - 1, dtype=torch.float64)
    with context as entered, in_evaluation_mode(model):
        began = time.perf_counter()
        for row, window in enumerate(track(windows, name)):
            ids = window[None].to(device_of(model))
            losses[row] = next_token_losses(model, ids)[0]
        return losses, time.perf_counter() - began, entered if isinstance(entered, Counts) else None


def next_token_losses(model: nn.Module | LogitsFunction, ids: Tensor) -> Tensor:
    """Negative log-likelihood float64 [B, n − 1] of each next token, in pieces of ``CHUNK`` positions."""
    outputs = run(model, ids)
    pieces = []
    for first in range(0, ids.shape[1] - 1, CHUNK):
        last = min(first + CHUNK, ids.shape[1] - 1)
        logits = outputs.logits(first, last).float()
        following = ids[:, first + 1 : last + 1].to(logits.device)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), following.flatten(), reduction="none")
        pieces.append(loss.view(following.shape).double().cpu())
    return torch.cat(pieces, 1)


class in_evaluation_mode:
    """Puts a module into evaluation mode inside the block, and every submodule back afterwards."""

    def __init__(self, model: object) -> None:
        modules = model.modules() if isinstance(model, nn.Module) else ()
        self.training = [module for module in modules if module.training]

    def __enter__(self) -> None:
        for module in self.training:
            module.training = False

    def __exit__(self, *error: object) -> None:
        for module in self.training:
            module.training = True


def device_of(model: object) -> torch.device:
    """Where the model's first parameter lies; a function's inputs are on the CPU."""
    if isinstance(model, nn.Module):
        for parameter in model.parameters():
            return parameter.device
    return torch.device("cpu")


def _span(own: Tensor, dense: Tensor | None, scored: Tensor, first: int, last: int) -> Span:
    use = scored[:, first:last]
    mine = math.exp(own[:, first:last][use].mean().item())
    theirs = None if dense is None else math.exp(dense[:, first:last][use].mean().item())
    return Span(
        first=first,
        last=last,
        tokens=int(use.sum()),
        perplexity=mine,
        dense=theirs,
        ratio=None if theirs is None else mine / theirs,
    )


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _sites(model: nn.Module | None) -> list[tuple[str, Any]]:
    if model is None:
        return []
    from retrofit.api import sites

    return list(sites(model))


def text_config(config: Any) -> Any:
    """The part of a model's configuration that is about text."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def positions_of(model: object) -> int | None:
    """The most positions a Hugging Face model takes; None where it does not say."""
    config = getattr(model, "config", None)
    if config is None:
        return None
    value = getattr(text_config(config), "max_position_embeddings", None)
    return value if isinstance(value, int) and value > 0 else None
