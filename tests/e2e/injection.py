"""Does to a cluster what a schedule says. The node and its programs are those of our own kind cluster."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from kubernetes import client

from ..cluster.cluster import Cluster, await_condition
from ..cluster.command import CommandError
from .fault import Fault, FaultKind
from .faulty_proxy import Behaviour
from .faulty_store import FaultyStore
from .node import Node
from .object import Jobs
from .release import OperatorRelease

BACK_SECONDS = 120
"""How long the API server may take to come back: the kubelet waits longer before every restart."""
QUIET_SECONDS = 60
"""How long a fault of the store waits for somebody to hit."""
CONTAINER = "io.kubernetes.container.name"


@dataclass(frozen=True, slots=True)
class Injector:
    """Whom faults hit."""

    cluster: Cluster
    jobs: Jobs
    operator: OperatorRelease
    store: FaultyStore

    @property
    def _node(self) -> Node:
        return Node(self.cluster)

    def inject(self, fault: Fault, withdrawn: Sequence[str]) -> str:
        """Do it, wait until it is over, and return what was hit; ``withdrawn`` are jobs that may still be deleted."""
        match fault.kind:
            case FaultKind.OPERATOR_KILLED:
                await_condition(lambda: bool(self.operator.pods()), "an operator to kill", BACK_SECONDS)
                self.operator.kill()
                return "its pod"
            case FaultKind.API_SERVER_KILLED:
                return self._kill_api_server()
            case FaultKind.POD_DELETED:
                return self._delete_pod(fault)
            case FaultKind.NODE_REBOOTED:
                return self._reboot(fault.seconds)
            case FaultKind.STORE_REFUSES:
                return self._let_misbehave(Behaviour.REFUSES, fault.seconds)
            case FaultKind.STORE_IS_SLOW:
                return self._let_misbehave(Behaviour.SLOW, fault.seconds)
            case FaultKind.STORE_CUTS:
                return self._let_misbehave(Behaviour.CUTS, fault.seconds)
            case FaultKind.JOB_WITHDRAWN:
                return self._withdraw(withdrawn)

    def _kill_api_server(self) -> str:
        [before] = self._api_servers()
        self._node.kill([before])
        await_condition(lambda: self._api_servers() not in ([], [before]), "another API server", BACK_SECONDS)
        await_condition(self._api_answers, "an answer of the API server", BACK_SECONDS)
        return before[:12]

    def _api_servers(self) -> list[str]:
        return self._node.containers(CONTAINER, "kube-apiserver")

    def _api_answers(self) -> bool:
        try:
            self.cluster.kubectl("get", "--raw=/readyz", "--request-timeout=5s", timeout=15)
        except CommandError:
            return False
        return True

    def _delete_pod(self, fault: Fault) -> str:
        pods = self.jobs.core.list_namespaced_pod(self.jobs.namespace, field_selector="status.phase=Running").items
        if not pods:
            return "nothing: no pod runs"
        name = sorted(pod.metadata.name for pod in pods)[int(fault.aim * len(pods))]
        try:
            if fault.is_gentle:
                self.jobs.core.delete_namespaced_pod(name, self.jobs.namespace)
            else:
                self.jobs.core.delete_namespaced_pod(name, self.jobs.namespace, grace_period_seconds=0)
        except client.ApiException as error:
            if error.status != 404:
                raise
            return f"nothing: {name} has just gone"
        return f"{name}, {'gently' if fault.is_gentle else 'at once'}"

    def _reboot(self, seconds: float) -> str:
        """Let the jobs' pods die as a node's do: all at once, unseen by a kubelet that comes back later."""
        self._node.run("systemctl", "stop", "kubelet")
        try:
            found = self._node.kill_pods("namespace", self.jobs.namespace)
            time.sleep(seconds)  # the fault itself
        finally:
            self._node.run("systemctl", "start", "kubelet")
        return f"{found} containers"

    def _let_misbehave(self, how: Behaviour, seconds: float) -> str:
        """Harm all requests for ``seconds``, and longer until there was one."""

        def harmed() -> int:
            return sum(self.store.harm().values()) - before

        before = sum(self.store.harm().values())
        over = time.monotonic() + seconds
        self.store.behave(how)
        try:
            while (now := time.monotonic()) < over or (not harmed() and now < over + QUIET_SECONDS):
                time.sleep(1)  # the fault itself
        finally:
            self.store.behave(Behaviour.WELL)
        return f"{harmed()} requests"

    def _withdraw(self, names: Sequence[str]) -> str:
        if not names:
            return "nothing: none is left"
        self.jobs.delete(names[0])
        return names[0]
