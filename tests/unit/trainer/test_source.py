import gzip
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune_trainer.errors import DataError, SpecError
from finetune_trainer.source import fetch_local, read_rows

FIELD = "spec.data.tasks[0].source"


def write(folder: Path, name: str, content: bytes | str) -> str:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def rows_of(uri: str) -> list[dict[str, object]]:
    return list(read_rows(fetch_local(uri, FIELD), FIELD))


def write_parquet(folder: Path, table: pa.Table) -> Path:
    path = folder / "rows.parquet"
    pq.write_table(table, path)
    return path


READABLE = {
    "json lines keep their types": (
        "rows.jsonl", '{"a": 1, "b": null}\n{"a": "x", "b": [1]}\n', 0, {"a": 1, "b": None}),
    "a byte order mark before json is skipped": ("rows.jsonl", '\ufeff{"a": 1}\n', 0, {"a": 1}),
    "blank lines between json lines are skipped": ("rows.jsonl", '\n{"a": 1}\n  \n{"a": 2}', 1, {"a": 2}),
    "the ending's case does not matter": ("ROWS.JSONL", '{"a": 1}', 0, {"a": 1}),
    "a line separator inside a json string is no line end": ("rows.jsonl", '{"a": "x\u2028y"}\n', 0, {"a": "x\u2028y"}),
    "an escaped pair of halves is one character": ("rows.jsonl", r'{"a": "\ud83d\ude00"}', 0, {"a": "\U0001f600"}),
    "csv values are strings": ("rows.csv", "a,b\n1,true\n", 0, {"a": "1", "b": "true"}),
    "an empty csv cell is an empty string": ("rows.csv", "a,b\n1,\n", 0, {"a": "1", "b": ""}),
    "a byte order mark before csv is no part of the first name": (
        "rows.csv", "\ufeffa,b\n1,2\n", 0, {"a": "1", "b": "2"}),
    "csv cells in quotes hold commas and line ends": (
        "rows.csv", 'a,b\n"1,\n2","say ""hi"""\n', 0, {"a": "1,\n2", "b": 'say "hi"'}),
    "csv of windows has no line ends in its values": ("rows.csv", "a,b\r\n1,2\r\n", 0, {"a": "1", "b": "2"}),
    "a single csv column needs no comma": ("rows.csv", "text\nhello\n", 0, {"text": "hello"}),
    "an array of json objects": ("rows.json", '[{"a": 1},\n {"a": 2}]', 1, {"a": 2}),
    "an array in one line, with white space around": ("rows.json", ' [ {"a": 1} , {"a": 2} ] \n', 1, {"a": 2}),
    "a byte order mark before an array is skipped": ("rows.json", '\ufeff[{"a": 1}]', 0, {"a": 1}),
    "every line of text is a row": ("rows.txt", "one\r\n\n two \n", 1, {"text": " two "}),
    "json lines in gzip": ("rows.jsonl.gz", gzip.compress(b'{"a": 1}\n{"a": 2}'), 1, {"a": 2}),
    "csv in zstd": ("rows.csv.zst", pa.Codec("zstd").compress(b"a,b\n1,2\n", asbytes=True), 0, {"a": "1", "b": "2"}),
}  # fmt: skip


@pytest.mark.parametrize("name, content, index, expected", READABLE.values(), ids=READABLE.keys())
def test_rows_are_read(tmp_path, name, content, index, expected):
    assert rows_of(write(tmp_path, name, content))[index] == expected


BROKEN = {
    "a broken json line is named": ("rows.jsonl", '{"a": 1}\n{"a": \n{"a": 3}\n', r"line 2 is not JSON.*'\{\"a\":'"),
    "a truncated last json line is recognised": ("rows.jsonl", '{"a": 1}\n{"a": "hal', "line 2.*truncated"),
    "a json array is no row": ("rows.jsonl", "[1, 2]\n", "line 1 is a JSON array, not an object"),
    "a json null is no row": ("rows.jsonl", "null\n", "line 1 is a JSON null, not an object"),
    "NaN is no json": ("rows.jsonl", '{"a": NaN}\n', "line 1.*NaN is not JSON"),
    "infinity is no json": ("rows.jsonl", '{"a": -Infinity}\n', "-Infinity is not JSON"),
    "a json number of 5,000 digits is refused": ("rows.jsonl", '{"a": ' + "9" * 5000 + "}\n", "line 1 is not JSON"),
    "10,000 nested brackets are refused": ("rows.jsonl", "[" * 10_000 + "\n", "line 1 is not JSON"),
    "half a surrogate pair is refused": ("rows.jsonl", '{"a": "\\ud83d"}\n', "half character"),
    "latin-1 is no utf-8": ("rows.jsonl", '{"a": 1}\n{"a": "é"}'.encode("latin-1"), "line 2 is not UTF-8.*0xe9"),
    "utf-16 with a mark is no utf-8": ("rows.csv", "a,b\n1,2\n".encode("utf-16"), "line 1 is not UTF-8.*iconv"),
    "utf-16 without a mark is recognised": ("rows.csv", "a,b\n1,2\n".encode("utf-16-le"), "null character.*UTF-16"),
    "an empty file is named": ("rows.jsonl", "", "is empty"),
    "a file of blank lines holds no rows": ("rows.jsonl", "\n\n", "holds no rows"),
    "a csv header alone holds no rows": ("rows.csv", "a,b\n", "holds no rows"),
    "a csv row with too many cells is named": ("rows.csv", "a,b\n1,2\n1,2,3\n", "line 3 has 3 cells.*header has 2"),
    "a csv row with too few cells is named": ("rows.csv", "a,b\n1\n", "line 2 has 1 cells"),
    "an open csv quote is named": ("rows.csv", 'a,b\n1,"2\n3,4\n', "is not CSV.*never closed"),
    "text behind a csv quote is named": ("rows.csv", 'a,b\n"1"x,2\n', "line 2 is not CSV"),
    "a huge csv cell points to other formats": ("rows.csv", "a,b\n1," + "x" * 200_000 + "\n", "jsonl or parquet"),
    "a csv header that names a column twice": ("rows.csv", "a,b,a\n1,2,3\n", r"names columns twice: \['a'\]"),
    "a csv header with a nameless column": ("rows.csv", "a,\n1,2\n", "line 1 must name every column"),
    "csv with semicolons is recognised": ("rows.csv", "a;b\n1;2\n", "separates its columns by ';'"),
    "csv with tabs is recognised": ("rows.csv", "a\tb\n1\t2\n", "separates its columns by"),
    "text that calls itself parquet": ("rows.parquet", "a,b\n1,2\n" * 10, "not a whole Parquet file"),
}  # fmt: skip


@pytest.mark.parametrize("name, content, message", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_file_is_a_data_error(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message) as caught:
        rows_of(write(tmp_path, name, content))
    assert str(caught.value).startswith(FIELD)
    assert name in str(caught.value)
    assert len(str(caught.value)) < 800


def test_rows_before_a_broken_line_are_delivered(tmp_path):
    rows = read_rows(Path(write(tmp_path, "rows.jsonl", '{"a": 1}\n{')), FIELD)
    assert next(rows) == {"a": 1}
    with pytest.raises(DataError, match="line 2"):
        next(rows)


def test_parquet_keeps_types_and_nested_columns(tmp_path):
    rows = [
        {"text": "x", "n": 1, "tags": ["a", "b"], "meta": {"k": 1.5}},
        {"text": None, "n": 2, "tags": [], "meta": None},
    ]
    assert rows_of(str(write_parquet(tmp_path, pa.Table.from_pylist(rows)))) == rows


def test_parquet_without_rows_is_a_data_error(tmp_path):
    path = write_parquet(tmp_path, pa.table({"a": pa.array([], pa.string())}))
    with pytest.raises(DataError, match="holds no rows"):
        rows_of(str(path))


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9, 0.99])
def test_truncated_parquet_is_a_data_error(tmp_path, kept):
    path = write_parquet(tmp_path, pa.table({"a": [f"row {number}" for number in range(1000)]}))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(DataError, match=r"not a whole Parquet file.*fetch"):
        rows_of(str(path))


def test_parquet_with_damaged_pages_is_a_data_error(tmp_path):
    path = write_parquet(tmp_path, pa.table({"a": [f"row {number}" for number in range(1000)]}))
    content = bytearray(path.read_bytes())
    content[4:400] = b"\xff" * 396
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"rows\.parquet"):
        rows_of(str(path))


@pytest.mark.parametrize("uri", ["file://{path}", "{path}"])
def test_a_file_is_named_by_uri_or_path(tmp_path, uri):
    path = write(tmp_path, "my rows.jsonl", '{"a": 1}')
    assert rows_of(uri.format(path=path)) == [{"a": 1}]


def test_a_quoted_file_uri_is_unquoted(tmp_path):
    write(tmp_path, "my rows.jsonl", '{"a": 1}')
    assert rows_of((tmp_path / "my rows.jsonl").as_uri()) == [{"a": 1}]


def test_a_percent_sign_in_a_name_is_taken_literally(tmp_path):
    path = write(tmp_path, "100%25.jsonl", '{"a": 1}')
    assert rows_of(f"file://{path}") == [{"a": 1}]


def test_a_missing_file_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match=r"there is no file .*gone\.jsonl"):
        read_rows(tmp_path / "gone.jsonl", FIELD)


def test_a_file_below_a_file_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="cannot open"):
        read_rows(Path(write(tmp_path, "rows", "x")) / "rows.jsonl", FIELD)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows"])
def test_an_empty_folder_is_a_data_error(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(DataError, match=r"holds no file of rows \(\.jsonl.*\) but nothing"):
        read_rows(tmp_path / name, FIELD)


@pytest.mark.parametrize(
    "uri, message",
    [
        ("s3://bucket/rows.jsonl", "s3:// .*not read here"),
        ("file://rows.jsonl", "must be absolute"),
        ("/data/rows.xlsx", r"'\.xlsx'.*names no known format.*\.jsonl"),
        ("/data/rows", "names no known format"),
    ],
)
def test_a_source_of_unknown_kind_is_a_spec_error(uri, message):
    with pytest.raises(SpecError, match=message):
        read_rows(fetch_local(uri, FIELD), FIELD)


def test_json_rows_survive_a_round_trip(tmp_path):
    rows = [{"text": text} for text in ("", "a\nb", "\U0001f600", '"', "\\", "\x00", "x" * 100_000)]
    assert rows_of(write(tmp_path, "rows.jsonl", "\n".join(map(json.dumps, rows)))) == rows


# --- other formats, many files


@pytest.mark.parametrize("with_footer", [True, False], ids=["arrow file", "arrow stream, as datasets keeps it"])
def test_arrow_keeps_types(tmp_path, with_footer):
    rows = [{"text": f"row {n}", "n": n, "tags": ["a"], "meta": {"k": n}} for n in range(3000)]
    table = pa.Table.from_pylist(rows)
    path = tmp_path / "rows.arrow"
    make = pa.ipc.new_file if with_footer else pa.ipc.new_stream
    with make(str(path), table.schema) as writer:
        writer.write_table(table)
    assert rows_of(str(path)) == rows


def test_a_column_of_dictionaries_reads_as_its_values(tmp_path):
    table = pa.table({"label": pa.array(["a", None, "b", "a"]).dictionary_encode(), "empty": [None] * 4})
    assert [row["label"] for row in rows_of(str(write_parquet(tmp_path, table)))] == ["a", None, "b", "a"]


def test_the_files_of_a_folder_are_read_in_the_order_of_their_names(tmp_path):
    (tmp_path / "deep").mkdir()
    for name, text in {"b.jsonl": "2", "a.csv": "1", "deep/c.txt": "3", ".hidden.jsonl": "x", "notes.md": "x"}.items():
        content = {"b.jsonl": f'{{"text": "{text}"}}', "a.csv": f"text\n{text}\n"}.get(name, text)
        write(tmp_path, name, content)
    assert [row["text"] for row in rows_of(str(tmp_path))] == ["1", "2", "3"]
    assert [row["text"] for row in rows_of(f"{tmp_path}/*.jsonl")] == ["2"]
    assert [row["text"] for row in rows_of(f"file://{tmp_path}/**/*.txt")] == ["3"]


def test_a_folder_of_several_splits_is_not_guessed_at(tmp_path):
    for name in ("train.jsonl", "test.jsonl"):
        write(tmp_path, name, '{"text": "x"}')
    with pytest.raises(DataError, match=r"different splits \(test, train\): test\.jsonl, train\.jsonl\. Name those"):
        rows_of(str(tmp_path))
    assert len(rows_of(f"{tmp_path}/train*")) == 1


def test_a_pattern_that_nothing_matches_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match=r"nothing matches .*rows-\*\.jsonl"):
        rows_of(f"{tmp_path}/rows-*.jsonl")


def test_wide_rows_are_read_a_few_at_a_time(tmp_path):
    path = write_parquet(tmp_path, pa.table({"a": [str(n % 10) * 1_000_000 for n in range(30)]}))
    assert [len(str(row["a"])) for row in rows_of(str(path))] == [1_000_000] * 30


def test_an_array_is_read_across_the_pieces_of_its_file(tmp_path):
    rows = [{"text": "é\U0001f600" * (n % 1000), "n": n, "inner": [{"k": n}]} for n in range(3000)]
    content = json.dumps(rows, ensure_ascii=False)
    assert len(content) > 2 << 20
    assert rows_of(write(tmp_path, "rows.json", content)) == rows


def test_a_long_text_that_few_rows_have_is_read_as_it_is(tmp_path):
    rows = [{"text": "x" * 3_000_000 if n % 100 == 0 else f"row {n}", "tags": ["y" * n, None]} for n in range(400)]
    assert rows_of(str(write_parquet(tmp_path, pa.Table.from_pylist(rows)))) == rows


@pytest.mark.parametrize("dictionary", [True, False])
def test_every_kind_of_column_is_read_from_parquet(tmp_path, dictionary):
    columns = {
        "large": pa.array(["a", None, "b"], pa.large_string()),
        "view": pa.array(["a", None, "b"], pa.string_view()),
        "bytes": pa.array([b"a", None, b"b"]),
        "equal": pa.array([b"aa", None, b"bb"], pa.binary(2)),
        "map": pa.array([[("k", "v")], None, []], pa.map_(pa.string(), pa.string())),
        "lists": pa.array([[["a"], None], None, []], pa.large_list(pa.list_(pa.string()))),
        "two": pa.array([["a", "b"], None, ["c", None]], pa.list_(pa.string(), 2)),
        "decimal": pa.array([1, None, 2]).cast(pa.decimal128(21, 1)),
        "labels": pa.array([["a"], None, ["b"]], pa.list_(pa.dictionary(pa.int8(), pa.string()))),
        "deep": pa.array([{"x": {"y": ["z"]}}, None, {"x": None}]),
    }
    table = pa.table(columns)
    pq.write_table(table, tmp_path / "rows.parquet", use_dictionary=dictionary, row_group_size=2)
    assert rows_of(str(tmp_path / "rows.parquet")) == table.to_pylist()
    (tmp_path / "rows.arrow").write_bytes(b"")
    with pa.ipc.new_file(str(tmp_path / "rows.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    assert rows_of(str(tmp_path / "rows.arrow")) == table.to_pylist()


def test_memory_stays_small_beside_the_group_of_rows(tmp_path):
    draws = random.Random(0)
    path = write_parquet(tmp_path, pa.table({"text": [draws.randbytes(1000).hex() for _ in range(30_000)]}))
    before = pa.default_memory_pool().bytes_allocated()
    most = max(pa.default_memory_pool().bytes_allocated() for _ in read_rows(path, FIELD))
    assert most - before < 20 << 20
