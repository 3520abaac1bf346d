"""Measure what Arrow holds before Python does: what a message unpacks to, how large the values of a column are.

Pure: reads what it is given and nothing else.
"""

import struct
from collections.abc import Iterator
from itertools import chain
from typing import cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Sizes = npt.NDArray[np.float64]
"""Bytes, one for each value; floating, as what a file claims may be more than 64 bits count."""

_CELL_BYTES = 8
"""Of a number, and of a place in a list."""


class UnmeasuredTypeError(Exception):
    """Nobody knows how large values of this type are."""


def value_bytes(column: pa.Array) -> Sizes | float:
    """Return about how long each value of a column is; one number where all are of one length.

    Nothing is made that is larger than the column's own buffers: of nulls there may be billions in none.

    Raises:
        ArrowInvalid: it names entries that its dictionary does not have.
        UnmeasuredTypeError: of that type, with its name.
    """
    kind = column.type
    if isinstance(column, pa.ExtensionArray):
        return value_bytes(column.storage)
    if pa.types.is_dictionary(kind):
        return _where_valid(column, _of_entries(column.dictionary, column.indices))
    if pa.types.is_struct(kind):
        return cast("Sizes | float", sum((value_bytes(column.field(at)) for at in range(kind.num_fields)), _CELL_BYTES))
    if pa.types.is_fixed_size_list(kind):
        return _of_equal_lists(column)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_map(kind):
        return _of_lists(column)
    if pa.types.is_string_view(kind) or pa.types.is_binary_view(kind):
        # Each is 16 bytes, of which the first four are its length.
        end = column.offset + len(column)
        lengths = np.frombuffer(column.buffers()[1], np.int32, 4 * end)[4 * column.offset :: 4]
        return _where_valid(column, lengths.astype(np.float64))
    if pa.types.is_fixed_size_binary(kind):
        return float(kind.byte_width)
    if any(is_kind(kind) for is_kind in _TEXT_KINDS):
        return _numbers(pc.fill_null(pc.binary_length(column), 0))
    if pa.types.is_primitive(kind) or pa.types.is_null(kind) or pa.types.is_decimal(kind):
        return float(_CELL_BYTES)
    raise UnmeasuredTypeError(str(kind))


_TEXT_KINDS = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)


def _numbers(column: pa.Array) -> Sizes:
    return cast(Sizes, column.to_numpy(zero_copy_only=False).astype(np.float64))


def _where_valid(column: pa.Array, sizes: Sizes | float) -> Sizes | float:
    if not column.null_count or isinstance(sizes, float):
        return sizes
    return cast(Sizes, np.where(column.is_valid().to_numpy(zero_copy_only=False), sizes, 0.0))


def _of_entries(dictionary: pa.Array, indices: pa.Array) -> Sizes | float:
    places = indices.drop_null().to_numpy(zero_copy_only=False)
    # Arrow follows them unchecked.
    if len(places) and (places.min() < 0 or places.max() >= len(dictionary)):
        raise pa.ArrowInvalid(f"places beyond the {len(dictionary):,} entries of a dictionary")
    entries = value_bytes(dictionary)
    if isinstance(entries, float) or not len(entries):
        return entries if isinstance(entries, float) else 0.0
    return cast(Sizes, entries[pc.fill_null(indices, 0).to_numpy(zero_copy_only=False)])


def _of_lists(column: pa.Array) -> Sizes | float:
    if not len(column):
        return 0.0
    offsets = column.offsets.to_numpy(zero_copy_only=False)
    first = int(offsets[0])
    inner = value_bytes(column.values.slice(first, int(offsets[-1]) - first))
    counts = np.diff(offsets).astype(np.float64)
    if isinstance(inner, float):
        return cast(Sizes, counts * (_CELL_BYTES + inner))
    ends = np.concatenate(([0.0], np.cumsum(inner)))
    return cast(Sizes, np.diff(ends[offsets - first]) + counts * _CELL_BYTES)


def _of_equal_lists(column: pa.Array) -> Sizes | float:
    each = column.type.list_size
    inner = value_bytes(column.values.slice(column.offset * each, len(column) * each))
    if isinstance(inner, float):
        return float(each * (_CELL_BYTES + inner))
    return cast(Sizes, inner.reshape(len(column), each).sum(axis=1) + each * _CELL_BYTES)


def dictionaries(batch: pa.RecordBatch) -> Iterator[pa.DictionaryArray]:
    """Yield what lies in dictionaries, however deep it is, in the order of the columns."""
    return chain.from_iterable(map(_dictionaries, batch.columns))


def _dictionaries(column: pa.Array) -> Iterator[pa.DictionaryArray]:
    kind = column.type
    if isinstance(column, pa.ExtensionArray):
        yield from _dictionaries(column.storage)
    elif pa.types.is_dictionary(kind):
        yield column
    elif pa.types.is_struct(kind):
        for at in range(kind.num_fields):
            yield from _dictionaries(column.field(at))
    elif pa.types.is_nested(kind):
        yield from _dictionaries(column.values)


def plain(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Return the same rows without dictionaries, however deep they are."""
    columns = [
        column if (kind := _plain_kind(column.type)) == column.type else column.cast(kind) for column in batch.columns
    ]
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _plain_kind(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(kind):
        return _plain_kind(kind.value_type)
    if pa.types.is_struct(kind):
        return pa.struct([_plain_field(kind.field(at)) for at in range(kind.num_fields)])
    if pa.types.is_map(kind):
        return pa.map_(_plain_field(kind.key_field), _plain_field(kind.item_field), keys_sorted=kind.keys_sorted)
    if pa.types.is_list(kind):
        return pa.list_(_plain_field(kind.value_field))
    if pa.types.is_large_list(kind):
        return pa.large_list(_plain_field(kind.value_field))
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(_plain_field(kind.value_field), kind.list_size)
    return kind


def _plain_field(field: pa.Field) -> pa.Field:
    return field.with_type(_plain_kind(field.type))


# --- messages of Arrow files, as format/Message.fbs of Apache Arrow has them

_DICTIONARY, _BATCH = 2, 3
# Of versions before 1.0, which Arrow still reads.
_OLD_COMPRESSION = b"ARROW:experimental_compression"


def unpacked_bytes(message: pa.Message) -> int:
    """Return how many bytes the buffers of a message say that they unpack to; none where they are not packed.

    Raises:
        ArrowInvalid: it is broken.
    """
    content = message.metadata.to_pybytes()
    try:
        return _unpacked_bytes(content, message.body)
    except struct.error as error:
        raise pa.ArrowInvalid(f"a broken message: {error}") from error


def _unpacked_bytes(content: bytes, body: pa.Buffer) -> int:
    root = struct.unpack_from("<I", content, 0)[0]
    kind, header = _field(content, root, 1), _inner(content, root, 2)
    if kind is None or header is None or content[kind] not in (_DICTIONARY, _BATCH):
        return 0
    batch = _inner(content, header, 1) if content[kind] == _DICTIONARY else header
    if batch is None or (_field(content, batch, 3) is None and _OLD_COMPRESSION not in content):
        return 0
    buffers = _inner(content, batch, 2)
    if buffers is None:
        return 0
    count, first = struct.unpack_from("<I", content, buffers)[0], buffers + 4
    places = struct.iter_unpack("<qq", content[first : first + 16 * count])
    return sum(max(0, struct.unpack_from("<q", body, place)[0]) for place, length in places if length)


def _field(content: bytes, table: int, number: int) -> int | None:
    """Return where a field of a table begins; absent when it has its default."""
    kinds = table - struct.unpack_from("<i", content, table)[0]
    slot = 4 + 2 * number
    if slot >= struct.unpack_from("<H", content, kinds)[0]:
        return None
    offset = struct.unpack_from("<H", content, kinds + slot)[0]
    return table + offset if offset else None


def _inner(content: bytes, table: int, number: int) -> int | None:
    """Return where the table or vector begins that a field points to."""
    field = _field(content, table, number)
    return None if field is None else field + struct.unpack_from("<I", content, field)[0]
