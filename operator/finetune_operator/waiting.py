"""Why a stage that was created does not run yet, in words a user can act on. Pure."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from finetune_api.status import Reason
from finetune_operator.observed import ChildView, Observed, PodView


@dataclass(frozen=True, slots=True)
class Wait:
    """What a stage waits for."""

    reason: Reason
    message: str
    is_silent: bool = False
    """Kubernetes does not say why: so far it merely takes its time."""


@dataclass(frozen=True, slots=True)
class _Rule:
    """A way in which pods wait: what Kubernetes calls it, and what we do."""

    reasons: tuple[str, ...]
    """Of the container, the pod's condition or an event."""
    says: str
    """Regular expression that must be found in the message; empty for any."""
    reason: Reason
    remedy: str


_REFUSALS = ("FailedCreate", "Forbidden", "")
"""Of a Job or a pod that the API server does not take; our own creations are refused without a reason."""

_RULES = (
    _Rule(
        ("ImagePullBackOff", "ErrImagePull", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable"),
        "",
        Reason.IMAGE_PULL_FAILED,
        "Check the image's name in spec.compute.image and spec.compute.imagePullSecrets; the pull is tried again.",
    ),
    _Rule(
        ("FailedMount", "FailedAttachVolume", "CreateContainerConfigError", "CreateContainerError"),
        r"not found|couldn't find key|references non-existent",
        Reason.REFERENCE_MISSING,
        "Create it in the job's namespace; the pod goes on by itself.",
    ),
    _Rule(
        ("Unschedulable",),
        r"persistentvolumeclaim .* not found",
        Reason.REFERENCE_MISSING,
        "Create it in the job's namespace; the pod goes on by itself.",
    ),
    _Rule(
        ("Unschedulable", "SchedulingGated"),
        "",
        Reason.UNSCHEDULABLE,
        "Ask for less in spec.compute, or wait for a node.",
    ),
    _Rule(
        _REFUSALS,
        r"exceeded quota",
        Reason.QUOTA_EXCEEDED,
        "It starts as soon as the namespace's quota allows.",
    ),
    _Rule(
        _REFUSALS,
        r"failed quota: .*must specify",
        Reason.QUOTA_EXCEEDED,
        "Name them in spec.compute.resources; for all jobs, and for the check stage, the administrator does so in "
        "settings.pod.defaultResources and settings.pod.checkResources.",
    ),
    _Rule(
        _REFUSALS,
        r"(?i)service ?account .*not found",
        Reason.REFERENCE_MISSING,
        "Create it in the job's namespace, or leave out spec.compute.pod.serviceAccountName.",
    ),
    _Rule(
        _REFUSALS,
        r"no PriorityClass",
        Reason.REFERENCE_MISSING,
        "Create it in the cluster, or name another one in spec.compute.priorityClassName (the administrator: "
        "settings.pod.priorityClassName).",
    ),
    _Rule(
        _REFUSALS,
        r"violates PodSecurity",
        Reason.POLICY_VIOLATED,
        "Take out of spec.compute.pod what it names, or have the namespace admit it: our own part is restricted.",
    ),
)


def why_waiting(child: ChildView, pods: Sequence[PodView]) -> Wait:
    """Return why the first of ``pods`` that does not run does not, or why ``child`` has none."""
    idle = [pod for pod in pods if pod.started is None and not pod.is_over]
    # One that says why comes before one that only has not said anything yet.
    for pod in sorted(idle, key=lambda pod: not pod.waiting_reason):
        return explain(f"pod {pod.name}", pod.waiting_reason, pod.waiting_message)
    return explain(f"{child.kind.value} {child.name}", child.waiting_reason, child.waiting_message)


def held_back(child: ChildView) -> str:
    """Return that a queue holds ``child`` back, and what the queue says about it."""
    return f"{child.kind.value} {child.name} is held back by its queue{_said(child.waiting_message)}"


def unwritten(kind: str, name: str, observed: Observed) -> Wait | None:
    """Return why the object of that name is not written, where that has been tried."""
    if name in observed.taken_names:
        message = f"{kind} {name} belongs to somebody else. Delete it, or give the FineTuneJob another name."
        return Wait(Reason.NAME_TAKEN, message)
    said = observed.refused.get(name)
    return refused(f"{kind} {name}", said) if said else None


def refused(what: str, message: str) -> Wait:
    """Return why ``what`` could not be created."""
    return _matching(what, "", message) or Wait(
        Reason.POD_NOT_STARTED, f"the API server refuses {what}{_said(message)}. It is tried again."
    )


def explain(what: str, reason: str, message: str) -> Wait:
    """Return what Kubernetes calls ``reason`` as one of ours, with what to do."""
    if not reason:
        return Wait(Reason.WAITING, f"{what} is about to start.", is_silent=True)
    return _matching(what, reason, message) or Wait(Reason.WAITING, f"{what} waits: {reason}{_said(message)}.")


def _matching(what: str, reason: str, message: str) -> Wait | None:
    for rule in _RULES:
        if reason in rule.reasons and re.search(rule.says, message):
            return Wait(rule.reason, f"{what} waits: {reason or rule.reason.value}{_said(message)}. {rule.remedy}")
    return None


def _said(message: str) -> str:
    words = " ".join(message.split()).rstrip(".")
    return f": {words[:500]}" if words else ""
