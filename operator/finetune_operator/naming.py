"""What things are called: labels, children, folders in a pod, the audience of a token. Nothing else decides a name."""

import hashlib

from finetune_api.crd import GROUP, PLURAL, VERSION
from finetune_api.job import MAX_NAME
from finetune_api.report import Stage

OPERATOR = "finetune-operator"

MANAGED_BY = "app.kubernetes.io/managed-by"
"""On every child, with the value ``finetune-operator``; watches are filtered by it on the server."""
JOB_LABEL = f"{GROUP}/job"
JOB_UID_LABEL = f"{GROUP}/job-uid"
STAGE_LABEL = f"{GROUP}/stage"
ATTEMPT_LABEL = f"{GROUP}/attempt"
SPEC_HASH_ANNOTATION = f"{GROUP}/spec-hash"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
QUEUED_UID_LABEL = "kueue.x-k8s.io/job-uid"
"""On a Workload of Kueue: the UID of the Job or RayJob that is queued by it."""
RAY_NODE_LABEL = "ray.io/node-type"
"""KubeRay's, on the pods of its clusters: ``head`` or ``worker``."""

CHILD_SELECTOR = {MANAGED_BY: OPERATOR}
"""Labels by which children and their pods are watched."""

CONTAINER = "trainer"
"""The one container of a stage's pod."""

# --- folders of a stage's pod

SPEC_FOLDER = "/etc/finetune"
SPEC_FILE = f"{SPEC_FOLDER}/job.json"
WORKSPACE_FOLDER = "/workspace"
TERMINATION_LOG = "/dev/termination-log"
SECRETS_FOLDER = "/var/run/secrets/finetune"
"""``<folder>/<secret>/<key>`` for every Secret that the spec names."""
CLAIMS_FOLDER = "/mnt/pvc"
"""``pvc://claim/path`` is ``<folder>/claim/path``."""
CONFIG_MAPS_FOLDER = "/mnt/config"
"""``configMap://name/key`` is ``<folder>/name/key``."""
CACHE_FOLDER = "/cache"
"""``compute.cacheVolume``."""
PROGRESS_FOLDER = "/var/run/secrets/kubeflow/trainer"
"""Token and ca.crt of the progress endpoint, where KubeflowCallback expects them."""
TOKEN_FILE = f"{PROGRESS_FOLDER}/token"
CA_FILE = f"{PROGRESS_FOLDER}/ca.crt"
CA_BUNDLE_FILE = f"{SPEC_FOLDER}/ca-bundle/ca-bundle.crt"
"""The administrator's private certificate authorities; the trainer adds the public ones."""

LONGEST_CHILD = 47
"""KubeRay refuses longer names: it makes those of its clusters and services from them."""
_LONGEST_STEM = 32
"""Leaves room for ``-evaluate-a9999``."""


def child_name(job: str, stage: Stage, attempt: int) -> str:
    """Return the name of the Job or RayJob of one attempt: ``reviews-lora-train-a2``.

    Of a long name the end is replaced by a hash of the whole, so that no two jobs share it.
    """
    if len(job) > MAX_NAME:
        raise ValueError(f"{job} is too long for the name of a job")
    stem = job
    if len(job) > _LONGEST_STEM:
        stem = f"{job[: _LONGEST_STEM - 9].rstrip('-.')}-{hashlib.sha256(job.encode()).hexdigest()[:8]}"
    name = f"{stem}-{stage.value}-a{attempt}"
    if len(name) > LONGEST_CHILD:
        raise ValueError(f"{name} is too long for the name of a child")
    return name


def spec_config_map_name(job: str, spec_hash: str) -> str:
    """Return the name of the immutable ConfigMap with the resolved job."""
    return f"{job}-spec-{spec_hash[:8]}"


def trust_config_map_name(job: str) -> str:
    """Return the name of the ConfigMap with the certificate authorities that the job's pods trust."""
    return f"{job}-trust"


def child_labels(job: str, uid: str, stage: Stage, attempt: int) -> dict[str, str]:
    """Return the labels of a child and of its pods."""
    return {
        MANAGED_BY: OPERATOR,
        JOB_LABEL: job,
        JOB_UID_LABEL: uid,
        STAGE_LABEL: stage.value,
        ATTEMPT_LABEL: str(attempt),
    }


def audience(namespace: str, job: str, uid: str, stage: Stage, attempt: int) -> str:
    """Return whom the projected token of one attempt's pod is for: useless anywhere else, and for any other attempt."""
    return f"{GROUP}/{VERSION}/namespaces/{namespace}/{PLURAL}/{job}/{uid}/{stage.value}/a{attempt}"


def progress_path(namespace: str, job: str, stage: Stage, attempt: int) -> str:
    """Return the endpoint's path for progress; ``…/result`` below it takes the stage's result."""
    return f"/apis/{GROUP}/{VERSION}/namespaces/{namespace}/{PLURAL}/{job}/{stage.value}/{attempt}"
