"""Which checkpoint a run goes on from: the newest one that was written to its end."""

import re
import shutil
from pathlib import Path

from finetune_trainer.manifest import COMPLETE_NAME, is_complete, write_manifest

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


def folder_of(folder: Path, step: int) -> Path:
    """Return where below ``folder`` the checkpoint of ``step`` is; the name is the trainer's."""
    return folder / f"checkpoint-{step}"


def seal(folder: Path, step: int) -> Path:
    """Declare the checkpoint of ``step`` complete, once all its files are written, and return where it is."""
    checkpoint = folder_of(folder, step)
    write_manifest(checkpoint)
    return checkpoint


def discard_old(folder: Path, keep: int) -> None:
    """Remove what is not among the ``keep`` newest sealed checkpoints; to be called behind `seal`, never before."""
    checkpoints = sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), key=step_of, reverse=True)
    sealed = [path for path in checkpoints if is_complete(path)]
    for path in checkpoints:
        if path not in sealed[:keep]:
            # First, so that a half-removed one is never taken for a whole one.
            (path / COMPLETE_NAME).unlink(missing_ok=True)
            shutil.rmtree(path)
