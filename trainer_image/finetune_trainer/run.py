"""One job on its way through the stages: what each of them is given, and what all of them need."""

from dataclasses import dataclass, field

from finetune_api.job import FineTuneJob, spec_hash
from finetune_api.model import ApiModel
from finetune_api.report import Progress, Stage
from finetune_trainer.adjustment import Adjustment
from finetune_trainer.dataset import Dataset
from finetune_trainer.errors import Preempted
from finetune_trainer.interrupt import StopFlag
from finetune_trainer.location import Mounts
from finetune_trainer.progress import Reporter, Sink
from finetune_trainer.shared_state import SharedState
from finetune_trainer.storage import Storage
from finetune_trainer.workspace import Workspace


@dataclass(frozen=True, slots=True)
class Run:
    """One job on its way: what every stage is given."""

    job: FineTuneJob
    """Resolved."""
    workspace: Workspace
    sink: Sink
    stop: StopFlag
    mounts: Mounts = field(default_factory=Mounts)
    shared: SharedState | None = None
    """Where stages leave their results when each runs in a pod of its own; absent on a laptop."""
    adjustment: Adjustment = field(default_factory=Adjustment)
    """What training does otherwise than the spec says."""
    dataset: Dataset | None = None
    """The rows, where they are not to be read from the job's sources: a rehearsal has some of its own."""
    image: str | None = None
    """What the operator says that the pod runs; absent on a laptop."""

    @property
    def storage(self) -> Storage:
        """The job's stores."""
        return Storage(self.job.spec.output, self.mounts)

    def remember(self, name: str, result: ApiModel) -> None:
        """Keep a stage's result where the next stage looks for it."""
        self.workspace.remember(name, result)
        if self.shared is not None:
            self.shared.push_result(name)


def output_prefix(job: FineTuneJob) -> str:
    """Return where below ``spec.output.uri`` the job's results go: ``<namespace>/<name>-<first 8 of the uid>``.

    Without a cluster there is no uid; the hash of the spec takes its place, so that the same YAML finds its results.
    """
    return f"{job.metadata.namespace}/{job.metadata.name}-{(job.metadata.uid or spec_hash(job.spec))[:8]}"


def interruptible(run: Run, stage: Stage) -> Reporter:
    """Return a reporter for a stage that can be left at any report and run again."""
    return Reporter(_StoppingSink(run.sink, run.stop), stage)


@dataclass(frozen=True, slots=True)
class _StoppingSink:
    sink: Sink
    stop: StopFlag

    def report(self, progress: Progress) -> None:
        if self.stop.event.is_set():
            raise Preempted(f"stopped in the {progress.stage.value} stage, which starts again on the next run.")
        self.sink.report(progress)
