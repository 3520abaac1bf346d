"""Read the rows of one file: JSON lines, JSON, CSV, text, Parquet or Arrow, the first four also compressed.

Rows come one after the other; what is held at once is bounded by the longest row, whatever the file unpacks to. CSV
values are strings, always; an empty cell is an empty string. The other formats keep their types.
"""

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from finetune_trainer.errors import DataError

Row = dict[str, object]

LONGEST_ROW_BYTES = 8 << 20
"""Of a line, and of a text in a column: far beyond any model's context."""
LONGEST_DOCUMENT_BYTES = 256 << 20
"""Of a file that is one JSON array, which is held as a whole."""

_SHOWN_CHARACTERS = 80
_BYTE_ORDER_MARK = "\ufeff"
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}

# Text packs to a fifth, tables of repetitive text to a fiftieth; what packs better than this is made to fill a disk.
_MOST_UNPACKED = 200
_ALWAYS_UNPACKED_BYTES = 16 << 20

_BATCH_ROWS = 1024
_BATCH_BYTES = 32 << 20


def format_of(name: str) -> str | None:
    """Return the ending of ``name`` that says its format, with that of its compression; nothing when none is known."""
    parts = name.lower().rsplit("/", 1)[-1].split(".")
    plain = f".{parts[-1]}" if len(parts) > 1 else ""
    if plain in _COMPRESSIONS and len(parts) > 2:
        inner = f".{parts[-2]}"
        return f"{inner}{plain}" if inner in _TEXT_READERS else None
    return plain if plain in _TEXT_READERS or plain in _BINARY_READERS else None


def read_file(path: Path, field: str) -> Iterator[Row]:
    """Yield the rows of a file that has a known format; ``field`` is the setting that named it, for messages.

    Raises:
        DataError: the file is truncated or broken, or a row is too large.
    """
    ending = format_of(path.name)
    assert ending is not None, path
    _, plain, compression = ending.rpartition(".")[0], "." + ending.split(".")[1], "." + ending.split(".")[-1]
    if plain in _BINARY_READERS:
        yield from _BINARY_READERS[plain](path, field)
        return
    with path.open("rb") as file:
        if compression not in _COMPRESSIONS:
            yield from _TEXT_READERS[plain](file, path, field)
            return
        with pa.input_stream(file, compression=_COMPRESSIONS[compression]) as packed:
            unpacked = io.BufferedReader(cast(Any, _Unpacked(packed, path, field)), 1 << 17)
            yield from _TEXT_READERS[plain](unpacked, path, field)


class _Unpacked(io.RawIOBase):
    """A compressed file as it reads unpacked, up to a size that honest files do not reach."""

    def __init__(self, packed: pa.NativeFile, path: Path, field: str) -> None:
        self._packed = packed
        self._place = f"{field}: {path}"
        self._left = max(_ALWAYS_UNPACKED_BYTES, _MOST_UNPACKED * path.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            content = self._packed.read(len(buffer))
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{self._place} cannot be unpacked: {_shown(str(error))}. It is truncated, damaged or of another "
                f"format than its ending says; fetch it again."
            ) from error
        self._left -= len(content)
        if self._left < 0:
            raise DataError(
                f"{self._place} unpacks to more than {_MOST_UNPACKED} times its size, as files do that are made to "
                f"fill a disk. If it is what you want, unpack it yourself and name the result."
            )
        buffer[: len(content)] = content
        return len(content)


def _lines(file: BinaryIO, path: Path, field: str) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, text with its line end): decoded line by line so that an error knows its line."""
    number = 0
    while raw := file.readline(LONGEST_ROW_BYTES + 1):
        number += 1
        if len(raw) > LONGEST_ROW_BYTES:
            raise DataError(
                f"{field}: {path} line {number} has more than {LONGEST_ROW_BYTES:,} bytes, which no model reads; "
                f"cut it, or write one row a line."
            )
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{field}: {path} line {number} is not UTF-8 (byte {raw[error.start]:#04x} at column "
                f"{error.start + 1}); convert it, e.g. iconv -f LATIN1 -t UTF-8 (or -f UTF-16)."
            ) from error
        if "\0" in line:
            raise DataError(
                f"{field}: {path} line {number} holds a null character: a binary or UTF-16 file; "
                f"convert it, e.g. iconv -f UTF-16 -t UTF-8."
            )
        yield number, line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON; write null, or drop the row")


def _read_json_lines(file: BinaryIO, path: Path, field: str) -> Iterator[Row]:
    for number, line in _lines(file, path, field):
        if not line.strip():
            continue
        try:
            row = json.loads(line, parse_constant=_refuse_constant)
            if "\\u" in line:
                _refuse_lone_surrogates(row)
        except (ValueError, RecursionError) as error:  # RecursionError: thousands of nested brackets
            hint = "" if line.endswith("\n") else " It is the last line and has no line end: is the file truncated?"
            raise DataError(f"{field}: {path} line {number} is not JSON: {error}: {_shown(line)}.{hint}") from error
        if not isinstance(row, dict):
            raise DataError(
                f"{field}: {path} line {number} is a JSON {_JSON_NAMES[type(row)]}, not an object: {_shown(line)}. "
                f'Write one object per line: {{"column": "value"}}.'
            )
        yield row


_JSON_NAMES: dict[type, str] = {
    list: "array",
    str: "string",
    int: "number",
    float: "number",
    bool: "boolean",
    type(None): "null",
}


def _read_json(file: BinaryIO, path: Path, field: str) -> Iterator[Row]:
    """Read one array of objects, which must fit into memory."""
    content = file.read(LONGEST_DOCUMENT_BYTES + 1)
    if len(content) > LONGEST_DOCUMENT_BYTES:
        raise DataError(
            f"{field}: {path} has more than {LONGEST_DOCUMENT_BYTES:,} bytes, and JSON is read as a whole; write one "
            f"object a line (jsonl), e.g. jq -c '.[]'."
        )
    try:
        document = json.loads(content.decode("utf-8-sig"), parse_constant=_refuse_constant)
        if b"\\u" in content:
            _refuse_lone_surrogates(document)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise DataError(f"{field}: {path} is not JSON: {_shown(str(error))}; write it again, as UTF-8.") from error
    if not isinstance(document, list):
        raise DataError(
            f"{field}: {path} holds a JSON {_JSON_NAMES.get(type(document), 'object')}, not an array of objects. Write "
            f"[{{...}}, {{...}}], or one object a line and call it .jsonl."
        )
    for number, row in enumerate(document):
        if not isinstance(row, dict):
            raise DataError(
                f"{field}: {path} entry {number} (counted from 0) is a JSON {_JSON_NAMES[type(row)]}, not an object: "
                f"{_shown(repr(row))}."
            )
        yield row


def _read_text(file: BinaryIO, path: Path, field: str) -> Iterator[Row]:
    """Read lines of text, each a row with the column text; blank ones are none."""
    for _, line in _lines(file, path, field):
        if line.strip():
            yield {"text": line.rstrip("\r\n")}


def _refuse_lone_surrogates(row: object) -> None:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError("an escaped half character (\\ud800 to \\udfff without its partner)") from error


def _read_csv(file: BinaryIO, path: Path, field: str) -> Iterator[Row]:
    reader = csv.reader((line for _, line in _lines(file, path, field)), strict=True)
    try:
        header = next(reader, None)
        if header is None:
            return
        _check_header(header, path, field)
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                raise DataError(
                    f"{field}: {path} line {reader.line_num} has {len(cells)} cells where the header has "
                    f"{len(header)} ({_shown(','.join(header))}): {_shown(','.join(cells))}. "
                    f"Put cells that hold commas or line ends in double quotes."
                )
            yield dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise DataError(
            f"{field}: {path} line {reader.line_num} is not CSV: {error}. A quote that is never closed reads to the "
            f"end of the file; cells beyond {csv.field_size_limit():,} characters need jsonl or parquet."
        ) from error


def _check_header(header: list[str], path: Path, field: str) -> None:
    if len(header) == 1 and (separator := next((mark for mark in ";\t|" if mark in header[0]), None)):
        raise DataError(f"{field}: {path} separates its columns by {separator!r}; CSV here means commas.")
    if not all(name.strip() for name in header):
        raise DataError(f"{field}: {path} line 1 must name every column; it reads {_shown(','.join(header))}.")
    if repeated := sorted({name for name in header if header.count(name) > 1}):
        raise DataError(f"{field}: {path} line 1 names columns twice: {repeated}; rename them.")


def _read_parquet(path: Path, field: str) -> Iterator[Row]:
    try:
        with pq.ParquetFile(path) as file:
            _refuse_repeated(file.schema_arrow.names, path, field)
            texts = [each.name for each in file.schema_arrow if pa.types.is_string(each.type)]
            rows = _rows_at_once(file.metadata)
        # As dictionaries: a value that is written once and repeated a million times is held once.
        with pq.ParquetFile(path, read_dictionary=texts) as file:
            for batch in file.iter_batches(batch_size=rows):
                yield from _rows_of(batch, path, field)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(
            f"{field}: {path} is not a whole Parquet file: {_shown(str(error))}; fetch or write it again."
        ) from error
    except OSError as error:  # what Arrow raises for truncated pages
        raise DataError(f"{field}: {path} is truncated or broken: {_shown(str(error))}; fetch it again.") from error


def _rows_at_once(metadata: pq.FileMetaData) -> int:
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    bytes_a_row = max((group.total_byte_size / max(1, group.num_rows) for group in groups), default=1)
    return max(1, min(_BATCH_ROWS, int(_BATCH_BYTES / max(1, bytes_a_row))))


def _read_arrow(path: Path, field: str) -> Iterator[Row]:
    try:
        with pa.memory_map(str(path)) as file:
            for batch in _arrow_batches(file):
                _refuse_repeated(batch.schema.names, path, field)
                for start in range(0, len(batch), _BATCH_ROWS):
                    yield from _rows_of(batch.slice(start, _BATCH_ROWS), path, field)
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        raise DataError(
            f"{field}: {path} is not a whole Arrow file: {_shown(str(error))}; fetch or write it again."
        ) from error


def _arrow_batches(file: pa.MemoryMappedFile) -> Iterator[pa.RecordBatch]:
    """Yield the batches of either form: with a footer, or as a stream, which is what the datasets library keeps."""
    if file.read(6) == b"ARROW1":
        reader = pa.ipc.open_file(file)
        yield from (reader.get_batch(index) for index in range(reader.num_record_batches))
    else:
        file.seek(0)
        yield from pa.ipc.open_stream(file)


def _refuse_repeated(names: list[str], path: Path, field: str) -> None:
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"{field}: {path} names columns twice: {repeated}; rename them.")


def _rows_of(batch: pa.RecordBatch, path: Path, field: str) -> Iterator[Row]:
    """Yield the rows of a batch, together where they are small and one by one where they are not."""
    sizes = np.zeros(len(batch), dtype=np.int64)
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        lengths = _text_bytes(column)
        if lengths is None:
            continue
        if len(lengths) and lengths.max() > LONGEST_ROW_BYTES:
            raise DataError(
                f"{field}: {path} has a text of {lengths.max():,} bytes in column {name!r}, more than the "
                f"{LONGEST_ROW_BYTES:,} that are read; no model does. Cut it or drop the row."
            )
        sizes += lengths
    step = len(batch) if sizes.sum() <= _BATCH_BYTES else 1
    for start in range(0, len(batch), step):
        yield from _plain(batch.slice(start, step)).to_pylist()


def _text_bytes(column: pa.Array) -> np.ndarray[Any, np.dtype[np.int64]] | None:
    """Return how long each value of a column of texts is; nothing for a column of another type."""
    if pa.types.is_dictionary(column.type):
        lengths = _text_bytes(column.dictionary)
        if lengths is None:
            return None
        indices = pc.fill_null(column.indices, 0).to_numpy(zero_copy_only=False)
        return lengths[indices] if len(lengths) else np.zeros(len(indices), dtype=np.int64)
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return None
    found = pc.fill_null(pc.binary_length(column), 0)
    return cast("np.ndarray[Any, np.dtype[np.int64]]", found.to_numpy(zero_copy_only=False).astype(np.int64))


def _plain(batch: pa.RecordBatch) -> pa.RecordBatch:
    columns = [
        column.dictionary_decode() if pa.types.is_dictionary(column.type) else column for column in batch.columns
    ]
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _shown(text: str) -> str:
    text = text.strip()
    return repr(text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "…")


_TEXT_READERS: dict[str, Callable[[BinaryIO, Path, str], Iterator[Row]]] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".txt": _read_text,
}
_BINARY_READERS: dict[str, Callable[[Path, str], Iterator[Row]]] = {".parquet": _read_parquet, ".arrow": _read_arrow}

KNOWN_ENDINGS = (*_TEXT_READERS, *_BINARY_READERS)
"""Of files that are read; the text formats also with .gz or .zst behind it."""
