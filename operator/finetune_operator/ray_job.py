"""What KubeRay is asked for: a cluster of one head and its workers, and the program that trains on it. Pure.

The shape follows what KubeRay 1.6 does with it. It tries nothing again, for attempts are ours; its cluster ends with
the program; the head has neither CPUs nor GPUs to offer, so that all training is the workers'. The entrypoint is a
shell line, so nothing of a user's text may be in it.
"""

import re
from typing import Any

from finetune_api.spec.compute import gpus
from finetune_operator.pod import Role, Run, arguments, pod_template

Manifest = dict[str, Any]

PRE_RUNNING_GRACE_SECONDS = 120
"""Our own start deadline comes first: it knows why nothing has started."""
SUBMISSION_TRIES = 2
"""How often the program may be handed over again while the head is not ready; under one id, so it runs once."""
AUTH = {"mode": "token"}
"""Otherwise a head runs whatever anybody sends it who reaches its ports. KubeRay makes the token."""
RAY_VERSION = "2.60.0"
"""Of the trainer image; KubeRay wants to know it, for what Ray could not yet do."""
KUBERAY_NEEDED = "1.6"
"""The first version that knows every field of ours: it brought preRunningDeadlineSeconds, 1.5.1 the tokens."""
SUBMITTER = "ray-job-submitter"
SUBMITTER_RESOURCES = {"requests": {"cpu": "100m", "memory": "256Mi"}, "limits": {"cpu": "1", "memory": "1Gi"}}
_PLAIN_WORD = re.compile(r"[A-Za-z0-9_./=-]+")


def ray_job_spec(run: Run) -> Manifest:
    """Return the spec of the attempt's RayJob."""
    return {
        "entrypoint": _entrypoint(run),
        "submissionMode": "K8sJobMode",
        "submitterConfig": {"backoffLimit": SUBMISSION_TRIES},
        "submitterPodTemplate": _submitter(run),
        "backoffLimit": 0,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": 0,
        "preRunningDeadlineSeconds": run.job.spec.run_policy.start_deadline_seconds + PRE_RUNNING_GRACE_SECONDS,
        "rayClusterSpec": {
            "rayVersion": RAY_VERSION,
            "authOptions": dict(AUTH),
            "headGroupSpec": {
                "rayStartParams": {"num-cpus": "0", **_gpus(0), "dashboard-host": "0.0.0.0"},
                "template": pod_template(run, Role.HEAD),
            },
            "workerGroupSpecs": [
                {
                    "groupName": "worker",
                    "replicas": run.compute.workers,
                    "minReplicas": run.compute.workers,
                    "maxReplicas": run.compute.workers,
                    "rayStartParams": _gpus(gpus(run.compute)),
                    "template": pod_template(run, Role.WORKER),
                }
            ],
        },
    }


def newest_fields(namespace: str) -> Manifest:
    """Return so much of a RayJob as tells by its fields whether the definition is of `KUBERAY_NEEDED` or newer."""
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": "fields", "namespace": namespace},
        "spec": {"preRunningDeadlineSeconds": PRE_RUNNING_GRACE_SECONDS, "rayClusterSpec": {"authOptions": dict(AUTH)}},
    }


def _gpus(number: int) -> dict[str, str]:
    # Left open, KubeRay takes it from a resource whose name ends in "gpu", and without one Ray counts what the driver
    # shows: all of a node where the image sets NVIDIA_VISIBLE_DEVICES.
    return {"num-gpus": str(number)}


def _entrypoint(run: Run) -> str:
    words = ["python", "-m", "finetune_trainer", *arguments(run)]
    if strange := [word for word in words if not _PLAIN_WORD.fullmatch(word)]:
        raise ValueError(f"{strange} must not become part of a shell line")
    return " ".join(words)


def _submitter(run: Run) -> Manifest:
    """Return a pod that mounts nothing of the job: it only talks to the head."""
    template = pod_template(run, Role.SUBMITTER)
    [container] = template["spec"]["containers"]
    scratch = [mount for mount in container["volumeMounts"] if mount["mountPath"] == "/tmp"]
    names = {mount["name"] for mount in scratch}
    home = [variable for variable in container["env"] if variable["name"] == "HOME"]
    changes = {"name": SUBMITTER, "env": home, "volumeMounts": scratch, "resources": SUBMITTER_RESOURCES}
    template["spec"]["containers"] = [container | changes]
    template["spec"]["volumes"] = [volume for volume in template["spec"]["volumes"] if volume["name"] in names]
    return template
