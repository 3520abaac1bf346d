"""Everything that one worker needs to train."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from finetune_api.job import FineTuneJob
from finetune_trainer.checkpoint_upload import CheckpointUpload
from finetune_trainer.example import Encoded
from finetune_trainer.location import Mounts
from finetune_trainer.mixture import Mixture
from finetune_trainer.model import ModelFiles
from finetune_trainer.process_group import ProcessGroup
from finetune_trainer.progress import Sink
from finetune_trainer.published_model import PublishedModel
from finetune_trainer.watched import Watched
from finetune_trainer.workspace import Workspace


class Flag(Protocol):
    """A request to stop that may come at any time."""

    def is_set(self) -> bool:
        """Whether it has come."""
        ...


@dataclass(frozen=True, slots=True)
class TrainingInput:
    """Everything one worker needs."""

    job: FineTuneJob
    files: ModelFiles
    train: Sequence[Encoded]
    """The training rows of all tasks, then the replayed ones."""
    mixture: Mixture
    """Which of them make an epoch."""
    validation: Mapping[str, Sequence[Encoded]]
    """By task."""
    workspace: Workspace
    sink: Sink
    stop: Flag
    """Set from outside: save a checkpoint behind the current step and end."""
    upload: CheckpointUpload | None = None
    """Takes this node's part of checkpoints to the output store; absent where they stay on this machine, and with all
    but the first process of a node."""
    general: Sequence[Encoded] = ()
    """What no task is about: looked at with the validation rows, to see what is forgotten on the way."""
    watched: Watched | None = None
    """What early stopping goes by instead of the validation loss."""
    start: PublishedModel | None = None
    """What training goes on from instead of the bare base."""
    group: ProcessGroup = field(default_factory=ProcessGroup)
    """Who trains with this process; they share the workspace with those of the same node."""
    mounts: Mounts = field(default_factory=Mounts)
