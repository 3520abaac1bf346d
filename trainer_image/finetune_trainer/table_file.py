"""Read the rows of Parquet and Arrow files, which say in few bytes what takes many."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from finetune_trainer.arrow_batch import Sizes, UnmeasuredTypeError, plain, unpacked_bytes, value_bytes
from finetune_trainer.errors import DataError
from finetune_trainer.excerpt import excerpt
from finetune_trainer.parquet_batch import parquet_batches
from finetune_trainer.row_limit import (
    ALWAYS_UNPACKED_BYTES,
    BATCH_BYTES,
    BATCH_ROWS,
    HELD_BYTES,
    LONGEST_ROW_BYTES,
    Row,
    refuse_columns,
)

# A table writes an instruction of some pages once for all its rows, each of which then counts as a whole.
_MOST_REPEATED = 500
_ROW_BYTES = 64
"""That a row takes beside its values."""


def read_parquet(path: Path, field: str) -> Iterator[Row]:
    """Yield the rows of a Parquet file; ``field`` is the setting that named it, for messages.

    Raises:
        DataError: it is truncated or broken, or a row is too large.
    """
    rows = _TableRows(path, field)
    try:
        for batch in parquet_batches(path, f"{field}: {path}"):
            yield from rows.of(batch)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(
            f"{field}: {path} is not a whole Parquet file: {excerpt(str(error))}; fetch or write it again."
        ) from error
    except OSError as error:  # what Arrow raises for truncated pages
        raise DataError(f"{field}: {path} is truncated or broken: {excerpt(str(error))}; fetch it again.") from error


def read_arrow(path: Path, field: str) -> Iterator[Row]:
    """Yield the rows of an Arrow file, as `read_parquet` does."""
    rows = _TableRows(path, field)
    try:
        with pa.memory_map(str(path)) as file:
            for batch in _arrow_batches(file, f"{field}: {path}"):
                rows.refuse_views(batch)
                # Places outside of the file are otherwise followed.
                batch.validate(full=True)
                for start in range(0, len(batch), BATCH_ROWS):
                    yield from rows.of(batch.slice(start, BATCH_ROWS))
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        raise DataError(
            f"{field}: {path} is not a whole Arrow file: {excerpt(str(error))}; fetch or write it again."
        ) from error


def _arrow_batches(file: pa.MemoryMappedFile, place: str) -> Iterator[pa.RecordBatch]:
    """Yield the batches of either form: with a footer, or as a stream, which is what the datasets library keeps.

    With a footer it is a stream as well, behind eight bytes, and read as one: what is measured is what is read.
    """
    has_footer = file.read(6) == b"ARROW1"
    count = pa.ipc.open_file(file).num_record_batches if has_footer else None
    start = 8 if has_footer else 0
    file.seek(start)
    _refuse_packed(file, place)
    file.seek(start)
    with pa.ipc.open_stream(file) as reader:
        refuse_columns(reader.schema.names, place)
        read = 0
        for batch in reader:
            yield batch
            read += 1
    if count is not None and read != count:
        raise pa.ArrowInvalid(f"{read} batches where its end names {count}")


def _refuse_packed(file: pa.MemoryMappedFile, place: str) -> None:
    for message in pa.ipc.MessageReader.open_stream(file):
        size = unpacked_bytes(message)
        if size > HELD_BYTES:
            raise DataError(
                f"{place} has a compressed batch of {size:,} bytes, which would be held as a whole; at most "
                f"{HELD_BYTES:,} are. Write smaller ones (max_chunksize), or without compression."
            )


class _TableRows:
    """The rows of a table's batches, up to a size that honest files do not reach."""

    def __init__(self, path: Path, field: str) -> None:
        self._place = f"{field}: {path}"
        self._left = float(max(ALWAYS_UNPACKED_BYTES, _MOST_REPEATED * path.stat().st_size))

    def of(self, batch: pa.RecordBatch) -> Iterator[Row]:
        """Yield the rows of a batch, as many at once as are small together."""
        sizes = self._sizes(batch)
        self._left -= sizes.sum()
        if self._left < 0:
            raise self._repeated()
        ends, start, read_bytes = np.cumsum(sizes), 0, 0.0
        while start < len(batch):
            stop = max(start + 1, int(np.searchsorted(ends, read_bytes + BATCH_BYTES, side="right")))
            yield from self._read(batch.slice(start, stop - start))
            start, read_bytes = stop, ends[stop - 1]

    def refuse_views(self, batch: pa.RecordBatch) -> None:
        """Raise where views are of more than may be read: a million may be of one text, and each would be validated."""
        batch.validate()
        left = self._left
        views = [field.name for field in batch.schema if "_view" in str(field.type)]
        for start in range(0, len(batch) if views else 0, BATCH_ROWS):
            part = batch.slice(start, BATCH_ROWS)
            left -= sum(np.sum(self._value_bytes(name, part.column(name))) for name in views)
            if left < 0:
                raise self._repeated()

    def _repeated(self) -> DataError:
        return DataError(
            f"{self._place} unpacks to more than {_MOST_REPEATED} times its size, as files do that are made to fill a "
            f"disk. If it is what you want, write the rows as jsonl."
        )

    def _read(self, batch: pa.RecordBatch) -> list[Row]:
        try:
            rows: list[Row] = plain(batch).to_pylist()
            return rows
        # What Arrow can hold and Python cannot: the year 300,000, a time zone nobody knows.
        except (ValueError, OverflowError, LookupError, RecursionError) as error:
            raise DataError(
                f"{self._place} holds a value that cannot be read: {excerpt(str(error))}. Write it as text, or leave "
                f"out its column."
            ) from error

    def _sizes(self, batch: pa.RecordBatch) -> Sizes:
        sizes = np.full(len(batch), _ROW_BYTES, dtype=np.float64)
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            sizes += self._value_bytes(name, column)
        if np.max(sizes, initial=0) > BATCH_BYTES:
            raise DataError(
                f"{self._place} has a row of {sizes.max():,.0f} bytes, more than the {BATCH_BYTES:,} that are read. "
                f"Leave out the columns that are not used."
            )
        return sizes

    def _value_bytes(self, name: str, column: pa.Array) -> Sizes | float:
        try:
            sizes = value_bytes(column)
        except UnmeasuredTypeError as error:
            raise DataError(
                f"{self._place} has a column {excerpt(name)} of type {excerpt(str(error))}, which is not read. Write "
                f"it as texts, numbers, lists or objects."
            ) from error
        if (longest := np.max(sizes, initial=0)) > LONGEST_ROW_BYTES:
            raise DataError(
                f"{self._place} has a {_word_for(column.type)} of {longest:,.0f} bytes in column {excerpt(name)}, more "
                f"than the {LONGEST_ROW_BYTES:,} that are read; no model does. Cut it or drop the row."
            )
        return sizes


def _word_for(kind: pa.DataType) -> str:
    if pa.types.is_dictionary(kind):
        return _word_for(kind.value_type)
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    return "text" if is_text else "value"
