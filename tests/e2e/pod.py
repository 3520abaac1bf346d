"""Pods for tests: one container, restricted as far as Kubernetes can, run to its end."""

import json
from typing import Any

from ..cluster.cluster import Cluster, Manifest, await_condition

RESTRICTED = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "runAsNonRoot": True,
    "capabilities": {"drop": ["ALL"]},
    "seccompProfile": {"type": "RuntimeDefault"},
}
"""What the `restricted` Pod Security Standard asks for, and a root file system that nobody writes to."""


def restricted_namespace(name: str) -> Manifest:
    """Return a namespace into which no pod comes that is not restricted."""
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}


def pod_manifest(
    name: str,
    image: str,
    script: str = "",
    *,
    environment: list[dict[str, str]] | None = None,
    claim: str = "",
    **container: Any,
) -> Manifest:
    """Return a pod that runs the Python ``script``, or without one what the image runs with ``args``.

    It may write to /tmp, and to /volume when it has a ``claim``.
    """
    mounts = [{"name": "tmp", "mountPath": "/tmp"}]
    volumes: list[dict[str, Any]] = [{"name": "tmp", "emptyDir": {}}]
    if claim:
        mounts.append({"name": "volume", "mountPath": "/volume"})
        volumes.append({"name": "volume", "persistentVolumeClaim": {"claimName": claim}})
    main = {
        "name": "main",
        "image": image,
        "imagePullPolicy": "Never",
        "securityContext": RESTRICTED,
        "env": environment or [],
        "volumeMounts": mounts,
        **({"command": ["python", "-c", script]} if script else {}),
        **container,
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": name}},
        "spec": {
            "containers": [main],
            "volumes": volumes,
            "restartPolicy": "Never",
            # A shell or Python as the first process ignores SIGTERM; nothing here needs its half minute.
            "terminationGracePeriodSeconds": 1,
        },
    }


def run_pod(cluster: Cluster, namespace: str, manifest: Manifest, seconds: float = 240) -> str:
    """Run the pod to its end and return what it printed; a pod that fails is an error with what it said."""
    name = manifest["metadata"]["name"]
    cluster.apply(manifest, namespace)

    def phase() -> str:
        return str(cluster.get("pod", name, namespace)["status"].get("phase"))

    await_condition(lambda: phase() in ("Succeeded", "Failed"), f"the end of pod {name}", seconds)
    said = cluster.kubectl("logs", name, f"--namespace={namespace}")
    status = cluster.get("pod", name, namespace)["status"]
    assert status["phase"] == "Succeeded", f"{said}\n{json.dumps(status, indent=1)}"
    return said
