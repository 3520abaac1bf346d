"""A kind cluster of one node: create it, remove it."""

import logging
from pathlib import Path

from .command import ClusterUnavailableError, CommandError, run
from .daemon import Docker
from .folder import BIN, ROOT, digest

logger = logging.getLogger(__name__)

CREATE_SECONDS = 900
NAME = f"finetune-{digest([str(ROOT)])[:6]}"
"""One cluster per checkout: two checkouts on one machine do not meet."""

NODE = f"{NAME}-control-plane"

# failCgroupV1: Kubernetes 1.34 is the last that runs there, and asks to be told that we know.
CONFIGURATION = """
kind: Cluster
apiVersion: kind.x-k8s.io/v1alpha4
networking:
  disableDefaultCNI: {has_network}
nodes:
  - role: control-plane
kubeadmConfigPatches:
  - |
    kind: KubeletConfiguration
    failCgroupV1: false
    failSwapOn: false
"""


def exists(docker: Docker) -> bool:
    """Return whether the checkout's cluster is there, running or not."""
    return (BIN / "kind").is_file() and NAME in _kind(docker, "get", "clusters").split()


def create(docker: Docker, node_image: str, kubeconfig: Path, *, has_network: bool) -> None:
    """Create the checkout's cluster anew and write how to reach it to ``kubeconfig``.

    A ``node_image`` that ``has_network`` gets none from kind.
    """
    delete(docker)
    kubeconfig.parent.mkdir(parents=True, exist_ok=True)
    logger.info("creating the cluster %s", NAME)
    configuration = CONFIGURATION.format(has_network=str(has_network).lower())
    options = (f"--name={NAME}", f"--image={node_image}", f"--kubeconfig={kubeconfig}", "--config=-")
    try:
        _kind(docker, "create", "cluster", *options, stdin=configuration)
    except CommandError as error:
        raise ClusterUnavailableError(f"kind cannot create a cluster: {error}") from error


def delete(docker: Docker) -> None:
    """Remove the checkout's cluster with its volumes; nothing to do when there is none."""
    if exists(docker):
        _kind(docker, "delete", "cluster", "--name", NAME)


def _kind(docker: Docker, *arguments: str, stdin: str | None = None) -> str:
    return run([BIN / "kind", *arguments], timeout=CREATE_SECONDS, stdin=stdin, environment=docker.environment)
