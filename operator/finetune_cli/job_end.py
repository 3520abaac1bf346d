"""How a job on a cluster ended, as the exit code and the error that a run on this machine would have given. Pure."""

from collections.abc import Mapping

from finetune_api.report import ExitCode
from finetune_api.status import ConditionType, FineTuneJobStatus, Phase, Reason
from finetune_cli.cluster_job import ClusterJob
from finetune_trainer.errors import (
    DataError,
    FineTuneError,
    OutOfMemoryError,
    Preempted,
    SpecError,
    StorageError,
    TrainingDivergedError,
    WorkerLostError,
)

_ERRORS: Mapping[ExitCode, type[FineTuneError]] = {
    kind.exit_code: kind
    for kind in (
        SpecError,
        DataError,
        WorkerLostError,
        StorageError,
        OutOfMemoryError,
        TrainingDivergedError,
        Preempted,
    )
}

_CODES: Mapping[Reason, ExitCode] = {
    Reason.SPEC_INVALID: ExitCode.BAD_SPEC,
    Reason.NOT_SUPPORTED: ExitCode.BAD_SPEC,
    Reason.PROFILE_NOT_FOUND: ExitCode.BAD_SPEC,
    Reason.POLICY_VIOLATED: ExitCode.BAD_SPEC,
    Reason.BAD_SPEC: ExitCode.BAD_SPEC,
    Reason.BAD_DATA: ExitCode.BAD_DATA,
    Reason.STORAGE: ExitCode.STORAGE,
    Reason.OUT_OF_MEMORY: ExitCode.OUT_OF_MEMORY,
    Reason.DIVERGED: ExitCode.DIVERGED,
    Reason.PREEMPTED: ExitCode.PREEMPTED,
}
"""What a reason means where no trainer left an exit code; every other one is internal to the cluster."""


def failure_of(job: ClusterJob) -> FineTuneError | None:
    """Return the error that a failed job ended with; nothing for one that runs or succeeded."""
    if job.status.phase is not Phase.FAILED:
        return None
    failed = next((one for one in job.status.conditions if one.type is ConditionType.FAILED), None)
    why = f": {failed.message or failed.reason.value}" if failed else ""
    reason = f" ({failed.reason.value})" if failed and failed.message else ""
    code = _exit_code(job.status, failed.reason if failed else None)
    return _ERRORS.get(code, FineTuneError)(f"FineTuneJob {job.name} failed{reason}{why}")


def _exit_code(status: FineTuneJobStatus, reason: Reason | None) -> ExitCode:
    """Return the code of the stage that failed: of its last attempt, else what the reason means."""
    if reason is Reason.RETRIES_EXHAUSTED and status.attempts:
        # What stopped a trainer from outside is no word of its own: one that was evicted says that it was preempted.
        reason = status.attempts[-1].reason
    if reason is not None and reason in _CODES:
        return _CODES[reason]
    codes = [*(attempt.exit_code for attempt in status.attempts), *(stage.exit_code for stage in status.stages)]
    # 137 and the like are signals: not the trainer's own words.
    known = [ExitCode(code) for code in codes if code in list(ExitCode) and code != ExitCode.OK]
    return known[-1] if known else ExitCode.INTERNAL
