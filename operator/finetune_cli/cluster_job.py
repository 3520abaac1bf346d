"""A FineTuneJob as the cluster tells it, and which one the user means. Pure but for reading a named file."""

from dataclasses import dataclass
from pathlib import Path

from finetune_api.job import MAX_NAME, FineTuneJob
from finetune_api.status import FineTuneJobStatus
from finetune_api.stored_status import read_status
from finetune_cli.job_api import JsonObject
from finetune_cli.manifest import read_job
from finetune_trainer.errors import SpecError


@dataclass(frozen=True, slots=True)
class JobName:
    """Which job is meant."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.name} in namespace {self.namespace}"


@dataclass(frozen=True, slots=True)
class ClusterJob:
    """One FineTuneJob, as far as commands look at it."""

    name: JobName
    uid: str
    resource_version: str
    created: str
    """As the API server writes times: RFC 3339."""
    is_deleting: bool
    spec: JsonObject
    status: FineTuneJobStatus
    document: JsonObject
    """The whole object without what only the API server needs."""


def cluster_job(document: JsonObject) -> ClusterJob:
    """Return the job in an API server's answer."""
    metadata = {key: value for key, value in document["metadata"].items() if key != "managedFields"}
    return ClusterJob(
        JobName(metadata["namespace"], metadata["name"]),
        metadata["uid"],
        metadata["resourceVersion"],
        metadata["creationTimestamp"],
        "deletionTimestamp" in metadata,
        document.get("spec") or {},
        read_status(document.get("status") or {}),
        {**document, "metadata": metadata},
    )


# --- which one


def find_name(given: str, namespace: str | None, default_namespace: str) -> JobName:
    """Return the job that ``given``, a name or the path of a manifest, means.

    Args:
        given: a name has neither a dot nor a slash.
        namespace: what the command line says.
        default_namespace: what the context says.

    Raises:
        SpecError: it is neither, or the manifest is of another namespace than the command line.
        InvalidJobError: the manifest is no job.
    """
    if "." in given or "/" in given:
        job = read_job(Path(given))
        return JobName(own_namespace(job, namespace, default_namespace, given), job.metadata.name)
    if not given or len(given) > MAX_NAME:
        raise SpecError(f"{given!r} is no name of a job: names have 1 to {MAX_NAME} characters. Give a name or a file.")
    return JobName(namespace or default_namespace, given)


def own_namespace(job: FineTuneJob, namespace: str | None, default_namespace: str, source: str) -> str:
    """Return where ``job`` belongs: where its manifest, else the command line, else the context says.

    Raises:
        SpecError: manifest and command line differ.
    """
    own = job.metadata.namespace if "namespace" in job.metadata.model_fields_set else None
    if own and namespace and own != namespace:
        raise SpecError(
            f"{source}: metadata.namespace is {own!r} and --namespace says {namespace!r}. Keep one of them."
        )
    return own or namespace or default_namespace
