"""Read the batches of a Parquet file, of which none takes far more memory than its file has bytes.

A column of texts may be written as a dictionary: a text of a megabyte once, and a million times its number. Read as it
is that is a terabyte; read as a dictionary it stays small, but all different texts of a group of rows are then held,
several times. So each column's dictionary, which lies before its rows, is looked at first.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from finetune_trainer.arrow_batch import dictionaries, value_bytes
from finetune_trainer.errors import DataError
from finetune_trainer.parquet_footer import values_of_columns
from finetune_trainer.row_limit import (
    ALWAYS_UNPACKED_BYTES,
    BATCH_BYTES,
    BATCH_ROWS,
    HELD_BYTES,
    MOST_UNPACKED,
    refuse_columns,
)

_BUFFER_BYTES = 1 << 20
_LOOKED_AT_ROWS = 100


def parquet_batches(path: Path, place: str) -> Iterator[pa.RecordBatch]:
    """Yield the batches of ``path``, in which texts may lie in dictionaries; ``place`` is for messages.

    Raises:
        DataError: reading it would take too much memory, or its columns have no names of their own.
        ArrowException: it is broken; also OSError.
    """
    metadata = pq.read_metadata(path)
    refuse_columns(metadata.schema.to_arrow_schema().names, place)
    leaves = [metadata.schema.column(index) for index in range(metadata.num_columns)]
    most = max(HELD_BYTES, MOST_UNPACKED * path.stat().st_size)
    # Of rows without lists each column has as many values as there are rows.
    values = values_of_columns(path) if any(leaf.max_repetition_level for leaf in leaves) else []
    _refuse_packed(metadata, leaves, values, most, place)
    texts = [leaf.path for leaf in leaves if _is_text(leaf)]
    with ExitStack() as opened:

        @cache
        def file(as_dictionaries: frozenset[str]) -> pq.ParquetFile:
            return opened.enter_context(
                pq.ParquetFile(
                    path,
                    metadata=metadata,
                    read_dictionary=sorted(as_dictionaries),
                    # A group of rows is otherwise held as a whole, as it lies on the disk.
                    buffer_size=_BUFFER_BYTES,
                    pre_buffer=False,
                )
            )

        for index in range(metadata.num_row_groups):
            group = metadata.row_group(index)
            longest = _longest_entries(file(frozenset(texts)), index, texts)
            as_they_are = {
                leaf.path: longest[leaf.path]
                for at, leaf in enumerate(leaves)
                if leaf.path in longest
                # A row of a flat column has one value; one with lists may have all of the group's.
                and (not leaf.max_repetition_level or values[index][at] * longest[leaf.path] <= most)
            }
            yield from file(frozenset(texts).difference(as_they_are)).iter_batches(
                batch_size=_rows_at_once(group, leaves, sum(as_they_are.values())), row_groups=[index]
            )


def _is_text(leaf: pq.ColumnSchema) -> bool:
    return bool(leaf.physical_type == "BYTE_ARRAY" and leaf.logical_type.type != "DECIMAL")


def _refuse_packed(
    metadata: pq.FileMetaData,
    leaves: Sequence[pq.ColumnSchema],
    values: Sequence[Sequence[int]],
    most: int,
    place: str,
) -> None:
    """Raise where a page, or the lists of a group of rows, may take far more memory than the file has bytes."""
    for counts in values:
        lists = sum(
            count * _width(leaf) for leaf, count in zip(leaves, counts, strict=True) if leaf.max_repetition_level
        )
        if lists > most:
            raise DataError(
                f"{place} has lists of {lists:,} bytes in one group of rows, all of which may be one row's. Leave out "
                f"the columns that are not used, or write smaller groups (row_group_size)."
            )
    unpacked = sum(metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups))
    if unpacked > max(ALWAYS_UNPACKED_BYTES, most):
        raise DataError(
            f"{place} unpacks to more than {MOST_UNPACKED} times its size, as files do that are made to fill a disk. "
            f"If it is what you want, write it without compression."
        )


def _width(leaf: pq.ColumnSchema) -> int:
    """Return how many bytes a value takes in memory; of a text its place alone."""
    return int(leaf.length) if leaf.physical_type == "FIXED_LEN_BYTE_ARRAY" else 8


def _longest_entries(file: pq.ParquetFile, group: int, texts: Sequence[str]) -> dict[str, float]:
    """Return the longest entry of the dictionary of each column of texts, where it is sure to have been seen.

    With the first value the whole dictionary is there. Has it no more entries than values were read, they may as well
    be values that stand before it.
    """
    if not texts:
        return {}
    found: dict[str, float] = {}
    seen = dict.fromkeys(texts, 0)
    for batch in islice(file.iter_batches(batch_size=1, row_groups=[group], columns=list(texts)), _LOOKED_AT_ROWS):
        columns = list(dictionaries(batch))
        if len(columns) != len(texts):
            return {}
        for name, column in zip(texts, columns, strict=True):
            seen[name] += len(column) - column.null_count
            if len(column.dictionary) > seen[name]:
                found[name] = float(np.max(value_bytes(column.dictionary), initial=0))
        if all(seen.values()):
            break
    return found


def _rows_at_once(group: pq.RowGroupMetaData, leaves: Sequence[pq.ColumnSchema], longest_bytes: float) -> int:
    written = group.total_byte_size / max(1, group.num_rows)
    bytes_a_row = max(1, written, sum(map(_width, leaves)) + longest_bytes)
    return max(1, min(BATCH_ROWS, int(BATCH_BYTES / bytes_a_row)))
