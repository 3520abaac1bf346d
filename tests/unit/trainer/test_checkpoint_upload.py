"""Checkpoints on their way to the store: training does not wait, and all nodes store the same ones."""

import threading
from pathlib import Path

import pytest

from finetune_trainer.checkpoint_upload import CheckpointUpload
from finetune_trainer.errors import Preempted, StorageError


class Store:
    """Takes checkpoints; the first one as slowly as a test wants."""

    def __init__(self, failures: int = 0) -> None:
        self.taken: list[tuple[int, str]] = []
        self.go_on = threading.Event()
        self.has_begun = threading.Event()
        self._failures = failures

    def push(self, folder: Path, step: int) -> None:
        self.has_begun.set()
        assert self.go_on.wait(30)
        if self._failures:
            self._failures -= 1
            raise StorageError("away")
        self.taken.append((step, (folder / "weights").read_text()))


def seal(folder: Path, step: int) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir()
    (checkpoint / "weights").write_text(f"of {step}")
    return checkpoint


def remove(checkpoint: Path) -> None:
    (checkpoint / "weights").unlink()
    checkpoint.rmdir()


def test_the_last_one_is_stored_before_a_stop_behind_the_one_that_is_on_its_way(tmp_path: Path):
    store = Store()
    with pytest.raises(Preempted), CheckpointUpload(tmp_path / "uploads", store.push) as upload:
        assert not upload.is_busy
        for step in (1, 2):
            checkpoint = seal(tmp_path, step)
            upload.submit(checkpoint)
            remove(checkpoint)
            assert store.has_begun.wait(30) and upload.is_busy
        store.go_on.set()
        raise Preempted("stopped")
    assert store.taken == [(1, "of 1"), (2, "of 2")]
    assert not (tmp_path / "uploads").exists()


def test_end_of_training_needs_no_more_checkpoints(tmp_path: Path):
    store = Store()
    with CheckpointUpload(tmp_path / "uploads", store.push) as upload:
        upload.submit(seal(tmp_path, 1))
        assert store.has_begun.wait(30)
        upload.submit(seal(tmp_path, 2))
        threading.Timer(0.2, store.go_on.set).start()
    assert store.taken == [(1, "of 1")]


def test_store_that_is_away_stops_neither_training_nor_the_next_upload(tmp_path: Path):
    store = Store(failures=1)
    store.go_on.set()
    with pytest.raises(Preempted), CheckpointUpload(tmp_path / "uploads", store.push) as upload:
        upload.submit(seal(tmp_path, 1))
        assert store.has_begun.wait(30)
        upload.submit(seal(tmp_path, 2))
        raise Preempted("stopped")
    assert store.taken == [(2, "of 2")]


def test_defect_in_an_upload_is_not_swallowed(tmp_path: Path):
    def push(folder: Path, step: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), CheckpointUpload(tmp_path / "uploads", push) as upload:
        upload.submit(seal(tmp_path, 1))
