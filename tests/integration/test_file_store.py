"""The file system below ``file://`` and ``pvc://``: links, crashes, full and read-only disks."""

import errno
import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from finetune_trainer.errors import StorageError
from finetune_trainer.file_store import FileStore
from finetune_trainer.manifest import verify_manifest, write_manifest

from .tree import PREFIX, files_of, make_tree

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
