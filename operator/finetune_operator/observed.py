"""What is known about one FineTuneJob at one moment: plain values, made from the watched objects. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any

from finetune_api.job import FineTuneJob
from finetune_api.report import Stage
from finetune_api.stage_result import StageResult
from finetune_api.status import FineTuneJobStatus


class ChildKind(StrEnum):
    """What runs an attempt."""

    JOB = "Job"
    RAY_JOB = "RayJob"


class KubeRayState(StrEnum):
    """Whether RayJobs can be created."""

    READY = "Ready"
    TOO_OLD = "TooOld"
    """They are served, but without fields that ours have."""
    MISSING = "Missing"


class PodPhase(StrEnum):
    """As in Kubernetes."""

    PENDING = "Pending"
    RUNNING = "Running"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"
    UNKNOWN = "Unknown"


@dataclass(frozen=True, slots=True)
class JobView:
    """The FineTuneJob itself."""

    namespace: str
    name: str
    uid: str
    generation: int
    resource_version: str
    created: datetime
    deleting: bool
    labels: Mapping[str, str]
    annotations: Mapping[str, str]
    spec: Mapping[str, Any]
    """As the user wrote it; may be faulty."""
    status: FineTuneJobStatus

    @property
    def key(self) -> tuple[str, str]:
        """Namespace and name."""
        return self.namespace, self.name

    @property
    def start_job(self) -> str | None:
        """The job that it goes on from, where it names one."""
        return start_job(self.spec)


def start_job(spec: Mapping[str, Any]) -> str | None:
    """Return what ``model.startFrom.job`` names in a spec as written, which may be anything."""
    model = spec.get("model")
    start = model.get("startFrom") if isinstance(model, Mapping) else None
    name = start.get("job") if isinstance(start, Mapping) else None
    return name if isinstance(name, str) else None


@dataclass(frozen=True, slots=True)
class PodView:
    """One pod of a stage."""

    name: str
    uid: str
    child: str
    """Name of the Job that owns it."""
    job_uid: str
    stage: Stage
    attempt: int
    phase: PodPhase
    created: datetime
    gone_by: datetime | None = None
    """When it is to be gone, its time to end included; absent while nobody deletes it."""
    node: str | None = None
    image_id: str | None = None
    """What the node's runtime calls the image that the container runs: by its digest."""
    started: datetime | None = None
    """When the container started to run."""
    finished: datetime | None = None
    exit_code: int | None = None
    out_of_memory: bool = False
    """Killed by the kernel for its memory limit."""
    over_limit: str = ""
    """What the kubelet says of a pod that it evicted for storing more than its own limits allow; empty for others."""
    disrupted: bool = False
    """Evicted for its node's sake, preempted or its node lost: DisruptionTarget, or a pod reason such as NodeLost."""
    termination_message: str = ""
    child_uid: str = ""
    """UID of the Job that controls it by its owner reference, which labels cannot claim."""
    ray_cluster: str = ""
    """Name of the RayCluster that controls it, of which a RayJob knows; empty for a Job's pod."""
    is_head: bool = False
    """Whether it is the head of that cluster: it runs the program, trains nothing and has a size of its own."""
    waiting_reason: str = ""
    """ImagePullBackOff, CreateContainerConfigError, Unschedulable, FailedMount …; empty when it runs."""
    waiting_message: str = ""

    @property
    def is_over(self) -> bool:
        """Whether its container will not run any more."""
        return self.phase in (PodPhase.SUCCEEDED, PodPhase.FAILED)


@dataclass(frozen=True, slots=True)
class ChildView:
    """One attempt's Job or RayJob."""

    kind: ChildKind
    name: str
    uid: str
    owner_uid: str
    """Of the FineTuneJob that controls it."""
    stage: Stage
    attempt: int
    created: datetime
    deleting: bool = False
    suspended: bool = False
    """Held back by a queue."""
    admitted: datetime | None = None
    """When it may start: its creation, or when the queue let it go."""
    succeeded: bool = False
    failed: bool = False
    failure_reason: str = ""
    """BackoffLimitExceeded, PodFailurePolicy, DeadlineExceeded …"""
    failure_message: str = ""
    finished: datetime | None = None
    started: datetime | None = None
    """When a RayJob's program began; a Job's begins with its pod."""
    ray_cluster: str = ""
    """Name of the RayCluster that a RayJob runs on now."""
    waiting_reason: str = ""
    """Why it has no pod: FailedCreate, or what its queue calls it; empty when it has one."""
    waiting_message: str = ""

    @property
    def is_over(self) -> bool:
        """Whether it has ended, well or badly."""
        return self.succeeded or self.failed

    def owns(self, pod: PodView) -> bool:
        """Whether ``pod`` is controlled by this child, or by the RayCluster that it runs on."""
        if self.kind is ChildKind.RAY_JOB:
            return bool(self.ray_cluster) and pod.ray_cluster == self.ray_cluster
        return pod.child_uid == self.uid


@dataclass(frozen=True, slots=True)
class DeliveredResult:
    """A result that the trainer posted."""

    stage: Stage
    attempt: int
    result: StageResult


@dataclass(frozen=True, slots=True)
class Observed:
    """The children of one job and what they said."""

    children: tuple[ChildView, ...] = ()
    pods: tuple[PodView, ...] = ()
    results: tuple[DeliveredResult, ...] = ()
    """Posted and not in the status yet."""
    starts: tuple[JobView, ...] = ()
    """The job that this one goes on from by its name, the one that goes on from, and so on, as far as they exist."""
    resolved: FineTuneJob | None = None
    """The content of the ConfigMap that the status pins; absent before it is pinned or when it is gone."""
    trust_hash: str | None = None
    """Hash of what the job's trust ConfigMap holds; absent when there is none."""
    running_in_namespace: int = 0
    """Other jobs of the namespace that have an open attempt, a pod, or a child that may start one."""
    waiting_before: int = 0
    """Older jobs of the namespace that want to run and do not: under the cap on running jobs, or between attempts."""
    progress_ca: str = ""
    """PEM of the certificate authorities of the progress endpoint."""
    kuberay: KubeRayState = KubeRayState.MISSING
    taken_names: frozenset[str] = field(default_factory=frozenset)
    """Names that a creation found taken by an object of another owner."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Names of children that the API server refused to create, and what it said: quota, a webhook, a rule."""

    def child(self, name: str) -> ChildView | None:
        """Return the child of that name."""
        return next((child for child in self.children if child.name == name), None)

    def pods_of(self, child: str) -> tuple[PodView, ...]:
        """Return the pods of a child, oldest first."""
        return tuple(sorted((pod for pod in self.pods if pod.child == child), key=lambda pod: pod.created))
