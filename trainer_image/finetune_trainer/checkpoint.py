"""Which checkpoint a run goes on from: the newest one that was written to its end."""

import re
from pathlib import Path

from finetune_trainer.manifest import is_complete, write_manifest

_NAME = re.compile(r"checkpoint-(\d+)")


def newest_complete(folder: Path) -> Path | None:
    """Return the checkpoint with the highest step whose marker matches its files; absent when there is none."""
    if not folder.is_dir():
        return None
    complete = [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and is_complete(path)]
    return max(complete, key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    """Return the optimiser step a checkpoint was taken behind."""
    match = _NAME.fullmatch(checkpoint.name)
    if match is None:
        raise ValueError(f"{checkpoint.name} is not the name of a checkpoint")
    return int(match[1])


def seal(folder: Path, step: int) -> None:
    """Declare the checkpoint of ``step`` complete; to be called once all its files are written."""
    write_manifest(folder / f"checkpoint-{step}")
