"""Which checkpoint a run goes on from: the newest one that was written to its end."""

import os
import re
import shutil
from pathlib import Path

from finetune_trainer.manifest import COMPLETE_NAME, is_complete, write_manifest

_NAME = re.compile(r"checkpoint-(\d+)")
_EARLIER = "earlier"
_WEIGHTS = re.compile(r"(adapter_)?model.*\.(safetensors|json)|(adapter_|generation_)?config\.json")
"""What a model is loaded from, of all that a checkpoint holds."""


def newest_complete(folder: Path) -> Path | None:
    """Return the checkpoint with the highest step whose marker matches its files; absent when there is none."""
    return max(_complete(folder), key=step_of, default=None)


def _complete(folder: Path) -> list[Path]:
    checkpoints = folder.iterdir() if folder.is_dir() else ()
    return [path for path in checkpoints if _NAME.fullmatch(path.name) and is_complete(path)]


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


def keep_weights(checkpoints: Path, tuned: Path) -> None:
    """Keep what every complete checkpoint holds of the model, beside the tuned weights in ``tuned``."""
    shutil.rmtree(tuned / _EARLIER, ignore_errors=True)
    for checkpoint in _complete(checkpoints):
        kept = folder_of(tuned / _EARLIER, step_of(checkpoint))
        kept.mkdir(parents=True)
        for path in checkpoint.iterdir():
            if _WEIGHTS.fullmatch(path.name):
                # A link costs nothing, and the checkpoint goes when the tuned weights are whole.
                os.link(path, kept / path.name)


def kept_weights(tuned: Path) -> dict[int, Path]:
    """Return by step, the earliest first, where `keep_weights` has put what checkpoints held."""
    folder = tuned / _EARLIER
    return {step_of(path): path for path in sorted(folder.iterdir(), key=step_of)} if folder.is_dir() else {}


def discard_old(folder: Path, keep: int) -> None:
    """Remove what is not among the ``keep`` newest sealed checkpoints; to be called behind `seal`, never before."""
    checkpoints = sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), key=step_of, reverse=True)
    sealed = [path for path in checkpoints if is_complete(path)]
    for path in checkpoints:
        if path not in sealed[:keep]:
            # First, so that a half-removed one is never taken for a whole one.
            (path / COMPLETE_NAME).unlink(missing_ok=True)
            shutil.rmtree(path)
