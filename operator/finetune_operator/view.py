"""Raw objects of the API server, trimmed to what is needed: thousands of them are kept in memory. Pure."""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from finetune_api.crd import GROUP
from finetune_api.job import KIND
from finetune_api.report import Stage
from finetune_api.status import ConditionStatus, ConditionType, Phase, Reason
from finetune_api.stored_status import read_status
from finetune_operator import naming
from finetune_operator.observed import ChildKind, ChildView, JobView, PodPhase, PodView, start_job

Raw = Mapping[str, Any]

RAY_CLUSTER = "RayCluster"

_ACCEPTED = (ConditionType.ACCEPTED, ConditionStatus.TRUE)

PROGRESS_FIELDS = ("progress", "latestMetrics")
PROGRESS_SUMMARY_FIELDS = ("progress", "eta")
"""What only the writer of progress sets: in ``status``, and in ``status.summary``."""

# A pod is in this state for seconds in any case, and for ever when something is wrong: it tells nothing.
_SILENT_REASONS = frozenset({"ContainerCreating", "PodInitializing"})
_DISRUPTIONS = frozenset(
    {
        "Evicted",
        "NodeLost",
        "NodeShutdown",
        "Preempting",
        "Shutdown",
        "Terminated",
        "NodeAffinity",
        "UnexpectedAdmissionError",
    }
)


@dataclass(frozen=True, slots=True)
class PackedJob:
    """A FineTuneJob in some 2 KB: as objects, its spec and status would take twenty times that."""

    namespace: str
    name: str
    uid: str
    resource_version: int
    created: datetime
    phase: Phase | None
    has_begun: bool
    """An attempt is recorded and has not ended: it has a pod, or may get one at any time."""
    wants_to_run: bool
    """Accepted or not judged yet, and neither ended, deleted nor suspended; so it has its turn under the cap on running
    jobs."""
    held_back: bool
    """Waits for its turn under the cap on running jobs."""
    waits_for: str | None
    """The job whose publication it goes on from; absent once it is accepted, when that is pinned."""
    content: bytes
    """The object as JSON, without what nobody asks for."""
    essence: int
    """Changes with anything but progress."""

    @property
    def key(self) -> tuple[str, str]:
        """Namespace and name."""
        return self.namespace, self.name

    @property
    def is_terminal(self) -> bool:
        """Whether it has ended for good."""
        return self.phase is not None and self.phase.is_terminal


def job_key(raw: Raw) -> tuple[str, str]:
    """Return namespace and name of a FineTuneJob."""
    return raw["metadata"]["namespace"], raw["metadata"]["name"]


def packed_job(raw: Raw) -> PackedJob:
    """Return the object without managed fields and the like."""
    metadata, status = raw["metadata"], raw.get("status") or {}
    kept = {
        "metadata": {
            "namespace": metadata["namespace"],
            "name": metadata["name"],
            "uid": metadata["uid"],
            "generation": metadata.get("generation", 1),
            "creationTimestamp": metadata["creationTimestamp"],
            "deleting": "deletionTimestamp" in metadata,
            "labels": metadata.get("labels") or {},
            "annotations": metadata.get("annotations") or {},
        },
        "spec": raw.get("spec") or {},
    }
    told = _json(kept)
    phase = Phase(status["phase"]) if status.get("phase") in list(Phase) else None
    is_terminal = phase is not None and phase.is_terminal
    wants_to_run = not is_terminal and "deletionTimestamp" not in metadata and _is_to_run(raw)
    return PackedJob(
        namespace=metadata["namespace"],
        name=metadata["name"],
        uid=metadata["uid"],
        resource_version=int(metadata["resourceVersion"]),
        created=_time(metadata["creationTimestamp"]),
        phase=phase,
        has_begun=not is_terminal and any(map(_is_open, status.get("attempts") or ())),
        wants_to_run=wants_to_run,
        held_back=wants_to_run and _has(status, ConditionType.ADMITTED, ConditionStatus.FALSE, Reason.QUOTA_EXCEEDED),
        waits_for=None if is_terminal or _has(status, *_ACCEPTED) else start_job(kept["spec"]),
        content=b'%b,"status":%b}' % (told[:-1], _json(status)),
        essence=hash((told, _json(without_progress(status)), _publishes(status))),
    )


def without_progress(status: Raw) -> dict[str, Any]:
    """Return ``status`` without what the writer of progress owns."""
    rest = {name: value for name, value in status.items() if name not in PROGRESS_FIELDS}
    if "summary" in rest:
        summary = {name: value for name, value in rest["summary"].items() if name not in PROGRESS_SUMMARY_FIELDS}
        rest["summary"] = summary
    return rest


# Reports of progress come many to a change of the object; each wants to know whom it is for.
@functools.lru_cache(maxsize=64)
def job_view(packed: PackedJob) -> JobView:
    """Return the job as the planner sees it."""
    content = json.loads(packed.content)
    metadata = content["metadata"]
    return JobView(
        namespace=packed.namespace,
        name=packed.name,
        uid=packed.uid,
        generation=metadata["generation"],
        resource_version=str(packed.resource_version),
        created=packed.created,
        deleting=metadata["deleting"],
        labels=metadata["labels"],
        annotations=metadata["annotations"],
        spec=content["spec"],
        status=read_status(content["status"]),
    )


def stored_status(packed: PackedJob) -> Raw:
    """Return the status as the API server has it."""
    status: Raw = json.loads(packed.content)["status"]
    return status


def _is_to_run(raw: Raw) -> bool:
    is_suspended = ((raw.get("spec") or {}).get("runPolicy") or {}).get("suspend") is True
    conditions = (raw.get("status") or {}).get("conditions") or ()
    accepted = [one["status"] for one in conditions if one["type"] == ConditionType.ACCEPTED]
    # Until somebody installs KubeRay, which may be never, others have its turn.
    lacks_kuberay = any(one.get("reason") == Reason.KUBERAY_MISSING for one in conditions)
    return not is_suspended and not lacks_kuberay and all(status == ConditionStatus.TRUE for status in accepted)


def _is_open(attempt: Raw) -> bool:
    """Return what `attempt.is_open` says of an attempt, which is dear to read of thousands."""
    return not (attempt.get("endTime") and attempt.get("reason"))


def _has(status: Raw, kind: ConditionType, value: ConditionStatus, reason: Reason | None = None) -> bool:
    return any(
        condition.get("type") == kind
        and condition.get("status") == value
        and (reason is None or condition.get("reason") == reason)
        for condition in status.get("conditions") or ()
    )


def _publishes(status: Raw) -> bool:
    """Return whether the progress tells of another phase, which is more than a trainer's next step."""
    return (status.get("progress") or {}).get("stage") == Stage.PUBLISH


def _json(content: Raw) -> bytes:
    return json.dumps(content, separators=(",", ":"), sort_keys=True).encode()


# --- children


def child_view(raw: Raw) -> ChildView | None:
    """Return the Job or RayJob of one attempt; None when it is none of ours."""
    metadata = raw["metadata"]
    place, owner = _place(metadata), controller(metadata)
    if place is None or owner.get("kind") != KIND or not str(owner.get("apiVersion")).startswith(f"{GROUP}/"):
        return None
    kind = ChildKind(raw["kind"])
    look = _ray_job if kind is ChildKind.RAY_JOB else _job
    spec, status = raw.get("spec") or {}, raw.get("status") or {}
    created = _time(metadata["creationTimestamp"])
    return ChildView(
        kind=kind,
        name=metadata["name"],
        uid=metadata["uid"],
        owner_uid=owner["uid"],
        stage=place[0],
        attempt=place[1],
        created=created,
        deleting="deletionTimestamp" in metadata,
        **look(spec, status, created),
    )


def _job(spec: Raw, status: Raw, created: datetime) -> dict[str, Any]:
    conditions = _true_conditions(status)
    failed = conditions.get("Failed")
    suspended = bool(spec.get("suspend"))
    return dict(
        suspended=suspended,
        admitted=None if suspended else _resumed(status) or created,
        succeeded="Complete" in conditions,
        failed=failed is not None,
        failure_reason=(failed or {}).get("reason", ""),
        failure_message=(failed or {}).get("message", ""),
        finished=_time_or_none(status.get("completionTime") or (failed or {}).get("lastTransitionTime")),
    )


_SUSPENDED_STATES = ("Suspending", "Suspended")
_FAILED_STATES = ("Failed", "ValidationFailed")
_BEGUN = ("RUNNING", "SUCCEEDED", "FAILED", "STOPPED")


def _ray_job(spec: Raw, status: Raw, created: datetime) -> dict[str, Any]:
    state, program = status.get("jobDeploymentStatus"), status.get("jobStatus")
    suspended = bool(spec.get("suspend")) or state in _SUSPENDED_STATES
    since = _time_or_none(status.get("startTime"))
    began = _time_or_none((status.get("rayJobInfo") or {}).get("startTime"))
    # Complete says only that it is over: a program that was stopped is complete as well.
    succeeded = state == "Complete" and program == "SUCCEEDED"
    return dict(
        suspended=suspended,
        admitted=None if suspended else since or created,
        started=(began or since) if program in _BEGUN and not suspended else None,
        succeeded=succeeded,
        failed=state in _FAILED_STATES or (state == "Complete" and not succeeded),
        failure_reason=status.get("reason") or "",
        failure_message=status.get("message") or "",
        finished=_time_or_none(status.get("endTime")),
        ray_cluster=status.get("rayClusterName") or "",
    )


def _resumed(status: Raw) -> datetime | None:
    """Return when a queue let the Job go."""
    for condition in status.get("conditions") or ():
        if condition["type"] == "Suspended" and condition["status"] == "False":
            return _time_or_none(condition.get("lastTransitionTime"))
    return None


# --- pods


def pod_view(raw: Raw) -> PodView | None:
    """Return the pod of a stage; None when it is none of ours."""
    metadata, spec, status = raw["metadata"], raw.get("spec") or {}, raw.get("status") or {}
    place, owner = _place(metadata), controller(metadata)
    if place is None or not owner:
        return None
    container = _container(status)
    state = container.get("state") or {}
    ended = state.get("terminated") or {}
    waiting_reason, waiting_message = _waiting(status, state)
    labels = metadata.get("labels") or {}
    in_cluster = owner["kind"] == RAY_CLUSTER
    child = _ray_job_name(labels, *place) if in_cluster else owner["name"]
    if child is None:
        return None
    over_limit = _over_limit(status)
    return PodView(
        name=metadata["name"],
        uid=metadata["uid"],
        child=child,
        child_uid=owner["uid"],
        ray_cluster=owner["name"] if in_cluster else "",
        is_head=in_cluster and labels.get(naming.RAY_NODE_LABEL) == "head",
        job_uid=labels.get(naming.JOB_UID_LABEL, ""),
        stage=place[0],
        attempt=place[1],
        phase=PodPhase(status.get("phase") or PodPhase.PENDING),
        created=_time(metadata["creationTimestamp"]),
        gone_by=_time_or_none(metadata.get("deletionTimestamp")),
        node=spec.get("nodeName"),
        image_id=container.get("imageID") or None,
        started=_time_or_none(ended.get("startedAt") or (state.get("running") or {}).get("startedAt")),
        finished=_time_or_none(ended.get("finishedAt")),
        exit_code=ended.get("exitCode"),
        out_of_memory=ended.get("reason") == "OOMKilled",
        over_limit=over_limit,
        disrupted=_is_disrupted(status) and not over_limit,
        termination_message=ended.get("message") or "",
        waiting_reason=waiting_reason,
        waiting_message=waiting_message,
    )


def _ray_job_name(labels: Mapping[str, str], stage: Stage, attempt: int) -> str | None:
    """Return what the RayJob is called: its cluster has a name of its own, another one after each time in a queue."""
    try:
        return naming.child_name(labels.get(naming.JOB_LABEL, ""), stage, attempt)
    except ValueError:
        # Anybody may label a pod.
        return None


def _container(status: Raw) -> Raw:
    for container in status.get("containerStatuses") or ():
        if container["name"] == naming.CONTAINER:
            found: Raw = container
            return found
    return {}


def _is_disrupted(status: Raw) -> bool:
    return "DisruptionTarget" in _true_conditions(status) or status.get("reason") in _DISRUPTIONS


def _over_limit(status: Raw) -> str:
    """Return what the kubelet says of a pod that it evicted for what that stored; empty for every other one.

    It evicts a pod for its node's sake with DisruptionTarget. A node under pressure refuses pods as Evicted as well,
    without that, in other words: ``The node had condition``.
    """
    message: str = status.get("message") or ""
    is_for_itself = status.get("reason") == "Evicted" and "DisruptionTarget" not in _true_conditions(status)
    return message if is_for_itself and "exceed" in message else ""


def _waiting(status: Raw, state: Raw) -> tuple[str, str]:
    """Return why the container does not run, as far as the pod says so itself."""
    waiting = state.get("waiting") or {}
    if (reason := waiting.get("reason", "")) and reason not in _SILENT_REASONS:
        return reason, waiting.get("message", "")
    for condition in status.get("conditions") or ():
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return condition.get("reason", ""), condition.get("message", "")
    return "", ""


def trouble_told(events: Sequence[Raw]) -> tuple[str, str]:
    """Return reason and message of the newest event about a pod or its child; empty when that is no warning.

    A mount that failed and works now is followed by news that all is well.
    """
    newest = max(events, key=_event_order, default={})
    if newest.get("type") != "Warning":
        return "", ""
    return newest.get("reason") or "", newest.get("message") or ""


def _event_order(event: Raw) -> tuple[str, bool]:
    # RFC 3339 in UTC sorts as text. Old clients count whole seconds: of two events of one, the warning is meant.
    series = event.get("series") or {}
    time = series.get("lastObservedTime") or event.get("lastTimestamp") or event.get("eventTime")
    return (time or event["metadata"]["creationTimestamp"])[:19], event.get("type") == "Warning"


# --- a queue

_QUOTA = "QuotaReserved"
_TELL_OF_A_QUEUE = frozenset({(_QUOTA, "False"), (_QUOTA, "True"), ("Evicted", "True")})
"""Conditions of a Workload, and their status. With quota it may still wait for the queue's admission checks."""


def queue_told(workloads: Sequence[Raw], uid: str) -> tuple[str, str]:
    """Return reason and message of what Kueue has found last about the Job or RayJob with that UID.

    Empty while Kueue has not looked at it.
    """
    told = [
        condition
        for workload in workloads
        # Anybody may label a Workload.
        if controller(workload["metadata"]).get("uid") == uid
        for condition in (workload.get("status") or {}).get("conditions") or ()
        if (condition["type"], condition["status"]) in _TELL_OF_A_QUEUE
    ]
    newest: Raw = max(told, key=_condition_order, default={})
    return newest.get("reason") or "", newest.get("message") or ""


def _condition_order(condition: Raw) -> tuple[str, bool]:
    # What is evicted loses its quota next, perhaps in the same second; from then on that says what it waits for.
    return condition["lastTransitionTime"], condition["type"] == _QUOTA


# --- what all have


def controller(metadata: Raw) -> Raw:
    """Return the reference to the object's controller; empty when it has none."""
    for owner in metadata.get("ownerReferences") or ():
        if owner.get("controller"):
            found: Raw = owner
            return found
    return {}


def owner_key(raw: Raw) -> tuple[str, str] | None:
    """Return namespace and name of the FineTuneJob that a child or pod says it belongs to."""
    metadata = raw["metadata"]
    name = (metadata.get("labels") or {}).get(naming.JOB_LABEL)
    return (metadata["namespace"], name) if name else None


def _place(metadata: Raw) -> tuple[Stage, int] | None:
    labels = metadata.get("labels") or {}
    stage, attempt = labels.get(naming.STAGE_LABEL, ""), labels.get(naming.ATTEMPT_LABEL, "")
    if stage not in list(Stage) or not (attempt.isascii() and attempt.isdigit()):
        return None
    return Stage(stage), int(attempt)


def _true_conditions(status: Raw) -> dict[str, Raw]:
    return {one["type"]: one for one in status.get("conditions") or () if one["status"] == "True"}


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text)


def _time_or_none(text: str | None) -> datetime | None:
    return _time(text) if text else None
