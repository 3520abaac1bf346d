"""What `finetune run` gives a job to: the trainer's stages, or a stand-in for them in tests."""

from collections.abc import Callable
from pathlib import Path

from finetune_api.job import FineTuneJob
from finetune_api.report import Report
from finetune_trainer.garbage import kept_for_good
from finetune_trainer.progress import Sink

StageRunner = Callable[[FineTuneJob, Path, Sink], Report]
"""Takes the resolved job, the workspace and who listens; raises FineTuneError."""


def load_trainer() -> StageRunner:
    """Return the trainer's own `run`; importing it takes seconds, for torch, transformers and ray come along."""
    with kept_for_good():
        from finetune_trainer import stages

    return stages.run
