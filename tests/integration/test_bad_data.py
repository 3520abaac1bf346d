"""Rows and templates that are broken, hostile or too large: each ends in words, none is obeyed, memory stays small.

Every case is read as a job's task is, through templates and splits; what fills memory or time is read in a process of
its own, whose peak is measured.
"""

import gzip
import json
import os
import re
import subprocess
import sys
import textwrap
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune_api.spec import DataSpec
from finetune_trainer.dataset import load_dataset
from finetune_trainer.errors import FineTuneError

TEMPLATE = {"prompt": "{{ text }}", "completion": " {{ label }}"}
SOURCE = r"spec\.data\.tasks\[0\]\.source: "
GOOD = b"".join(json.dumps({"text": f"review {n}", "label": "x"}).encode() + b"\n" for n in range(60))


def load(path: Path | str, template: dict[str, str] | None = None, **task: Any) -> None:
    tasks = [{"name": "t", "source": f"file://{path}", "templates": [template or TEMPLATE], **task}]
    load_dataset(DataSpec.model_validate({"tasks": tasks, "splits": {"validation": 0.2, "test": 0.2}}))


def parquet(path: Path, table: pa.Table) -> bytes:
    pq.write_table(table, path)
    return path.read_bytes()


def packed(content: bytes) -> bytes:
    compressed: bytes = pa.Codec("zstd").compress(content, asbytes=True)
    return compressed


def arrow(table: pa.Table, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def columns_twice() -> bytes:
    return arrow(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]))


def outside() -> bytes:
    indices = pa.array([0, 1 << 30], pa.int32())
    return arrow(pa.table({"text": pa.DictionaryArray.from_arrays(indices, pa.array(["a"]), safe=False)}))


def far_future() -> bytes:
    return arrow(pa.table({"text": pa.array([10**16], pa.timestamp("s"))}))


def union() -> bytes:
    kinds, places = pa.array([0], pa.int8()), pa.array([0], pa.int32())
    return arrow(pa.table({"text": pa.UnionArray.from_dense(kinds, places, [pa.array(["a"])])}))


LONG = json.dumps({"text": "x" * (10 << 20), "label": "x"}).encode()

FILES: dict[str, tuple[str, bytes, str]] = {
    "nothing at all": ("rows.jsonl", b"", "is empty"),
    "white space alone": ("rows.jsonl", b" \n\n", "holds no rows"),
    "a header alone": ("rows.csv", b"text,label\n", "holds no rows"),
    "a table without a line, packed": ("rows.csv.gz", gzip.compress(b""), "holds no rows"),
    "an empty array": ("rows.json", b"[]", "holds no rows"),
    "latin-1": ("rows.jsonl", '{"text": "é"}'.encode("latin-1"), "line 1 is not UTF-8.*iconv"),
    "latin-1 in csv": ("rows.csv", "text,label\né,x\n".encode("latin-1"), "line 2 is not UTF-8"),
    "utf-16 with a mark": ("rows.csv", "text,label\na,b\n".encode("utf-16"), "not UTF-8.*UTF-16"),
    "utf-16 without a mark": ("rows.txt", "text\n".encode("utf-16-le"), "null character"),
    "latin-1 in an array": ("rows.json", '[{"text": "é"}]'.encode("latin-1"), "is not JSON: .*as UTF-8"),
    "a mark within the csv header": ("rows.csv", "label,\ufefftext\na,b\n".encode(), "'text' not among the columns"),
    "ragged csv, too many": ("rows.csv", b"text,label\na,b\na,b,c\n", "line 3 has 3 cells where the header has 2"),
    "ragged csv, too few": ("rows.csv", b"text,label\na\n", "line 2 has 1 cells"),
    "a quote that never closes": ("rows.csv", b'text,label\n"a,b\nc,d\n', "is not CSV.*never closed"),
    "a cell of 10 MB": ("rows.csv", b"text,label\n" + b"x" * (10 << 20) + b",y\n", "line 2 has more than 8,388,608"),
    "semicolons": ("rows.csv", b"text;label\na;b\n", "CSV here means commas"),
    "columns named twice in csv": ("rows.csv", b"text,text\na,b\n", r"names columns twice: \['text'\]"),
    "columns named twice in arrow": ("rows.arrow", columns_twice(), r"names columns twice: \['text'\]"),
    "a column without a name": ("rows.csv", b"text,\na,b\n", "must name every column"),
    "broken json": ("rows.jsonl", GOOD + b'{"text": \n', "line 61 is not JSON"),
    "a truncated last line": ("rows.jsonl", GOOD + b'{"text": "a', "line 61 is not JSON.*truncated"),
    "an array among the lines": ("rows.jsonl", b"[1]\n", "is a JSON array, not an object"),
    "an object instead of an array": ("rows.json", b'{"text": "a"}', "holds a JSON object, not an array"),
    "a number in the array": ("rows.json", b'[{"text": "a"}, 7]', r"entry 1 .* is a JSON number"),
    "an array that is cut": ("rows.json", b'[{"text": "a"},\n {"te', "is not JSON: line 2: .*entry 1, counted from 0"),
    "an array without a comma": ("rows.json", b'[{"text": "a"} {"text": "b"}]', "line 1: ',' or ']' expected"),
    "an array with a comma too many": ("rows.json", b'[{"text": "a"},\n]', "line 2: Expecting value"),
    "two arrays": ("rows.json", b'[{"text": "a"}]\n[]', "line 2: more behind the array's end"),
    "NaN in an array": ("rows.json", b'[{"text": NaN}]', "is not JSON: line 1: NaN is not JSON"),
    "JSON lines that call themselves an array": ("rows.json", GOOD, "holds a JSON object.*call it .jsonl"),
    "10,000 brackets": ("rows.json", b"[" * 10_000, "is not JSON"),
    "300 brackets": ("rows.jsonl", b'{"text": ' + b"[" * 300 + b"]" * 300 + b"}", "line 1 .*more than 100 lists"),
    "300 brackets in an array": ("rows.json", b'[{"text": ' + b"[" * 300 + b"]" * 300 + b"}]", "more than 100 lists"),
    "60,000 columns": ("rows.csv", ",".join(f"c{n}" for n in range(60_000)).encode(), "has 60,000 columns; at most"),
    "9,000 columns named twice": (
        "rows.csv", ",".join(f"c{n // 2}" for n in range(9000)).encode(), r"names columns twice.* and 4490 more"),
    "a place outside of the arrow file": ("rows.arrow", outside(), "not a whole Arrow file: .*indices invalid"),
    "a year that no calendar has": ("rows.arrow", far_future(), "holds a value that cannot be read"),
    "a union": ("rows.arrow", union(), "column 'text' of type 'dense_union.* is not read"),
    "a line of 10 MB": ("rows.jsonl", LONG, "line 1 has more than 8,388,608 bytes"),
    "a number of 5,000 digits": ("rows.jsonl", b'{"text": ' + b"9" * 5000 + b"}", "line 1 is not JSON"),
    "half a surrogate pair": ("rows.json", b'[{"text": "\\ud83d"}]', "half character"),
    "a list where text should be": ("rows.jsonl", b'{"text": ["a"], "label": "x"}\n', "a printed value is a list"),
    "mixed types": ("rows.jsonl", GOOD + b'{"text": {"a": 1}, "label": "x"}\n', "row 60 .*a printed value is a dict"),
    "null": ("rows.jsonl", GOOD + b'{"text": null, "label": "x"}\n', "row 60 .*missing"),
    "an empty answer": ("rows.jsonl", GOOD + b'{"text": "a", "label": ""}\n', "has no value in 1 of 61 rows"),
    "a blank answer": ("rows.jsonl", GOOD + b'{"text": "a", "label": "  "}\n', "completion is blank for row 60"),
    "other columns": ("rows.jsonl", b'{"body": "a"}\n', "'text', 'label' not among the columns .* are body"),
    "text that calls itself parquet": ("rows.parquet", b"text,label\n" * 9, "not a whole Parquet file"),
    "text that calls itself arrow": ("rows.arrow", b"text,label\n" * 9, "not a whole Arrow file"),
    "a stump of arrow": ("rows.arrow", columns_twice()[:60], "not a whole Arrow file"),
    "text that calls itself gzip": ("rows.jsonl.gz", GOOD, "cannot be unpacked"),
    "gzip that is cut": ("rows.jsonl.gz", gzip.compress(os.urandom(99_999))[:50_000], "line 1|cannot be unpacked"),
    "zstd that is damaged": ("rows.csv.zst", packed(GOOD * 50)[:200] + b"\xff" * 99, "cannot be unpacked|is not CSV"),
    "gzip in gzip": ("rows.jsonl.gz", gzip.compress(gzip.compress(GOOD)), "line 1 is not UTF-8"),
    "a pickle that calls itself jsonl": ("rows.jsonl", b"cos\nsystem\n(S'touch canary'\ntR.", "line 1 is not JSON"),
    "a format nobody reads": ("rows.pkl", b"cos\nsystem\n(S'touch canary'\ntR.", r"'\.pkl' .* names no known format"),
    "a packed binary format": ("rows.parquet.gz", gzip.compress(b"PAR1"), "names no known format"),
}  # fmt: skip


@pytest.mark.parametrize("name, content, words", FILES.values(), ids=FILES.keys())
def test_a_broken_file_is_told_in_words(tmp_path: Path, name: str, content: bytes, words: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FineTuneError, match=words) as caught:
        load(tmp_path / name)
    assert str(caught.value).startswith("spec.data.tasks[0].")
    assert len(str(caught.value)) < 1000
    assert not (tmp_path / "canary").exists()


def link_out(folder: Path) -> Path:
    (folder / "secret.jsonl").write_bytes(GOOD)
    (folder / "rows").mkdir()
    (folder / "rows" / "a.jsonl").write_bytes(GOOD)
    (folder / "rows" / "b.jsonl").symlink_to(folder / "secret.jsonl")
    return folder / "rows"


def linked_folder_out(folder: Path) -> str:
    rows = folder / "rows"
    rows.mkdir()
    (folder / "else").mkdir()
    (folder / "else" / "a.jsonl").write_bytes(GOOD)
    (rows / "in").symlink_to(folder / "else")
    return f"{rows}/*/*.jsonl"


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "rows.jsonl")
    return folder / "rows.jsonl"


def dangling(folder: Path) -> Path:
    (folder / "rows.jsonl").symlink_to(folder / "gone.jsonl")
    return folder / "rows.jsonl"


def looping(folder: Path) -> Path:
    (folder / "rows.jsonl").symlink_to(folder / "rows.jsonl")
    return folder / "rows.jsonl"


def several_splits(folder: Path) -> Path:
    for name in ("train-0.jsonl", "test-0.jsonl"):
        (folder / name).write_bytes(GOOD)
    return folder


PLACES: dict[str, tuple[Callable[[Path], Path | str], str]] = {
    "a link out of the folder": (link_out, r"b\.jsonl is a link out of .*rows, to .*secret\.jsonl"),
    "a pattern through a link out": (linked_folder_out, r"in/a\.jsonl is a link out of"),
    "a pipe": (pipe, "neither file nor folder but a pipe or device"),
    "a link to nothing": (dangling, r"there is no file .*rows\.jsonl"),
    "a link to itself": (looping, r"cannot open .*rows\.jsonl"),
    "files of several splits": (several_splits, r"different splits \(test, train\)"),
    "a folder with nothing in it": (lambda folder: folder, "holds no file of rows"),
    "a pattern of nothing": (lambda folder: f"{folder}/*.csv", "nothing matches"),
    "a device": (lambda folder: "/dev/null", "neither file nor folder"),
}


@pytest.mark.parametrize("make, words", PLACES.values(), ids=PLACES.keys())
def test_a_place_with_no_rows_in_it_is_told_in_words(tmp_path: Path, make: Callable[[Path], Path | str], words: str):
    with pytest.raises(FineTuneError, match=SOURCE + ".*" + f"({words})"):
        load(make(tmp_path))


NESTED = "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}"


def doubled(step: str, first: str = "text", rounds: int = 60) -> str:
    return f"{{% set n = namespace(x={first}) %}}{{% for i in range({rounds}) %}}{step}{{% endfor %}}"


TEMPLATES: dict[str, tuple[str, str]] = {
    "not closed": ("{{ text", "line 1"),
    "no filter": ("{{ text | shout }}", "No filter named 'shout'"),
    "an unknown name": ("{{ txt }}", "'txt' not among the columns"),
    "a class": ("{{ text.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    "a class by filter": ("{{ [text] | map(attribute='__class__') | first }}", "undefined|unsafe|no text"),
    "a class by attr": ("{{ text | attr('__class__') }}", "No filter named 'attr'"),
    "a class by format": ("{{ '{0.__class__}'.format(text) }}", "unsafe"),
    "a class by format_map": ("{{ '{a.__class__}'.format_map({'a': text}) }}", "unsafe"),
    "a function's globals": ("{{ range.__globals__ }}", "unsafe"),
    "a function's self": ("{{ range.__self__._left }}", "unsafe|no attribute"),
    "the globals of a helper": ("{{ cycler.__init__.__globals__.os.popen('touch canary') }}", "'cycler' not among"),
    "the template itself": ("{{ self.__init__ }}", "unsafe"),
    "the template as text": ("{{ self }}", "is no text but TemplateReference"),
    "a namespace's init": ("{{ namespace.__init__.__globals__ }}", "unsafe"),
    "an import": ("{% import 'os' as os %}", "is not available"),
    "a file": ("{% include '/etc/passwd' %}", "include is not available"),
    "a base": ("{% extends 'x' %}", "extends is not available"),
    "text times a billion": ("{{ text * 1000000000 }}", "works on numbers"),
    "text padded": ("{{ '%1000000000d' % 1 }}", "not on text"),
    "text padded by a method": ("{{ text.ljust(1000000000) }}", "unsafe"),
    "a power": ("{{ 9 ** 999999999 }}", "powers to 64"),
    "a huge range": ("{% for i in range(10 ** 9) %}{% endfor %}", "range"),
    "many ranges": ("{% for i in range(999) %}{% for j in range(999) %}{% endfor %}{% endfor %}", "range"),
    "loops over the text": (
        "{% for a in text %}" * 9 + "{% endfor %}" * 9, "loops and calls take more"),
    "a macro in a macro": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "two macros in a macro": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "loops and calls"),
    "a loop in itself": ("{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}", "recursive loops are not"),
    "doubling by concatenation": (
        "{% set n = namespace(x=text) %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}", "joined text"),
    "doubling by addition": (
        "{% set n = namespace(x=text) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}", "joined text"),
    "doubling by replacement": (
        "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x.replace('a', 'aa') %}{% endfor %}",
        "joined text"),
    "doubling by join": (
        "{% set n = namespace(x=text) %}{% for i in range(60) %}{% set n.x = n.x.join([n.x, n.x]) %}{% endfor %}",
        "joined text"),
    "doubling of lists": (
        "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}", "joined text"),
    "a list of itself as JSON": (f"{NESTED}{{{{ n.x | tojson }}}}", "joined text"),
    "a list of itself as text": (f"{NESTED}{{{{ n.x | string }}}}", "joined text"),
    "doubling by a block that is kept": (doubled("{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}"), "joined text"),
    "doubling by a macro": (
        "{% macro f(x) %}{{ x }}{{ x }}{% endmacro %}{{ " + "f(" * 40 + "text" + ")" * 40 + " }}", "joined text"),
    "doubling by a sum": (doubled("{% set n.x = [n.x, n.x] | sum(start=[]) %}", "[1]"), "joined text"),
    "doubling by translation": (doubled("{% set n.x = n.x.translate({97: 'aa'}) %}"), "unsafe"),
    "doubling of pairs, as a key": (
        doubled("{% set n.x = (n.x, n.x) %}") + "{{ {n.x: 1} | length }}", "joined text"),
    "doubling of views": (
        doubled("{% set n.x = {'a': n.x, 'b': n.x}.values() %}") + "{{ [n.x] | upper }}", "joined text"),
    "a number as bytes": ("{{ (1).to_bytes(10 ** 9, 'big') | length }}", "unsafe"),
    "bytes padded": ("{{ 'a'.encode().ljust(10 ** 9) | length }}", "unsafe"),
    "JSON indented": ("{{ [1] | tojson(indent=500000000) }}", "indents by up to 8"),
    "JSON of deep lists, indented": (
        doubled("{% set n.x = [n.x] %}", "range(9999) | list") + "{{ n.x | tojson(8) }}", "joined text"),
    "a number rounded": ("{{ 1.5 | round(1000000000, 'ceil') }}", "up to 20 digits"),
    "a text rounded": ("{{ 'a' | round(9, 'ceil') }}", "a number is expected"),
    "a text that is odd": ("{% if '%1000000000d' is odd %}{% endif %}", "a number is expected"),
    "a text that is divisible": ("{{ '%1000000000d' is divisibleby 5 }}", "a number is expected"),
    "a number of 5,000 digits": ("{{ " + "9" * 5000 + " }}", "thousands of digits"),
    "a chain of 280 filters": ("{{ text" + " | default('')" * 280 + " }}", "nested too deeply"),
    "a chain of 280 choices": ("{{ " + " or ".join(["text"] * 280) + " }}", "nested too deeply"),
    "a long loop over little": (
        "{% for i in range(25000) %}" + "{% if i %}{% endif %}" * 700 + "{% endfor %}", "loops and calls"),
    "a long macro over little": (
        "{% macro f() %}" + "{% if text %}{% endif %}" * 600 + "{% endmacro %}"
        "{% for i in range(25000) %}{{ f() }}{% endfor %}", "loops and calls"),
    "iterators in iterators": (doubled("{% set n.x = n.x | map('upper') %}", rounds=20_000), "loops and calls"),
    "an attribute of attributes": (
        "{% set n = namespace() %}{% set n.n = n %}{{ range(999) | map(attribute='" + "n." * 7000 + "n') | list }}",
        "loops and calls"),
    "a truncation to less than its mark": ("{{ text | truncate(1) }}", "expected length"),
    "a counter that lets itself be refilled": (
        "{% macro f(x) %}{% endmacro %}{% set __steps = namespace(spend=f, grow=f, take=f) %}"
        + doubled("{% set n.x = n.x ~ n.x %}"), "joined text"),
    "a megabyte printed in parts": (
        "{% for i in range(20000) %}" + "{{ text }}" * 8 + "{% endfor %}", "more than 1,048,576"),
    "a list printed": ("{{ [text] }}", "a printed value is a list"),
    "a function printed": ("{{ range }}", "is no text but"),
    "a blank completion": ("x", "completion is blank"),
    "brackets without end": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "nested too deeply|line 1"),
}  # fmt: skip


LARGE = json.dumps({"text": "ab cd " * 43_690, "label": "\u0436 " * 130_000}).encode()

TEMPLATES_ON_LARGE_ROWS: dict[str, tuple[str, str]] = {
    "characters kept": (doubled("{% set n.x = [n.x, text | list] %}", rounds=1000), "joined text"),
    "words kept": (doubled("{% set n.x = [n.x, text.split()] %}", rounds=1000), "joined text|loops and calls"),
    "copies kept, as they are made": (
        "{% set n = namespace() %}" + "".join(f"{{% set n.x{i} = label | upper %}}" for i in range(200)),
        "loops and calls"),
    "slices kept": (
        "{% set n = namespace() %}" + "".join(f"{{% set n.x{i} = label[{i}:] %}}" for i in range(200)),
        "loops and calls"),
    "blocks kept": (
        "{% set n = namespace() %}"
        + "".join(f"{{% set n.x{i} %}}{{{{ label }}}}{i}{{% endset %}}" for i in range(200)), "loops and calls"),
    "comparisons": (
        "{% for i in range(25000) %}" + "{% if 'xy' in text %}{% endif %}" * 50 + "{% endfor %}", "loops and calls"),
    "searches from behind": ("{{ text.rfind('ab' ~ text[:100000]) }}", "joined text"),
    "all characters taken off": ("{{ text.strip(label ~ 'abcd ') }}", "joined text"),
    "characters as keys": ("{{ {}.fromkeys(label) | length }}", "unsafe"),
}  # fmt: skip

RENDERING_PEAK = 100 << 20
"""Bytes of Python's own, the first import of what reads rows included."""
RENDERING_SECONDS = 60
"""Of the processor; tracing the memory takes most of it."""


@pytest.mark.parametrize("text, words", TEMPLATES.values(), ids=TEMPLATES.keys())
@pytest.mark.timeout(180)
def test_a_bad_template_is_told_in_words_and_not_obeyed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, words: str
):
    monkeypatch.chdir(tmp_path)
    refuse(tmp_path, GOOD, {"prompt": text, "completion": "{{ '  ' }}" if "blank" in words else "{{ label }}"}, words)


@pytest.mark.parametrize("text, words", TEMPLATES_ON_LARGE_ROWS.values(), ids=TEMPLATES_ON_LARGE_ROWS.keys())
@pytest.mark.timeout(180)
def test_a_template_that_makes_much_of_a_large_row_is_told_in_words(tmp_path: Path, text: str, words: str):
    refuse(tmp_path, LARGE, {"prompt": text, "completion": "x"}, words)


def refuse(folder: Path, rows: bytes, template: dict[str, str], words: str) -> None:
    (folder / "rows.jsonl").write_bytes(rows)
    before = time.process_time()
    tracemalloc.start()
    try:
        with pytest.raises(FineTuneError, match=words) as caught:
            load(folder / "rows.jsonl", template)
        assert tracemalloc.get_traced_memory()[1] < RENDERING_PEAK
    finally:
        tracemalloc.stop()
    assert time.process_time() - before < RENDERING_SECONDS
    assert str(caught.value).startswith("spec.data.tasks[0].templates")
    assert len(str(caught.value)) < 1000
    assert not (folder / "canary").exists()


# --- what would fill the memory

PEAK_ABOVE_START = 400 << 20

MEASURED = r"""
    import json, re, sys
    from pathlib import Path
    from tests.integration.test_bad_data import load
    from finetune_trainer.errors import FineTuneError
    def peak():
        # Of this program alone: getrusage also counts what the one was that started it.
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    before = peak()
    try:
        load(sys.argv[1])
        message = ""
    except FineTuneError as error:
        message = str(error)
    print(json.dumps({"message": message, "bytes": peak() - before}))
"""


def zeros_of(compress: Callable[[Any], Any], size: int, path: Path) -> Path:
    with path.open("wb") as file, compress(file) as stream:
        for _ in range(size >> 20):
            stream.write(b"\0" * (1 << 20))
    return path


def gzip_bomb(folder: Path) -> Path:
    return zeros_of(lambda file: gzip.GzipFile(fileobj=file, mode="wb"), 256 << 20, folder / "rows.jsonl.gz")


def gzip_bomb_of_lines(folder: Path) -> Path:
    path = folder / "rows.jsonl.gz"
    with gzip.open(path, "wb") as stream:
        for _ in range(32):
            stream.write(b"\n" * (1 << 20))
    return path


def zstd_bomb(folder: Path) -> Path:
    return zeros_of(lambda file: pa.CompressedOutputStream(file, "zstd"), 1 << 30, folder / "rows.csv.zst")


def json_bomb(folder: Path) -> Path:
    return zeros_of(lambda file: gzip.GzipFile(fileobj=file, mode="wb"), 320 << 20, folder / "rows.json.gz")


def parquet_bomb(folder: Path) -> Path:
    """One text of 9 MB, written once and meant by 200,000 rows."""
    table = pa.table({"text": pa.DictionaryArray.from_arrays(pa.array([0] * 200_000, pa.int32()), ["x" * (9 << 20)])})
    pq.write_table(table, folder / "rows.parquet", dictionary_pagesize_limit=64 << 20)
    return folder / "rows.parquet"


def repeated(values: pa.Array, folder: Path, times: int = 1000) -> Path:
    """One value, written once and meant by every row."""
    pq.write_table(
        pa.table({"text": pa.concat_arrays([values] * times)}),
        folder / "rows.parquet",
        dictionary_pagesize_limit=64 << 20,
        compression="zstd",
    )
    return folder / "rows.parquet"


MEGABYTE = "x" * (1 << 20)


def parquet_of_lists(folder: Path) -> Path:
    return repeated(pa.array([[MEGABYTE]]), folder)


def parquet_of_one_list(folder: Path) -> Path:
    return repeated(pa.array([[MEGABYTE] * 500]), folder, times=1)


def parquet_of_objects(folder: Path) -> Path:
    return repeated(pa.array([{"of": MEGABYTE}]), folder)


def parquet_of_bytes(folder: Path) -> Path:
    return repeated(pa.array([MEGABYTE.encode()]), folder)


def parquet_of_equal_bytes(folder: Path) -> Path:
    return repeated(pa.array([MEGABYTE.encode()], pa.binary(1 << 20)), folder)


def parquet_of_one_long_list(folder: Path) -> Path:
    zeros = pa.array(np.zeros(60_000_000, np.int64))
    return repeated(pa.ListArray.from_arrays([0, len(zeros)], zeros), folder, times=1)


def parquet_of_nothing(folder: Path) -> Path:
    return repeated(pa.nulls(30_000_000), folder, times=1)


def parquet_of_one_page(folder: Path) -> Path:
    table = pa.table({"text": [f"{'x' * (7 << 20)}{number}" for number in range(60)]})
    pq.write_table(table, folder / "rows.parquet", use_dictionary=False, compression="zstd", data_page_size=1 << 30)
    return folder / "rows.parquet"


def arrow_in_zstd(folder: Path) -> Path:
    (folder / "rows.arrow").write_bytes(arrow(pa.table({"text": [MEGABYTE] * 500}), compression="zstd"))
    return folder / "rows.arrow"


def arrow_in_many_batches(folder: Path) -> Path:
    table = pa.table({"text": [MEGABYTE] * 100})
    with pa.ipc.new_stream(
        str(folder / "rows.arrow"), table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")
    ) as writer:
        for _ in range(20):
            writer.write_table(table)
    return folder / "rows.arrow"


def arrow_of_nothing(folder: Path) -> Path:
    (folder / "rows.arrow").write_bytes(arrow(pa.table({"text": pa.nulls(10**9)})))
    return folder / "rows.arrow"


def arrow_of_views(folder: Path) -> Path:
    """A million views of one megabyte."""
    one = pa.array([MEGABYTE], pa.string_view())
    _, view, text = one.buffers()
    views = pa.py_buffer(view.to_pybytes()[:16] * 1_000_000)
    table = pa.table({"text": pa.Array.from_buffers(pa.string_view(), 1_000_000, [None, views, text])})
    (folder / "rows.arrow").write_bytes(arrow(table, compression="zstd"))
    return folder / "rows.arrow"


def csv_of_one_row(folder: Path) -> Path:
    """Every line end is within quotes."""
    with gzip.open(folder / "rows.csv.gz", "wb") as stream:
        stream.write(b"text\n" + b'"ab\n",' * (2 << 20))
    return folder / "rows.csv.gz"


def array_of_objects(folder: Path) -> Path:
    (folder / "rows.json").write_bytes(b'[{"text":"a"},7' + b",{}" * (16 << 20) + b"]")
    return folder / "rows.json"


def array_of_one_object(folder: Path) -> Path:
    (folder / "rows.json").write_bytes(b'[{"text":[{}' + b",{}" * (16 << 20) + b"]}]")
    return folder / "rows.json"


def sparse_file(folder: Path) -> Path:
    with (folder / "rows.jsonl").open("wb") as file:
        file.truncate(20 << 30)
    return folder / "rows.jsonl"


BOMBS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "zeros in gzip": (gzip_bomb, "more than 8,388,608 bytes|more than 200 times"),
    "line ends in gzip": (gzip_bomb_of_lines, "unpacks to more than 200 times its size"),
    "zeros in zstd": (zstd_bomb, "more than 8,388,608 bytes|more than 200 times"),
    "zeros in gzip instead of JSON": (json_bomb, "is not JSON"),
    "48 megabytes of empty objects": (array_of_objects, "entry 1 .* is a JSON number"),
    "an object of 48 megabytes": (array_of_one_object, "entry 0 .* has more than 8,388,608 characters"),
    "a row of a million lines": (csv_of_one_row, "is still of a row that has more than 8,388,608 characters"),
    "2 terabytes of text in a Parquet dictionary": (parquet_bomb, r"a text of 9,437,184 bytes in column 'text'"),
    "a gigabyte of lists of texts in 10 kilobytes": (parquet_of_lists, "more than 500 times its size"),
    "one list that names one text 500 times": (parquet_of_one_list, "a value of 524,.* bytes in column 'text'"),
    "a gigabyte of objects in 10 kilobytes": (parquet_of_objects, "more than 500 times its size"),
    "a gigabyte of bytes in 10 kilobytes": (parquet_of_bytes, "more than 500 times its size"),
    "a gigabyte of bytes of one length": (parquet_of_equal_bytes, "more than 500 times its size"),
    "one list of 60 million zeros": (parquet_of_one_long_list, "lists of 480,000,000 bytes in one group of rows"),
    "30 million rows of nothing": (parquet_of_nothing, "more than 500 times its size"),
    "a page of 420 megabytes in Parquet": (parquet_of_one_page, "unpacks to more than 200 times its size"),
    "a batch of 500 megabytes in 17 kilobytes": (arrow_in_zstd, "a compressed batch of 524,.* at most 134,217,728"),
    "batches of 100 megabytes each": (arrow_in_many_batches, "more than 500 times its size"),
    "a billion rows of nothing": (arrow_of_nothing, "more than 500 times its size"),
    "a million views of one text": (arrow_of_views, "more than 500 times its size"),
    "a file of 20 gigabytes without a line": (sparse_file, "line 1 has more than 8,388,608"),
}


@pytest.mark.parametrize("make, words", BOMBS.values(), ids=BOMBS.keys())
def test_what_unpacks_to_more_than_memory_holds_is_told_in_words(
    tmp_path: Path, make: Callable[[Path], Path], words: str
):
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEASURED), str(make(tmp_path))],
        capture_output=True,
        text=True,
        cwd=root,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert re.search(words, found["message"]), found["message"]
    assert found["bytes"] < PEAK_ABOVE_START
