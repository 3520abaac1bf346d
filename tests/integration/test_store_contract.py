"""What every store promises, whatever its scheme. A new scheme is one more parameter of ``store``."""

import errno
import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from finetune_api.spec import OutputSpec, SecretRef
from finetune_trainer.errors import DataError, SpecError, StorageError
from finetune_trainer.file_store import FileStore
from finetune_trainer.location import Mounts
from finetune_trainer.manifest import verify_manifest, write_manifest
from finetune_trainer.storage import Storage
from finetune_trainer.store import Store

from .s3_server import S3Server, serve_s3

PREFIX = "team/job-1a2b3c4d/model"


@pytest.fixture(params=["file", "pvc", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty store of each scheme, opened as a job's output is."""
    mounts = Mounts(secrets=tmp_path / "secrets", volumes=tmp_path / "volumes")
    match request.param:
        case "file":
            output = OutputSpec(uri=(tmp_path / "store root").as_uri())
        case "pvc":
            (tmp_path / "volumes" / "claim").mkdir(parents=True)
            output = OutputSpec(uri="pvc://claim/store%20root")
        case "s3":
            server: S3Server = request.getfixturevalue("s3")
            server.write_secret(tmp_path / "secrets" / "keys")
            output = OutputSpec(
                uri=f"s3://{server.make_bucket()}/store-root", endpoint=server.url, secret_ref=SecretRef(name="keys")
            )
        case scheme:
            raise AssertionError(f"no store for {scheme}")
    return Storage(output, mounts).open_output()


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with serve_s3(tmp_path_factory.mktemp("s3")) as server:
        yield server


def neighbours(folder: Path) -> set[str]:
    """What a test has left in its folder beside the stores."""
    return {path.name for path in folder.iterdir()} - {"store root", "volumes", "secrets"}


def make_tree(folder: Path, version: str, *, complete: bool = True) -> Path:
    """A tree whose every file says which version it belongs to; versions do not have the same files."""
    (folder / "sub" / version).mkdir(parents=True)
    for name in ("README.md", "sub/same-name.bin", f"sub/{version}/own.bin"):
        (folder / name).write_bytes(f"{version}:{name}".encode() * 500)
    (folder / "empty").touch()
    if complete:
        write_manifest(folder)
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


# --- single files


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


# --- trees


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


# --- the file system underneath: links, crashes, full and read-only disks

STEPS = ("open", "mkdir", "rename", "fsync", "unlink", "rmdir")
"""The calls that change a file system; shutil and pathlib use them too."""


class Killed(BaseException):
    """Stands for SIGKILL: from the chosen call on, no call does anything any more."""


def at_step(monkeypatch: pytest.MonkeyPatch, chosen: int, action: Callable[[], None]) -> Callable[[], int]:
    """Run ``action`` instead of the chosen file-system call, and whenever it raises, of all later ones."""
    count = 0

    def wrapped(real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **options: object) -> object:
            nonlocal count
            count += 1
            if count >= chosen:
                action()
            return real(*args, **options)

        return call

    for name in STEPS:
        monkeypatch.setattr(os, name, wrapped(getattr(os, name)))
    return lambda: count


def kill() -> None:
    raise Killed


def test_writer_killed_at_any_step_leaves_the_old_or_the_new_tree_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = make_tree(tmp_path / "old", "one"), make_tree(tmp_path / "new", "two")
    outcomes = []
    for step in range(1, 1000):
        root = tmp_path / f"store-{step}"
        store = FileStore(root)
        store.put_tree(old, PREFIX)
        with monkeypatch.context() as patch:
            at_step(patch, step, kill)
            try:
                store.put_tree(new, PREFIX)
                finished = True
            except Killed:
                finished = False
        if store.exists(f"{PREFIX}/COMPLETE"):
            store.get_tree(PREFIX, tmp_path / f"out-{step}")
            content = files_of(tmp_path / f"out-{step}")
            outcomes.append("old" if content == files_of(old) else "new" if content == files_of(new) else "mixed")
        else:
            assert store.list() == ()
            outcomes.append("none")
        store.put_tree(new, PREFIX)
        assert files_of(root / PREFIX) == files_of(new)
        assert [path.name for path in (root / PREFIX).parent.iterdir()] == ["model"], "the next writer cleans up"
        if finished:
            break
    assert set(outcomes) == {"old", "none", "new"}
    assert len(outcomes) > 30, "the steps were really interrupted"


def test_second_writer_at_any_step_of_the_first_never_mixes_trees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trees = {name: files_of(make_tree(tmp_path / name, name)) for name in ("old", "first", "second")}
    winners = set()
    for step in range(1, 1000):
        root = tmp_path / f"store-{step}"
        store = FileStore(root)
        store.put_tree(tmp_path / "old", PREFIX)
        with monkeypatch.context() as patch:

            def second(patch: pytest.MonkeyPatch = patch, root: Path = root) -> None:
                patch.undo()
                FileStore(root).put_tree(tmp_path / "second", PREFIX)
                assert files_of(root / PREFIX) == trees["second"]

            calls = at_step(patch, step, second)
            try:
                store.put_tree(tmp_path / "first", PREFIX)
                allowed = {"first", "second"}
            except StorageError:
                allowed = {"second"}
        verify_manifest(root / PREFIX)
        (winner,) = [name for name, content in trees.items() if content == files_of(root / PREFIX)]
        assert winner in allowed
        winners.add(winner)
        if calls() < step:
            break
    assert winners == {"first", "second"}


@pytest.mark.parametrize("method", ["list", "get_bytes", "put_bytes", "exists", "put_tree", "get_tree"])
def test_link_inside_the_store_is_never_followed(tmp_path: Path, method: str) -> None:
    outside = make_tree(tmp_path / "outside", "one", complete=False)
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(outside)
    store = FileStore(root)
    tree = make_tree(tmp_path / "tree", "two", complete=False)
    call: dict[str, Callable[[], object]] = {
        "list": lambda: store.list(),
        "get_bytes": lambda: store.get_bytes("link/README.md"),
        "put_bytes": lambda: store.put_bytes("link/new", b"x"),
        "exists": lambda: store.exists("link/README.md"),
        "put_tree": lambda: store.put_tree(tree, "link/model"),
        "get_tree": lambda: store.get_tree("link", tmp_path / "out"),
    }
    before = files_of(outside)
    with pytest.raises(StorageError, match="link"):
        call[method]()
    assert files_of(outside) == before


def test_link_to_a_file_is_not_read_and_is_replaced_by_a_put(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(secret)
    store = FileStore(tmp_path / "root")
    with pytest.raises(StorageError, match="symbolic link"):
        store.get_bytes("link")
    store.put_bytes("link", b"new")
    assert secret.read_text() == "secret"
    assert store.get_bytes("link") == b"new"


def test_deleting_a_tree_does_not_reach_through_links(tmp_path: Path) -> None:
    outside = make_tree(tmp_path / "outside", "one")
    store = FileStore(tmp_path / "root")
    store.put_bytes("a/file", b"x")
    (tmp_path / "root" / "a" / "link").symlink_to(outside)
    store.delete_tree("a")
    assert not (tmp_path / "root" / "a").exists()
    verify_manifest(outside)


def test_pipe_in_the_store_does_not_block_the_reader(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    os.mkfifo(tmp_path / "root" / "pipe")
    with pytest.raises(StorageError, match="no regular file"):
        FileStore(tmp_path / "root").get_bytes("pipe")


def test_root_below_a_file_is_refused_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"cannot write to .*file/below: Not a directory.*choose another place"):
        FileStore(tmp_path / "file" / "below").check_writable()


def test_file_system_that_takes_no_folders_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"cannot create /proc/nope: no folder can be made there"):
        FileStore(Path("/proc/nope")).check_writable()


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Let the kernel refuse larger files (EFBIG). No fixture: pytest reports, perhaps to a file, before those end."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_file_that_the_disk_refuses_leaves_the_old_one_and_no_rest(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    store.put_bytes("a/file", b"old")
    with files_of_at_most(4096), pytest.raises(StorageError, match=r"cannot write .*a/file: File too large"):
        store.put_bytes("a/file", bytes(10_000))
    assert store.get_bytes("a/file") == b"old"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["file"]


def mount(folder: Path, options: str) -> Iterator[Path]:
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    yield from mount(tmp_path / "full", "size=64k")


@pytest.fixture
def read_only_disk(tmp_path: Path) -> Iterator[Path]:
    yield from mount(tmp_path / "ro", "ro,size=64k")


def test_full_disk_keeps_the_old_tree_whole(full_disk: Path, tmp_path: Path) -> None:
    store = FileStore(full_disk)
    store.put_tree(make_tree(tmp_path / "one", "one"), PREFIX)
    big = make_tree(tmp_path / "two", "two", complete=False)
    (big / "weights").write_bytes(bytes(100_000))
    write_manifest(big)
    with pytest.raises(StorageError, match=r"No space left on device.*The disk is full: free space"):
        store.put_tree(big, PREFIX)
    assert files_of(full_disk / PREFIX) == files_of(tmp_path / "one")
    assert [path.name for path in (full_disk / PREFIX).parent.iterdir()] == ["model"]


def test_read_only_disk_is_named_before_any_work(read_only_disk: Path) -> None:
    with pytest.raises(StorageError, match=r"Read-only file system.*mount it writable"):
        FileStore(read_only_disk).check_writable()


def test_full_disk_is_named_also_where_none_can_be_mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    store = FileStore(tmp_path / "root")
    store.put_bytes("a", b"old")
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StorageError, match=r"cannot write .*root/a: No space left"):
        store.put_bytes("a", b"new")
    assert store.get_bytes("a") == b"old"
    assert store.list() == ("a",)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_folder_of_another_user_is_named_with_a_remedy(tmp_path: Path) -> None:
    folder = tmp_path / "of-root"
    folder.mkdir(mode=0o755)
    os.seteuid(65534)
    try:
        with pytest.raises(StorageError, match=r"Permission denied.*mend the owner or mode"):
            FileStore(folder).check_writable()
    finally:
        os.seteuid(0)
