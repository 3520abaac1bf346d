"""Rows on the disk: what is read is what was written, and nothing is left behind."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from finetune_trainer import record_file
from finetune_trainer.errors import StorageError
from finetune_trainer.example import Encoded, Example, pack_encoded, pack_example, unpack_encoded, unpack_example
from finetune_trainer.record_file import RecordFile
from finetune_trainer.records import StoredRows


def make_rows(folder: Path, *records: bytes) -> StoredRows[str]:
    file = RecordFile(folder)
    for record in records:
        file.append(record)
    return StoredRows(file, bytes.decode)


def test_rows_are_a_sequence_of_what_was_appended(tmp_path):
    rows = make_rows(tmp_path, b"a", b"", b"ccc", b"dd")
    assert list(rows) == ["a", "", "ccc", "dd"]
    assert (len(rows), rows[2], rows[-1]) == (4, "ccc", "dd")
    assert rows[1:3] == ["", "ccc"]
    assert list(rows[::-2]) == ["dd", ""]
    assert rows.at([3, 0]) == ["dd", "a"]
    assert rows[:1] + rows[3:] == ["a", "dd"]
    assert rows != ["a", "", "ccc"]
    with pytest.raises(IndexError):
        rows[4]


def test_records_may_be_longer_than_what_is_read_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(record_file, "_BUFFER_BYTES", 4)
    rows = make_rows(tmp_path, b"a", b"bb", b"ccccccc", b"d", b"ee")
    assert list(rows) == ["a", "bb", "ccccccc", "d", "ee"]


@pytest.mark.parametrize("buffer_bytes", [1, 30, 1 << 16])
def test_any_part_can_be_read_whatever_block_it_lies_in(tmp_path, monkeypatch, buffer_bytes):
    monkeypatch.setattr(record_file, "_BUFFER_BYTES", buffer_bytes)
    given = [bytes([number]) * (number % 4) for number in range(12)]
    file = RecordFile(tmp_path)
    for record in given:
        file.append(record)
    assert [file[number] for number in range(12)] == given
    for first in range(13):
        for last in range(first, 13):
            assert list(file.records(first, last)) == given[first:last]


def test_numbers_lie_in_a_file_that_cannot_be_seen(tmp_path):
    numbers = RecordFile(tmp_path).numbers(3, np.int64)
    numbers[1] = 7
    assert numbers.tolist() == [0, 7, 0]
    assert len(RecordFile(tmp_path).numbers(0, np.int64)) == 0
    assert not list(tmp_path.iterdir())


def test_rows_can_be_added_after_others_were_read(tmp_path):
    file = RecordFile(tmp_path)
    file.append(b"a")
    assert file[0] == b"a"
    file.append(b"b")
    assert [file[0], file[1]] == [b"a", b"b"]


def test_no_file_can_be_seen_and_none_stays_open(tmp_path):
    rows = make_rows(tmp_path, b"a")
    assert not list(tmp_path.iterdir())
    descriptor = rows._records._file
    os.fstat(descriptor)
    del rows
    with pytest.raises(OSError):
        os.fstat(descriptor)


def test_rows_travel_alone_without_their_neighbours(tmp_path):
    sent = pickle.dumps(make_rows(tmp_path, b"first", b"second", b"third")[1:2])
    assert b"first" not in sent
    assert pickle.loads(sent) == ["second"]


def test_rows_that_travel_are_not_copied_for_each_who_is_sent_them(tmp_path):
    texts = ["first" * 1000, "", "third", "fourth"]
    buffers: list[pickle.PickleBuffer] = []
    sent = pickle.dumps(make_rows(tmp_path, *map(str.encode, texts)), protocol=5, buffer_callback=buffers.append)
    # As Ray has it: what is in buffers lies in memory that the processes of a node share.
    assert b"third" not in sent
    received = pickle.loads(sent, buffers=buffers)
    assert list(received) == texts
    assert (received[-1], received[1:3], received.at([2, 0])[0]) == ("fourth", texts[1:3], "third")
    assert pickle.loads(pickle.dumps(received[2:])) == texts[2:]
    assert received[:1] + received[3:] == [texts[0], texts[3]]
    assert pickle.loads(pickle.dumps(received[:0])) == []
    with pytest.raises(IndexError):
        received[4]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(StorageError, match=r"cannot write rows to .*missing: .* does not exist"):
        RecordFile(tmp_path / "missing")


@pytest.mark.parametrize(
    "item",
    [
        Encoded((5, 70_000, 2), 1),
        Encoded((1, 2, 3, 4, 5, 6), 5, True, ((1, 2), (3, 4))),
        Encoded((9,), 0, decoder_start=0),
    ],
)
def test_tokens_are_read_as_they_were_written(item):
    assert unpack_encoded(pack_encoded(item)) == item


def test_an_example_is_read_as_it_was_written():
    shown = Example("t", 4, "q", "d", 1, "other", {})
    example = Example("t", 3, "p", "c", 1, "key", {"a": [1, {"b": None}]}, (shown,), (("user", "hi"),), 7)
    assert unpack_example(pack_example(example)) == example
