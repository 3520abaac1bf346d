"""The operator as a cluster has it: the chart's release, installed, killed, removed."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..cluster.cluster import Cluster, await_condition
from ..cluster.folder import ROOT
from .node import Node
from .pod import restricted_namespace

CHART = ROOT / "charts" / "finetune-operator"
NAME = "finetune-operator"
NAMESPACE = "finetune-system"
DEFINITION = "finetunejobs.finetune.dev"
SELECTOR = f"app.kubernetes.io/instance={NAME}"
READY_SECONDS = 120


@dataclass(frozen=True, slots=True)
class OperatorRelease:
    """A release of the chart with images that the nodes have."""

    cluster: Cluster
    image: str
    trainer_image: str

    @property
    def image_values(self) -> tuple[str, ...]:
        """What replaces images that would be pulled."""
        repository, _, tag = self.image.rpartition(":")
        return (
            f"--set=image.repository={repository}",
            f"--set-string=image.tag={tag}",
            "--set=image.pullPolicy=IfNotPresent",
            f"--set=settings.image.name={self.trainer_image}",
        )

    @property
    def is_installed(self) -> bool:
        """Whether it is there as a whole; remains of an interrupted command are none."""
        return NAME in self._listed("--deployed")

    def _listed(self, *states: str) -> Sequence[str]:
        return self.cluster.helm("list", "--short", *states, f"--namespace={NAMESPACE}").split()

    def install(self, *options: str, chart: Path = CHART) -> None:
        """Install or upgrade with ``options`` and no others, and return when the new pod is ready.

        Its namespace lets only restricted pods in.
        """
        self.cluster.apply(restricted_namespace(NAMESPACE))
        if NAME in self._listed("--all") and not self.is_installed:
            self.uninstall()
        place = ("upgrade", "--install", NAME, str(chart), "--reset-values", f"--namespace={NAMESPACE}")
        self.cluster.helm(*place, *self.image_values, *options)
        self.wait_ready()

    def restart(self) -> None:
        """Replace the pod, whose image may be another one of the same name by now."""
        self.cluster.kubectl("rollout", "restart", f"deployment/{NAME}", f"--namespace={NAMESPACE}")
        self.wait_ready()

    def wait_ready(self) -> None:
        """Wait until the newest pod is ready and the older ones are gone."""
        status = ("rollout", "status", f"deployment/{NAME}", f"--namespace={NAMESPACE}")
        self.cluster.kubectl(*status, f"--timeout={READY_SECONDS}s", timeout=READY_SECONDS + 10)
        await_condition(lambda: len(self.pods()) == 1, "the old operator's end", READY_SECONDS)

    def pods(self) -> Sequence[str]:
        """Return the names of its pods."""
        listed = ("get", "pods", f"--namespace={NAMESPACE}", f"--selector={SELECTOR}", "--output=name")
        return self.cluster.kubectl(*listed).split()

    def kill(self) -> None:
        """Kill the pod without any time to end well; the Deployment makes another one.

        On a node that is ours its processes die by SIGKILL: the kubelet gives a pod that is deleted two seconds.
        """
        if self.cluster.docker is not None:
            Node(self.cluster).kill_pods("namespace", NAMESPACE)
        now = ("--grace-period=0", "--force", "--wait=false")
        self.cluster.kubectl("delete", *self.pods(), f"--namespace={NAMESPACE}", *now)

    def uninstall(self) -> None:
        """Remove the release; nothing to do when there is none."""
        self.cluster.helm("uninstall", NAME, f"--namespace={NAMESPACE}", "--ignore-not-found", "--wait")
