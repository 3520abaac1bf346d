"""The errors a user can meet, one class per reaction: each knows the exit code it ends the process with.

A message says what is wrong, which value, where (field path or file and row) and what to do about it.
"""

from typing import ClassVar

from finetune_api.report import ExitCode


class FineTuneError(Exception):
    """An error whose message is meant for the user; printed without a traceback."""

    exit_code: ClassVar[ExitCode] = ExitCode.INTERNAL


class SpecError(FineTuneError):
    """The job asks for something that cannot be done; running it again does not help."""

    exit_code = ExitCode.BAD_SPEC


class DataError(FineTuneError):
    """The rows, the templates or the model's files are not what the job says they are."""

    exit_code = ExitCode.BAD_DATA


class StorageError(FineTuneError):
    """A store or the hub did not answer, or a disk refused; worth trying again."""

    exit_code = ExitCode.STORAGE


class StepError(FineTuneError):
    """A training step was cut off, for want of memory or perhaps so."""

    def __init__(self, message: str, micro_batch: int | None = None) -> None:
        """Tell how many rows its forward pass had, for who tries it with fewer; absent where it was no such step."""
        super().__init__(message)
        self.micro_batch = micro_batch


class OutOfMemoryError(StepError):
    """The step did not fit into memory; worth trying again with a smaller micro-batch."""

    exit_code = ExitCode.OUT_OF_MEMORY


class TrainingDivergedError(FineTuneError):
    """The loss became NaN or infinite."""

    exit_code = ExitCode.DIVERGED


class WorkerLostError(StepError):
    """One of several workers is gone; worth trying again from the last checkpoint."""

    exit_code = ExitCode.WORKER_LOST


class ParityError(FineTuneError):
    """What would be published is not the model that was evaluated: a defect here, or of a disk; worth trying again."""


class Preempted(FineTuneError):  # noqa: N818 - not a fault: the checkpoint is written, the next run resumes
    """Training was asked to stop, saved a checkpoint and stopped."""

    exit_code = ExitCode.PREEMPTED
