"""``spec.compute``: what the job runs on in a cluster."""

import re
from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated

from pydantic import Field

from finetune_api.block import Block, Problem
from finetune_api.spec.field import (
    ENV_NAME,
    IMAGE,
    Annotations,
    Devices,
    Flag,
    Int,
    LabelKey,
    Labels,
    LabelValue,
    MountPath,
    Name,
    ObjectName,
    Quantity,
    ResourceName,
    Seconds,
    SecretRef,
    amount,
)


class Engine(StrEnum):
    """What runs the workers."""

    AUTO = "auto"
    JOB = "job"
    RAY = "ray"


class Offload(StrEnum):
    """Where DeepSpeed keeps what does not fit on the GPU."""

    NONE = "none"
    CPU = "cpu"
    NVME = "nvme"


class ResourcesSpec(Block):
    """Requests and limits of one pod; both are set to these values."""

    cpu: Quantity | None = None
    """Cores: "4" or 500m."""
    memory: Quantity | None = None
    """Main memory: 32Gi."""
    ephemeral_storage: Quantity | None = None
    """Disk of the node: 100Gi."""


def _offload_needs_a_stage(stage: int, offload: Offload) -> Iterator[Problem]:
    least = {Offload.NONE: 0, Offload.CPU: 1, Offload.NVME: 3}[offload]
    if stage < least:
        yield Problem(
            ("offload",),
            offload.value,
            f"needs stage {least} or more, and stage is {stage}",
            f"Set stage: {least}, or offload: none.",
        )


class DeepspeedSpec(Block):
    """ZeRO: spread optimiser state, gradients and weights over the workers (arXiv:1910.02054)."""

    rules = (_offload_needs_a_stage,)

    stage: Annotated[Int, Field(ge=0, le=3)] = 2
    """0 spreads nothing, 1 the optimiser state, 2 also gradients, 3 also weights (slowest, least memory)."""
    offload: Offload = Offload.NONE
    """cpu or nvme keep the optimiser state off the GPU: much slower, for models that fit no other way."""


class CacheVolumeSpec(Block):
    """A volume that keeps downloads across jobs."""

    claim_name: ObjectName
    """PersistentVolumeClaim in the job's namespace."""


class TolerationOperator(StrEnum):
    """How a toleration compares."""

    EXISTS = "Exists"
    EQUAL = "Equal"


class TaintEffect(StrEnum):
    """What a taint does to pods that do not tolerate it."""

    NO_SCHEDULE = "NoSchedule"
    PREFER_NO_SCHEDULE = "PreferNoSchedule"
    NO_EXECUTE = "NoExecute"


class TolerationSpec(Block):
    """A taint that the pods tolerate; as in Kubernetes."""

    key: LabelKey | None = None
    """Key of the taint. Absent with operator Exists: every taint."""
    operator: TolerationOperator | None = None
    """Absent: Equal."""
    value: LabelValue | None = None
    """Value of the taint, for operator Equal."""
    effect: TaintEffect | None = None
    """Absent: every effect."""
    toleration_seconds: Annotated[Int, Field(ge=0, le=31_536_000)] | None = None
    """Seconds that the pod stays under a NoExecute taint. Absent: for good."""


class SelectorOperator(StrEnum):
    """How an expression compares a label."""

    IN = "In"
    NOT_IN = "NotIn"
    EXISTS = "Exists"
    DOES_NOT_EXIST = "DoesNotExist"
    GT = "Gt"
    LT = "Lt"


class MatchExpression(Block):
    """One condition on a label."""

    key: LabelKey
    """Label to look at."""
    operator: SelectorOperator
    """How to compare."""
    values: Annotated[tuple[LabelValue, ...], Field(max_length=32)] = ()
    """Values to compare with; none for Exists and DoesNotExist."""


class NodeTerm(Block):
    """Nodes whose labels meet all conditions."""

    match_expressions: Annotated[tuple[MatchExpression, ...], Field(min_length=1, max_length=16)]
    """Conditions, all of which must hold."""


class PreferredNodeTerm(Block):
    """Nodes to prefer."""

    weight: Annotated[Int, Field(ge=1, le=100)]
    """How much."""
    preference: NodeTerm
    """Which."""


class RequiredNodes(Block):
    """Nodes that the pods must run on."""

    node_selector_terms: Annotated[tuple[NodeTerm, ...], Field(min_length=1, max_length=16)]
    """Terms, one of which must hold."""


class NodeAffinity(Block):
    """Which nodes the pods may and should run on."""

    required_during_scheduling_ignored_during_execution: RequiredNodes | None = None
    """Nodes that the pods must run on."""
    preferred_during_scheduling_ignored_during_execution: Annotated[
        tuple[PreferredNodeTerm, ...], Field(max_length=16)
    ] = ()
    """Nodes to prefer."""


class LabelSelector(Block):
    """Pods by their labels."""

    match_labels: Labels
    """Labels that must all be there."""


class PodTerm(Block):
    """Pods, and how near is together."""

    label_selector: LabelSelector
    """Which pods."""
    topology_key: LabelKey
    """Node label whose equal values mean together: kubernetes.io/hostname."""


class PreferredPodTerm(Block):
    """Pods to be near to or away from, if possible."""

    weight: Annotated[Int, Field(ge=1, le=100)]
    """How much."""
    pod_affinity_term: PodTerm
    """Which."""


class PodAffinity(Block):
    """Pods to be near to or away from."""

    required_during_scheduling_ignored_during_execution: Annotated[tuple[PodTerm, ...], Field(max_length=16)] = ()
    """Must hold."""
    preferred_during_scheduling_ignored_during_execution: Annotated[
        tuple[PreferredPodTerm, ...], Field(max_length=16)
    ] = ()
    """Should hold."""


class AffinitySpec(Block):
    """Where the pods may run; as in Kubernetes."""

    node_affinity: NodeAffinity | None = None
    """By nodes."""
    pod_affinity: PodAffinity | None = None
    """Near other pods."""
    pod_anti_affinity: PodAffinity | None = None
    """Away from other pods."""


class KeyRef(Block):
    """One key of a Secret or ConfigMap."""

    name: ObjectName
    """Name of the object."""
    key: Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[-._A-Za-z0-9]+$")]
    """Key in it."""


def _one_source(secret_key_ref: KeyRef | None, config_map_key_ref: KeyRef | None) -> Iterator[Problem]:
    if (secret_key_ref is None) == (config_map_key_ref is None):
        yield Problem((), None, "needs exactly one of secretKeyRef and configMapKeyRef", "Keep one of them.")


class EnvSource(Block):
    """Where a variable's value comes from."""

    rules = (_one_source,)

    secret_key_ref: KeyRef | None = None
    """A key of a Secret."""
    config_map_key_ref: KeyRef | None = None
    """A key of a ConfigMap."""


SECRET_WORDS = ("TOKEN", "SECRET", "PASSWORD", "PASSWD", "CREDENTIAL", "API_KEY", "APIKEY", "ACCESS_KEY", "PRIVATE_KEY")
"""A variable whose name contains one of these holds something that must not stand in the object."""

SECRET_VALUES = (
    r"\b(hf_[A-Za-z0-9]{20,}|AKIA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9-]{20,})|PRIVATE KEY--"
)
"""Forms of tokens and keys, by which they are known whatever the variable is called."""


def _one_value(value: str | None, value_from: EnvSource | None) -> Iterator[Problem]:
    if (value is None) == (value_from is None):
        yield Problem((), None, "needs exactly one of value and valueFrom", "Keep one of them.")


def _secrets_stay_out(name: str, value: str | None) -> Iterator[Problem]:
    if value and (any(word in name.upper() for word in SECRET_WORDS) or re.search(SECRET_VALUES, value)):
        yield Problem(
            ("value",),
            "(not shown)",
            f"looks like a secret in {name}: everyone who may read jobs could read it",
            "Put it into a Secret and name its key in valueFrom.secretKeyRef.",
        )


class EnvSpec(Block):
    """An environment variable of the trainer."""

    rules = (_one_value, _secrets_stay_out)

    name: Annotated[str, Field(min_length=1, max_length=253, pattern=ENV_NAME)]
    """Name of the variable."""
    value: Annotated[str, Field(max_length=4096)] | None = None
    """Its value, for everyone to read; secrets go through ``valueFrom``."""
    value_from: EnvSource | None = None
    """A Secret's or ConfigMap's key."""


class ClaimVolume(Block):
    """A PersistentVolumeClaim."""

    claim_name: ObjectName
    """Name of the claim."""
    read_only: Flag = False
    """Whether the pods may only read it."""


class ConfigMapVolume(Block):
    """The keys of a ConfigMap as files."""

    name: ObjectName
    """Name of the ConfigMap."""


class SecretVolume(Block):
    """The keys of a Secret as files."""

    secret_name: ObjectName
    """Name of the Secret."""


class EmptyDirMedium(StrEnum):
    """Where an emptyDir lies."""

    DISK = "Disk"
    MEMORY = "Memory"


class EmptyDirVolume(Block):
    """A folder that lives as long as the pod."""

    medium: EmptyDirMedium = EmptyDirMedium.DISK
    """Memory counts against the pod's memory limit."""
    size_limit: Quantity | None = None
    """The pod is evicted beyond this."""


def _one_kind_of_volume(
    persistent_volume_claim: ClaimVolume | None,
    config_map: ConfigMapVolume | None,
    secret: SecretVolume | None,
    empty_dir: EmptyDirVolume | None,
) -> Iterator[Problem]:
    if sum(kind is not None for kind in (persistent_volume_claim, config_map, secret, empty_dir)) != 1:
        yield Problem(
            (),
            None,
            "needs exactly one of persistentVolumeClaim, configMap, secret and emptyDir",
            "Keep one of them; other kinds of volumes are not allowed.",
        )


class VolumeSpec(Block):
    """A volume of the pods."""

    rules = (_one_kind_of_volume,)

    name: Name
    """Name that ``volumeMounts`` use."""
    persistent_volume_claim: ClaimVolume | None = None
    """A PersistentVolumeClaim."""
    config_map: ConfigMapVolume | None = None
    """A ConfigMap."""
    secret: SecretVolume | None = None
    """A Secret."""
    empty_dir: EmptyDirVolume | None = None
    """A folder that lives as long as the pod."""


class VolumeMountSpec(Block):
    """Where a volume appears in the trainer."""

    name: Name
    """Which of ``volumes``."""
    mount_path: MountPath
    """Folder in the container."""
    sub_path: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    """Folder in the volume. Absent: its root."""
    read_only: Flag = False
    """Whether the trainer may only read it."""


def _mounts_have_volumes(
    volumes: tuple[VolumeSpec, ...], volume_mounts: tuple[VolumeMountSpec, ...]
) -> Iterator[Problem]:
    names = [volume.name for volume in volumes]
    for index, mount in enumerate(volume_mounts):
        if mount.name not in names:
            yield Problem(
                ("volumeMounts", index, "name"),
                mount.name,
                f"is none of the volumes {names}",
                "Correct the name, or add the volume to spec.compute.pod.volumes.",
            )


def _entries_differ(
    volumes: tuple[VolumeSpec, ...], env: tuple[EnvSpec, ...], volume_mounts: tuple[VolumeMountSpec, ...]
) -> Iterator[Problem]:
    keys = (
        ("volumes", "name", [one.name for one in volumes]),
        ("env", "name", [one.name for one in env]),
        ("volumeMounts", "mountPath", [one.mount_path for one in volume_mounts]),
    )
    for field, key, values in keys:
        for index, value in enumerate(values):
            if value in values[:index]:
                yield Problem((field, index, key), value, "is given twice", "Keep one of them.")


class PodSpec(Block):
    """What may be added to the pods: an allow-list, merged by name. No containers, no host access."""

    rules = (_mounts_have_volumes, _entries_differ)

    node_selector: Labels | None = None
    """Labels that a node must have. Not for the check stage of a job with GPUs, which needs none."""
    tolerations: Annotated[tuple[TolerationSpec, ...], Field(max_length=16)] = ()
    """Taints that the pods tolerate, in every stage."""
    affinity: AffinitySpec | None = None
    """Where the pods may run; for the check stage as nodeSelector."""
    labels: Labels | None = None
    """Labels put on the pods."""
    annotations: Annotations | None = None
    """Annotations put on the pods."""
    env: Annotated[tuple[EnvSpec, ...], Field(max_length=64)] = ()
    """Environment variables of the trainer."""
    volumes: Annotated[tuple[VolumeSpec, ...], Field(max_length=16)] = ()
    """Volumes of the pods: claims, ConfigMaps, Secrets and empty folders."""
    volume_mounts: Annotated[tuple[VolumeMountSpec, ...], Field(max_length=16)] = ()
    """Where the volumes appear in the trainer."""
    service_account_name: ObjectName | None = None
    """Service account of the pods: workload identity of the store. No API token is mounted."""
    termination_grace_period_seconds: Seconds | None = None
    """Seconds between SIGTERM and SIGKILL: time to write a checkpoint."""


def _resource_has_an_amount(gpu_resource: str | None, gpus_per_worker: int | None) -> Iterator[Problem]:
    if gpu_resource is not None and gpus_per_worker == 0:
        yield Problem(
            ("gpuResource",),
            gpu_resource,
            "has no effect with gpusPerWorker 0",
            "Leave it out, or ask for a GPU with gpusPerWorker: 1.",
        )


GPU_RESOURCES = ("nvidia.com/gpu", "nvidia.com/mig-", "amd.com/gpu", "gpu.intel.com/")
"""What the names of GPUs begin with, whole ones and parts of one."""


def _devices_are_extended_resources(devices_per_worker: Devices | None) -> Iterator[Problem]:
    for name, number in (devices_per_worker or {}).items():
        # As Kubernetes' IsExtendedResourceName has it.
        if "kubernetes.io/" in name or name.startswith("requests."):
            yield Problem(
                ("devicesPerWorker", name),
                number,
                "is no extended resource: kubernetes.io/ and requests. belong to Kubernetes itself",
                "Write a name that `kubectl describe node` lists under Allocatable: vpc.amazonaws.com/efa.",
            )


def _devices_are_no_gpus(devices_per_worker: Devices | None, gpu_resource: str | None) -> Iterator[Problem]:
    for name, number in (devices_per_worker or {}).items():
        if name == gpu_resource or name.startswith(GPU_RESOURCES):
            yield Problem(
                ("devicesPerWorker", name),
                number,
                "asks for GPUs that neither the plan nor the number of training processes would know of",
                f"Ask for them with spec.compute.gpusPerWorker, and set gpuResource: {name}.",
            )


def _job_is_one_process(engine: Engine, workers: int, gpus_per_worker: int | None) -> Iterator[Problem]:
    if engine is Engine.JOB and (workers > 1 or (gpus_per_worker or 0) > 1):
        yield Problem(
            ("engine",),
            engine.value,
            f"runs one process, and workers is {workers}, gpusPerWorker {gpus_per_worker or 0}",
            "Set engine: ray or auto, or workers: 1 and gpusPerWorker: 1.",
        )


def _deepspeed_needs_company(
    engine: Engine, workers: int, gpus_per_worker: int | None, deepspeed: DeepspeedSpec | None
) -> Iterator[Problem]:
    if deepspeed is not None and engine is not Engine.RAY and workers == 1 and (gpus_per_worker or 0) <= 1:
        yield Problem(
            ("deepspeed",),
            deepspeed.model_dump(mode="json", by_alias=True),
            "needs the ray engine or several workers",
            "Set spec.compute.engine: ray, or workers: 2 or more, or leave deepspeed out.",
        )


class ComputeSpec(Block):
    """What the job runs on; on a laptop only engine, workers, gpusPerWorker, gpuMemory and deepspeed count."""

    rules = (
        _resource_has_an_amount,
        _devices_are_extended_resources,
        _devices_are_no_gpus,
        _job_is_one_process,
        _deepspeed_needs_company,
    )

    profile: Name | None = None
    """A preset that the administrator keeps: image, GPU resource, selectors, tolerations, network settings, limits.
    What this block sets itself wins. Copied into status.resolved when the job is accepted."""
    engine: Engine = Engine.AUTO
    """job: one pod. ray: a RayJob, needs KubeRay. auto: ray when workers or gpusPerWorker is above 1."""
    image: Annotated[str, Field(min_length=1, max_length=512, pattern=IMAGE)] | None = None
    """Trainer image, from a registry that the administrator allows. Absent: the operator's own version."""
    image_pull_secrets: Annotated[tuple[SecretRef, ...], Field(max_length=8)] = ()
    """Secrets for pulling the image."""
    priority_class_name: ObjectName | None = None
    """PriorityClass of the pods."""
    workers: Annotated[Int, Field(ge=1, le=1024)] = 1
    """Training processes' hosts. Time falls almost linearly with it, cost does not."""
    gpus_per_worker: Annotated[Int, Field(ge=0, le=16)] | None = None
    """GPUs of each worker; 0 trains on the CPU. Absent: 1 in a cluster, what is there on a laptop."""
    gpu_resource: ResourceName | None = None
    """Name of the GPU resource. Absent: the profile's, or nvidia.com/gpu."""
    gpu_memory: Quantity | None = None
    """Memory of one GPU: 80Gi. The plan warns of what does not fit, and under preflight: enforce a job that no smaller
    batch can make fit ends in the check stage. Changes nothing of training. Absent: what is needed is told alone."""
    devices_per_worker: Devices | None = None
    """Other devices of each worker by the names of their extended resources: ``{vpc.amazonaws.com/efa: 4}`` for the
    network between workers. Asked for while training alone."""
    resources: ResourcesSpec | None = None
    """CPU, memory and disk of each worker."""
    deepspeed: DeepspeedSpec | None = None
    """Spread the state over the workers; for models that do not fit on one GPU."""
    shared_memory: Quantity | None = None
    """Size of /dev/shm, for several GPUs in one pod: 8Gi."""
    cache_volume: CacheVolumeSpec | None = None
    """Keeps downloads of models and data across jobs."""
    pod: PodSpec | None = None
    """What may be added to the pods."""


def gpus(compute: ComputeSpec) -> int:
    """Return the GPUs of one worker in a cluster, where one is the default."""
    return 1 if compute.gpus_per_worker is None else compute.gpus_per_worker


def processes(compute: ComputeSpec) -> int:
    """Return how many processes train: one for every GPU, or one for every worker without GPUs."""
    return compute.workers * max(1, gpus(compute))


def gpu_memory_bytes(compute: ComputeSpec) -> int | None:
    """Return the memory of one GPU; None where nobody has said it."""
    return None if compute.gpu_memory is None else int(amount(compute.gpu_memory))


def zero_stage(compute: ComputeSpec) -> int:
    """Return DeepSpeed's ZeRO stage; 0 spreads nothing."""
    return compute.deepspeed.stage if compute.deepspeed else 0


def spreads_weights(compute: ComputeSpec) -> bool:
    """Return whether no process has the whole model."""
    return zero_stage(compute) == 3


def is_offloaded(compute: ComputeSpec) -> bool:
    """Return whether something of training is kept off the GPUs."""
    return compute.deepspeed is not None and compute.deepspeed.offload is not Offload.NONE


def is_distributed(compute: ComputeSpec) -> bool:
    """Return whether training runs on Ray workers: the engine that is asked for, else by the number of processes."""
    if compute.engine is not Engine.AUTO:
        return compute.engine is Engine.RAY
    return processes(compute) > 1
