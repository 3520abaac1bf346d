"""``finetune render --serve``: one base with the adapters of several jobs behind vLLM's OpenAI server.

vLLM loads the base once and takes the adapter that a request names as its model. What lies in a bucket is fetched, and
held against its manifest, by the trainer's image before vLLM starts.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import yaml

from finetune_api.report import ArtifactKind, ExitCode
from finetune_api.spec import LoraSpec
from finetune_api.status import ConditionType, PublishedArtifact
from finetune_cli.cluster_job import ClusterJob, JobName
from finetune_cli.job_api import JobApi, JsonObject
from finetune_cli.job_status import fetch
from finetune_operator import naming
from finetune_operator.condition import holds
from finetune_operator.location import authority
from finetune_operator.pod import GPU_RESOURCE, container_security, pod_security
from finetune_trainer.errors import SpecError
from finetune_trainer.vllm_command import MOST_RANKS, max_lora_rank, refused_kind, serve_command, served_name

VLLM_IMAGE = "vllm/vllm-openai:v0.33.0"
PORT = 8000
FETCHED_FOLDER = "/models"
"""Where the pod keeps what it has fetched from buckets."""

_INTRODUCTION = """\
# Serves {base} with {adapters} by vLLM's OpenAI server.
# A Kubernetes API server takes these objects; they were NOT run on a GPU. Try them before anybody relies on them, and
# add what your cluster needs to place a pod on a GPU: nodeSelector, tolerations, memory.
# A request names the job whose adapter it wants as "model"; {base} is the base itself.
"""


@dataclass(frozen=True, slots=True)
class _Served:
    """One job's adapter."""

    job: str
    artifact: PublishedArtifact
    rank: int
    spec: JsonObject
    image: str
    """The trainer's, which fetches."""

    @property
    def endpoint(self) -> str | None:
        """Address of the store that the adapter lies in."""
        endpoint: str | None = self.spec["output"].get("endpoint")
        return endpoint

    @property
    def secret(self) -> str | None:
        """Secret for that store."""
        return _secret(self.spec["output"])


def render_serving(api: JobApi, names: Sequence[JobName], image: str, output: str) -> ExitCode:
    """Print a Deployment and a Service for the adapters that the jobs have published.

    Raises:
        NotFoundError: there is no such job.
        SpecError: one has published no adapter that vLLM serves, or they do not stand on one base.
    """
    jobs = [fetch(api, name) for name in names]
    objects = json.loads(json.dumps(serving_manifests(jobs, image)))
    if output == "json":
        sys.stdout.write(json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}, indent=2) + "\n")
        return ExitCode.OK
    base = served_name(jobs[0].spec["model"]["source"])
    sys.stdout.write(_INTRODUCTION.format(base=base, adapters=", ".join(job.name.name for job in jobs)))
    for one in objects:
        sys.stdout.write(f"---\n{yaml.safe_dump(one, sort_keys=False, width=120, allow_unicode=True)}")
    return ExitCode.OK


def serving_manifests(jobs: Sequence[ClusterJob], image: str) -> list[JsonObject]:
    """Return Deployment and Service; raises as `render_serving` does."""
    served = [_served(job) for job in jobs]
    first = jobs[0]
    for job in jobs[1:]:
        if job.name.namespace != first.name.namespace:
            raise SpecError(f"{first.name} and {job.name}: a pod reads the Secrets of one namespace. Name such jobs.")
        if _base(job) != _base(first):
            raise SpecError(
                f"{job.name} stands on {' at '.join(_base(job))}, {first.name} on {' at '.join(_base(first))}. Name "
                "jobs of one base, or render each base by itself."
            )
    name = f"{first.name.name}-serving"
    labels = {"app.kubernetes.io/name": "vllm", "app.kubernetes.io/instance": name}
    metadata = {"name": name, "namespace": first.name.namespace, "labels": labels}
    return [
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": metadata,
            "spec": {
                "replicas": 1,
                # A second pod would wait for a GPU that the first one holds.
                "strategy": {"type": "Recreate"},
                "selector": {"matchLabels": labels},
                "template": {"metadata": {"labels": labels}, "spec": _pod(served, first, image)},
            },
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": metadata,
            "spec": {"selector": labels, "ports": [{"name": "http", "port": 80, "targetPort": "http"}]},
        },
    ]


# --- which jobs


def _served(job: ClusterJob) -> _Served:
    artifact = next((one for one in job.status.artifacts if one.kind is ArtifactKind.ADAPTER), None)
    if not holds(job.status, ConditionType.PUBLISHED) or artifact is None or job.status.resolved is None:
        raise SpecError(f"{job.name} has published no adapter. `finetune status {job.name.name}` says why.")
    method = job.spec["method"]
    lora = method.get("lora") or {}
    if kind := refused_kind(method["type"], bool(lora.get("useDora"))):
        raise SpecError(f"{job.name} has published a {kind} adapter, and vLLM serves lora alone. Leave it out.")
    if job.spec["model"].get("task", "causal-lm") != "causal-lm":
        raise SpecError(f"{job.name} is for {job.spec['model']['task']}, to which vLLM adds no adapters. Leave it out.")
    if artifact.uri.partition("://")[0] not in ("s3", "pvc"):
        raise SpecError(
            f"{job.name} has published to {artifact.uri}, which pods do not see. Publish to s3:// or pvc://."
        )
    rank = int(lora.get("rank") or LoraSpec().rank)
    return _Served(job.name.name, artifact, rank, job.spec, job.status.resolved.image or "")


def _base(job: ClusterJob) -> tuple[str, str]:
    revision = job.status.resolved.model_revision if job.status.resolved else None
    return job.spec["model"]["source"], revision or "an unknown revision"


# --- the pod


def _pod(served: Sequence[_Served], first: ClusterJob, image: str) -> JsonObject:
    source, revision = _base(first)
    secrets = _once(_secret(first.spec["model"]), *(one.secret for one in served))
    claims = _once(*(authority(uri, "pvc") for uri in (source, *(one.artifact.uri for one in served))))
    fetches = [*_fetch_base(served[0], source), *(fetch for one in served for fetch in _fetch_adapter(one))]
    volumes = [*_secret_volumes(secrets), *_claim_volumes(claims), *_scratch()]
    mounts = [mount for _, mount in volumes]
    pod: JsonObject = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": pod_security(),
        "containers": [_server(served, source, revision, image, mounts)],
        "volumes": [volume for volume, _ in volumes],
    }
    account = ((first.spec.get("compute") or {}).get("pod") or {}).get("serviceAccountName")
    if account:
        # Where no Secret is named, it is the pod's identity that opens a bucket.
        pod["serviceAccountName"] = account
    if fetches:
        pod["initContainers"] = [
            {
                "name": f"fetch-{index}",
                "image": served[0].image,
                "command": ["python", "-m", "finetune_trainer.folder_fetch", *arguments],
                "env": [{"name": "HOME", "value": "/tmp"}],
                "securityContext": container_security(),
                "volumeMounts": mounts,
            }
            for index, arguments in enumerate(fetches)
        ]
    return pod


def _server(
    served: Sequence[_Served], source: str, revision: str, image: str, mounts: Sequence[JsonObject]
) -> JsonObject:
    rank = max_lora_rank(max(one.rank for one in served))
    if rank is None:
        raise SpecError(f"vLLM serves adapters up to rank {MOST_RANKS[-1]}. Leave those of a higher one out.")
    compute = served[0].spec.get("compute") or {}
    on_hub = source.startswith("hf://")
    # Python asks for the name of a user that the image does not know.
    environment = {"HOME": "/tmp", "USER": "vllm", "HF_HOME": f"{FETCHED_FOLDER}/hub"}
    if on_hub and (secret := _secret(served[0].spec["model"])):
        environment["HF_TOKEN_PATH"] = f"{naming.SECRETS_FOLDER}/{secret}/HF_TOKEN"
    command = serve_command(
        served_name(source) if on_hub else _folder(source, "base"),
        served_name(source),
        revision if on_hub else None,
        {one.job: _folder(one.artifact.uri, one.job) for one in served},
        rank,
    )
    health = {"httpGet": {"path": "/health", "port": "http"}}
    return {
        "name": "vllm",
        "image": image,
        "command": command[:3],
        "args": ["--port", str(PORT), *command[3:]],
        "env": [{"name": name, "value": value} for name, value in environment.items()],
        "ports": [{"name": "http", "containerPort": PORT}],
        # Large weights take minutes to load.
        "startupProbe": {**health, "periodSeconds": 10, "failureThreshold": 180},
        "readinessProbe": {**health, "periodSeconds": 10},
        "resources": {"limits": {compute.get("gpuResource") or GPU_RESOURCE: "1"}},
        "securityContext": container_security(),
        "volumeMounts": list(mounts),
    }


# --- what is fetched and what is mounted


def _folder(uri: str, name: str) -> str:
    """Return where the pod finds what lies at ``uri``."""
    scheme, _, rest = uri.partition("://")
    root = naming.CLAIMS_FOLDER if scheme == "pvc" else FETCHED_FOLDER
    return str(PurePosixPath(root, rest if scheme == "pvc" else name))


def _fetch_base(first: _Served, source: str) -> Iterator[list[str]]:
    if source.startswith("s3://"):
        secret = _secret(first.spec["model"])
        endpoint = None if secret else first.endpoint
        yield _fetch(source, _folder(source, "base"), endpoint, secret or first.secret)


def _fetch_adapter(one: _Served) -> Iterator[list[str]]:
    uri = one.artifact.uri
    if uri.startswith("s3://"):
        yield [*_fetch(uri, _folder(uri, one.job), one.endpoint, one.secret), "--sha256", one.artifact.sha256]


def _fetch(uri: str, folder: str, endpoint: str | None, secret: str | None) -> list[str]:
    return [
        *(uri, folder),
        *(("--endpoint", endpoint) if endpoint else ()),
        *(("--secret", secret) if secret else ()),
    ]


def _once(*names: str | None) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for name in names if name))


def _secret(block: JsonObject) -> str | None:
    name: str | None = (block.get("secretRef") or {}).get("name")
    return name


_Volume = tuple[JsonObject, JsonObject]
"""A volume, and where it is mounted."""


def _secret_volumes(names: Sequence[str]) -> Iterator[_Volume]:
    for index, name in enumerate(names):
        source = {"secret": {"secretName": name, "defaultMode": 0o440}}
        yield _volume(f"secret-{index}", source, f"{naming.SECRETS_FOLDER}/{name}", read_only=True)


def _claim_volumes(names: Sequence[str]) -> Iterator[_Volume]:
    for index, name in enumerate(names):
        source = {"persistentVolumeClaim": {"claimName": name}}
        yield _volume(f"claim-{index}", source, f"{naming.CLAIMS_FOLDER}/{name}", read_only=True)


def _scratch() -> Iterator[_Volume]:
    yield _volume("models", {"emptyDir": {}}, FETCHED_FOLDER)
    yield _volume("tmp", {"emptyDir": {}}, "/tmp")
    # Processes of vLLM talk through it.
    yield _volume("shared-memory", {"emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}}, "/dev/shm")


def _volume(name: str, source: JsonObject, folder: str, read_only: bool = False) -> _Volume:
    mount: dict[str, Any] = {"name": name, "mountPath": folder}
    return {"name": name, **source}, mount | ({"readOnly": True} if read_only else {})
