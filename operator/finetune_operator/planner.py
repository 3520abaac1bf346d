"""Decide what to do next for one FineTuneJob. Pure: same input, same plan; no clock, no I/O.

A job is refused or accepted; accepted means pinned: what is to be done lies in an immutable ConfigMap. Then its stages
run, one attempt after the other, until one fails for good or the last has succeeded. What has happened is entered into
the status first (`ledger`); then exactly one step is chosen (`step`).

Every plan records before it acts: the status with a new attempt, or with the end, is written before the Job is created
or deleted. So an operator that dies anywhere finds out from the cluster what it was about to do.
"""

from datetime import datetime, timedelta

from pydantic import ValidationError

from finetune_api.job import FineTuneJob
from finetune_api.spec import RunPolicySpec
from finetune_api.status import ConditionStatus, ConditionType, FineTuneJobStatus, Reason, ResolvedStatus, Summary
from finetune_operator import attempt as attempts
from finetune_operator import manifest, naming, waiting
from finetune_operator.acceptance import Accepted, Refused, judge
from finetune_operator.action import Action, Create, Plan, RecordStatus, Replace
from finetune_operator.condition import (
    STAGE_CONDITIONS,
    Statement,
    current_stage,
    derive_phase,
    ending,
    headline,
    news,
    stated,
)
from finetune_operator.ledger import brought_up_to_date, open_attempt
from finetune_operator.observed import JobView, Observed
from finetune_operator.retention import after_the_end, forgotten
from finetune_operator.settings import Settings
from finetune_operator.step import Moment, Step, lacks_trust, next_step

LOOK_AGAIN = timedelta(minutes=1)
"""For what no watch tells: a profile that is missing, a policy."""


def plan(job: JobView, observed: Observed, settings: Settings, now: datetime) -> Plan:
    """Return what to do now for ``job``, and when to look again although nothing has happened.

    Args:
        job: the object with its status.
        observed: its children and what they said.
        settings: what the administrator decides.
        now: the time.
    """
    if job.deleting:
        return Plan()
    ended = _ended(job.status, now)
    if ended is not None:
        time_to_live = timedelta(seconds=_run_policy(job, RunPolicySpec()).child_ttl_seconds)
        return after_the_end(job, observed, ended + time_to_live, now)
    if job.status.resolved is None or job.status.resolved.config_map is None:
        return _accept(job, observed, settings, now)
    if observed.resolved is None:
        return _restore(job, observed, settings, now)
    status = brought_up_to_date(job, observed, observed.resolved, now)
    return _brought_forward(job, observed, settings, now, observed.resolved, status)


def _ended(status: FineTuneJobStatus, now: datetime) -> datetime | None:
    """Return when the job ended for good; just now, where a later release says how by what this one cannot read."""
    if over := ending(status):
        return over.last_transition_time
    return now if status.phase is not None and status.phase.is_terminal else None


# --- acceptance


def _accept(job: JobView, observed: Observed, settings: Settings, now: datetime) -> Plan:
    verdict = judge(job, settings, observed.starts)
    if isinstance(verdict, Refused):
        return _refuse(job, verdict, now)
    pin = manifest.spec_config_map(verdict.job, verdict.spec_hash)
    name = pin["metadata"]["name"]
    create = Create(pin, "pin what is to be done")
    if wait := waiting.unwritten("ConfigMap", name, observed):
        refused = Statement(ConditionType.ACCEPTED, ConditionStatus.UNKNOWN, wait.reason, wait.message)
        status = _finished(stated(job.status, [refused], now, job.generation), job)
        return Plan((*_recorded(job, status, "cannot be pinned"), create))
    accepted = Statement(
        ConditionType.ACCEPTED, ConditionStatus.TRUE, Reason.SPEC_VALID, "the spec is valid and pinned"
    )
    status = job.status.model_copy(update={"resolved": _pinned(verdict)})
    status = stated(status, [accepted], now, job.generation)
    # Pinned, recorded and begun at one look: of a thousand jobs the last waits for as many looks less.
    begun = _brought_forward(job, observed, settings, now, verdict.job, status)
    return Plan((create, *begun.actions), begun.wake_at, pinned=pin["data"][manifest.JOB_FILE])


def _pinned(accepted: Accepted) -> ResolvedStatus:
    return ResolvedStatus(
        config_map=naming.spec_config_map_name(accepted.job.metadata.name, accepted.spec_hash),
        spec_hash=accepted.spec_hash,
        image=accepted.image,
        output_path=accepted.output_path,
    )


def _refuse(job: JobView, refused: Refused, now: datetime) -> Plan:
    kinds = [ConditionType.ACCEPTED] if not refused.is_final else [ConditionType.ACCEPTED, ConditionType.FAILED]
    waits = refused.reason is Reason.WAITING_FOR_JOB
    values = {
        ConditionType.ACCEPTED: ConditionStatus.UNKNOWN if waits else ConditionStatus.FALSE,
        ConditionType.FAILED: ConditionStatus.TRUE,
    }
    statements = [Statement(kind, values[kind], refused.reason, refused.message) for kind in kinds]
    status = _finished(stated(job.status, statements, now, job.generation), job)
    return Plan(_recorded(job, status, "refused"), wake_at=None if refused.is_final else now + LOOK_AGAIN)


def _restore(job: JobView, observed: Observed, settings: Settings, now: datetime) -> Plan:
    """Create the pinned ConfigMap again if it can be made as it was."""
    pinned, verdict = job.status.resolved, judge(job, settings, observed.starts)
    if pinned is not None and isinstance(verdict, Accepted) and verdict.spec_hash == pinned.spec_hash:
        create = Create(manifest.spec_config_map(verdict.job, verdict.spec_hash), "pin again what is to be done")
        return Plan((*_told_unpinned(job, observed, create, now), create), wake_at=now)
    name = pinned.config_map if pinned else ""
    message = (
        f"ConfigMap {name}, which held what is to be done, was deleted, and settings or profile are other ones now. "
        "Make a new FineTuneJob with a new name."
    )
    failed = Statement(ConditionType.FAILED, ConditionStatus.TRUE, Reason.REFERENCE_MISSING, message)
    status = _finished(stated(job.status, [failed], now, job.generation), job)
    return Plan(_recorded(job, status, "its pinned spec is gone"), wake_at=now)


def _told_unpinned(job: JobView, observed: Observed, create: Create, now: datetime) -> tuple[Action, ...]:
    wait = waiting.unwritten("ConfigMap", create.manifest["metadata"]["name"], observed)
    if wait is None:
        return ()
    # Of the stage, which says something else as soon as it goes on.
    kind = STAGE_CONDITIONS[current_stage(job.status)]
    waits = Statement(kind, ConditionStatus.UNKNOWN, wait.reason, wait.message)
    status = _finished(stated(job.status, [waits], now, job.generation), job)
    return _recorded(job, status, "cannot be pinned again")


def _run_policy(job: JobView, pinned: RunPolicySpec) -> RunPolicySpec:
    """Return the run policy as it is now."""
    try:
        return RunPolicySpec.model_validate(job.spec.get("runPolicy") or {}, by_alias=True, by_name=False)
    except ValidationError:
        # Admission refuses such a change; what was accepted goes on.
        return pinned


# --- from a step to a plan


def _brought_forward(
    job: JobView, observed: Observed, settings: Settings, now: datetime, spec: FineTuneJob, status: FineTuneJobStatus
) -> Plan:
    moment = Moment(job, observed, settings, now, spec, _run_policy(job, spec.spec.run_policy), status)
    return _carried_out(moment, next_step(moment))


def _carried_out(moment: Moment, step: Step) -> Plan:
    status = moment.status
    if step.attempt is not None and step.attempt not in status.attempts:
        status = attempts.replaced(status, step.attempt)
    status = _finished(stated(status, step.statements, moment.now, moment.job.generation), moment.job)
    records = _recorded(moment.job, status, headline(status))
    actions = _with_trust(step.actions, moment) if open_attempt(status) is not None else step.actions
    return Plan((*records, *forgotten(moment.job, moment.observed, status), *actions), step.wake_at)


def _finished(status: FineTuneJobStatus, job: JobView) -> FineTuneJobStatus:
    """Return ``status`` with what follows from the rest of it."""
    summary = status.summary or Summary()
    derived = {
        "observed_generation": job.generation,
        "phase": derive_phase(status),
        "summary": summary.model_copy(update={"message": headline(status)} | ({"eta": ""} if ending(status) else {})),
    }
    return status.model_copy(update=derived)


def _recorded(job: JobView, status: FineTuneJobStatus, why: str) -> tuple[Action, ...]:
    if status == job.status:
        return ()
    return (RecordStatus(status, why), *news(job.status, status))


def _with_trust(actions: tuple[Action, ...], moment: Moment) -> tuple[Action, ...]:
    """Return ``actions`` and a new trust ConfigMap where pods would trust the wrong authorities."""
    if not lacks_trust(moment):
        return actions
    content = manifest.trust_config_map(moment.spec, moment.observed.progress_ca, moment.settings)
    replace = Replace(content, "certificate authorities that the pods trust")
    # New pods need it. Where none are to come nothing may wait for it: it may be refused.
    return (replace, *actions) if any(isinstance(action, Create) for action in actions) else (*actions, replace)
