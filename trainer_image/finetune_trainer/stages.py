"""The stages of one job and their order: check, train, evaluate, which publishes too.

Each reads what it needs from the spec and the workspace, so a stage can run in a process or pod of its own, and a
finished one is not run again.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path

from finetune_api.job import FineTuneJob, spec_hash
from finetune_api.report import DataReport, Report, Stage
from finetune_api.stage_result import StageResult
from finetune_api.status import PlanStatus
from finetune_trainer.adjustment import Adjustment
from finetune_trainer.check_stage import check_stage, inspect_job
from finetune_trainer.errors import FineTuneError, StepError, StorageError
from finetune_trainer.evaluate_stage import evaluate_stage
from finetune_trainer.interrupt import StopFlag
from finetune_trainer.location import Mounts
from finetune_trainer.manifest import read_manifest
from finetune_trainer.progress import Sink
from finetune_trainer.publication import find_publication, record_publication
from finetune_trainer.run import Run, output_prefix
from finetune_trainer.shared_state import SharedState
from finetune_trainer.stage_summary import check_result, evaluate_result, failure, train_result
from finetune_trainer.storage import Storage
from finetune_trainer.train_stage import find_checkpoint, train_stage
from finetune_trainer.workspace import Workspace

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PodOptions:
    """What a stage is told that runs in a pod of its own."""

    adjustment: Adjustment = field(default_factory=Adjustment)
    """See `Run`."""
    image: str | None = None
    """See `Run`; absent where the operator is of a version that did not say."""


def run(job: FineTuneJob, folder: Path, sink: Sink) -> Report:
    """Run all stages, one after the other; a used workspace is gone on with.

    Raises:
        FineTuneError: what kept the job from its end.
    """
    mounts = Mounts.from_environment()
    workspace = Workspace(folder, mounts.cache)
    with workspace.claim(spec_hash(job.spec)), StopFlag() as stop:
        whole = Run(job, workspace, sink, stop, mounts)
        check_stage(whole)
        train_stage(whole)
        return evaluate_stage(whole)


def run_one(stage: Stage, job: FineTuneJob, folder: Path, sink: Sink, pod: PodOptions | None = None) -> StageResult:
    """Run a single stage and return how it ended, also when it failed.

    Args:
        stage: check, train or evaluate.
        job: resolved.
        folder: the workspace that the stages before it have left; in a pod, an empty folder.
        sink: who listens.
        pod: set when every stage has a pod of its own: results then go through the output store.
    """
    mounts = Mounts.from_environment()
    workspace = Workspace(folder, mounts.cache)
    shared: SharedState | None = None
    resumed_from: int | None = None
    try:
        with workspace.claim(spec_hash(job.spec)), StopFlag() as stop:
            if pod is not None:
                shared = SharedState(Storage(job.spec.output, mounts).open_output(), output_prefix(job), workspace)
            told = pod or PodOptions()
            one = Run(job, workspace, sink, stop, mounts, shared, told.adjustment, image=told.image)
            match stage:
                case Stage.CHECK:
                    if shared is not None and (published := find_publication(shared.store, job)) is not None:
                        return published
                    return _checked(one)
                case Stage.TRAIN:
                    if shared is not None:
                        shared.drop_useless_checkpoints(one.adjustment)
                    resumed_from = find_checkpoint(one)
                    return train_result(train_stage(one))
                case Stage.EVALUATE:
                    result = _evaluated(one, evaluate_stage(one))
                    if shared is not None and result.published:
                        record_publication(shared.store, job, result)
                    return result
                case _:
                    raise ValueError(f"{stage} is no stage that runs by itself")
    except FineTuneError as error:
        return _failed(stage, error, shared, resumed_from)


def check(job: FineTuneJob, folder: Path, sink: Sink) -> DataReport:
    """Run the check stage alone and return what was found; a run in the same workspace goes on from it.

    Raises:
        FineTuneError: what would keep the job from being trained, leakage aside.
    """
    mounts = Mounts.from_environment()
    workspace = Workspace(folder, mounts.cache)
    with workspace.claim(spec_hash(job.spec)), StopFlag() as stop:
        report, _ = inspect_job(Run(job, workspace, sink, stop, mounts))
    return report


def _checked(one: Run) -> StageResult:
    """Return what the check found, also where it then refused to go on."""
    recall = one.workspace.recall
    try:
        report, inputs = check_stage(one)
    except FineTuneError as error:
        if (data := recall("data", DataReport)) is None:
            raise
        found, told = check_result(data, recall("plan", PlanStatus)), failure(Stage.CHECK, error.exit_code, str(error))
        return told.model_copy(update={"data": found.data, "plan": found.plan})
    return check_result(report, recall("plan", PlanStatus), inputs.model)


def _evaluated(one: Run, report: Report) -> StageResult:
    manifest = read_manifest(one.workspace.report)
    uri = f"{one.storage.open_output().uri}/{output_prefix(one.job)}/report"
    return evaluate_result(report, uri, manifest.sha256, manifest.total_bytes)


def _failed(stage: Stage, error: FineTuneError, shared: SharedState | None, resumed_from: int | None) -> StageResult:
    result = failure(stage, error.exit_code, str(error)).model_copy(update={"resumed_from_step": resumed_from})
    if isinstance(error, StepError):
        result = result.model_copy(update={"micro_batch_size": error.micro_batch})
    # A store that does not answer has been waited for already.
    if stage is not Stage.TRAIN or shared is None or isinstance(error, StorageError):
        return result
    try:
        return result.model_copy(update={"checkpoints": shared.checkpoints()})
    except FineTuneError as other:
        # Must not hide why the stage ended.
        logger.warning("checkpoints not listed reason=%s", other)
        return result
