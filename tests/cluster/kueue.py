"""The real Kueue, installed by its own chart. It must go again: with dead webhooks no job can be created."""

import json
import tempfile
from pathlib import Path

from .binary import source_folder
from .cluster import Cluster
from .program_image import provide_program

MODULE = "sigs.k8s.io/kueue"
VALUES = Path(__file__).with_name("kueue.yaml")
RELEASE = "kueue"
NAMESPACE = "kueue-system"
DEPLOYMENT = "deployment/kueue-controller-manager"
READY_SECONDS = 120


def install_kueue(cluster: Cluster) -> None:
    """Install Kueue; return when its webhooks answer."""
    image = provide_program(cluster.docker, "kueue-manager")
    repository, tag = image.rsplit(":", 1)
    chart = source_folder(MODULE) / "charts" / "kueue"
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as values:
        values.write(VALUES.read_text(encoding="utf-8").format(repository=repository, tag=tag))
        values.flush()
        cluster.helm(
            *("upgrade", "--install", RELEASE, str(chart), f"--namespace={NAMESPACE}", "--create-namespace"),
            *("--values", values.name),
        )
    # The chart names the program as Kueue's own image has it.
    container = {"name": "manager", "command": ["kueue-manager"]}
    patch = {"spec": {"replicas": 1, "template": {"spec": {"containers": [container]}}}}
    cluster.kubectl("patch", DEPLOYMENT, f"--namespace={NAMESPACE}", "--patch", json.dumps(patch))
    cluster.wait(DEPLOYMENT, "condition=Available", NAMESPACE, timeout=READY_SECONDS)


def uninstall_kueue(cluster: Cluster) -> None:
    """Remove Kueue with all that it made; workloads that it holds are let go first."""
    for kind in ("workloads", "clusterqueues", "localqueues", "resourceflavors"):
        cluster.kubectl("delete", f"{kind}.kueue.x-k8s.io", "--all", "--all-namespaces", "--wait=true", "--timeout=60s")
    cluster.helm("uninstall", RELEASE, f"--namespace={NAMESPACE}", "--wait")
    cluster.kubectl("delete", "namespace", NAMESPACE, "--wait=false")
