"""Objects as the API server sends them."""

from typing import Any

from finetune_api.report import Stage
from finetune_operator import naming

from ..builders import make_manifest
from .objects import IN_A_CLUSTER, NAME, NAMESPACE, UID

CREATED = "2026-01-02T03:04:05Z"


def raw_job(
    given: dict[str, Any] | None = None, status: dict[str, Any] | None = None, **metadata: Any
) -> dict[str, Any]:
    """Return a FineTuneJob."""
    manifest = make_manifest(IN_A_CLUSTER | (given or {}))
    known = {"creationTimestamp": CREATED, "resourceVersion": "7", "generation": 1}
    manifest["metadata"] = {**manifest["metadata"], **known, **metadata}
    return {**manifest, "status": status or {}}


def raw_child(stage: Stage = Stage.TRAIN, attempt: int = 1, uid: str = "child", **parts: Any) -> dict[str, Any]:
    """Return the Job of an attempt."""
    owner = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "name": NAME, "uid": UID, "controller": True}
    metadata = {
        "name": naming.child_name(NAME, stage, attempt),
        "namespace": NAMESPACE,
        "uid": uid,
        "resourceVersion": "7",
        "creationTimestamp": CREATED,
        "labels": naming.child_labels(NAME, UID, stage, attempt),
        "ownerReferences": [owner],
    }
    return {"kind": "Job", "metadata": {**metadata, **parts.pop("metadata", {})}, "spec": {}, "status": {}, **parts}


def raw_pod(stage: Stage = Stage.TRAIN, attempt: int = 1, **parts: Any) -> dict[str, Any]:
    """Return the pod of an attempt."""
    child = naming.child_name(NAME, stage, attempt)
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": child, "uid": "child", "controller": True}
    metadata = {
        "name": f"{child}-x",
        "namespace": NAMESPACE,
        "uid": "pod",
        "resourceVersion": "7",
        "creationTimestamp": CREATED,
        "labels": naming.child_labels(NAME, UID, stage, attempt),
        "ownerReferences": [owner],
    }
    return {"metadata": {**metadata, **parts.pop("metadata", {})}, "spec": {}, "status": {"phase": "Pending"}, **parts}


def raw_workload(*conditions: dict[str, Any], owner: str = "child") -> dict[str, Any]:
    """Return what Kueue keeps of a Job in a queue."""
    reference = {"apiVersion": "batch/v1", "kind": "Job", "name": "any", "uid": owner, "controller": True}
    return {"metadata": {"ownerReferences": [reference]}, "status": {"conditions": list(conditions)}}


def queue_condition(kind: str, status: str, message: str, time: str = CREATED) -> dict[str, Any]:
    """Return a condition of a Workload."""
    return {"type": kind, "status": status, "reason": "Pending", "message": message, "lastTransitionTime": time}


def container(**state: Any) -> dict[str, Any]:
    """Return a pod's status with its one container in a state."""
    return {"containerStatuses": [{"name": naming.CONTAINER, "state": state}]}
