"""What is thrown at: one function each, given bytes that a fuzzer mutates.

A target ends quietly or raises an error meant for users; anything else that comes out is a crash. While it is at work,
nothing may be opened, started or connected to: an audit hook makes every attempt a crash as well.
"""

import contextlib
import html.parser
import io
import itertools
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import atheris
import httpx2
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

import finetune_trainer.hub
from finetune_api.job import InvalidJobError, load_job
from finetune_api.plain_text import printable
from finetune_api.progress_message import ProgressMessage
from finetune_api.report import Stage
from finetune_api.secret_text import masked
from finetune_api.spec import OutputSpec
from finetune_cli.cluster_job import cluster_job
from finetune_cli.status_text import status_lines
from finetune_operator.progress import moment_of, read_result, status_patch
from finetune_trainer.errors import DataError, SpecError, StorageError
from finetune_trainer.hub_client import HubClient
from finetune_trainer.location import Mounts, bucket_and_key, config_map_path, local_path, volume_path
from finetune_trainer.report_page import render_page, visible
from finetune_trainer.row_format import KNOWN_ENDINGS, read_file
from finetune_trainer.storage import Storage
from finetune_trainer.template import Template

from ..integration.hub_server import COMMIT
from ..unit.trainer.test_report_page import make_report

NOW = datetime(2026, 1, 2, tzinfo=UTC)
ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*/finetunejob.yaml"))
MOST_ROWS = 200

Target = Callable[[bytes], None]


# --- nothing else happens meanwhile

_FORBIDDEN = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "socket.connect",
    "ctypes.dlopen",
)
_CHANGES = {"os.mkdir": 0, "os.rename": 1, "os.link": 1, "os.symlink": 1, "os.remove": 0, "os.rmdir": 0}
"""Which argument names what is changed."""
_INSTALLED = (Path(sys.prefix), Path(sys.base_prefix), ROOT / "operator", ROOT / "trainer_image")
_watched: list[Path] = []
"""While a target is at work: the one folder in which files may be opened."""


class EscapeError(Exception):
    """Input has made the program do what it must not."""


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watched:
        return
    if event in _FORBIDDEN:
        raise EscapeError(f"{event} {arguments!r:.200}")
    if event == "open" and isinstance(arguments[0], (str, bytes)) and isinstance(arguments[1], str):
        path = arguments[0].decode("utf-8", "replace") if isinstance(arguments[0], bytes) else arguments[0]
        # Modules and data of packages are read when they are first used.
        if not any(Path(path).is_relative_to(root) for root in (_watched[-1], *_INSTALLED)):
            raise EscapeError(f"open {path!r:.200} {arguments[1]!r}")
    if event in _CHANGES:
        path = os.fsdecode(arguments[_CHANGES[event]])
        # Inside a folder that is open already, names are relative to it.
        if Path(path).is_absolute() and not Path(os.path.normpath(path)).is_relative_to(_watched[-1]):
            raise EscapeError(f"{event} {path!r:.200}")


sys.addaudithook(_watch)


@contextlib.contextmanager
def watched(folder: Path = Path("/nowhere")) -> Iterator[None]:
    """Make it a crash when anything outside ``folder`` is opened, started or connected to."""
    _watched.append(folder)
    try:
        yield
    finally:
        _watched.pop()


# What is not there stays so, and no case waits for it.
finetune_trainer.hub._RETRY_SECONDS = ()
finetune_trainer.hub_client.LARGEST_LISTING_BYTES = 1 << 20
huggingface_hub.utils.disable_progress_bars()

# --- the targets


def manifest(data: bytes) -> None:
    """A manifest as text: any bytes that are UTF-8."""
    text = data.decode("utf-8", "replace")
    with watched(), contextlib.suppress(InvalidJobError):
        load_job(text, "job.yaml")


_DOCUMENTS = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in EXAMPLES]


def spec(data: bytes) -> None:
    """A valid manifest with one or more of its values replaced by others of any kind."""
    given = atheris.FuzzedDataProvider(data)
    document = yaml.safe_load(yaml.safe_dump(_DOCUMENTS[given.ConsumeIntInRange(0, len(_DOCUMENTS) - 1)]))
    for _ in range(given.ConsumeIntInRange(1, 4)):
        _replace_one(document, given)
    text = yaml.safe_dump(document, allow_unicode=True)
    with watched(), contextlib.suppress(InvalidJobError):
        load_job(text, "job.yaml")


def _replace_one(value: Any, given: atheris.FuzzedDataProvider) -> None:
    while isinstance(value, (dict, list)) and value:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = keys[given.ConsumeIntInRange(0, len(keys) - 1)]
        if not isinstance(value[key], (dict, list)) or given.ConsumeProbability() < 0.2:
            value[key] = _anything(given)
            return
        value = value[key]


def _anything(given: atheris.FuzzedDataProvider) -> Any:
    match given.ConsumeIntInRange(0, 8):
        case 0:
            return None
        case 1:
            return given.ConsumeBool()
        case 2:
            return given.ConsumeInt(8)
        case 3:
            return given.ConsumeFloat()
        case 4:
            return [_anything(given) for _ in range(given.ConsumeIntInRange(0, 3))]
        case 5:
            return {_text(given, 12): _anything(given) for _ in range(given.ConsumeIntInRange(0, 3))}
        case 6:
            return f"s3://{_text(given, 40)}"
        case 7:
            return "x" * given.ConsumeIntInRange(0, 70_000)
        case _:
            return _text(given, 200)


def _text(given: atheris.FuzzedDataProvider, most: int) -> str:
    # YAML and JSON carry no half of a surrogate pair.
    return given.ConsumeUnicodeNoSurrogates(given.ConsumeIntInRange(0, most))


def template(data: bytes) -> None:
    """A template of the user's on a row of the user's: it may print the row, and do nothing else."""
    given = atheris.FuzzedDataProvider(data)
    pieces = [_PIECES[given.ConsumeIntInRange(0, len(_PIECES) - 1)] for _ in range(given.ConsumeIntInRange(0, 8))]
    text = "".join(piece if piece else _text(given, 30) for piece in pieces) or _text(given, 100)
    row = {"a": _text(given, 30), "b": given.ConsumeInt(4), "c": [_text(given, 5)] * 2, "d": {"k": _text(given, 5)}}
    with watched(), contextlib.suppress(SpecError, DataError):
        Template(text, "{{ a }}", "spec.data.tasks[0].templates[0]").render(row, 0)


_PIECES = (
    *("", "{{ ", " }}", "{% if ", " %}", "{% endif %}", "{% for x in ", "{% endfor %}", "{% set y = ", "{{ a", "{{ c"),
    *("|join", "|replace('a','b')", "|tojson", "|upper", ".__class__", ".__mro__", "[0]", "range(9)", "range(10**9)"),
    *("|attr('__class__')", "cycler", "lipsum", "self", "x", "y", "'a'*10**9", "10**10**9", " ~ ", "{% raw %}", "{#"),
    *(".__init__.__globals__", "{% include 'x' %}", "{% import 'os' as o %}", "{% macro m() %}", "{% endmacro %}"),
    *("namespace(z=1)", "dict(a=1)", ".format(a)", "'{0.__class__}'", "|format(1)", "|map('upper')", "|batch(2)"),
    *("{% set z %}", "{% endset %}", "|sum(start=[])", "|round(9)", ".translate({97: 'aa'})", ".encode()", " is odd"),
    *("[a, c]", "[1:]", "|list", "|unique", "|striptags", "|truncate(9)", ".split()", "(x, x)", " in c", " - 1"),
)


def rows(data: bytes) -> None:
    """A file of rows in any of the formats, of any content."""
    ending = KNOWN_ENDINGS[data[0] % len(KNOWN_ENDINGS)] if data else ".jsonl"
    with tempfile.TemporaryDirectory(prefix="fuzz") as folder:
        path = Path(folder) / f"rows{ending}"
        path.write_bytes(data[1:])
        with watched(Path(folder)), contextlib.suppress(SpecError, DataError):
            for number, _ in enumerate(read_file(path, "spec.data.tasks[0].source")):
                if number > MOST_ROWS:
                    break


def progress(data: bytes) -> None:
    """A body that a pod posts to the operator."""
    with watched():
        with contextlib.suppress(ValueError):
            status_patch(moment_of(ProgressMessage.model_validate_json(data), Stage.TRAIN, NOW))
        for stage in (Stage.CHECK, Stage.EVALUATE):
            with contextlib.suppress(ValueError):
                read_result(data, stage)


def status(data: bytes) -> None:
    """An object of a newer or hostile operator, shown by the command line: no line moves the cursor."""
    given = atheris.FuzzedDataProvider(data)
    document = {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {
            "name": "n",
            "namespace": "ns",
            "uid": "u",
            "resourceVersion": "1",
            "creationTimestamp": "2026-01-02T03:04:05Z",
        },
        "spec": {"method": {"type": _text(given, 20)}},
        "status": yaml.safe_load(yaml.safe_dump(_STATUS)),
    }
    for _ in range(given.ConsumeIntInRange(1, 4)):
        _replace_one(document["status"], given)
    with watched():
        for line in status_lines(cluster_job(document), NOW):
            assert line == printable(line) and "\n" not in line, line


_STATUS = {
    "phase": "Training",
    "conditions": [
        {
            "type": "Accepted",
            "status": "True",
            "reason": "SpecValid",
            "message": "m",
            "lastTransitionTime": "2026-01-02T03:04:05Z",
        }
    ],
    "attempts": [{"stage": "train", "number": 1, "child": "c", "reason": "Running", "node": "n", "change": "x"}],
    "progress": {"stage": "train", "percent": 3, "message": "m", "lastUpdateTime": "2026-01-02T03:04:05Z"},
    "summary": {"progress": "3 %", "metric": "m", "delta": "+1", "message": "m"},
    "plan": {"parameters": 1, "memoryBytesPerGpu": 2, "warnings": ["w"]},
    "data": {"rows": {"train": 1, "validation": 1, "test": 1}, "hash": "h"},
    "evaluation": {"tasks": [{"name": "t", "metric": "m", "base": "1", "tuned": "2", "low": "0", "high": "1"}]},
    "artifacts": [{"kind": "adapter", "uri": "s3://b/x", "sha256": "a", "bytes": 1}],
}


class _Tags(html.parser.HTMLParser):
    """Collects what a browser would build, texts left out."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[tuple[str, tuple[str, ...]]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, tuple(name for name, _ in attrs)))


def report(data: bytes) -> None:
    """A report with texts from data, shown in a browser: whatever they hold, no element comes of it."""
    text = data.decode("utf-8", "replace")[:300] or "x"
    with watched():
        built = [_Tags(_page_with(one)).found for one in ("plain", text)]
    allowed = {tag for tag, _ in built[0]} | {"del"}
    assert {tag for tag, _ in built[1]} <= allowed, {tag for tag, _ in built[1]} - allowed
    names = {name for _, names in built[0] for name in names}
    assert {name for _, found in built[1] for name in found} <= names
    assert not re.search(r"[\u202a-\u202e\u2066-\u2069]", visible(text))


def _page_with(text: str) -> str:
    whole = make_report()
    assert whole.evaluation is not None
    examples = tuple(
        one.model_copy(update={"prompt": text, "reference": text, "base": text, "tuned": text, "task": text})
        for one in whole.evaluation.examples
    )
    evaluation = whole.evaluation.model_copy(update={"examples": examples})
    changed = {"evaluation": evaluation, "why_not_published": text, "base_model": text, "resolved": {"x": text}}
    data = whole.data.model_copy(update={"sample_prompt": text, "warnings": (text,)})
    return render_page(whole.model_copy(update={**changed, "data": data, "published": False}))


_MOUNTED = Path(tempfile.mkdtemp(prefix="fuzz-mounts"))
for _name in ("volumes/claim/inside", "config/map", "secrets/key"):
    (_MOUNTED / _name).mkdir(parents=True)
(_MOUNTED / "volumes/claim/link").symlink_to(_MOUNTED / "secrets")
(_MOUNTED / "volumes/claim/circle").symlink_to("circle")
_MOUNTS = Mounts(_MOUNTED / "secrets", _MOUNTED / "volumes", _MOUNTED / "config")


def uri(data: bytes) -> None:
    """A URI of a store: where it leads lies below what it may lead to."""
    text = data.decode("utf-8", "replace")
    with watched(_MOUNTED):
        for prefix, find, root in (
            ("pvc://claim/", volume_path, _MOUNTS.volumes),
            ("pvc://", volume_path, _MOUNTS.volumes),
            ("configMap://", config_map_path, _MOUNTS.config),
        ):
            with contextlib.suppress(SpecError, StorageError):
                found = find(f"{prefix}{text}", _MOUNTS, "spec.output.uri")
                assert found.resolve().is_relative_to(root.resolve()), found
        with contextlib.suppress(SpecError):
            assert ".." not in local_path(f"file://{text}").parts
        with contextlib.suppress(SpecError):
            bucket, key = bucket_and_key(f"s3://{text}", "spec.output.uri")
            assert "/" not in bucket and not {"..", ".", ""} & set(key.split("/") if key else ())


def secret(data: bytes) -> None:
    """A log that somebody sends around: masking it twice masks no more, and keys are gone."""
    text = f"{data.decode('utf-8', 'replace')} AKIAIOSFODNN7EXAMPLE"
    once = masked(text)
    assert "AKIAIOSFODNN7EXAMPLE" not in once
    assert len(once) <= len(text) + 3


_NAMES = (
    "..",
    ".",
    "",
    "/",
    "\\",
    "\0",
    "%2e%2e",
    "a",
    "README.md",
    "train.jsonl",
    "train.csv",
    "~",
    "C:",
    "x" * 200,
    "\n",
    "*",
)


def hub(data: bytes) -> None:
    """A hub that lies: names that climb, sizes, hashes, commits that are none, no end. Nothing is written elsewhere."""
    given = atheris.FuzzedDataProvider(data)
    names = ["README.md", *(_repository_name(given) for _ in range(given.ConsumeIntInRange(0, 3)))]
    commit = given.PickValueInList(
        [
            COMMIT,
            COMMIT,
            COMMIT,
            "main",
            "../../x",
            given.ConsumeUnicodeNoSurrogates(41).encode("ascii", "replace").decode(),
        ]
    )
    files = {name: _text(given, 60).encode() for name in names}
    entries: list[dict[str, Any]] = [
        {"type": given.PickValueInList(["file", "file", "directory", "link"]), "path": name, "size": len(content)}
        | {"oid": given.PickValueInList(["a" * 40, "../x", ""])}
        for name, content in files.items()
    ]
    for _ in range(given.ConsumeIntInRange(0, 2)):
        _replace_one(entries, given)
    headers = {
        "ETag": given.PickValueInList(['"a"', '"../../../etag"', '"' + "e" * 300 + '"', ""]),
        "X-Repo-Commit": commit,
    }
    lie = given.PickValueInList(["", "", "", "1", "-1", "99999999999999", "x"])
    is_endless = given.ConsumeProbability() < 0.1
    is_endless_listing = given.ConsumeProbability() < 0.01
    info = {"id": "acme/some", "sha": commit, "siblings": [{"rfilename": name} for name in names]}

    def answer(request: httpx2.Request) -> httpx2.Response:
        path = unquote(request.url.path)
        if "/revision/" in path:
            return httpx2.Response(200, json=info)
        if "/tree/" in path:
            more = {"Link": f'<{request.url.copy_with(query=None)}?more>; rel="next"'} if is_endless_listing else {}
            return httpx2.Response(200, json=entries, headers=more)
        name = path.partition("/resolve/")[2].partition("/")[2]
        content = files.get(name, b"{}")
        if is_endless and name and request.method == "GET":
            return httpx2.Response(200, headers=headers, content=itertools.repeat(bytes(1 << 20)))
        return httpx2.Response(200, headers=headers | {"X-Linked-Size": lie or str(len(content))}, content=content)

    huggingface_hub.set_client_factory(lambda: HubClient(transport=httpx2.MockTransport(answer)))
    with tempfile.TemporaryDirectory(prefix="fuzz") as name:
        folder = Path(name)
        storage = Storage(OutputSpec(uri="file:///models"), _MOUNTS)
        with watched(folder), contextlib.suppress(SpecError, DataError, StorageError):
            found = storage.fetch_rows("hf://datasets/acme/some", "spec.data.tasks[0].source", None, folder)
            for file in found.rglob("*"):
                assert file.resolve().is_relative_to(folder.resolve()), file


def _repository_name(given: atheris.FuzzedDataProvider) -> str:
    pieces = [given.PickValueInList(list(_NAMES)) for _ in range(given.ConsumeIntInRange(1, 4))]
    return given.PickValueInList(["/", ""]).join(pieces) + given.PickValueInList(["", ".jsonl", "/train.jsonl"])


TARGETS: dict[str, Target] = {
    one.__name__: one for one in (manifest, spec, template, rows, progress, status, report, uri, secret, hub)
}


# --- what they begin with


def seeds(name: str) -> list[bytes]:
    """Return inputs that are good: what is near them goes deeper than noise."""
    match name:
        case "manifest":
            return [path.read_bytes() for path in EXAMPLES]
        case "rows":
            return [bytes([number]) + _good_file(ending) for number, ending in enumerate(KNOWN_ENDINGS)]
        case "progress":
            said = {"trainerStatus": {"progressPercentage": 42, "metrics": [{"name": "loss", "value": "0.5"}]}}
            result = {"stage": "check", "exitCode": 0, "data": _STATUS["data"]}
            return [json.dumps(one).encode() for one in (said, result)]
        case "report":
            return [b"<script>alert(1)</script>", b'"><img src=x onerror=y>', "\u202eevil".encode()]
        case "uri":
            return [b"inside/file", b"../../secrets", b"%2e%2e/x", b"link/key", b"circle/x", b"x" * 300]
        case _:
            return []


def _good_file(ending: str) -> bytes:
    table = pa.table({"text": ["Gr\u00fc\u00dfe", "two"], "n": [1, None], "tags": [["a"], []]})
    match ending:
        case ".parquet":
            pq.write_table(table, sink := io.BytesIO())
            return sink.getvalue()
        case ".arrow":
            sink = io.BytesIO()
            with pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)
            return sink.getvalue()
        case ".csv":
            return b'text,n\r\n"a, b",1\r\n'
        case ".json":
            return b'[{"text": "a", "n": 1}]'
        case _:
            return b'{"text": "a", "n": [1, 2.5, null, true]}\n'
