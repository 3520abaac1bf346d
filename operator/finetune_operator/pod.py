"""The pod of one stage, as a template for its Job. Pure; every call gives fresh objects.

Nothing of a user's text becomes part of a command line: fields go into the spec's file, names into volumes.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import PurePosixPath
from typing import Any

from finetune_api.job import FineTuneJob
from finetune_api.model import ApiModel
from finetune_api.report import CONTRACT_VARIABLE, CONTRACT_VERSION, IMAGE_VARIABLE, Stage
from finetune_api.spec import ComputeSpec, PodSpec, ResourcesSpec, VolumeSpec
from finetune_api.spec.compute import EmptyDirMedium, gpus
from finetune_api.spec.field import amount
from finetune_api.status import Attempt
from finetune_operator import location, naming
from finetune_operator.settings import Settings

USER = 65532
GPU_RESOURCE = "nvidia.com/gpu"
GRACE_SECONDS = 120
"""Between SIGTERM and SIGKILL, unless the job says otherwise: time to write and upload a checkpoint."""
TOKEN_SECONDS = 3600
KUEUE = "kueue.x-k8s.io/"
RESERVED = "finetune-"
"""What the names of our own volumes begin with."""

Manifest = dict[str, Any]
_NOTHING = PodSpec()


class Role(StrEnum):
    """What a pod does for its attempt."""

    WHOLE = "whole"
    """Everything: a Job has one pod."""
    HEAD = "head"
    """Runs the program of a RayJob; trains nothing itself."""
    WORKER = "worker"
    """Trains, as one of several."""
    SUBMITTER = "submitter"
    """Hands the program to the head and repeats what it prints."""


_OF_RAY = (Role.HEAD, Role.WORKER)
"""Pods of the Ray cluster."""


@dataclass(frozen=True, slots=True)
class Run:
    """One attempt at a stage, with all that its manifests are made from."""

    job: FineTuneJob
    """Resolved, with the name, namespace, uid and labels of the object."""
    attempt: Attempt
    """Which stage and which try; a smaller micro-batch is taken from it."""
    image: str
    """The trainer's image, as pinned."""
    spec_hash: str
    """Of the resolved spec; the trainer refuses a file with another one."""
    settings: Settings

    @property
    def compute(self) -> ComputeSpec:
        """What the job runs on."""
        return self.job.spec.compute

    @property
    def extra(self) -> PodSpec:
        """What profile and user add to the pod."""
        return self.compute.pod or _NOTHING


def pod_template(run: Run, role: Role = Role.WHOLE) -> Manifest:
    """Return the template of a pod that runs the attempt, or its part of it."""
    return {
        "metadata": {
            "labels": {
                # Costs are booked by the administrator's labels: whoever runs a job must not be able to change them.
                **without_queue(_labels_of_job(run) | (run.extra.labels or {}) | run.settings.pod.labels),
                **labels(run),
            },
            "annotations": {
                **(run.extra.annotations or {}),
                **run.settings.pod.annotations,
                naming.SPEC_HASH_ANNOTATION: run.spec_hash,
            },
        },
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "terminationGracePeriodSeconds": _grace_seconds(run),
            "securityContext": pod_security(),
            # A first process for which SIGTERM is not lost as long as Ray has no handler for it yet.
            **({"shareProcessNamespace": True} if role in _OF_RAY else {}),
            **_identity(run),
            **_placement(run, role),
            "containers": [_container(run, role)],
            "volumes": _merged((volume for volume, _ in _volumes(run)), map(_user_volume, run.extra.volumes)),
        },
    }


def pod_security() -> Manifest:
    """Return what Pod Security `restricted` asks of a pod."""
    return {
        "runAsNonRoot": True,
        "runAsUser": USER,
        "runAsGroup": USER,
        "fsGroup": USER,
        # A large volume is not gone through at every start.
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def container_security() -> Manifest:
    """Return what it asks of a container, and that nothing is written outside volumes."""
    return {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
    }


def _grace_seconds(run: Run) -> int:
    return run.extra.termination_grace_period_seconds or GRACE_SECONDS


def labels(run: Run) -> dict[str, str]:
    """Return the labels by which the attempt's child and pods are known."""
    metadata = run.job.metadata
    return naming.child_labels(metadata.name, metadata.uid, run.attempt.stage, run.attempt.number)


def _labels_of_job(run: Run) -> dict[str, str]:
    # They would be a way around the lock.
    return {} if "labels" in run.settings.policy.locked_pod_fields else run.job.metadata.labels


def without_queue(labels: Mapping[str, str]) -> dict[str, str]:
    """Return ``labels`` without those that tell Kueue to queue the object that bears them."""
    return {key: value for key, value in labels.items() if not key.startswith(KUEUE)}


def _identity(run: Run) -> Manifest:
    secrets = dict.fromkeys((*run.settings.image.pull_secrets, *(one.name for one in run.compute.image_pull_secrets)))
    return _given(
        {
            "serviceAccountName": run.extra.service_account_name,
            "priorityClassName": run.compute.priority_class_name or run.settings.pod.priority_class_name,
            "imagePullSecrets": [{"name": name} for name in secrets],
        }
    )


def _needs_no_gpu(run: Run, role: Role) -> bool:
    return run.attempt.stage is Stage.CHECK or role in (Role.HEAD, Role.SUBMITTER)


def _placement(run: Run, role: Role) -> Manifest:
    tolerations = {"tolerations": [_plain(toleration) for toleration in run.extra.tolerations]}
    if _needs_no_gpu(run, role) and gpus(run.compute) > 0:
        # What selects GPU nodes must not start one for a pod that needs none. Tolerations select nothing.
        return _given(tolerations)
    affinity = _plain(run.extra.affinity) if run.extra.affinity else None
    return _given({"nodeSelector": run.extra.node_selector, **tolerations, "affinity": affinity})


def _container(run: Run, role: Role) -> Manifest:
    resources = _resources(run, role)
    return {
        "name": naming.CONTAINER,
        "image": run.image,
        "imagePullPolicy": run.settings.image.pull_policy,
        # KubeRay says what the pods of its cluster run, and what these leave behind nobody reads.
        **({"args": [*arguments(run), "--termination-log", naming.TERMINATION_LOG]} if role is Role.WHOLE else {}),
        **({"lifecycle": _lifecycle()} if role in _OF_RAY else {}),
        "env": _env(run, role, resources),
        "resources": {"requests": resources, "limits": dict(resources)} if resources else {},
        "terminationMessagePath": naming.TERMINATION_LOG,
        "terminationMessagePolicy": "File",
        "securityContext": container_security(),
        "volumeMounts": [*(mount for _, mount in _volumes(run)), *map(_plain, run.extra.volume_mounts)],
    }


def _lifecycle() -> Manifest:
    """Return what holds a pod whose first process is Ray's, which keeps the SIGTERM to itself."""
    return {"preStop": {"exec": {"command": ["python", "-m", "finetune_trainer.pod_stop", naming.WORKSPACE_FOLDER]}}}


def arguments(run: Run) -> list[str]:
    """Return what the trainer is told; nothing of it is a user's text."""
    attempt = run.attempt
    told = [attempt.stage.value, "--spec", naming.SPEC_FILE, "--spec-hash", run.spec_hash]
    told += ["--workspace", naming.WORKSPACE_FOLDER, "--attempt", str(attempt.number)]
    return [*told, *_adjustments(attempt)]


def _adjustments(attempt: Attempt) -> list[str]:
    told = ["--gradient-checkpointing"] if attempt.gradient_checkpointing else []
    values = {
        "--micro-batch-size": attempt.micro_batch_size,
        "--zero-stage": attempt.zero_stage,
        "--learning-rate-scale": attempt.learning_rate_scale,
    }
    return told + [word for flag, value in values.items() if value is not None for word in (flag, str(value))]


# --- environment


def _env(run: Run, role: Role, resources: Mapping[str, str]) -> list[Manifest]:
    """Return the variables: defaults first, then the administrator's, then the user's, then what must be so."""
    return _merged(
        _variables(
            {"HOME": "/tmp"} | _threads(run, role, resources) | _certificates(run.settings) | run.settings.pod.env
        ),
        map(_plain, run.extra.env),
        _variables(_contract() | _origin(run) | _endpoint(run) | _cache(run.compute) | _patience(run, role)),
    )


def _variables(values: Mapping[str, str]) -> list[Manifest]:
    return [{"name": name, "value": value} for name, value in values.items()]


def _threads(run: Run, role: Role, resources: Mapping[str, str]) -> dict[str, str]:
    if "cpu" not in resources:
        return {}
    # A worker trains in one process for every GPU, which share its CPUs.
    sharing = max(1, gpus(run.compute)) if role is Role.WORKER else 1
    # Without this, PyTorch starts a thread for every core of the node, and they fight for the limit.
    return {"OMP_NUM_THREADS": str(max(1, whole_cpus(resources["cpu"]) // sharing))}


def whole_cpus(quantity: str) -> int:
    """Return the whole CPUs of ``4``, ``500m`` or ``2.5``; at least one."""
    return max(1, math.floor(amount(quantity)))


def _certificates(settings: Settings) -> dict[str, str]:
    # What the libraries read replaces the public ones; the trainer puts both into one file.
    return {"FINETUNE_CA_BUNDLE": naming.CA_BUNDLE_FILE} if settings.pod.ca_bundle else {}


def _contract() -> dict[str, str]:
    # An image of another version says so, instead of taking what it is told for something else.
    return {CONTRACT_VARIABLE: str(CONTRACT_VERSION)}


def _origin(run: Run) -> dict[str, str]:
    # A container cannot find out by itself; the report names it. A tag alone does not say which bytes ran.
    known = None if "@" in run.image else run.attempt.image_id
    return {IMAGE_VARIABLE: f"{run.image} ({known})" if known else run.image}


def _endpoint(run: Run) -> dict[str, str]:
    metadata, attempt = run.job.metadata, run.attempt
    path = naming.progress_path(metadata.namespace, metadata.name, attempt.stage, attempt.number)
    return {
        "KUBEFLOW_TRAINER_SERVER_URL": run.settings.progress.url.rstrip("/") + path,
        "KUBEFLOW_TRAINER_SERVER_CA_CERT": naming.CA_FILE,
        "KUBEFLOW_TRAINER_SERVER_TOKEN": naming.TOKEN_FILE,
    }


def _patience(run: Run, role: Role) -> dict[str, str]:
    if role not in _OF_RAY:
        return {}
    # Otherwise a head takes 30 s to go, for which the next stage waits. What works in a pod has saved before Ray hears
    # of its end, see `_lifecycle`.
    at_once = {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}
    # Otherwise Ray kills a program 3 s after it was asked to stop.
    return at_once | ({"RAY_JOB_STOP_WAIT_TIME_S": str(_grace_seconds(run))} if role is Role.HEAD else {})


def _cache(compute: ComputeSpec) -> dict[str, str]:
    return {"FINETUNE_CACHE": naming.CACHE_FOLDER} if compute.cache_volume else {}


# --- resources


def _resources(run: Run, role: Role) -> dict[str, str]:
    """Return what is both requested and the limit."""
    pod, stage = run.settings.pod, run.attempt.stage
    if _needs_no_gpu(run, role):
        return _amounts(pod.check_resources) or _amounts(pod.default_resources)
    own = (run.job.spec.evaluation.resources if stage is Stage.EVALUATE else None) or run.compute.resources
    amounts = _amounts(pod.default_resources) | _amounts(own or ResourcesSpec())
    if gpus(run.compute):
        amounts[run.compute.gpu_resource or GPU_RESOURCE] = str(gpus(run.compute))
    # An evaluation is a single pod, which talks to no other worker.
    devices = (run.compute.devices_per_worker or {}) if stage is Stage.TRAIN else {}
    return amounts | {name: str(number) for name, number in devices.items()}


def _amounts(resources: ResourcesSpec) -> dict[str, str]:
    return _given({"cpu": resources.cpu, "memory": resources.memory, "ephemeral-storage": resources.ephemeral_storage})


# --- volumes, each with its mount


def mount_paths(run: Run) -> tuple[str, ...]:
    """Return the folders that are taken by our own volumes."""
    return tuple(mount["mountPath"] for _, mount in _volumes(run))


def _volumes(run: Run) -> list[tuple[Manifest, Manifest]]:
    trust = naming.trust_config_map_name(run.job.metadata.name)
    spec_file = {"configMap": {"name": naming.spec_config_map_name(run.job.metadata.name, run.spec_hash)}}
    pairs = [
        _volume("workspace", naming.WORKSPACE_FOLDER, {"emptyDir": {}}, read_only=False),
        _volume("tmp", "/tmp", {"emptyDir": {}}, read_only=False),
        _volume("spec", naming.SPEC_FOLDER, spec_file),
        _volume("progress", naming.PROGRESS_FOLDER, _progress(run, trust)),
    ]
    if run.settings.pod.ca_bundle:
        file = PurePosixPath(naming.CA_BUNDLE_FILE)
        items = [{"key": file.name, "path": file.name}]
        pairs.append(_volume("ca-bundle", str(file.parent), {"configMap": {"name": trust, "items": items}}))
    if run.compute.cache_volume is not None:
        claim = {"persistentVolumeClaim": {"claimName": run.compute.cache_volume.claim_name}}
        pairs.append(_volume("cache", naming.CACHE_FOLDER, claim, read_only=False))
    if run.compute.shared_memory is not None and run.attempt.stage is not Stage.CHECK:
        memory = {"emptyDir": {"medium": "Memory", "sizeLimit": run.compute.shared_memory}}
        pairs.append(_volume("shared-memory", "/dev/shm", memory, read_only=False))
    return [*pairs, *_referenced(run)]


def _progress(run: Run, trust: str) -> Manifest:
    metadata, attempt = run.job.metadata, run.attempt
    token = {
        "audience": naming.audience(metadata.namespace, metadata.name, metadata.uid, attempt.stage, attempt.number),
        "expirationSeconds": TOKEN_SECONDS,
        "path": PurePosixPath(naming.TOKEN_FILE).name,
    }
    authority = PurePosixPath(naming.CA_FILE).name
    return {
        "projected": {
            "defaultMode": 0o440,
            "sources": [
                {"serviceAccountToken": token},
                {"configMap": {"name": trust, "items": [{"key": authority, "path": authority}]}},
            ],
        }
    }


def _referenced(run: Run) -> Iterable[tuple[Manifest, Manifest]]:
    """Yield what the spec's URIs and secretRefs name."""
    spec = run.job.spec
    for index, name in enumerate(location.secrets(spec)):
        secret = {"secret": {"secretName": name, "defaultMode": 0o440}}
        yield _volume(f"secret-{index}", f"{naming.SECRETS_FOLDER}/{name}", secret)
    for index, (name, read_only) in enumerate(location.claims(spec).items()):
        claim = {"persistentVolumeClaim": {"claimName": name}}
        yield _volume(f"claim-{index}", f"{naming.CLAIMS_FOLDER}/{name}", claim, read_only=read_only)
    for index, name in enumerate(location.config_maps(spec)):
        yield _volume(f"config-{index}", f"{naming.CONFIG_MAPS_FOLDER}/{name}", {"configMap": {"name": name}})


def _volume(name: str, folder: str, source: Manifest, read_only: bool = True) -> tuple[Manifest, Manifest]:
    mount: Manifest = {"name": f"{RESERVED}{name}", "mountPath": folder}
    return {"name": f"{RESERVED}{name}", **source}, mount | ({"readOnly": True} if read_only else {})


def _user_volume(volume: VolumeSpec) -> Manifest:
    if volume.empty_dir is None:
        return _plain(volume)
    medium = "Memory" if volume.empty_dir.medium is EmptyDirMedium.MEMORY else None
    return {"name": volume.name, "emptyDir": _given({"medium": medium, "sizeLimit": volume.empty_dir.size_limit})}


# --- plain values


def _plain(block: ApiModel) -> Manifest:
    """Return a block whose fields are those of Kubernetes as Kubernetes writes it; defaults are left to Kubernetes."""
    return block.model_dump(mode="json", by_alias=True, exclude_none=True, exclude_defaults=True)


def _given(values: Mapping[str, Any]) -> Manifest:
    return {key: value for key, value in values.items() if value}


def _merged(*lists: Iterable[Manifest]) -> list[Manifest]:
    """Return the entries of all lists; of one name, the last."""
    return list({entry["name"]: entry for entries in lists for entry in entries}.values())
