"""Trees of files as stores keep them."""

from pathlib import Path

from finetune_trainer.manifest import write_manifest

PREFIX = "team/job-1a2b3c4d/model"


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
