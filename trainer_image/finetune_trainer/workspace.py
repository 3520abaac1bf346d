"""What a run keeps on its own disk between stages and attempts. Running again on a used workspace goes on from it."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from finetune_api.model import ApiModel
from finetune_trainer.durable import disk_errors, write_file
from finetune_trainer.errors import DataError, SpecError, StorageError
from finetune_trainer.pod_stop import PROGRAM_LOCK

M = TypeVar("M", bound=ApiModel)

SHARED_FOLDER = ".finetune"
"""The command line keeps its workspaces in a folder of this name."""

EVENT_FILES = "tensorboard"
"""A folder of this name holds TensorBoard's files: in the workspace, beside the tuned weights, in the report."""

WANDB_FILES = "wandb"
"""What Weights & Biases' library keeps of a run lies in a folder of this name, which is the library's choice."""

RESULTS = ("inputs", "plan", "data", "training", "evaluation")
"""What stages remember, in the order in which it comes about."""


@dataclass(frozen=True, slots=True)
class Workspace:
    """The folders and files of one run."""

    root: Path
    cache: Path | None = None
    """A folder that several runs keep their downloads in. Absent: beside the workspace where that is the command
    line's own place, else inside it."""

    @property
    def models(self) -> Path:
        """Downloads of base models."""
        return self._shared / "models"

    @property
    def tokens(self) -> Path:
        """Tokens of rows that were tokenised before."""
        return self._shared / "tokens"

    @property
    def _shared(self) -> Path:
        # An edited job has another workspace, but the same base model.
        own = self.root.parent if self.root.parent.name == SHARED_FOLDER else self.root
        return self.cache or own

    @property
    def rows(self) -> Path:
        """Copies of rows that are not on this machine."""
        return self.root / "rows"

    @property
    def checkpoints(self) -> Path:
        """Checkpoints of the training in progress."""
        return self.root / "checkpoints"

    @property
    def tuned(self) -> Path:
        """What training made: an adapter or full weights, with a COMPLETE marker."""
        return self.root / "tuned"

    @property
    def uploads(self) -> Path:
        """Checkpoints on their way to the output store."""
        return self.root / "uploads"

    @property
    def predictions(self) -> Path:
        """What both models answered to every test row."""
        return self.report / "predictions.parquet"

    @property
    def export(self) -> Path:
        """What will be published."""
        return self.root / "export"

    @property
    def report(self) -> Path:
        """report.json, report.html and what belongs to them."""
        return self.root / "report"

    @contextmanager
    def claim(self, spec_hash: str) -> Iterator[None]:
        """Make the workspace belong to one spec, and to this process as long as the context lasts.

        Raises:
            SpecError: another spec's run is in it.
            StorageError: it cannot be written, or another process is at work in it, which will end.
        """
        self._check_owner(spec_hash)
        path = self.root / PROGRAM_LOCK
        with disk_errors("open", path):
            lock = path.open("a")
        # The lock goes with the process, however that ends: nothing stale can keep a workspace closed.
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise StorageError(
                    f"another process is running this job in {self.root}; wait for it, or give another --workspace."
                ) from error
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            yield

    def _check_owner(self, spec_hash: str) -> None:
        owner = self.root / "spec-hash"
        with disk_errors("create", self.root):
            self.root.mkdir(parents=True, exist_ok=True)
        if not owner.exists():
            write_file(owner, spec_hash.encode())
        elif owner.read_text() != spec_hash:
            raise SpecError(
                f"workspace {self.root} belongs to another version of this job (spec {owner.read_text()[:8]}, now "
                f"{spec_hash[:8]}); give another folder with --workspace, or delete that one."
            )

    def result_file(self, name: str) -> Path:
        """Return where `remember` keeps the result called ``name``."""
        return self.root / f"{name}.json"

    def forget(self, name: str) -> None:
        """Remove what `remember` kept under ``name``."""
        path = self.result_file(name)
        with disk_errors("remove", path):
            path.unlink(missing_ok=True)

    def remember(self, name: str, model: ApiModel) -> None:
        """Keep a stage's result under ``name``."""
        write_file(self.result_file(name), model.model_dump_json(by_alias=True, indent=1).encode())

    def recall(self, name: str, kind: type[M]) -> M | None:
        """Return what `remember` kept under ``name``; absent when the stage has not ended yet.

        Raises:
            DataError: the file is damaged.
        """
        path = self.result_file(name)
        if not path.exists():
            return None
        try:
            return kind.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise DataError(f"{path} is damaged or of another version; delete it and run again.") from error
