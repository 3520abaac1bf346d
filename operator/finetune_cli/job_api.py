"""What commands need of a cluster, so that tests can stand in for one."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

JsonObject = dict[str, Any]
"""An object of Kubernetes, as JSON says it."""


@dataclass(frozen=True, slots=True)
class Target:
    """Which cluster and namespace, as the options of the command line say it."""

    namespace: str | None = None
    context: str | None = None
    kubeconfig: Path | None = None


class JobApi(Protocol):
    """What commands need of a cluster. Every method raises a FineTuneError in the user's words."""

    @property
    def default_namespace(self) -> str:
        """The namespace where none is named."""
        ...

    def create(self, namespace: str, manifest: JsonObject) -> JsonObject:
        """Create a job; unknown fields are refused."""
        ...

    def get(self, namespace: str, name: str) -> JsonObject:
        """Return a job."""
        ...

    def jobs(self, namespace: str) -> list[JsonObject]:
        """Return all jobs of a namespace."""
        ...

    def patch(self, namespace: str, name: str, change: JsonObject) -> JsonObject:
        """Merge ``change`` into a job."""
        ...

    def delete(self, namespace: str, name: str, uid: str) -> None:
        """Delete exactly this job; its pods follow by themselves."""
        ...

    def watch(self, namespace: str, name: str, resource_version: str) -> Iterator[tuple[str, JsonObject]]:
        """Yield ADDED, MODIFIED or DELETED with the job, until the server or the network ends it."""
        ...

    def pods(self, namespace: str, labels: Mapping[str, str]) -> list[JsonObject]:
        """Return the pods with these labels."""
        ...

    def events(self, namespace: str) -> list[JsonObject]:
        """Return the events of a namespace."""
        ...

    def watch_pods(self, namespace: str, labels: Mapping[str, str]) -> Iterator[JsonObject]:
        """Yield pods with these labels, now and as they change, until the server or the network ends it."""
        ...

    def log(self, namespace: str, pod: str, container: str, since: str | None, follow: bool) -> Iterator[str]:
        """Yield a pod's log line by line, each with its time in front.

        Args:
            namespace: of the pod.
            pod: its name.
            container: whose log.
            since: time of the first line wanted, RFC 3339; all of the log when absent.
            follow: wait for more until the container ends.
        """
        ...
