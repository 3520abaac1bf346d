"""The node of our own kind cluster: which containers run on it, and how they die without being asked."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..cluster import kind
from ..cluster.cluster import Cluster
from ..cluster.command import CommandError


@dataclass(frozen=True, slots=True)
class Node:
    """Wants a cluster that is our own."""

    cluster: Cluster

    def run(self, *arguments: str) -> str:
        """Return what a command prints that runs on the node."""
        assert self.cluster.docker is not None, "the node is not ours"
        return self.cluster.docker("exec", kind.NODE, *arguments)

    def containers(self, key: str, value: str) -> list[str]:
        """Return the ids of the containers that run and have the label ``key`` with ``value``."""
        labelled = set(self._ctr("containers", "list", "--quiet", f'labels."{key}"=={value}').split())
        running = [line.split()[0] for line in self._ctr("tasks", "list").splitlines() if line.endswith("RUNNING")]
        return sorted(labelled.intersection(running))

    def kill_pods(self, key: str, value: str) -> int:
        """Kill what runs of the pods whose ``name`` or ``namespace``, the ``key``, is ``value``; return how many."""
        found = self.containers(f"io.kubernetes.pod.{key}", value)
        self.kill(found)
        return len(found)

    def kill(self, containers: Sequence[str]) -> None:
        """Send SIGKILL to every process that a container began with."""
        for container in containers:
            try:
                self._ctr("tasks", "kill", "--signal", "SIGKILL", container)
            except CommandError as error:
                # A pod's other container may have taken this one with it.
                if "not found" not in str(error) and "process already finished" not in str(error):
                    raise

    def _ctr(self, *arguments: str) -> str:
        return self.run("ctr", "--namespace=k8s.io", *arguments)
