"""How many values a Parquet file's columns have: what pyarrow says of whole files, words of broken ones."""

import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune_trainer.errors import DataError
from finetune_trainer.parquet_footer import values_of_columns
from finetune_trainer.row_format import read_file

TABLE = pa.table(
    {
        "text": [f"row {number}" for number in range(50)],
        "words": [["a", None, "b"], []] * 25,
        "kinds": pa.array(["a", "b"] * 25).dictionary_encode(),
        "inner": [{"number": 1.5, "flags": [True]}] * 50,
        "pairs": pa.array([[("a", 1), ("b", 2)]] * 50, pa.map_(pa.string(), pa.int64())),
    }
)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"row_group_size": 7},
        {"version": "1.0"},
        {"compression": "zstd", "write_page_checksum": True},
        {"write_page_index": True},
        {"write_statistics": False, "store_schema": False},
    ],
    ids=str,
)
def test_values_are_those_that_pyarrow_counts(tmp_path: Path, how: dict[str, Any]):
    file = tmp_path / "rows.parquet"
    pq.write_table(TABLE, file, **how)
    metadata = pq.read_metadata(file)
    groups = map(metadata.row_group, range(metadata.num_row_groups))
    assert values_of_columns(file) == [
        [group.column(index).num_values for index in range(metadata.num_columns)] for group in groups
    ]


def test_a_damaged_file_is_told_in_words_and_ends_nothing(tmp_path: Path):
    file = tmp_path / "rows.parquet"
    pq.write_table(TABLE, file)
    whole, draw, refused = file.read_bytes(), random.Random(4), 0
    for _ in range(1000):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] = draw.randrange(256)
        file.write_bytes(damaged)
        try:
            list(read_file(file, "spec.data.tasks[0].source"))
        except DataError:
            refused += 1
    assert refused > 500


@pytest.mark.parametrize(
    "content", [b"", b"PAR1", b"PAR1\xff\xff\xff\x7fPAR1", b"\x4c\x1c" * 5000 + b"\x10\x27\0\0PAR1"]
)
def test_an_end_that_is_none_is_invalid(tmp_path: Path, content: bytes):
    file = tmp_path / "rows.parquet"
    file.write_bytes(content)
    with pytest.raises(pa.ArrowInvalid):
        values_of_columns(file)
