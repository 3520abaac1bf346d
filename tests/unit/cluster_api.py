"""A cluster in memory for the command line: one job, its pods and their logs. A `JobApi`."""

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from finetune_api.report import Stage
from finetune_cli.refusal import ClusterError, NotFoundError
from finetune_operator import naming

NAMESPACE, NAME, UID = "team", "reviews", "1a2b3c4d-0000-4000-8000-000000000000"


class FakeJobApi:
    """Answers from ``job`` and ``pods``, which tests change as they like, also while a watch runs."""

    default_namespace = NAMESPACE

    def __init__(self, job: dict[str, Any] | None = None) -> None:
        self.job = job
        self.pod_objects: list[dict[str, Any]] = []
        self.event_objects: list[dict[str, Any]] = []
        self.logs: dict[str, list[str]] = {}
        self.changes: list[dict[str, Any]] = []
        self.on_watch: list[Callable[[], Iterator[tuple[str, dict[str, Any]]]]] = []
        self.on_pods_watched: list[Callable[[], None]] = []
        self.failures: list[ClusterError] = []
        """Raised, one a call, before anything is answered."""
        self.since: list[str | None] = []
        """What the log was asked for."""

    def create(self, namespace: str, manifest: dict[str, Any]) -> dict[str, Any]:
        raise AssertionError("nothing is created here")

    def get(self, namespace: str, name: str) -> dict[str, Any]:
        self._fail()
        if self.job is None or name != self.job["metadata"]["name"]:
            raise NotFoundError(f"there is no FineTuneJob {name} in namespace {namespace}.")
        return copy.deepcopy(self.job)

    def jobs(self, namespace: str) -> list[dict[str, Any]]:
        return [copy.deepcopy(self.job)] if self.job else []

    def patch(self, namespace: str, name: str, change: dict[str, Any]) -> dict[str, Any]:
        self.changes.append(change)
        return self.get(namespace, name)

    def delete(self, namespace: str, name: str, uid: str) -> None:
        assert self.job is not None and uid == self.job["metadata"]["uid"]
        self.job = None

    def watch(self, namespace: str, name: str, resource_version: str) -> Iterator[tuple[str, dict[str, Any]]]:
        return self.on_watch.pop(0)()

    def pods(self, namespace: str, labels: Mapping[str, str]) -> list[dict[str, Any]]:
        self._fail()
        return [copy.deepcopy(pod) for pod in self.pod_objects if labels.items() <= pod["metadata"]["labels"].items()]

    def events(self, namespace: str) -> list[dict[str, Any]]:
        self._fail()
        return copy.deepcopy(self.event_objects)

    def watch_pods(self, namespace: str, labels: Mapping[str, str]) -> Iterator[dict[str, Any]]:
        self.on_pods_watched.pop(0)()
        return iter(self.pods(namespace, labels))

    def log(self, namespace: str, pod: str, container: str, since: str | None, follow: bool) -> Iterator[str]:
        assert container == naming.CONTAINER
        self.since.append(since)
        yield from [line for line in self.logs[pod] if since is None or line[:19] >= since[:19]]

    def _fail(self) -> None:
        if self.failures:
            raise self.failures.pop(0)


def make_object(status: dict[str, Any] | None = None, version: int = 1, **spec: Any) -> dict[str, Any]:
    """Return a job as an API server tells it."""
    return {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {
            "name": NAME,
            "namespace": NAMESPACE,
            "uid": UID,
            "resourceVersion": str(version),
            "creationTimestamp": "2026-01-02T03:04:05Z",
            "managedFields": [{"manager": "kubectl"}],
        },
        "spec": {"model": {"source": "hf://acme/tiny"}, "method": {"type": "lora"}, **spec},
        "status": status or {},
    }


def make_pod(stage: Stage, attempt: int = 1, state: str = "running", reason: str = "") -> dict[str, Any]:
    """Return the pod of one attempt; ``state`` is its container's: waiting, running or terminated."""
    name = f"{NAME}-{stage.value}-a{attempt}-x"
    phase = {"waiting": "Pending", "running": "Running", "terminated": "Succeeded"}[state]
    return {
        "metadata": {
            "name": name,
            "uid": name,
            "creationTimestamp": "2026-01-02T03:04:05Z",
            "labels": naming.child_labels(NAME, UID, stage, attempt),
        },
        "status": {
            "phase": phase,
            "containerStatuses": [{"name": naming.CONTAINER, "state": {state: {"reason": reason} if reason else {}}}],
        },
    }


def pod_name(stage: Stage, attempt: int = 1) -> str:
    name: str = make_pod(stage, attempt)["metadata"]["name"]
    return name
