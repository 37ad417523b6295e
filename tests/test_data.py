from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from retrofit.data import batch, documents, pack, split, tokens
from retrofit.errors import DataError


class Characters:
    """A tokenizer that numbers characters; 0 ends a text."""

    eos_token_id = 0

    def __call__(self, texts: list[str], verbose: bool = True) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(character) for character in text] for text in texts]}


def test_the_default_source_is_long_and_english() -> None:
    (text,) = documents()
    assert len(text) > 300_000
    assert "assert" in text


def test_text_file_loses_its_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes("\ufeffgrün\n".encode())
    assert list(documents(file)) == ["grün\n"]
    assert list(documents(str(file))) == ["grün\n"]


def test_jsonl_takes_records_and_strings(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one"}\n\n"two"\n{"text": "three\\u2028"}\n')
    assert list(documents(file)) == ["one", "two", "three\u2028"]


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"body": ["one", None, "two"], "n": [1, 2, 3]}), file)
    assert list(documents(file, field="body")) == ["one", "two"]
    with pytest.raises(DataError, match="no column 'text', got body, n; pass field="):
        list(documents(file))
    with pytest.raises(DataError, match="must hold text, got int"):
        list(documents(file, field="n"))


def test_datasets_reads_a_local_folder(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps({"text": f"text {i}"}) for i in range(3)))
    assert list(documents(f"datasets:{tmp_path}:train")) == ["text 0", "text 1", "text 2"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt is empty"),
        ("a.txt", b" \n", "a.txt is empty"),
        ("a.txt", b"caf\xe9 au lait", "not UTF-8: byte 0xe9 at offset 3; convert it"),
        ("a.jsonl", b'{"text": "x"}\n{oops}\n', "line 2 is not JSON"),
        ("a.jsonl", b'{"body": "x"}\n', "line 1 has no text under 'text', got body; pass field="),
        ("a.jsonl", b'{"text": ""}\n', "a.jsonl is empty"),
        ("a.parquet", b"PAR1 no", "not a parquet file"),
    ],
)
def test_bad_files_are_named_in_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        list(documents(file))
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no/such/file", "no/such/file does not exist; pass a file"),
        (".", "is a folder"),
        ("datasets:", "expected datasets:ID"),
        ([1], "item 0 of the texts must be a string, got int"),
        ([], "the iterable of texts is empty"),
    ],
)
def test_bad_sources(source: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(documents(source))


def test_documents_are_joined_by_the_end_token() -> None:
    assert tokens(["ab", "c"], Characters()).tolist() == [97, 98, 0, 99]
    assert tokens(["ab", "c"], Characters(), limit=3).tolist() == [97, 98, 0]
    with pytest.raises(DataError, match="needs a tokenizer"):
        tokens(["ab"])
    with pytest.raises(DataError, match="token ids must be whole numbers"):
        tokens(torch.zeros(3))


def test_pack_drops_the_rest_and_refuses_short_data() -> None:
    assert pack(torch.arange(7), 3).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert pack(torch.arange(10).view(2, 5), 2).tolist() == [[0, 1], [2, 3], [5, 6], [7, 8]]
    with pytest.raises(DataError, match="has 7 tokens, a sequence needs length=8"):
        pack(torch.arange(7), 8)


def test_split_is_in_one_place() -> None:
    train, held = split(torch.arange(100), 0.1)
    assert torch.equal(torch.cat([train, held]), torch.arange(100))
    assert held.numel() == 10
    with pytest.raises(DataError, match="leaves one part"):
        split(torch.arange(3), 0.05)


def test_batches_are_a_function_of_the_step_and_cover_every_epoch() -> None:
    sequences = torch.arange(14).view(7, 2)
    rows = torch.cat([batch(sequences, step, 3, seed=5)[1] for step in range(7)])
    for epoch in range(3):
        assert sorted(rows[7 * epoch : 7 * epoch + 7].tolist()) == list(range(7))
    assert rows[:7].tolist() != rows[7:14].tolist()
    again, index = batch(sequences, 4, 3, seed=5)
    assert torch.equal(index, rows[12:15])
    assert torch.equal(again, sequences[index])
    assert batch(sequences[:2], 0, 5, seed=0)[0].shape == (5, 2)
