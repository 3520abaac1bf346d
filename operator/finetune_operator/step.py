"""The one next step of an accepted job: which attempt to create, supervise, stop or give up, or how the job ends. Pure.

`next_step` asks its questions from the first to the last; each answer is one function below it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta

from finetune_api.job import FineTuneJob
from finetune_api.report import ExitCode, Stage
from finetune_api.spec import Preflight, RunPolicySpec, evaluates_only
from finetune_api.status import Attempt, ConditionStatus, ConditionType, FineTuneJobStatus, Reason, StageStatus
from finetune_operator import attempt as attempts
from finetune_operator import manifest, naming, waiting
from finetune_operator.action import Action, Create
from finetune_operator.condition import ADMITTED, STAGE_CONDITIONS, Statement, current_stage, event, find, holds, stated
from finetune_operator.ledger import open_attempt, pods_told_by
from finetune_operator.observed import ChildKind, ChildView, JobView, KubeRayState, Observed, PodView
from finetune_operator.outcome import RETRYABLE
from finetune_operator.pod import Run
from finetune_operator.ray_job import KUBERAY_NEEDED
from finetune_operator.retention import LINGER, deletion, stragglers
from finetune_operator.settings import Settings

CAP_POLL = timedelta(seconds=10)
"""How often to look whether another job of the namespace has ended, which is no event of this one."""

RAY_JOB_ENDS_WITHIN = timedelta(minutes=10)
"""Behind its program: KubeRay may be away, and trains nothing new meanwhile either."""

NODE_ANSWERS_WITHIN = timedelta(minutes=1)
"""Behind the time by which a pod was to be gone."""
OUT_OF_SERVICE = "node.kubernetes.io/out-of-service=nodeshutdown:NoExecute"
"""The taint by which an administrator tells Kubernetes that a machine is off: it ends the pods that it keeps there."""


@dataclass(frozen=True, slots=True)
class Moment:
    """One accepted job, as it stands now."""

    job: JobView
    observed: Observed
    settings: Settings
    now: datetime
    spec: FineTuneJob
    """As pinned."""
    policy: RunPolicySpec
    """As it is now: suspend, deadline and time to live may change while the job exists."""
    status: FineTuneJobStatus
    """With everything that has happened."""


@dataclass(frozen=True, slots=True)
class Step:
    """What is to be done and said next."""

    statements: tuple[Statement, ...] = ()
    attempt: Attempt | None = None
    """To be entered into the status."""
    actions: tuple[Action, ...] = ()
    """After the status has been recorded."""
    wake_at: datetime | None = None


def next_step(moment: Moment) -> Step:
    """Return what is to be done next."""
    failed = next((stage for stage in moment.status.stages if not _is_passed(stage, moment)), None)
    if failed is not None:
        return _fail_with(failed, moment)
    if any(stage.stage is Stage.EVALUATE for stage in moment.status.stages):
        return _complete(moment)
    attempt = open_attempt(moment.status)
    if attempt is not None and (step := _past_deadline(attempt, moment)):
        return step
    if attempt is not None and attempts.is_reported(attempt):
        return _await_ray_job(attempt, moment)
    if attempt is not None and (moment.policy.suspend or attempt.reason is not None):
        return _stop(attempt, moment)
    if moment.policy.suspend:
        return _suspend(moment)
    if attempt is not None:
        child = moment.observed.child(attempt.child)
        if child is not None:
            return _supervise(attempt, child, moment)
        return _past_start_deadline(attempt, moment) or _create(attempt, moment)
    return _start_next(moment)


def _is_passed(stage: StageStatus, moment: Moment) -> bool:
    warned = stage.stage is Stage.CHECK and moment.spec.spec.run_policy.preflight is Preflight.WARN
    findings = (ExitCode.BAD_SPEC, ExitCode.BAD_DATA)
    return holds(moment.status, STAGE_CONDITIONS[stage.stage]) or (warned and stage.exit_code in findings)


# --- the end


def _fail_with(stage: StageStatus, moment: Moment) -> Step:
    attempt = attempts.newest(moment.status, stage.stage)
    reason = attempt.reason if attempt and attempt.reason else Reason.INTERNAL
    message = f"{stage.stage.value}: {stage.message or reason.value}"
    if reason in RETRYABLE and attempt is not None and attempt.failures > moment.spec.spec.run_policy.retries:
        faults = "one fault" if attempt.failures == 1 else f"{attempt.failures} faults"
        message = f"{stage.stage.value}: given up after {faults}, at last {reason.value}: {stage.message}"
        reason = Reason.RETRIES_EXHAUSTED
    return Step((Statement(ConditionType.FAILED, ConditionStatus.TRUE, reason, message),), wake_at=moment.now)


def _complete(moment: Moment) -> Step:
    published = find(moment.status, ConditionType.PUBLISHED)
    evaluated = find(moment.status, ConditionType.EVALUATED)
    reason = published.reason if published else Reason.STAGE_SUCCEEDED
    verdict, publication = (condition.message if condition else "" for condition in (evaluated, published))
    told = [verdict, publication]
    if published is not None and published.status is ConditionStatus.FALSE:
        # What surprises comes first: the headline has no room for all of it.
        told = [f"not published: {publication}", verdict]
    message = ". ".join(text.rstrip(".") for text in told if text)
    return Step((Statement(ConditionType.COMPLETE, ConditionStatus.TRUE, reason, message),), wake_at=moment.now)


def _past_deadline(attempt: Attempt, moment: Moment) -> Step | None:
    if moment.policy.active_deadline_seconds is None:
        return None
    latest = attempts.deadline(attempt, moment.policy.active_deadline_seconds)
    if latest is None or moment.now < latest:
        return None
    return _ended_by_us(attempt, *_too_long(moment), moment)


def _has_used_up_its_time(attempt: Attempt, moment: Moment) -> bool:
    limit = moment.policy.active_deadline_seconds
    return limit is not None and attempt.earlier_seconds >= limit


def _too_long(moment: Moment) -> tuple[Reason, str]:
    message = (
        f"the job has run for {moment.policy.active_deadline_seconds} s, which is all that "
        "spec.runPolicy.activeDeadlineSeconds allows. Its checkpoints stay; make a new FineTuneJob with more time."
    )
    return Reason.DEADLINE_EXCEEDED, message


def _ended_by_us(attempt: Attempt, reason: Reason, message: str, moment: Moment) -> Step:
    ended = attempt.model_copy(update={"reason": reason, "end_time": moment.now})
    delete = _deletions(moment.observed.child(attempt.child), reason.value, moment)
    return Step(_failure(attempt.stage, reason, message), ended, delete)


def _failure(stage: Stage, reason: Reason, message: str) -> tuple[Statement, ...]:
    return (
        Statement(STAGE_CONDITIONS[stage], ConditionStatus.FALSE, reason, message),
        Statement(ConditionType.FAILED, ConditionStatus.TRUE, reason, message),
    )


def _deletions(child: ChildView | None, why: str, moment: Moment) -> tuple[Action, ...]:
    return (deletion(child, moment.job, why),) if child is not None and not child.deleting else ()


# --- suspension


def _stop(attempt: Attempt, moment: Moment) -> Step:
    """Stop the attempt; it ends when its trainer has written a checkpoint and its pods are gone."""
    child = moment.observed.child(attempt.child)
    stopping = attempt.model_copy(update={"reason": Reason.SUSPENDED_BY_USER})
    delete = _deletions(child, "suspended by its user", moment)
    said = (_stopping(attempt.child), *_unanswered(attempt.stage, moment))
    return Step(said, stopping, delete, moment.now + LINGER)


def _suspend(moment: Moment) -> Step:
    """Say that the job is suspended, once nothing of it runs."""
    if (running := _running(moment)) is not None:
        said = (_stopping(running), *_unanswered(_stage_to_run(moment), moment))
        return Step(said, actions=_stragglers(moment), wake_at=moment.now + LINGER)
    message = "set spec.runPolicy.suspend to false to go on from the newest checkpoint"
    return Step((Statement(ConditionType.SUSPENDED, ConditionStatus.TRUE, Reason.SUSPENDED_BY_USER, message),))


def _stopping(name: str) -> Statement:
    message = f"stopping: {name} is asked to write a checkpoint and to end"
    return Statement(ConditionType.SUSPENDED, ConditionStatus.FALSE, Reason.SUSPENDED_BY_USER, message)


def _resumed(moment: Moment) -> tuple[Statement, ...]:
    if find(moment.status, ConditionType.SUSPENDED) is None:
        return ()
    return (Statement(ConditionType.SUSPENDED, ConditionStatus.FALSE, Reason.RESUMED, "goes on"),)


# --- the next attempt


def _start_next(moment: Moment) -> Step:
    stage, said = _stage_to_run(moment), (*_resumed(moment), *_skipped(moment))
    before = attempts.newest(moment.status, stage)
    if before is not None and moment.now < (start := attempts.may_start_at(before, moment.settings)):
        return Step(said, wake_at=start)
    if _running(moment) is not None:
        said = (*said, *_unanswered(stage, moment))
        return Step(said, actions=_stragglers(moment), wake_at=moment.now + LINGER)
    if _lacks_kuberay(stage, moment):
        return Step((*said, _without_kuberay(stage, moment)))
    if _is_over_the_cap(moment):
        return Step((*said, _capped(moment)), wake_at=moment.now + CAP_POLL)
    attempt = attempts.following(moment.status, stage, moment.spec, moment.now)
    if _has_used_up_its_time(attempt, moment):
        return Step((*said, *_failure(stage, *_too_long(moment))))
    step = _create(attempt, moment)
    return Step((*said, *step.statements), attempt, step.actions, step.wake_at)


def _stage_to_run(moment: Moment) -> Stage:
    return current_stage(stated(moment.status, _skipped(moment), moment.now, moment.job.generation))


def _skipped(moment: Moment) -> tuple[Statement, ...]:
    """Return which stages the job does without."""
    why: dict[ConditionType, str] = {}
    if moment.spec.spec.run_policy.preflight is Preflight.SKIP:
        why[ConditionType.CHECKED] = (
            "spec.runPolicy.preflight is skip: rows and model are looked at by the next stage alone"
        )
    if evaluates_only(moment.spec.spec.training):
        why[ConditionType.TRAINED] = "spec.training.epochs is 0: what spec.model.startFrom names is evaluated as it is"
    return tuple(Statement(kind, ConditionStatus.UNKNOWN, Reason.SKIPPED, message) for kind, message in why.items())


def _running(moment: Moment) -> str | None:
    """Return the name of a pod or Job of an earlier attempt that may still run."""
    pods = [pod.name for pod in moment.observed.pods if not pod.is_over]
    children = [child.name for child in moment.observed.children if not child.is_over]
    return next(iter((*pods, *children)), None)


def _stragglers(moment: Moment) -> tuple[Action, ...]:
    return tuple(stragglers(moment.job, moment.observed, moment.status, moment.now))


def _lacks_kuberay(stage: Stage, moment: Moment) -> bool:
    is_ray_job = manifest.child_kind(moment.spec, stage) is ChildKind.RAY_JOB
    return is_ray_job and moment.observed.kuberay is not KubeRayState.READY


def _without_kuberay(stage: Stage, moment: Moment) -> Statement:
    need = f"several workers or GPUs need KubeRay {KUBERAY_NEEDED} or newer"
    if moment.observed.kuberay is KubeRayState.TOO_OLD:
        message = (
            f"{need}, and this cluster's definition of RayJobs is too old: it leaves out what protects Ray's head. The "
            "administrator upgrades KubeRay and its definitions, which helm upgrade leaves as they are; the job then "
            "goes on by itself."
        )
    else:
        message = (
            f"{need}, whose RayJobs this cluster does not have, or not for the operator. The administrator installs it "
            "(helm install kuberay-operator kuberay/kuberay-operator); the job then goes on by itself."
        )
    return Statement(STAGE_CONDITIONS[stage], ConditionStatus.UNKNOWN, Reason.KUBERAY_MISSING, message)


def _is_over_the_cap(moment: Moment) -> bool:
    cap, observed = moment.settings.policy.max_running_jobs, moment.observed
    return cap is not None and observed.running_in_namespace + observed.waiting_before >= cap


def _capped(moment: Moment) -> Statement:
    cap = moment.settings.policy.max_running_jobs
    message = f"{cap} jobs of the namespace may run at the same time; this one starts when it is its turn"
    return Statement(ConditionType.ADMITTED, ConditionStatus.FALSE, Reason.QUOTA_EXCEEDED, message)


def _create(attempt: Attempt, moment: Moment) -> Step:
    pinned = moment.status.resolved
    assert pinned is not None and pinned.image is not None and pinned.spec_hash is not None, "not accepted"
    if _lacks_kuberay(attempt.stage, moment):
        return Step((_without_kuberay(attempt.stage, moment),))
    if any(not pod.is_over for pod in moment.observed.pods_of(attempt.child)):
        # Its Job is being deleted: a second one of that name would run beside the first one's pod.
        return Step(_unanswered(attempt.stage, moment), wake_at=moment.now + LINGER)
    why = f"attempt {attempt.number} of {attempt.stage.value}"
    child = manifest.stage_child(Run(moment.spec, attempt, pinned.image, pinned.spec_hash, moment.settings))
    started = event(Reason.STAGE_STARTED, f"created {child['kind']} {attempt.child}: {why}")
    return Step((_not_created(attempt, moment),), actions=(Create(child, why), started))


def _past_start_deadline(attempt: Attempt, moment: Moment) -> Step | None:
    """Return how the job ends when the creation of its Job, or of what that needs, has been refused for too long."""
    wait = _hindrance(attempt, moment)
    if wait is None or attempt.record_time is None:
        return None
    if moment.now < attempt.record_time + timedelta(seconds=moment.policy.start_deadline_seconds):
        return None
    return _not_started_in_time(attempt, wait.message, moment)


def _not_created(attempt: Attempt, moment: Moment) -> Statement:
    """Return how the stage stands before its Job is seen."""
    wait = _hindrance(attempt, moment)
    if wait is None:
        return _about_to_start(attempt)
    return Statement(STAGE_CONDITIONS[attempt.stage], ConditionStatus.UNKNOWN, wait.reason, wait.message)


def _hindrance(attempt: Attempt, moment: Moment) -> waiting.Wait | None:
    """Return why the attempt's Job could not be created: what its pods trust is written before it."""
    trust = naming.trust_config_map_name(moment.job.name)
    wait = waiting.unwritten("ConfigMap", trust, moment.observed) if lacks_trust(moment) else None
    return wait or waiting.unwritten(manifest.child_kind(moment.spec, attempt.stage), attempt.child, moment.observed)


def lacks_trust(moment: Moment) -> bool:
    """Return whether pods would trust the wrong certificate authorities."""
    wanted = manifest.trust_hash(moment.observed.progress_ca, moment.settings.pod.ca_bundle)
    return moment.observed.trust_hash != wanted


def _about_to_start(attempt: Attempt) -> Statement:
    kind = STAGE_CONDITIONS[attempt.stage]
    return Statement(kind, ConditionStatus.UNKNOWN, Reason.WAITING, f"attempt {attempt.number} is about to start")


# --- the running attempt


def _supervise(attempt: Attempt, child: ChildView, moment: Moment) -> Step:
    if child.suspended:
        return Step((*_resumed(moment), *_queued(attempt, child)))
    latest_start = _latest_start(attempt, child, moment)
    if latest_start is not None and moment.now >= latest_start:
        wait = waiting.why_waiting(child, moment.observed.pods_of(attempt.child))
        return _not_started_in_time(attempt, wait.message, moment)
    latest_end = attempts.deadline(attempt, moment.policy.active_deadline_seconds or 0)
    wake_ups = [
        latest_start,
        latest_end if moment.policy.active_deadline_seconds else None,
        pods_told_by(child),
        _next_overdue(moment),
    ]
    (stands,) = _unanswered(attempt.stage, moment) or (_stands(attempt, child, moment),)
    statements = (*_resumed(moment), *_admitted(stands, moment), stands)
    return Step(statements, wake_at=_earliest(wake_ups))


def _await_ray_job(attempt: Attempt, moment: Moment) -> Step:
    """Wait until the RayJob of a program that has ended well says so as well, but not for ever."""
    child = moment.observed.child(attempt.child)
    if child is None or child.deleting:
        return Step()
    assert attempt.end_time is not None
    given_up = attempt.end_time + RAY_JOB_ENDS_WITHIN
    if moment.now < given_up:
        return Step(wake_at=given_up)
    minutes = RAY_JOB_ENDS_WITHIN // timedelta(minutes=1)
    return Step(actions=(deletion(child, moment.job, f"its program ended well {minutes} minutes ago"),))


def _admitted(stands: Statement, moment: Moment) -> tuple[Statement, ...]:
    """Return that the job may run, unless it merely waits for its pod: that is told with what comes next."""
    said = find(moment.status, ConditionType.ADMITTED)
    return () if stands.reason is Reason.WAITING and said is None else (ADMITTED,)


def _queued(attempt: Attempt, child: ChildView) -> tuple[Statement, ...]:
    message = waiting.held_back(child)
    return (
        Statement(ConditionType.ADMITTED, ConditionStatus.FALSE, Reason.IN_QUEUE, message),
        Statement(STAGE_CONDITIONS[attempt.stage], ConditionStatus.UNKNOWN, Reason.IN_QUEUE, message),
    )


def _latest_start(attempt: Attempt, child: ChildView, moment: Moment) -> datetime | None:
    if attempt.start_time is not None or child.admitted is None:
        return None
    return max(child.admitted, _let_go(moment)) + timedelta(seconds=moment.policy.start_deadline_seconds)


def _let_go(moment: Moment) -> datetime:
    """Return when the job was last seen to be let go, by a queue or the cap; now, where nobody has said so yet.

    A Job tells of it later than it may start, and a RayJob keeps the time of its first start until it starts again.
    """
    said = find(moment.status, ConditionType.ADMITTED)
    if said is None:
        return moment.job.created
    return moment.now if said.status is ConditionStatus.FALSE else said.last_transition_time


def _not_started_in_time(attempt: Attempt, why: str, moment: Moment) -> Step:
    seconds = moment.policy.start_deadline_seconds
    message = f"{attempt.stage.value} has not started within {seconds} s (spec.runPolicy.startDeadlineSeconds): "
    return _ended_by_us(attempt, Reason.START_DEADLINE_EXCEEDED, message + why, moment)


def _stands(attempt: Attempt, child: ChildView, moment: Moment) -> Statement:
    kind, pods = STAGE_CONDITIONS[attempt.stage], moment.observed.pods_of(attempt.child)
    if attempt.start_time is not None:
        where = f" on node {attempt.node}" if attempt.node else ""
        return Statement(kind, ConditionStatus.UNKNOWN, Reason.RUNNING, f"attempt {attempt.number} runs{where}")
    wait = waiting.why_waiting(child, pods)
    if wait.is_silent:
        # In the words of before its Job was created: that it has a Job now, and then a pod, is not worth a write.
        return _about_to_start(attempt)
    return Statement(kind, ConditionStatus.UNKNOWN, wait.reason, wait.message)


# --- a node that does not answer


def _unanswered(stage: Stage, moment: Moment) -> tuple[Statement, ...]:
    """Return that ``stage`` waits for a node that has not ended a pod in time, where there is one.

    The pod may still run and write there, so that nothing is begun beside it until somebody gives the node up.
    """
    overdue = [pod for pod in moment.observed.pods if (time := _overdue_from(pod)) and time <= moment.now]
    if not overdue:
        return ()
    # One of several, always the same: another one would be news.
    pod = min(overdue, key=lambda pod: pod.name)
    message = (
        f"node {pod.node} does not answer: pod {pod.name} was to be gone by {pod.gone_by:%Y-%m-%dT%H:%M:%SZ}. Once its "
        f"machine is off, delete the Node, or taint it {OUT_OF_SERVICE}; the next attempt then goes on from the newest "
        "checkpoint."
    )
    return (Statement(STAGE_CONDITIONS[stage], ConditionStatus.UNKNOWN, Reason.NODE_UNREACHABLE, message),)


def _next_overdue(moment: Moment) -> datetime | None:
    times = map(_overdue_from, moment.observed.pods)
    return _earliest(time for time in times if time is not None and time > moment.now)


def _overdue_from(pod: PodView) -> datetime | None:
    if pod.is_over or pod.node is None or pod.gone_by is None:
        return None
    return pod.gone_by + NODE_ANSWERS_WITHIN


def _earliest(times: Iterable[datetime | None]) -> datetime | None:
    return min((time for time in times if time is not None), default=None)
