"""The objects that belong to a job, as plain manifests. Pure: same arguments, same bytes.

``finetune render`` prints exactly what the operator creates.
"""

import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from finetune_api.crd import GROUP, VERSION
from finetune_api.job import KIND, FineTuneJob, Metadata, spec_hash
from finetune_api.report import ExitCode, Stage
from finetune_api.spec.compute import is_distributed
from finetune_operator import naming
from finetune_operator.observed import ChildKind
from finetune_operator.pod import KUEUE, Run, labels, pod_template, without_queue
from finetune_operator.ray_job import ray_job_spec
from finetune_operator.settings import Settings

Manifest = dict[str, Any]

JOB_FILE = "job.json"
AUTHORITY_FILE = "ca.crt"
BUNDLE_FILE = "ca-bundle.crt"


def child_kind(job: FineTuneJob, stage: Stage) -> ChildKind:
    """Return what runs the job's attempts at ``stage``; the one place that chooses."""
    return ChildKind.RAY_JOB if stage is Stage.TRAIN and is_distributed(job.spec.compute) else ChildKind.JOB


def image_of(job: FineTuneJob, settings: Settings) -> str:
    """Return the trainer's image: the job's, its profile's or the operator's own."""
    return job.spec.compute.image or settings.image.name


def output_path(job: FineTuneJob) -> str:
    """Return the folder of the job's results, which no other job ever gets."""
    identity = job.metadata.uid[:8] or spec_hash(job.spec)[:8]
    return f"{job.spec.output.uri.rstrip('/')}/{job.metadata.namespace}/{job.metadata.name}-{identity}"


_API_VERSIONS = {ChildKind.JOB: "batch/v1", ChildKind.RAY_JOB: "ray.io/v1"}


def stage_child(run: Run) -> Manifest:
    """Return the Job or RayJob of one attempt. It is tried once: the next attempt is another one."""
    stage, number = run.attempt.stage, run.attempt.number
    name = naming.child_name(run.job.metadata.name, stage, number)
    kind = child_kind(run.job, stage)
    return {
        "apiVersion": _API_VERSIONS[kind],
        "kind": kind.value,
        "metadata": {
            **_metadata(run.job, name),
            "labels": {
                **without_queue(run.job.metadata.labels | run.settings.pod.labels),
                **_queue(run.job, stage),
                **labels(run),
            },
            "annotations": {**run.settings.pod.annotations, naming.SPEC_HASH_ANNOTATION: run.spec_hash},
        },
        "spec": ray_job_spec(run) if kind is ChildKind.RAY_JOB else _job_spec(run),
    }


def _job_spec(run: Run) -> Manifest:
    return {
        "backoffLimit": 0,
        "parallelism": 1,
        "completions": 1,
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": {"rules": _failure_rules()},
        "template": pod_template(run),
    }


def _failure_rules() -> list[Manifest]:
    """Return rules that end the Job at the first failure.

    backoffLimit 0 would do so too; but these also put the exit code or the disruption into the Job's condition, where
    it is still to be read when the pod is gone.
    """
    codes = sorted(code.value for code in ExitCode if code is not ExitCode.OK)
    exits = {"containerName": naming.CONTAINER, "operator": "In", "values": codes}
    return [
        {"action": "FailJob", "onExitCodes": exits},
        {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]


def _queue(job: FineTuneJob, stage: Stage) -> dict[str, str]:
    """Return the labels by which Kueue queues the stage's Job; none keeps it out of the queue."""
    queue = {key: value for key, value in job.metadata.labels.items() if key.startswith(KUEUE)}
    if stage is not Stage.CHECK:
        return queue
    name = job.spec.run_policy.check_queue_name
    return {**queue, naming.QUEUE_LABEL: name} if name else {}


def spec_config_map(job: FineTuneJob, hash_of_spec: str) -> Manifest:
    """Return the ConfigMap that pins the resolved ``job``."""
    return {
        **_config_map(job, naming.spec_config_map_name(job.metadata.name, hash_of_spec), {JOB_FILE: job_file(job)}),
        "immutable": True,
    }


def job_file(job: FineTuneJob) -> str:
    """Return what the trainer reads: the job as JSON."""
    return job.model_dump_json(by_alias=True, exclude_none=True, exclude={"status"})


def trust_config_map(job: FineTuneJob, progress_ca: str, settings: Settings) -> Manifest:
    """Return the ConfigMap with what the job's pods trust; rewritten when a certificate authority is renewed."""
    name = naming.trust_config_map_name(job.metadata.name)
    return _config_map(job, name, _trust_data(progress_ca, settings.pod.ca_bundle))


@functools.lru_cache(maxsize=8)
def trust_hash(progress_ca: str, ca_bundle: str) -> str:
    """Return the hash of what the trust ConfigMap is to hold; the same for all jobs at one time."""
    return content_hash(_trust_data(progress_ca, ca_bundle))


def _trust_data(progress_ca: str, ca_bundle: str) -> dict[str, str]:
    return {AUTHORITY_FILE: progress_ca} | ({BUNDLE_FILE: ca_bundle} if ca_bundle else {})


def content_hash(data: Mapping[str, str]) -> str:
    """Return the sha256 of a ConfigMap's data."""
    return hashlib.sha256(json.dumps(dict(data), sort_keys=True).encode()).hexdigest()


def _config_map(job: FineTuneJob, name: str, data: Mapping[str, str]) -> Manifest:
    identity = {
        naming.MANAGED_BY: naming.OPERATOR,
        naming.JOB_LABEL: job.metadata.name,
        naming.JOB_UID_LABEL: job.metadata.uid,
    }
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {**_metadata(job, name), "labels": identity},
        "data": dict(data),
    }


def _metadata(job: FineTuneJob, name: str) -> Manifest:
    return {"name": name, "namespace": job.metadata.namespace, "ownerReferences": [owner_reference(job.metadata)]}


def owner_reference(metadata: Metadata) -> Manifest:
    """Return the reference by which a child goes when its job goes."""
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": KIND,
        "name": metadata.name,
        "uid": metadata.uid,
        "controller": True,
        "blockOwnerDeletion": False,
    }
