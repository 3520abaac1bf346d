"""The cluster that tests talk to: kubectl and helm with the right kubeconfig, and waiting with a deadline."""

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from . import kind
from .binary import TOOLS, ensure_binaries
from .command import ClusterUnavailableError, CommandError, run
from .daemon import Docker, ensure_docker, find_docker, stop_docker
from .folder import BIN, KUBECONFIG, STATE, alone
from .node_image import ensure_node_image, is_made_here
from .trace import traces

logger = logging.getLogger(__name__)

READY_SECONDS = 120
ANSWER_SECONDS = 30
COMMAND_SECONDS = 120

EXISTING = "FINETUNE_TEST_KUBECONFIG"
"""Names a kubeconfig: tests then use that cluster and make none. Its nodes must find our images by their names."""

Manifest = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Cluster:
    """A cluster that answers."""

    kubeconfig: Path
    docker: Docker | None
    """The daemon that runs the node; None for a cluster that is not ours."""

    @property
    def environment(self) -> dict[str, str]:
        """What kubectl, helm and clients of other languages need to reach this cluster and no other."""
        return {"KUBECONFIG": str(self.kubeconfig), "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}

    def kubectl(self, *arguments: str, input: str | bytes | None = None, timeout: float = COMMAND_SECONDS) -> str:
        """Run ``kubectl ARGUMENTS`` and return what it printed."""
        return run([BIN / "kubectl", *arguments], stdin=input, timeout=timeout, environment=self.environment)

    def helm(self, *arguments: str, timeout: float = COMMAND_SECONDS) -> str:
        """Run ``helm ARGUMENTS`` and return what it printed."""
        return run([BIN / "helm", *arguments], timeout=timeout, environment=self.environment)

    def get(self, kind: str, name: str, namespace: str = "default") -> dict[str, Any]:
        """Return one object as the API server has it."""
        return dict(json.loads(self.kubectl("get", kind, name, f"--namespace={namespace}", "--output=json")))

    def list(self, kind: str, namespace: str = "default", selector: str = "") -> list[dict[str, Any]]:
        """Return the objects of ``kind`` in ``namespace`` whose labels match ``selector``."""
        listed = self.kubectl("get", kind, f"--namespace={namespace}", f"--selector={selector}", "--output=json")
        return list(json.loads(listed)["items"])

    def apply(self, manifest: Manifest | str | Path, namespace: str = "default") -> None:
        """Apply one object, the text of several, or a file, server-side."""
        match manifest:
            case Path():
                text = manifest.read_text(encoding="utf-8")
            case str():
                text = manifest
            case _:
                text = yaml.safe_dump(dict(manifest))
        flags = ("--server-side", "--force-conflicts", "--field-manager=tests", f"--namespace={namespace}")
        self.kubectl("apply", *flags, "--filename=-", input=text)

    def wait(self, resource: str, condition: str, namespace: str = "default", timeout: float = 60) -> None:
        """Wait until ``resource`` (``pod/x``) meets ``condition``, as ``kubectl wait --for`` understands it.

        Raises:
            CommandError: It did not within ``timeout`` seconds; the message holds the object's description.
        """
        arguments = ("wait", resource, f"--for={condition}", f"--namespace={namespace}", f"--timeout={timeout:.0f}s")
        try:
            self.kubectl(*arguments, timeout=timeout + 30)
        except CommandError as error:
            described = self.kubectl("describe", resource, f"--namespace={namespace}")
            raise CommandError(f"{error}\n{described[-4000:]}") from error


def await_condition(condition: Callable[[], bool], what: str, seconds: float, pause_seconds: float = 0.25) -> None:
    """Return as soon as ``condition()`` holds.

    Raises:
        TimeoutError: It did not within ``seconds``; the message says ``what`` was awaited.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not happen within {seconds:.0f} s")
        time.sleep(pause_seconds)


def find_cluster() -> Cluster | None:
    """Return the cluster that is there: the one named by FINETUNE_TEST_KUBECONFIG, or the checkout's; None without."""
    if existing := os.environ.get(EXISTING):
        cluster = Cluster(Path(existing), None)
        if not _answers(cluster):
            raise ClusterUnavailableError(f"{EXISTING} names {existing}, and no cluster answers there")
        return cluster
    docker = find_docker()
    if docker is None or not KUBECONFIG.is_file() or not kind.exists(docker):
        return None
    cluster = Cluster(KUBECONFIG, docker)
    return cluster if _answers(cluster) else None


def start_cluster() -> Cluster:
    """Return a ready cluster: the one that is there, else a new one.

    Raises:
        ClusterUnavailableError: This machine lacks something; the message says what.
    """
    with alone():
        # First what takes seconds to find out: without Docker nothing is worth building.
        docker = None if os.environ.get(EXISTING) else ensure_docker()
        ensure_binaries(TOOLS)
        if found := find_cluster():
            return found
        assert docker is not None
        node_image = ensure_node_image(docker)
        kind.create(docker, node_image, KUBECONFIG, has_network=is_made_here(node_image))
        cluster = Cluster(KUBECONFIG, docker)
        cluster.wait(f"node/{kind.NODE}", "condition=Ready", timeout=READY_SECONDS)
        cluster.wait("deployment/coredns", "condition=Available", "kube-system", timeout=READY_SECONDS)
        return cluster


def stop_cluster(*, keep_images: bool = False) -> None:
    """Remove the checkout's cluster and what the harness started for it; nothing to do when there is none."""
    if os.environ.get(EXISTING):
        return
    with alone():
        if docker := find_docker():
            kind.delete(docker)
            stop_docker(docker, keep_images=keep_images)
        shutil.rmtree(STATE, ignore_errors=True)


@contextmanager
def lend_cluster() -> Iterator[Cluster]:
    """Yield the cluster that is there, else a new one, which goes again and leaves nothing behind.

    A Docker daemon that ran before, or in which others work, goes on, with its images and the network of kind.

    Raises:
        ClusterUnavailableError: This machine lacks something; the message says what.
    """
    if found := find_cluster():
        yield found
        return
    before = traces()
    try:
        yield start_cluster()
    finally:
        stop_cluster()
    if find_docker() is None:
        assert traces() <= before, f"the cluster has left {sorted(traces() - before)}"


def _answers(cluster: Cluster) -> bool:
    def is_ready() -> bool:
        try:
            cluster.kubectl("get", "--raw=/readyz", "--request-timeout=5s", timeout=15)
        except CommandError:
            return False
        return True

    try:
        # A busy machine makes an API server slow; nobody wants it replaced for that.
        await_condition(is_ready, "an answer of the API server", ANSWER_SECONDS)
    except TimeoutError:
        return False
    return True
