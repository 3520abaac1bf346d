"""What has happened since the status was last written, entered into it. Pure; decides nothing about what to do.

Only the newest attempt can be open. It is opened before its Job is created, and closed once: by what the trainer said,
by how its pod ended, or because it was stopped. One on Ray of which the trainer says that all went well is reported,
and closed by how its RayJob ends.
"""

from dataclasses import replace
from datetime import datetime, timedelta

from finetune_api.job import FineTuneJob
from finetune_api.report import Stage
from finetune_api.spec import PublishOn
from finetune_api.stage_result import StageResult
from finetune_api.status import (
    LONGEST_MESSAGE,
    Attempt,
    ConditionStatus,
    ConditionType,
    FineTuneJobStatus,
    PlanStatus,
    Reason,
    StageStatus,
    Summary,
)
from finetune_operator import attempt as attempts
from finetune_operator.condition import ADMITTED, STAGE_CONDITIONS, Statement, find, shortened, stated
from finetune_operator.manifest import child_kind
from finetune_operator.observed import ChildKind, ChildView, DeliveredResult, JobView, Observed, PodView
from finetune_operator.outcome import RETRYABLE, WITHOUT_CAUSE, Outcome, classify, confirm, with_its_cause
from finetune_operator.remedy import find_remedy, needs_remedy

PODS_TOLD_WITHIN = timedelta(seconds=10)
"""How much later than of a Job's end the operator may hear of its pod's: they come by different watches."""

_PERHAPS_NEVER_RAN = (Reason.CHILD_LOST, Reason.SUSPENDED_BY_USER)


def brought_up_to_date(job: JobView, observed: Observed, spec: FineTuneJob, now: datetime) -> FineTuneJobStatus:
    """Return the job's status with everything in it that ``observed`` tells about the open attempt, or the last one.

    Args:
        job: the job with its status as last written.
        observed: its children and what they said.
        spec: the resolved job.
        now: when this is looked at.
    """
    attempt = open_attempt(job.status)
    if attempt is None:
        return _with_its_cause(job, observed, spec, now)
    child, pods = observed.child(attempt.child), observed.pods_of(attempt.child)
    attempt = _queued_again(_started(attempt, child, pods), child, now)
    status = _with_attempt(job.status, attempt)
    is_ray = child_kind(spec, attempt.stage) is ChildKind.RAY_JOB
    if attempts.is_reported(attempt):
        outcome = _confirmed(attempt, child, status)
    else:
        outcome = _outcome(attempt, child, pods, _delivered(observed, attempt), is_ray)
    if outcome is None or (outcome.reason is Reason.CHILD_LOST and _may_be_told_yet(child, pods, now)):
        return status
    if is_ray and outcome.result is not None and _is_good(outcome):
        attempt = _reported(attempt, outcome.result, now)
        status = _with_report(status, attempt, outcome.result, now, job.generation)
        outcome = _confirmed(attempt, child, status)
    return status if outcome is None else _closed(status, attempt, outcome, spec, now, job.generation)


def open_attempt(status: FineTuneJobStatus) -> Attempt | None:
    """Return the attempt that has not ended, or of which it is not known yet how."""
    return next(filter(attempts.is_open, reversed(status.attempts)), None)


# --- the open attempt goes on


def _started(attempt: Attempt, child: ChildView | None, pods: tuple[PodView, ...]) -> Attempt:
    # Without its Job in sight, a start would make the Job look lost.
    if attempt.start_time is not None or child is None or child.suspended:
        return attempt
    image_id = next((pod.image_id for pod in reversed(pods) if pod.image_id), attempt.image_id)
    if child.kind is ChildKind.RAY_JOB:
        # Its pods run long before its program does, and on several nodes.
        started = {"start_time": child.started, "image_id": image_id}
        return attempt.model_copy(update=started) if child.started else attempt
    starts = [pod.started for pod in pods if pod.started is not None]
    if not starts:
        return attempt
    return attempt.model_copy(update={"start_time": min(starts), "node": pods[-1].node, "image_id": image_id})


def _queued_again(attempt: Attempt, child: ChildView | None, now: datetime) -> Attempt:
    """Keep the time that an attempt ran before its queue took the node away; its Job starts another pod later."""
    if child is None or not child.suspended:
        return attempt
    if attempts.is_reported(attempt):
        # Its program will run and end once more.
        attempt = attempt.model_copy(update={"end_time": None, "exit_code": None, "resumed_from_step": None})
    if attempt.start_time is None:
        return attempt
    ran = max(0, round((now - attempt.start_time).total_seconds()))
    return attempt.model_copy(update={"start_time": None, "earlier_seconds": attempt.earlier_seconds + ran})


def _with_attempt(status: FineTuneJobStatus, attempt: Attempt) -> FineTuneJobStatus:
    return status if attempt in status.attempts else attempts.replaced(status, attempt)


def _delivered(observed: Observed, attempt: Attempt) -> DeliveredResult | None:
    return next((one for one in observed.results if (one.stage, one.attempt) == (attempt.stage, attempt.number)), None)


# --- the open attempt ends


def _outcome(
    attempt: Attempt,
    child: ChildView | None,
    pods: tuple[PodView, ...],
    delivered: DeliveredResult | None,
    is_ray: bool,
) -> Outcome | None:
    never_seen = child is None and attempt.start_time is None and not any(pod.is_over for pod in pods)
    if never_seen:
        # Its Job is still to be created, or was stopped before it ran, or the caches are late: what it delivered waits
        # until it is in sight, so that nothing is created beside it.
        return Outcome(attempt.reason) if attempt.reason and not pods else None
    outcome = classify(child, pods, delivered)
    if outcome is None or attempt.reason is None:
        return outcome
    # It was stopped by us, so whatever else it did meanwhile is no fault, and a RayJob that is gone confirms nothing.
    if outcome.reason in RETRYABLE:
        return Outcome(attempt.reason, "", outcome.exit_code, outcome.result, outcome.ended)
    return Outcome(attempt.reason) if _is_good(outcome) and is_ray else outcome


def _reported(attempt: Attempt, result: StageResult, now: datetime) -> Attempt:
    """Return the attempt as it waits for its RayJob, having said that all went well."""
    said = {"exit_code": result.exit_code.value, "resumed_from_step": result.resumed_from_step}
    return attempt.model_copy(update={"end_time": now} | said)


def _with_report(
    status: FineTuneJobStatus, attempt: Attempt, result: StageResult, now: datetime, generation: int
) -> FineTuneJobStatus:
    status = _with_findings(attempts.replaced(status, attempt), result)
    told = Statement(
        STAGE_CONDITIONS[attempt.stage], ConditionStatus.UNKNOWN, Reason.RUNNING, _success(attempt, result)
    )
    return stated(status, [told], now, generation)


def _confirmed(attempt: Attempt, child: ChildView | None, status: FineTuneJobStatus) -> Outcome | None:
    """Return how the attempt ended by its RayJob, and what the trainer had to say if it ended well."""
    outcome, told = confirm(child), find(status, STAGE_CONDITIONS[attempt.stage])
    return replace(outcome, message=told.message) if outcome and _is_good(outcome) and told else outcome


def _is_good(outcome: Outcome) -> bool:
    return outcome.reason is Reason.STAGE_SUCCEEDED


def _may_be_told_yet(child: ChildView | None, pods: tuple[PodView, ...], now: datetime) -> bool:
    """Return whether the pod of a Job that has ended may still come in sight, with all that its trainer said."""
    latest = None if child is None or pods else pods_told_by(child)
    return latest is not None and now < latest


def pods_told_by(child: ChildView) -> datetime | None:
    """Return when the pod of a Job that has ended must be known; None while it goes on."""
    if child.kind is not ChildKind.JOB or not child.is_over or child.finished is None:
        return None
    return child.finished + PODS_TOLD_WITHIN


def _closed(
    status: FineTuneJobStatus, attempt: Attempt, outcome: Outcome, job: FineTuneJob, now: datetime, generation: int
) -> FineTuneJobStatus:
    counts = not _is_good(outcome) and outcome.reason not in attempts.FREE
    closed = attempt.model_copy(
        update={
            "end_time": attempt.end_time or outcome.ended or now,
            "reason": outcome.reason,
            "exit_code": outcome.exit_code,
            "failures": attempt.failures + counts,
            "resumed_from_step": outcome.result.resumed_from_step if outcome.result else attempt.resumed_from_step,
            "micro_batch_size": attempt.micro_batch_size or _did_not_fit(outcome),
        }
    )
    status = attempts.replaced(status, closed)
    is_tried_again = _is_tried_again(closed, job, status.plan)
    statements = [_stage_statement(closed, outcome, job, is_tried_again)]
    if closed.start_time is not None or outcome.reason not in _PERHAPS_NEVER_RAN:
        statements.append(ADMITTED)
    if outcome.result is not None:
        status = _with_findings(status, outcome.result)
    if _was_published_before(closed, outcome):
        statements = _nothing_to_do(outcome, job)
    elif _is_good(outcome) and closed.stage is Stage.EVALUATE and outcome.result is not None:
        statements += _verdict(outcome.result, job)
    if not is_tried_again:
        status = _with_stage(status, closed, outcome)
    return stated(status, statements, now, generation)


def _with_its_cause(job: JobView, observed: Observed, spec: FineTuneJob, now: datetime) -> FineTuneJobStatus:
    """Close the last attempt once more where a pod tells the cause only now: a trainer is answered before it ends."""
    attempt = next(reversed(job.status.attempts), None)
    if attempt is None or attempt.reason not in WITHOUT_CAUSE:
        return job.status
    known = Outcome(attempt.reason, exit_code=attempt.exit_code)
    outcome = with_its_cause(known, observed.child(attempt.child), observed.pods_of(attempt.child))
    if outcome.reason is attempt.reason:
        return job.status
    before = attempt.failures - (attempt.reason not in attempts.FREE)
    uncounted = attempt.model_copy(update={"failures": before})
    return _closed(job.status, uncounted, outcome, spec, now, job.generation)


def _did_not_fit(outcome: Outcome) -> int | None:
    """Return how many rows did not fit: where spec and plan leave it open, the trainer alone knows."""
    told = outcome.result if outcome.reason is Reason.OUT_OF_MEMORY else None
    return told.micro_batch_size if told else None


def _is_tried_again(attempt: Attempt, job: FineTuneJob, plan: PlanStatus | None) -> bool:
    if attempt.failures > job.spec.run_policy.retries:
        return False
    if needs_remedy(attempt):
        return find_remedy(attempt, job, plan) is not None
    return attempt.reason in RETRYABLE


def _with_stage(status: FineTuneJobStatus, attempt: Attempt, outcome: Outcome) -> FineTuneJobStatus:
    # A check that finds the whole job done before stands for all of it.
    stage = Stage.EVALUATE if _was_published_before(attempt, outcome) else attempt.stage
    ended = StageStatus(
        stage=stage,
        attempt=attempt.number,
        exit_code=outcome.exit_code,
        end_time=attempt.end_time,
        message=shortened(outcome.message, LONGEST_MESSAGE),
        report_sha256=outcome.result.report_sha256 if outcome.result else None,
        published=outcome.result.published if outcome.result else None,
    )
    others = tuple(one for one in status.stages if one.stage is not stage)
    return status.model_copy(update={"stages": (*others, ended)})


def _was_published_before(attempt: Attempt, outcome: Outcome) -> bool:
    """Whether the check found that an earlier job of this name has published the same spec."""
    return (
        attempt.stage is Stage.CHECK
        and _is_good(outcome)
        and outcome.result is not None
        and bool(outcome.result.published)
    )


# --- what the trainer found


def _with_findings(status: FineTuneJobStatus, result: StageResult) -> FineTuneJobStatus:
    """Return ``status`` with what ``result`` holds; what it says nothing about stays."""
    found = {
        name: value
        for name in ("data", "plan", "checkpoints", "evaluation", "artifacts")
        if (value := getattr(result, name))
    }
    if result.summary is not None:
        before = status.summary or Summary()
        found["summary"] = before.model_copy(update={"metric": result.summary.metric, "delta": result.summary.delta})
    if result.model_revision is not None and status.resolved is not None:
        found["resolved"] = status.resolved.model_copy(update={"model_revision": result.model_revision})
    return status.model_copy(update=found)


# --- in words


def _stage_statement(attempt: Attempt, outcome: Outcome, job: FineTuneJob, is_tried_again: bool) -> Statement:
    kind = STAGE_CONDITIONS[attempt.stage]
    if _is_good(outcome):
        message = _success(attempt, outcome.result) if outcome.result else outcome.message
        return Statement(kind, ConditionStatus.TRUE, outcome.reason, message)
    said = f"attempt {attempt.number}: {outcome.message or outcome.reason.value}"
    if not is_tried_again:
        return Statement(kind, ConditionStatus.FALSE, outcome.reason, said)
    if outcome.reason in attempts.FREE:
        message = f"attempt {attempt.number} was stopped; the next one goes on from its newest checkpoint"
        return Statement(kind, ConditionStatus.UNKNOWN, outcome.reason, message)
    again = f"{outcome.reason.value}, fault {attempt.failures} of {job.spec.run_policy.retries} that are tried again"
    return Statement(kind, ConditionStatus.UNKNOWN, Reason.RETRYING, f"{again}. {said}")


def _success(attempt: Attempt, result: StageResult) -> str:
    if result.summary is not None and result.summary.message:
        return result.summary.message
    if attempt.stage is Stage.CHECK and result.data is not None:
        rows = result.data.rows
        return f"{rows.train} rows to train on, {rows.validation} to choose on, {rows.test} to measure on"
    succeeded = f"attempt {attempt.number} succeeded"
    return f"{succeeded}; {result.message}" if result.message else succeeded


def _nothing_to_do(outcome: Outcome, job: FineTuneJob) -> list[Statement]:
    """Return what holds of a job whose spec was published before: all of it, by that earlier job."""
    assert outcome.result is not None
    gates, published = _verdict(outcome.result, job)
    message = "a job of this name has published the same spec before; nothing is trained again"
    done = [
        Statement(kind, ConditionStatus.TRUE, Reason.ALREADY_PUBLISHED, message) for kind in STAGE_CONDITIONS.values()
    ]
    return [
        ADMITTED,
        *done,
        gates,
        replace(published, reason=Reason.ALREADY_PUBLISHED),
    ]


def _verdict(result: StageResult, job: FineTuneJob) -> list[Statement]:
    """Return whether the gates let the model through, and whether it was published."""
    gates = result.evaluation.gates if result.evaluation else ()
    failed = [f"{gate.metric}: {gate.why}" for gate in gates if not gate.passed]
    # A result that had to be shortened may not name the gate any more.
    asked = job.spec.evaluation.gates or (job.spec.evaluation.forgetting and not gates)
    is_kept_back = result.published is False and job.spec.output.publish_on is PublishOn.GATES
    if failed or (is_kept_back and asked):
        message = "; ".join(failed) or result.why_not_published
        passed = Statement(ConditionType.GATES_PASSED, ConditionStatus.FALSE, Reason.GATES_NOT_PASSED, message)
    else:
        reason = Reason.GATES_PASSED if job.spec.evaluation.gates else Reason.NO_GATES
        passed = Statement(ConditionType.GATES_PASSED, ConditionStatus.TRUE, reason)
    return [passed, _publication(result, job, passed)]


def _publication(result: StageResult, job: FineTuneJob, gates: Statement) -> Statement:
    kind = ConditionType.PUBLISHED
    if result.published:
        places = ", ".join(artifact.uri for artifact in result.artifacts)
        return Statement(kind, ConditionStatus.TRUE, Reason.PUBLISHED, places)
    if job.spec.output.publish_on is PublishOn.NEVER:
        reason, message = Reason.PUBLISH_NEVER, "spec.output.publishOn is never; the report has the numbers"
    elif gates.reason is Reason.NO_GATES:
        reason, message = Reason.WORSE_THAN_BASE, "the tuned model is worse than its base; the report has the numbers"
    else:
        reason, message = Reason.GATES_NOT_PASSED, "a gate keeps the model back; the report has the numbers"
    return Statement(kind, ConditionStatus.FALSE, reason, result.why_not_published or message)
