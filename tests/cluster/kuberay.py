"""The real KubeRay, inside the cluster: it finds the heads of its clusters by the cluster's own DNS."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .binary import source_folder
from .cluster import Cluster, await_condition
from .program_image import provide_program

MODULE = "github.com/ray-project/kuberay/ray-operator"
MANIFEST = Path(__file__).with_name("kuberay.yaml")
NAMESPACE = "kuberay-system"
DEPLOYMENT = "deployment/kuberay-operator"
READY_SECONDS = 90


@dataclass(frozen=True, slots=True)
class KubeRay:
    """An installed KubeRay."""

    cluster: Cluster

    @contextmanager
    def away(self) -> Iterator[None]:
        """Take its operator away for as long; what it made stays."""
        self._scale(0)
        try:
            await_condition(lambda: not self.cluster.list("pods", NAMESPACE), "the end of KubeRay", READY_SECONDS)
            yield
        finally:
            self.start()

    def start(self) -> None:
        """Bring its operator back; return when it works."""
        self._scale(1)
        self.cluster.wait(DEPLOYMENT, "condition=Available", NAMESPACE, timeout=READY_SECONDS)

    def _scale(self, replicas: int) -> None:
        self.cluster.kubectl("scale", DEPLOYMENT, f"--replicas={replicas}", f"--namespace={NAMESPACE}")


def install_kuberay(cluster: Cluster) -> KubeRay:
    """Return the cluster's KubeRay, installing it when it is not there."""
    image = provide_program(cluster.docker, "kuberay-operator")
    for file in (*_definitions(), _configuration() / "rbac" / "role.yaml"):
        cluster.apply(file)
    cluster.apply(MANIFEST.read_text(encoding="utf-8").format(image=image, namespace=NAMESPACE), NAMESPACE)
    kuberay = KubeRay(cluster)
    kuberay.start()
    return kuberay


def remove_definitions(cluster: Cluster) -> None:
    """Take away what makes the API server know KubeRay's objects, and all of them; nothing to do where it does not."""
    for file in _definitions():
        cluster.kubectl("delete", "--ignore-not-found", f"--filename={file}", timeout=READY_SECONDS)


def _configuration() -> Path:
    return source_folder(MODULE) / "config"


def _definitions() -> list[Path]:
    return sorted((_configuration() / "crd" / "bases").glob("*.yaml"))
