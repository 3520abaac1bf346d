"""A manifest says what a folder holds; a marker that fits it says that the folder is whole."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune_trainer.errors import DataError
from finetune_trainer.manifest import (
    COMPLETE_NAME,
    MANIFEST_NAME,
    is_complete,
    read_manifest,
    verify_manifest,
    write_manifest,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "weights.safetensors").write_bytes(b"\0\1\2" * 1000)
    (folder / "sub" / "empty.txt").write_bytes(b"")
    (folder / "README.md").write_text("héllo")
    return folder


def test_written_folder_is_complete_and_verifies(folder: Path) -> None:
    written = write_manifest(folder, {"kind": "adapter"})
    assert is_complete(folder)
    assert verify_manifest(folder) == written
    assert [entry.path for entry in written.files] == ["README.md", "sub/empty.txt", "weights.safetensors"]
    assert written.total_bytes == 3006
    assert written.about == {"kind": "adapter"}


def test_equal_content_gives_equal_manifest(folder: Path, tmp_path: Path) -> None:
    first = write_manifest(folder)
    again = write_manifest(folder)
    moved = folder.rename(tmp_path / "elsewhere")
    assert first.sha256 == again.sha256 == write_manifest(moved).sha256
    assert str(tmp_path) not in (moved / MANIFEST_NAME).read_text()


def test_folder_without_marker_is_unfinished(folder: Path) -> None:
    write_manifest(folder)
    (folder / COMPLETE_NAME).unlink()
    assert not is_complete(folder)
    with pytest.raises(DataError, match="unfinished"):
        verify_manifest(folder)


def test_marker_of_another_manifest_does_not_count(folder: Path) -> None:
    write_manifest(folder)
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    manifest["files"][0]["bytes"] = 7
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
    assert not is_complete(folder)


def test_folder_that_does_not_exist_is_not_complete(tmp_path: Path) -> None:
    assert not is_complete(tmp_path / "nowhere")


def truncate(folder: Path) -> None:
    path = folder / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def flip_bit(folder: Path) -> None:
    path = folder / "weights.safetensors"
    content = bytearray(path.read_bytes())
    content[1500] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        pytest.param(truncate, "weights.safetensors: 2,999 bytes instead of 3,000", id="truncated file"),
        pytest.param(flip_bit, r"weights.safetensors: sha256 \w{12}… instead of \w{12}…", id="one bit flipped"),
        pytest.param(lambda f: (f / "README.md").unlink(), "README.md: listed but missing", id="missing file"),
        pytest.param(lambda f: (f / "x.bin").touch(), "x.bin: present but not listed", id="file put in"),
    ],
)
def test_each_mismatch_is_named(folder: Path, damage: Callable[[Path], None], said: str) -> None:
    write_manifest(folder)
    damage(folder)
    with pytest.raises(DataError, match=said):
        verify_manifest(folder)


def test_many_mismatches_are_told_in_one_bounded_message(folder: Path) -> None:
    write_manifest(folder)
    for number in range(40):
        (folder / f"extra-{number}").touch()
    with pytest.raises(DataError, match="and 30 more"):
        verify_manifest(folder)


def test_links_are_refused(folder: Path) -> None:
    (folder / "passwd").symlink_to("/etc/passwd")
    with pytest.raises(DataError, match="passwd is a symbolic link"):
        write_manifest(folder)


def test_rewriting_takes_the_marker_away_first(folder: Path) -> None:
    write_manifest(folder)
    (folder / "link").symlink_to("README.md")
    with pytest.raises(DataError):
        write_manifest(folder)
    assert not is_complete(folder)


@pytest.mark.parametrize("content", ["[]", '{"files": 3}', '{"files": [{"path": "x"}]}', '{"version": 2, "files": []}'])
def test_foreign_manifest_is_refused(folder: Path, content: str) -> None:
    import hashlib

    (folder / MANIFEST_NAME).write_text(content)
    (folder / COMPLETE_NAME).write_text(hashlib.sha256(content.encode()).hexdigest())
    with pytest.raises(DataError, match="version"):
        read_manifest(folder)
