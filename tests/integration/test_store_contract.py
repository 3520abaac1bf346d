"""What every scheme promises: to a job's output as a store, to its rows and to its model as a source.

The schemes are those that the contract takes; one that is new there fails here until it has a place of its own. S3 is
a real server, the hub an own one that speaks the part of its HTTP API that downloads need.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from finetune_api.spec import ModelSpec, OutputSpec, SecretRef
from finetune_api.support import SCHEMES
from finetune_trainer.errors import DataError, SpecError, StorageError
from finetune_trainer.location import Mounts
from finetune_trainer.model import fetch_model
from finetune_trainer.source import read_rows
from finetune_trainer.storage import Storage
from finetune_trainer.store import Store

from .hub_server import FakeHub, serve_hub
from .s3_server import S3Server
from .tree import PREFIX, files_of, make_tree

FIELD = "spec.data.tasks[0].source"
ROWS = '{"text": "Grüße"}\n{"text": "two"}\n'.encode()
OTHER_ROWS = b'{"text": "three"}\n'


@pytest.fixture
def mounts(tmp_path: Path) -> Mounts:
    """What the kubelet mounts into a pod; Secrets, a volume, ConfigMaps."""
    for folder in ("secrets", "volumes/claim", "config"):
        (tmp_path / folder).mkdir(parents=True)
    return Mounts(tmp_path / "secrets", tmp_path / "volumes", tmp_path / "config")


# --- a store


@pytest.fixture(params=SCHEMES["output.uri"])
def store(request: pytest.FixtureRequest, tmp_path: Path, mounts: Mounts) -> Store:
    """An empty store of each scheme, opened as a job's output is."""
    match request.param:
        case "file":
            output = OutputSpec(uri=(tmp_path / "store root").as_uri())
        case "pvc":
            output = OutputSpec(uri="pvc://claim/store%20root")
        case "s3":
            server: S3Server = request.getfixturevalue("server")
            output = output_in(server, mounts)
        case scheme:
            raise AssertionError(f"no store for {scheme}")
    return Storage(output, mounts).open_output()


def output_in(server: S3Server, mounts: Mounts) -> OutputSpec:
    server.write_secret(mounts.secrets / "keys")
    return OutputSpec(
        uri=f"s3://{server.make_bucket()}/store-root", endpoint=server.url, secret_ref=SecretRef(name="keys")
    )


def neighbours(folder: Path) -> set[str]:
    """What a test has left in its folder beside the stores."""
    return {path.name for path in folder.iterdir()} - {"store root", "volumes", "secrets", "config"}


def test_new_store_is_writable_and_empty(store: Store) -> None:
    store.check_writable()
    assert store.list() == ()
    assert not store.exists("a/b")


def test_file_comes_back_as_it_was_put(store: Store) -> None:
    content = bytes(range(256)) * 10
    store.put_bytes("a/b c/ü.bin", content)
    assert store.get_bytes("a/b c/ü.bin") == content
    assert store.exists("a/b c/ü.bin")
    assert not store.exists("a/b c")
    assert store.list() == store.list("a") == ("a/b c/ü.bin",)


def test_second_put_replaces_the_file(store: Store) -> None:
    store.put_bytes("a", b"long old content")
    store.put_bytes("a", b"new")
    assert store.get_bytes("a") == b"new"
    assert store.list() == ("a",)


def test_missing_file_is_a_storage_error_with_its_name(store: Store) -> None:
    with pytest.raises(StorageError, match=r"cannot read .*/a/nothing: (No such file|there is no such)"):
        store.get_bytes("a/nothing")


@pytest.mark.parametrize("key", ["../x", "/etc/passwd", "a/../../x", "a//b", "a/", "", ".", "a\\..\\b", "a\0b"])
def test_key_that_climbs_is_refused_by_every_method(store: Store, key: str, tmp_path: Path) -> None:
    calls: list[Callable[[], object]] = [
        lambda: store.put_bytes(key, b"x"),
        lambda: store.get_bytes(key),
        lambda: store.exists(key),
        lambda: store.delete_tree(key),
        lambda: store.put_tree(tmp_path, key),
        lambda: store.get_tree(key, tmp_path / "out"),
    ]
    for call in calls:
        with pytest.raises(SpecError, match="is no key of a store"):
            call()


def test_tree_comes_back_as_it_was_put(store: Store, tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree", "one")
    store.put_tree(tree, PREFIX)
    store.get_tree(PREFIX, tmp_path / "out" / "model")
    assert files_of(tmp_path / "out" / "model") == files_of(tree)
    assert store.list("team") == tuple(sorted(f"{PREFIX}/{name}" for name in files_of(tree)))


def test_new_tree_leaves_nothing_of_the_old_one(store: Store, tmp_path: Path) -> None:
    store.put_tree(make_tree(tmp_path / "one", "one"), PREFIX)
    store.put_tree(make_tree(tmp_path / "two", "two"), PREFIX)
    store.get_tree(PREFIX, tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "two")


def test_tree_without_marker_is_fetched_unverified(store: Store, tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree", "one", complete=False)
    store.put_tree(tree, PREFIX)
    store.get_tree(PREFIX, tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(tree)


def test_deleted_tree_is_gone_and_its_neighbours_stay(store: Store, tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree", "one")
    store.put_tree(tree, "a/model")
    store.put_tree(tree, "a/model.v2")
    store.delete_tree("a/model")
    store.delete_tree("a/model")
    assert {key.split("/")[1] for key in store.list()} == {"model.v2"}


def test_fetching_nothing_is_an_error(store: Store, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is nothing at .*team/job"):
        store.get_tree(PREFIX, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_tree_is_not_handed_out(store: Store, tmp_path: Path) -> None:
    store.put_tree(make_tree(tmp_path / "tree", "one"), PREFIX)
    store.put_bytes(f"{PREFIX}/README.md", b"changed")
    with pytest.raises(DataError, match=r"README\.md: 7 bytes instead of"):
        store.get_tree(PREFIX, tmp_path / "out")
    assert neighbours(tmp_path) == {"tree"}


def test_fetching_never_overwrites_a_folder_with_content(store: Store, tmp_path: Path) -> None:
    store.put_tree(make_tree(tmp_path / "tree", "one"), PREFIX)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(StorageError, match=r"cannot create .*out: .*Something else stands there already"):
        store.get_tree(PREFIX, tmp_path / "out")
    assert neighbours(tmp_path) == {"out", "tree"}


def test_link_in_the_tree_to_put_is_refused(store: Store, tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree", "one", complete=False)
    (tree / "sub" / "secret").symlink_to("/etc/passwd")
    with pytest.raises(DataError, match="secret is a symbolic link"):
        store.put_tree(tree, PREFIX)
    assert store.list() == ()


# --- a source


@dataclass(frozen=True)
class Source:
    """A place of one scheme that holds files."""

    storage: Storage
    folder_uri: str
    put: Callable[[str, bytes], None]
    """Writes a file, given its name below the folder; a second time, another content."""

    def fetch_rows(self, name: str, folder: Path) -> Path:
        """Return what `Storage.fetch_rows` returns for the file, folder or pattern ``name``."""
        return self.storage.fetch_rows(f"{self.folder_uri}/{name}", FIELD, None, folder)

    def texts(self, name: str, folder: Path) -> list[object]:
        return [row["text"] for row in read_rows(self.fetch_rows(name, folder), FIELD)]


class Sources:
    """Makes places, and holds the servers behind them until the test ends."""

    def __init__(self, request: pytest.FixtureRequest, folder: Path, mounts: Mounts, stack: ExitStack) -> None:
        self.request, self.folder, self.mounts, self.stack = request, folder, mounts, stack

    def make(self, scheme: str, kind: str) -> Source:
        """Return an empty place; ``kind`` is what it will hold: dataset or model."""
        elsewhere = Storage(OutputSpec(uri="file:///models"), self.mounts)
        match scheme:
            case "file":
                folder = self.folder / "source"
                return Source(elsewhere, folder.as_uri(), writer(folder))
            case "pvc":
                folder = self.mounts.volumes / "claim" / "some folder"
                return Source(elsewhere, "pvc://claim/some%20folder", writer(folder))
            case "configMap":
                return Source(elsewhere, "configMap://settings", publisher(self.mounts.config / "settings"))
            case "s3":
                server: S3Server = self.request.getfixturevalue("server")
                output, bucket, client = output_in(server, self.mounts), server.make_bucket(), server.client()

                def put(name: str, content: bytes) -> None:
                    client.put_object(Bucket=bucket, Key=f"some/folder/{name}", Body=content)

                return Source(Storage(output, self.mounts), f"s3://{bucket}/some/folder", put)
            case "hf":
                return self._hub(elsewhere, kind)
        raise AssertionError(f"no source for {scheme}")

    def _hub(self, storage: Storage, kind: str) -> Source:
        folder = self.folder / "repository"
        folder.mkdir()
        (folder / "README.md").write_text("Every repository has one.")
        hub = self.stack.enter_context(serve_hub("acme/some", folder, kind))
        patch: pytest.MonkeyPatch = self.request.getfixturevalue("monkeypatch")
        patch.setenv("HF_ENDPOINT", hub.url)
        patch.delenv("HF_TOKEN", raising=False)
        prefix = "hf://datasets/acme/some" if kind == "dataset" else "hf://acme/some"
        return Source(storage, prefix, committer(hub))


def writer(folder: Path) -> Callable[[str, bytes], None]:
    def put(name: str, content: bytes) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)

    return put


def publisher(folder: Path) -> Callable[[str, bytes], None]:
    """Write keys the way the kubelet does: links to a link to a folder, which is exchanged as a whole."""

    def put(name: str, content: bytes) -> None:
        version = folder / f"..{len(list(folder.iterdir())) if folder.is_dir() else 0}"
        version.mkdir(parents=True)
        (version / name).write_bytes(content)
        (folder / "..new").symlink_to(version.name)
        (folder / "..new").rename(folder / "..data")
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(f"..data/{name}")

    return put


def committer(hub: FakeHub) -> Callable[[str, bytes], None]:
    write = writer(hub.folder)

    def put(name: str, content: bytes) -> None:
        write(name, content)
        hub.commit = f"{int(hub.commit, 16) + 1:040x}"

    return put


@pytest.fixture
def sources(request: pytest.FixtureRequest, tmp_path: Path, mounts: Mounts) -> Iterator[Sources]:
    with ExitStack() as stack:
        yield Sources(request, tmp_path, mounts, stack)


@pytest.fixture(params=SCHEMES["data.tasks[].source"])
def source(request: pytest.FixtureRequest, sources: Sources) -> Source:
    """An empty place of each scheme that rows come from."""
    return sources.make(request.param, "dataset")


@pytest.fixture(params=[scheme for scheme in SCHEMES["data.tasks[].source"] if scheme != "configMap"])
def folder_source(request: pytest.FixtureRequest, sources: Sources) -> Source:
    """One that has folders; a ConfigMap has keys."""
    return sources.make(request.param, "dataset")


def test_rows_come_as_they_were_written(source: Source, tmp_path: Path) -> None:
    source.put("rows.jsonl", ROWS)
    file = source.fetch_rows("rows.jsonl", tmp_path / "rows")
    files = [file] if file.is_file() else [path for path in file.rglob("*") if path.is_file()]
    assert [path.read_bytes() for path in files] == [ROWS]
    assert source.texts("rows.jsonl", tmp_path / "rows") == ["Grüße", "two"]


def test_rows_that_changed_are_fetched_anew(source: Source, tmp_path: Path) -> None:
    source.put("rows.jsonl", ROWS)
    source.fetch_rows("rows.jsonl", tmp_path / "rows")
    source.put("rows.jsonl", OTHER_ROWS)
    assert source.texts("rows.jsonl", tmp_path / "rows") == ["three"]


def test_rows_that_are_not_there_are_a_fault_of_the_data_which_names_setting_and_file(
    source: Source, tmp_path: Path
) -> None:
    source.put("rows.jsonl", ROWS)
    with pytest.raises(DataError, match=rf"{FIELD.replace('[', '.').replace(']', '.')}: .*(gone|nothing)"):
        source.texts("gone.jsonl", tmp_path / "rows")


# The whole machine is the place of a file:// URI: whoever runs the job there may read what they may read.
@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES["data.tasks[].source"] if scheme != "file"])
def test_no_source_leads_out_of_its_place(scheme: str, sources: Sources, tmp_path: Path) -> None:
    source = sources.make(scheme, "dataset")
    source.put("rows.jsonl", ROWS)
    for path in (tmp_path, tmp_path / "config", tmp_path / "volumes"):
        (path / "secret.jsonl").write_text('{"text": "secret"}')
    for uri in ("../secret.jsonl", "../../secret.jsonl", "%2e%2e/secret.jsonl", "a/../../../secret.jsonl"):
        with pytest.raises((SpecError, DataError)):
            source.texts(uri, tmp_path / "rows")


def test_files_of_a_folder_are_read_in_the_order_of_their_names(folder_source: Source, tmp_path: Path) -> None:
    folder_source.put("data/b.jsonl", OTHER_ROWS)
    folder_source.put("data/a.jsonl", ROWS)
    folder_source.put("data/notes.md", b"not rows")
    assert folder_source.texts("data", tmp_path / "rows") == ["Grüße", "two", "three"]


def test_pattern_chooses_files(folder_source: Source, tmp_path: Path) -> None:
    folder_source.put("data/train-1.jsonl", ROWS)
    folder_source.put("data/train-2.jsonl", OTHER_ROWS)
    folder_source.put("data/test-1.jsonl", b'{"text": "unseen"}\n')
    assert folder_source.texts("data/train*", tmp_path / "rows") == ["Grüße", "two", "three"]


# --- a model


@pytest.fixture(params=SCHEMES["model.source"])
def model_source(request: pytest.FixtureRequest, sources: Sources) -> Source:
    """An empty place of each scheme that models come from."""
    return sources.make(request.param, "model")


def test_model_comes_with_all_its_files(model_source: Source, tiny_model_dir: Path, tmp_path: Path) -> None:
    original = files_of(tiny_model_dir)
    for name, content in original.items():
        model_source.put(name, content)
    files = fetch_model(ModelSpec(source=model_source.folder_uri), tmp_path / "cache", storage=model_source.storage)
    assert {name: content for name, content in files_of(files.path).items() if name != "README.md"} == original
    pinned = ModelSpec(source=model_source.folder_uri, revision=files.revision)
    assert fetch_model(pinned, tmp_path / "cache", storage=model_source.storage) == files


def test_pickled_model_is_refused(model_source: Source, tiny_model_dir: Path, tmp_path: Path) -> None:
    for name, content in files_of(tiny_model_dir).items():
        model_source.put(name.replace("model.safetensors", "pytorch_model.bin"), content)
    with pytest.raises(SpecError, match=r"only as pytorch_model\.bin;.*can run code"):
        fetch_model(ModelSpec(source=model_source.folder_uri), tmp_path / "cache", storage=model_source.storage)
    assert not list((tmp_path / "cache").rglob("pytorch_model.bin"))
