"""What a user might write into a FineTuneJob to get beyond the own namespace and the own pod, and what refuses it.

The same table meets the schema, the operator's own check and a real API server.
"""

from dataclasses import dataclass
from typing import Any

from finetune_operator.settings import LOCKABLE

POD = "spec.compute.pod"


@dataclass(frozen=True, slots=True)
class Attack:
    """One try."""

    sentence: str
    given: dict[str, Any]
    """Overrides of a manifest, by path."""
    field: str
    """What both refusals name."""
    is_unknown: bool = True
    """Whether there is no such field: without strict validation the API server drops it instead of refusing."""


ATTACKS = (
    Attack("a folder of the node", {f"{POD}.volumes": [{"name": "v", "hostPath": {"path": "/"}}]}, "hostPath"),
    Attack("a disk by its driver", {f"{POD}.volumes": [{"name": "v", "csi": {"driver": "d"}}]}, "csi"),
    Attack("the node's network", {f"{POD}.hostNetwork": True}, "hostNetwork"),
    Attack("the node's processes", {f"{POD}.hostPID": True}, "hostPID"),
    Attack("root", {f"{POD}.securityContext": {"runAsUser": 0}}, "securityContext"),
    Attack("a container without limits", {f"{POD}.containers": [{"name": "x", "image": "x"}]}, "containers"),
    Attack("a container before ours", {f"{POD}.initContainers": [{"name": "x", "image": "x"}]}, "initContainers"),
    Attack("a token of the API server", {f"{POD}.automountServiceAccountToken": True}, "automountServiceAccountToken"),
    Attack("a node past the scheduler", {f"{POD}.nodeName": "control-plane"}, "nodeName"),
    Attack(
        "another team's Secret by namespace", {"spec.output.secretRef": {"name": "s", "namespace": "b"}}, "namespace"
    ),
    Attack("another team's Secret by a path", {"spec.output.secretRef": {"name": "../b/s"}}, "name", is_unknown=False),
    Attack(
        "another team's Secret as a volume",
        {f"{POD}.volumes": [{"name": "v", "secret": {"secretName": "b/s"}}]},
        "secretName",
        is_unknown=False,
    ),
    Attack(
        "another team's Secret as a variable",
        {f"{POD}.env": [{"name": "A", "valueFrom": {"secretKeyRef": {"name": "b/s", "key": "k"}}}]},
        "secretKeyRef",
        is_unknown=False,
    ),
    Attack(
        "another team's claim as a volume",
        {f"{POD}.volumes": [{"name": "v", "persistentVolumeClaim": {"claimName": "b/c"}}]},
        "claimName",
        is_unknown=False,
    ),
    Attack(
        "another team's claim by a path",
        {"spec.data.tasks[0].source": "pvc://../b/x.jsonl"},
        "source",
        is_unknown=False,
    ),
    Attack(
        "another team's service account",
        {f"{POD}.serviceAccountName": "b:admin"},
        "serviceAccountName",
        is_unknown=False,
    ),
)

REDIRECTING = (
    *("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "HF_ENDPOINT"),
    *("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "https_proxy", "http_proxy", "all_proxy", "Https_Proxy"),
    *("AWS_CA_BUNDLE", "CURL_CA_BUNDLE", "FINETUNE_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "SSL_CERT_DIR", "SSL_CERT_FILE"),
)
"""Variables that have another server answer than the spec names."""
SOME_REDIRECTING = ("AWS_ENDPOINT_URL", "https_proxy", "SSL_CERT_FILE")
"""The API server tells of a job's faults in 5 kB, or of none by name."""

FOREIGN = {
    "spec.model.source": "s3://other/base",
    "spec.data.tasks[0].source": "s3://other/rows.jsonl",
    "spec.data.tasks[0].validationSource": "s3://other/validation.jsonl",
    "spec.data.tasks[0].testSource": "s3://other/test.jsonl",
    "spec.data.replay": {"source": "s3://other/replay.jsonl", "fraction": 0.1},
    "spec.evaluation.forgetting": {"sources": ["s3://other/general.jsonl"]},
    "spec.evaluation.benchmarks": [{"suite": "s3://other/task.yaml"}, {"suite": "mmlu"}],
    "spec.output.uri": "s3://other/out",
    "spec.output.endpoint": "https://other.example",
    "spec.training.reportTo": {
        "mlflow": {"trackingUri": "https://mlflow.other.example"},
        "wandb": {"project": "a", "baseUrl": "https://wandb.other.example"},
    },
    "spec.compute.image": "other.example/a",
    "spec.compute.priorityClassName": "system-node-critical",
    "spec.compute.cacheVolume": {"claimName": "other"},
    "spec.compute.pod": {
        "serviceAccountName": "other",
        "env": [{"name": name, "value": "https://other.example"} for name in SOME_REDIRECTING],
        "nodeSelector": {"pool": "other"},
        "tolerations": [{"operator": "Exists"}],
        "affinity": {},
        "labels": {"egress": "open"},
        "annotations": {"sidecar.example/inject": "true"},
        "volumes": [{"name": "other", "secret": {"secretName": "other"}}],
        "volumeMounts": [{"name": "other", "mountPath": "/other"}],
        "terminationGracePeriodSeconds": 86400,
    },
}
"""Every field that an administrator can lock, set to what none of `LOCKS` allows."""

FOREIGN_WORDS = (
    *(f"s3://other/{name}" for name in ("base", "rows.jsonl", "validation.jsonl", "test.jsonl", "general.jsonl")),
    *("s3://other/replay.jsonl", "s3://other/task.yaml", "s3://other/out", "https://other.example", "other.example/a"),
    *("https://mlflow.other.example", "https://wandb.other.example"),
    *(" trainer", "mmlu", "may lead to another store", *SOME_REDIRECTING),
    *(f"spec.compute.pod.{name}" for name in LOCKABLE if name not in ("priorityClassName", "cacheVolume")),
    *("spec.compute.priorityClassName", "spec.compute.cacheVolume"),
)
"""What a refusal of `FOREIGN` names."""

LOCKS = {
    "imageRegistries": ["registry.example/"],
    "storagePrefixes": ["pvc://models/", "pvc://rows/"],
    "storageEndpoints": ["https://minio.example/"],
    "serviceAccounts": ["trainer"],
    "lockedPodFields": [*LOCKABLE],
}
