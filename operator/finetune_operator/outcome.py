"""How an attempt ended: from what the trainer said, how its pod ended and what the Job says. Pure.

The trainer's own word counts most; then the exit code; then what Kubernetes tells of the pod; then of the Job.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel
from pydantic_core import from_json

from finetune_api.plain_text import one_line, printable_values
from finetune_api.report import CONTRACT_VERSION, ExitCode, Stage
from finetune_api.stage_result import StageResult
from finetune_api.status import Reason
from finetune_operator.observed import ChildKind, ChildView, DeliveredResult, PodView

EXIT_REASONS = {
    ExitCode.OK: Reason.STAGE_SUCCEEDED,
    ExitCode.BAD_SPEC: Reason.BAD_SPEC,
    ExitCode.BAD_DATA: Reason.BAD_DATA,
    ExitCode.WORKER_LOST: Reason.WORKER_LOST,
    ExitCode.STORAGE: Reason.STORAGE,
    ExitCode.INTERNAL: Reason.INTERNAL,
    ExitCode.OUT_OF_MEMORY: Reason.OUT_OF_MEMORY,
    ExitCode.DIVERGED: Reason.DIVERGED,
    ExitCode.PREEMPTED: Reason.PREEMPTED,
}

RETRYABLE = {
    *(reason for code, reason in EXIT_REASONS.items() if code.is_retryable),
    Reason.CHILD_LOST,
    Reason.SUSPENDED_BY_USER,
    Reason.UNKNOWN,
}
"""Ends after which the same job may succeed when it is run again."""

_OF_A_LOSS = (Reason.WORKER_LOST, Reason.CHILD_LOST)
WITHOUT_CAUSE = (*_OF_A_LOSS, Reason.PREEMPTED)
"""Ends of which the pods may know why."""

SIGKILL_EXIT = 137
SIGTERM_EXIT = 143
_EXIT_CODE = re.compile(r"exit code (\d{1,3})\b")
_LONGEST_QUOTE = 300


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an attempt ended."""

    reason: Reason
    message: str = ""
    """For people; empty when all went well."""
    exit_code: int | None = None
    result: StageResult | None = None
    """What the trainer said, as far as it is known."""
    ended: datetime | None = None
    """When; None when nobody saw it."""


def classify(child: ChildView | None, pods: Sequence[PodView], delivered: DeliveredResult | None) -> Outcome | None:
    """Return how an attempt that has started ended; None while it goes on or is not known for sure.

    What the trainer posted stands, whatever becomes of its pods: it posts when all that it made is stored. Only that
    all went well must be true of a RayJob as well: see `confirm`.

    Args:
        child: its Job; None when that is gone.
        pods: of the Job, oldest first.
        delivered: what the trainer posted.
    """
    if delivered is not None:
        return with_its_cause(_from_result(delivered.result, None), child, pods)
    if child is not None and child.kind is ChildKind.RAY_JOB:
        # How its pods end is KubeRay's doing; the program ran in one of them as one process of several.
        return with_its_cause(_from_child(child), child, pods) if child.is_over else None
    newest = pods[-1] if pods else None
    if any(not pod.is_over for pod in pods) or (child is not None and not child.is_over):
        return None
    if newest is not None and (child is None or child.failed or newest.exit_code is not None):
        return with_its_cause(_from_pod(newest), child, (newest,))
    return _from_child(child)


def confirm(child: ChildView | None) -> Outcome | None:
    """Return how an attempt ended whose trainer says that all went well, by its RayJob; None while that goes on.

    KubeRay, the queue and who looks at RayJobs go by the RayJob alone. An attempt that it does not confirm costs
    little: the next one finds what was trained, and trains nothing.
    """
    if child is None:
        return Outcome(Reason.CHILD_LOST, "its program ended well, but its RayJob has gone and did not say so.")
    if child.failed:
        return _from_child(child)
    return Outcome(Reason.STAGE_SUCCEEDED, exit_code=ExitCode.OK.value) if child.succeeded else None


def _from_result(result: StageResult, ended: datetime | None) -> Outcome:
    if result.contract_version != CONTRACT_VERSION:
        return _skew(result.contract_version, ended)
    reason = EXIT_REASONS[result.exit_code]
    return Outcome(reason, result.message, result.exit_code.value, result, ended)


def with_its_cause(outcome: Outcome, child: ChildView | None, pods: Sequence[PodView]) -> Outcome:
    """Return ``outcome`` by its cause, a limit of one of the pods: who is stopped or misses a worker cannot know it."""
    ended = [pod for pod in pods if _ended_in_time(pod, child)]
    killed = [pod for pod in ended if pod.out_of_memory] if outcome.reason in _OF_A_LOSS else []
    if worker := next((pod for pod in killed if not pod.is_head), None):
        return replace(outcome, reason=Reason.OUT_OF_MEMORY, message=_killed_at_its_limit(worker))
    if killed:
        # No step was too large for it: the head holds none.
        return replace(outcome, message=_killed_at_its_limit(killed[0]))
    evicted = next((pod for pod in ended if pod.over_limit), None)
    if evicted is not None and outcome.reason in WITHOUT_CAUSE:
        # As the trainer calls a disk that is full.
        return replace(outcome, reason=Reason.STORAGE, message=_evicted_at_its_limit(evicted))
    return outcome


def _ended_in_time(pod: PodView, child: ChildView | None) -> bool:
    """Return whether the program may have missed the pod: one that ended before it began has been replaced."""
    began = child.started if child is not None else None
    return began is None or pod.finished is None or pod.finished >= began


def _where(pod: PodView) -> str:
    whose = ", the head of the Ray cluster," if pod.is_head else ""
    return f"pod {pod.name}{whose}" + (f" on node {pod.node}" if pod.node else "")


def _killed_at_its_limit(pod: PodView) -> str:
    return f"{_where(pod)} was killed at its memory limit. If it happens again, raise {_sized_by(pod, 'memory')}."


def _evicted_at_its_limit(pod: PodView) -> str:
    said = one_line(pod.over_limit)[:_LONGEST_QUOTE].strip(" .")
    if "EmptyDir" in said:
        limit = "the volume's sizeLimit in spec.compute.pod.volumes"
    else:
        limit = _sized_by(pod, "ephemeralStorage")
    return f"{_where(pod)} was evicted for what it stored: {said}. Raise {limit}."


def _sized_by(pod: PodView, amount: str) -> str:
    """Return where the pod's ``amount`` is written."""
    if pod.stage is Stage.CHECK or pod.is_head:
        # No job can size it.
        return (
            f"{amount} in settings.pod.checkResources, which is the administrator's; where that is empty, in "
            "settings.pod.defaultResources"
        )
    if pod.stage is Stage.EVALUATE:
        return f"spec.evaluation.resources.{amount}, or spec.compute.resources.{amount} where the former is left out"
    return f"spec.compute.resources.{amount}"


def _skew(version: int, ended: datetime | None) -> Outcome:
    return Outcome(
        Reason.CONTRACT_SKEW,
        f"the trainer speaks contract version {version} and this operator {CONTRACT_VERSION}. "
        "Use images of one release: leave spec.compute.image out, or upgrade the operator.",
        ended=ended,
    )


def _from_pod(pod: PodView) -> Outcome:
    said = parse_result(pod.termination_message, pod.stage)
    if isinstance(said, _Version):
        return _skew(said.contract_version, pod.finished)
    # What it said about a failure stands; that all went well must be true of its exit as well.
    if said is not None and (said.exit_code is not ExitCode.OK or pod.exit_code == 0):
        return _from_result(said, pod.finished)
    return _from_exit(pod)


def _from_exit(pod: PodView) -> Outcome:
    """Return the outcome of a pod whose trainer left no usable word."""
    code, where = pod.exit_code, _where(pod)

    def outcome(reason: Reason, message: str) -> Outcome:
        return Outcome(reason, message, code, ended=pod.finished)

    if pod.out_of_memory:
        return outcome(Reason.OUT_OF_MEMORY, _killed_at_its_limit(pod))
    if code == 0:
        remedy = "The image must hold the trainer of this release: spec.compute.image."
        # No exit code: 0 would say that all is well.
        return Outcome(
            Reason.INTERNAL, f"{where} ended with exit code 0 and without a result. {remedy}", ended=pod.finished
        )
    if code in set(ExitCode):
        quoted = _quoted(pod.termination_message)
        return outcome(EXIT_REASONS[ExitCode(code)], f"{where} ended with exit code {code}{quoted}.")
    if pod.disrupted or code == SIGTERM_EXIT:
        return outcome(Reason.PREEMPTED, f"{where} was stopped from outside before it could end by itself.")
    if code == SIGKILL_EXIT:
        why = "its node went down or ran out of memory, or somebody killed it"
        return outcome(Reason.CHILD_LOST, f"{where} was killed from outside, below its own memory limit: {why}.")
    if code is None:
        return outcome(Reason.CHILD_LOST, f"{where} ended, and how is not known.")
    return outcome(
        Reason.INTERNAL, f"{where} ended with exit code {code}{_signal(code)}{_quoted(pod.termination_message)}."
    )


def _signal(code: int) -> str:
    return f" (killed by signal {code - 128})" if code > 128 else ""


def _quoted(text: str) -> str:
    """Return the end of what a process left behind, which names the error."""
    words = one_line(text)[-_LONGEST_QUOTE:]
    return f": {words}" if words else ""


def _without_log(message: str) -> str:
    """Return what Ray says of a program's end, without the last lines that the program itself printed."""
    return message.partition(", last available logs")[0]


def _from_child(child: ChildView | None) -> Outcome:
    """Return the outcome of an attempt whose pod is gone."""
    if child is None:
        message = "its Job and its pods are gone, and how it ended is not known. Somebody has deleted them."
        return Outcome(Reason.CHILD_LOST, message)
    if child.succeeded:
        message = f"{child.kind.value} {child.name} succeeded, but its pods are gone and with them what it found."
        return Outcome(Reason.CHILD_LOST, message, ended=child.finished)
    failure = _without_log(child.failure_message)
    said = f"{child.kind.value} {child.name} failed: {child.failure_reason} {failure}".strip()
    code = _EXIT_CODE.search(failure)
    if code is not None and int(code[1]) in set(ExitCode) - {ExitCode.OK}:
        known = ExitCode(int(code[1]))
        return Outcome(EXIT_REASONS[known], said, known.value, ended=child.finished)
    disrupted = "DisruptionTarget" in child.failure_message
    return Outcome(Reason.PREEMPTED if disrupted else Reason.CHILD_LOST, said, ended=child.finished)


# --- the termination message


class _Version(BaseModel):
    """The one field that every version of the contract has."""

    model_config = ConfigDict(alias_generator=to_camel, extra="ignore")

    contract_version: int = CONTRACT_VERSION


def parse_result(text: str, stage: Stage) -> StageResult | _Version | None:
    """Return the result of ``stage`` in a termination message; its version if that is another one; None for others."""
    try:
        content = printable_values(from_json(text))
        version = _Version.model_validate(content)
        if version.contract_version != CONTRACT_VERSION:
            return version
        result = StageResult.model_validate(content, by_alias=True, by_name=False)
    except ValueError:
        return None
    return result if result.stage is stage else None
