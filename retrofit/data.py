"""From any source of text to packed token sequences.

"pydoc_data.topics", Path("corpus.txt"), "a.jsonl", "b.parquet", "datasets:ID:SPLIT", ["text", …]
    ── documents ──▶ str, str, …
    ── tokens ─────▶ int64 [N], documents separated by the end-of-text token
    ── split ──────▶ train, held out
    ── pack ───────▶ int64 [S, length], nothing padded
    ── batch ──────▶ int64 [B, length], a function of (seed, step): what makes a run resumable
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retrofit.errors import DataError

DEFAULT_SOURCE = "pydoc_data.topics"
"""Reference English that ships with every Python: the source that needs no download."""

Source = str | Path | Iterable[str]


def documents(source: Source = DEFAULT_SOURCE, *, field: str = "text") -> Iterator[str]:
    """Yields the texts of ``source`` one by one.

    Args:
        source: ``"pydoc_data.topics"``; the path of a text, JSONL or parquet file; ``"datasets:ID"``,
            ``"datasets:ID:SPLIT"`` or ``"datasets:ID:CONFIG:SPLIT"``; a string with a line break, taken as
            the text itself; or an iterable of texts.
        field: The column or key that holds the text in JSONL, parquet and ``datasets`` sources.

    Raises:
        DataError: If the source does not exist, is empty, is not UTF-8 or lacks ``field``.
    """
    if isinstance(source, str) and "\n" in source:
        texts: Iterator[str] = iter([source])
        name = "the text"
    elif isinstance(source, str) and source == DEFAULT_SOURCE:
        texts, name = _topics(), source
    elif isinstance(source, str) and source.startswith("datasets:"):
        texts, name = _dataset(source, field), source
    elif isinstance(source, (str, Path)):
        path = Path(source).expanduser()
        texts, name = _file(path, field), str(path)
    else:
        texts, name = _iterable(source), "the iterable of texts"
    return _not_blank(texts, name)


def check(source: str, *, field: str = "text") -> None:
    """Reads the first text of ``source``, before anything long is done for the rest.

    Raises:
        DataError: As ``documents``.
    """
    next(documents(source, field=field))


def tokens(
    source: Source | Tensor,
    tokenizer: Any = None,
    *,
    field: str = "text",
    limit: int | None = None,
) -> Tensor:
    """Tokenises ``source`` into one stream.

    Each document is tokenised as the tokenizer does it by default (with a first token where the model has one)
    and ends with the end-of-text token where several are joined.

    Args:
        source: What ``documents`` takes, or token ids that are returned as they are.
        tokenizer: A Hugging Face tokenizer; may be left out if ``source`` is a tensor.
        field: See ``documents``.
        limit: Stop after this many tokens.

    Returns:
        int64 [N], or the tensor handed over.

    Raises:
        DataError: As ``documents``, or if a tokenizer is needed and missing.
    """
    if isinstance(source, Tensor):
        if source.is_floating_point() or source.dim() not in (1, 2):
            raise DataError(
                f"token ids must be whole numbers of shape [N] or [S, length], got {source.dtype} "
                f"{list(source.shape)}; pass token ids, or text with a tokenizer"
            )
        return source.to(torch.int64)
    if tokenizer is None:
        raise DataError("text needs a tokenizer, got None; pass tokenizer=…, or token ids as a tensor")
    end = getattr(tokenizer, "eos_token_id", None)
    texts = documents(source, field=field)
    stream: list[int] = []
    count = 0
    while chunk := list(islice(texts, 256)):
        # verbose=False: the tokenizer's note on texts longer than the model, which packing makes moot.
        for ids in tokenizer(chunk, verbose=False)["input_ids"]:
            if count and end is not None and stream and stream[-1] != end:
                stream.append(end)
            stream.extend(ids)
            count += 1
            if limit is not None and len(stream) >= limit:
                return torch.tensor(stream[:limit], dtype=torch.int64)
    return torch.tensor(stream, dtype=torch.int64)


def pack(stream: Tensor, length: int) -> Tensor:
    """Cuts a stream into sequences, or cuts longer sequences; the rest that fills no sequence is dropped.

    Args:
        stream: int64 [N] or [S, N].
        length: Tokens of a sequence.

    Returns:
        int64 [S', length].

    Raises:
        DataError: If not one sequence can be filled.
    """
    if length < 2:
        raise DataError(f"length must be at least 2, got {length}")
    available = stream.shape[-1]
    if available < length:
        raise DataError(
            f"the data has {available} tokens{' per sequence' if stream.dim() == 2 else ''}, "
            f"a sequence needs length={length}; bring more text or pass a smaller length"
        )
    cut = stream[..., : available // length * length]
    return cut.reshape(-1, length)


def split(data: Tensor, held_out: float = 0.05) -> tuple[Tensor, Tensor]:
    """Cuts the last part of a stream (or of sequences) off, to measure on text that was not trained on.

    The cut is in one place, so that no document but one is on both sides.

    Returns:
        The part to train on and the part held out.

    Raises:
        DataError: If one of the parts would be empty.
    """
    if not 0 < held_out < 1:
        raise DataError(f"held_out must lie between 0 and 1, got {held_out}")
    held = round(data.shape[0] * held_out)
    if held == 0 or held == data.shape[0]:
        raise DataError(
            f"held_out={held_out} leaves one part of {data.shape[0]} empty; bring more text or change held_out"
        )
    return data[:-held], data[-held:]


def batch(sequences: Tensor, step: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """The batch of a step: each epoch is a permutation of its own, and steps run on across epochs.

    Args:
        sequences: int64 [S, length].
        step: Counts batches from 0.
        size: Sequences of a batch.
        seed: Of the permutations.

    Returns:
        int64 [size, length], and the rows of ``sequences`` they are.
    """
    count = sequences.shape[0]
    rows: list[int] = []
    position = step * size
    while len(rows) < size:
        epoch, first = divmod(position, count)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed + epoch))
        taken = order[first : first + size - len(rows)].tolist()
        rows += taken
        position += len(taken)
    index = torch.tensor(rows)
    return sequences[index], index


def _topics() -> Iterator[str]:
    from pydoc_data.topics import topics

    yield "\n\n".join(topics[key] for key in sorted(topics))


def _file(path: Path, field: str) -> Iterator[str]:
    if path.is_dir():
        raise DataError(f"{path} is a folder, expected a text, JSONL or parquet file; name one file in it")
    if not path.is_file():
        raise DataError(
            f"{path} does not exist; pass a file, {DEFAULT_SOURCE!r}, 'datasets:ID' for a data set, "
            "or a list of texts for text itself"
        )
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _parquet(path, field)
    if suffix in (".jsonl", ".ndjson"):
        return _jsonl(path, field)
    return iter([read_text(path)])


def read_text(path: Path) -> str:
    """Reads a UTF-8 file.

    Raises:
        DataError: If it cannot be read, is empty or is not UTF-8; names the offset of the first bad byte.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; check the path and its rights") from error
    if not raw.strip():
        raise DataError(f"{path} is empty; name a file with text")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start}; "
            "convert it, for example with iconv -f LATIN1 -t UTF-8"
        ) from error


def _jsonl(path: Path, field: str) -> Iterator[str]:
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path} line {number} is not JSON: {error.msg}; correct or remove it") from error
        if isinstance(record, str):
            yield record
        elif isinstance(record, dict) and isinstance(record.get(field), str):
            yield record[field]
        else:
            has = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            raise DataError(f"{path} line {number} has no text under {field!r}, got {has}; pass field=…")


def _parquet(path: Path, field: str) -> Iterator[str]:
    try:
        import pyarrow  # type: ignore[import-untyped,import-not-found,unused-ignore]
        import pyarrow.parquet  # type: ignore[import-untyped,import-not-found,unused-ignore]
    except ImportError as error:
        raise DataError(
            f"{path} needs pyarrow, which is not installed; pip install 'retrofit-attention[datasets]'"
        ) from error
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a parquet file: {str(error).splitlines()[0]}") from error
    names = file.schema_arrow.names
    if field not in names:
        raise DataError(f"{path} has no column {field!r}, got {', '.join(names)}; pass field=…")
    for group in file.iter_batches(columns=[field]):
        for value in group.column(0).to_pylist():
            if value is None:
                continue
            if not isinstance(value, str):
                raise DataError(
                    f"{path} column {field!r} must hold text, got {type(value).__name__}; pass field=…"
                )
            yield value


def _dataset(source: str, field: str) -> Iterator[str]:
    identity, *rest = source.removeprefix("datasets:").split(":")
    if not identity or len(rest) > 2:
        raise DataError(f"expected datasets:ID, datasets:ID:SPLIT or datasets:ID:CONFIG:SPLIT, got {source}")
    try:
        from datasets import load_dataset  # type: ignore[import-untyped,import-not-found,unused-ignore]
    except ImportError as error:
        raise DataError(
            f"{source} needs the datasets library, which is not installed; "
            "pip install 'retrofit-attention[datasets]'"
        ) from error
    config = rest[0] if len(rest) == 2 else None
    part = rest[-1] if rest else "train"
    try:
        rows = load_dataset(identity, config, split=part, streaming=True)
    except Exception as error:  # the library raises errors of many kinds for one cause
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{source} cannot be loaded: {reason}; check the id, the split and the network"
        ) from error
    for row in rows:
        if not isinstance(row.get(field), str):
            raise DataError(f"{source} has no text under {field!r}, got {', '.join(row)}; pass field=…")
        yield row[field]


def _iterable(source: Iterable[str]) -> Iterator[str]:
    for number, item in enumerate(source):
        if not isinstance(item, str):
            raise DataError(f"item {number} of the texts must be a string, got {type(item).__name__}")
        yield item


def _not_blank(texts: Iterator[str], name: str) -> Iterator[str]:
    found = False
    for item in texts:
        if item.strip():
            found = True
            yield item
    if not found:
        raise DataError(f"{name} is empty; name a source with text")
