"""Passkey retrieval: a number hidden at a depth of a long text, asked for at its end.

    … text … The pass key is 52814. Remember it. … text … What is the pass key? The pass key is ▮

An answer counts when every one of its tokens is the most likely one, which is when greedy decoding gives it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from retrofit.data import DEFAULT_SOURCE, Source, tokens
from retrofit.errors import DataError
from retrofit.evaluate.logits import LogitsFunction, run
from retrofit.evaluate.perplexity import _sites, device_of, in_evaluation_mode, positions_of
from retrofit.progress import track

INTRODUCTION = "There is a pass key hidden in the text below. Find it and remember it.\n\n"
NEEDLE = "\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n"
QUESTION = "\n\nWhat is the pass key? The pass key is"
ANSWER = " {key}"


@dataclass(frozen=True, kw_only=True)
class PasskeyCell:
    """Share of the keys found at one length and depth, by the model and by its weights with dense attention."""

    length: int
    depth: float
    trials: int
    accuracy: float
    dense: float | None = None


@dataclass(frozen=True, kw_only=True)
class PasskeyReport:
    """One cell per length and depth, lengths outermost."""

    cells: tuple[PasskeyCell, ...]
    accuracy: float
    dense: float | None

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON takes it."""
        return asdict(self)


@torch.no_grad()
def passkey(
    model: nn.Module | LogitsFunction,
    tokenizer: Any,
    lengths: Sequence[int] = (1024, 2048, 4096, 8192),
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    *,
    trials: int = 1,
    digits: int = 5,
    seed: int = 0,
    against_dense: bool = True,
    filler: Source = DEFAULT_SOURCE,
) -> PasskeyReport:
    """Measures how often a hidden number is found.

    Args:
        model: As for ``evaluate``.
        tokenizer: The model's tokenizer.
        lengths: Tokens of a prompt with its answer.
        depths: Where the number stands, as a share of the text before it.
        trials: Prompts per length and depth, each with a number and a piece of text of its own.
        digits: Of the number.
        seed: Of numbers and texts.
        against_dense: Whether to ask a converted model with dense attention too.
        filler: The text it is hidden in.

    Raises:
        DataError: If a length is beyond the model's positions or too short for the prompt, or a depth is not
            between 0 and 1.
    """
    positions = positions_of(model)
    for length in lengths:
        if positions is not None and length > positions:
            raise DataError(
                f"lengths must be at most the model's {positions} positions, got {length}; pass shorter ones"
            )
    for depth in depths:
        if not 0 <= depth <= 1:
            raise DataError(f"depths must lie between 0 and 1, got {depth}")
    if trials < 1 or not lengths or not depths:
        raise DataError("passkey needs at least one length, one depth and one trial")
    hay = tokens(filler, tokenizer, limit=4 * max(lengths)).tolist()
    asked = [(length, depth, trial) for length in lengths for depth in depths for trial in range(trials)]
    prompts = [
        _prompt(tokenizer, hay, length, depth, digits, Random(f"{seed}/{length}/{depth}/{trial}"))
        for length, depth, trial in asked
    ]
    own = _found(model, prompts, "passkey")
    dense: list[bool] | None = None
    if against_dense and isinstance(model, nn.Module) and _sites(model):
        from retrofit.api import dense as dense_attention

        with dense_attention(model):
            dense = _found(model, prompts, "passkey, dense")
    cells = []
    for first in range(0, len(asked), trials):
        length, depth, _ = asked[first]
        part = slice(first, first + trials)
        cells.append(
            PasskeyCell(
                length=length,
                depth=depth,
                trials=trials,
                accuracy=_share(own[part]),
                dense=None if dense is None else _share(dense[part]),
            )
        )
    return PasskeyReport(
        cells=tuple(cells), accuracy=_share(own), dense=None if dense is None else _share(dense)
    )


def _prompt(
    tokenizer: Any, hay: list[int], length: int, depth: float, digits: int, random: Random
) -> tuple[Tensor, int]:
    """The prompt with its answer, int64 [length], and the number of the answer's tokens."""
    key = str(random.randint(10 ** (digits - 1), 10**digits - 1))

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    # A beginning-of-text token where the model has one: what the tokenizer puts before an empty text.
    begin = [token for token in tokenizer("")["input_ids"] if token == tokenizer.bos_token_id][:1]
    introduction, needle = begin + encode(INTRODUCTION), encode(NEEDLE.format(key=key))
    question, answer = encode(QUESTION), encode(ANSWER.format(key=key))
    room = length - len(introduction) - len(needle) - len(question) - len(answer)
    if room < 0:
        raise DataError(f"a passkey prompt needs at least {length - room} tokens, got length {length}")
    if len(hay) < room:
        raise DataError(f"the filler text has {len(hay)} tokens, a prompt needs {room}; pass a longer filler")
    offset = random.randint(0, len(hay) - room)
    before = round(depth * room)
    text = hay[offset : offset + room]
    ids = introduction + text[:before] + needle + text[before:] + question + answer
    return torch.tensor(ids), len(answer)


def _found(model: nn.Module | LogitsFunction, prompts: list[tuple[Tensor, int]], name: str) -> list[bool]:
    found = []
    with in_evaluation_mode(model):
        for ids, answer in track(prompts, name):
            inputs = ids[None].to(device_of(model))
            logits = run(model, inputs).logits(len(ids) - 1 - answer, len(ids) - 1)
            found.append(bool((logits[0].argmax(-1).cpu() == ids[-answer:]).all()))
    return found


def _share(found: list[bool]) -> float:
    return sum(found) / len(found)
