"""The same number of TrainJobs of Kubeflow Trainer, until each has its JobSet.

What stands between its program and a plain machine is played here: the Secret with its certificate is put where its pod
would mount it. Its admission webhook is left out, which is to its advantage.
"""

import base64
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from tests.cluster.binary import KUBEFLOW, source_folder
from tests.integration.operator.operator_process import await_until

from .cluster import ControlPlane, Cpu, Program, cpu, usage
from .load import Client, latencies, percentile

NAMESPACE = "kubeflow-system"
SECRET = "kubeflow-trainer-webhook-cert"
WEBHOOKS = "validator.trainer.kubeflow.org"
CERTIFICATES = Path("/tmp/k8s-webhook-server/serving-certs")
RUNTIME = "torch-distributed"
TEAM = "team"
DEFINITIONS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"


@dataclass(frozen=True, slots=True)
class Start:
    """How TrainJobs began."""

    program: str
    jobs: int
    apply_p50: float
    """Seconds from the request that creates a TrainJob to its JobSet."""
    apply_p99: float
    apply_cpu: Cpu
    memory_mb: float


async def begin(program: str, jobs: int, folder: Path) -> Start:
    """Let ``jobs`` TrainJobs begin, with ``program`` for their controller."""
    plane = ControlPlane(folder)
    login = {**os.environ, "KUBECONFIG": str(plane.server.folder / "admin.kubeconfig")}
    controller = Program(
        program, ("--webhook-server-port=0", "--health-probe-bind-address=0"), folder, environment=login
    )
    try:
        plane.start()
        assert plane.server.kubeconfig.is_file()
        _install(plane)
        controller.start()
        _mount_certificate(plane)
        await_until(lambda: _has_begun(folder / f"{program}.log"), f"{program} has begun; see {folder}", 120)
        path = "/apis/trainer.kubeflow.org/v1alpha1/namespaces/{}/trainjobs"
        children = f"/apis/jobset.x-k8s.io/v1alpha2/namespaces/{TEAM}/jobsets"
        manifests = [_train_job(f"job-{number}") for number in range(jobs)]
        async with Client(plane.server) as client:
            before = cpu(controller.pid, plane)
            waited = await latencies(client, manifests, path, children, _owner)
            apply_cpu = cpu(controller.pid, plane).since(before, jobs)
        memory = usage(controller.pid).most_memory_bytes
    finally:
        controller.kill()
        plane.stop()
    return Start(
        program=program,
        jobs=jobs,
        apply_p50=percentile(waited, 0.5),
        apply_p99=percentile(waited, 0.99),
        apply_cpu=apply_cpu,
        memory_mb=memory / 1e6,
    )


def _install(plane: ControlPlane) -> None:
    sources = source_folder(KUBEFLOW)
    definitions = sorted((sources / "manifests/base/crds").glob("trainer.kubeflow.org_*.yaml"))
    jobset = source_folder("sigs.k8s.io/jobset") / "config/components/crd/bases/jobset.x-k8s.io_jobsets.yaml"
    for file in (*definitions, jobset):
        plane.server.request("POST", DEFINITIONS, yaml.safe_load(file.read_text(encoding="utf-8")))
    for namespace in (NAMESPACE, TEAM):
        plane.server.request("POST", "/api/v1/namespaces", {"metadata": {"name": namespace}})
    plane.server.request("POST", f"/api/v1/namespaces/{NAMESPACE}/secrets", {"metadata": {"name": SECRET}})
    path = "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations"
    plane.server.request("POST", path, {"metadata": {"name": WEBHOOKS}, "webhooks": []})
    runtimes = "/apis/trainer.kubeflow.org/v1alpha1/clustertrainingruntimes"
    plane.server.await_path(runtimes)
    plane.server.await_path("/apis/jobset.x-k8s.io/v1alpha2/jobsets")
    runtime = (sources / "manifests/base/runtimes/torch_distributed.yaml").read_text(encoding="utf-8")
    plane.server.request("POST", runtimes, yaml.safe_load(runtime))


def _mount_certificate(plane: ControlPlane) -> None:
    """Do what the kubelet does when the Secret has been filled."""
    path = f"/api/v1/namespaces/{NAMESPACE}/secrets/{SECRET}"
    await_until(lambda: plane.server.request("GET", path).get("data"), "its certificate is made", 120)
    CERTIFICATES.mkdir(parents=True, exist_ok=True)
    for name, content in plane.server.request("GET", path)["data"].items():
        (CERTIFICATES / name).write_bytes(base64.b64decode(content))


def _has_begun(log: Path) -> bool:
    return log.is_file() and "Starting workers" in log.read_text(encoding="utf-8", errors="replace")


def _train_job(name: str) -> dict[str, Any]:
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": {"name": name, "namespace": TEAM},
        "spec": {"runtimeRef": {"name": RUNTIME}},
    }


def _owner(metadata: dict[str, Any]) -> str | None:
    name: str = metadata["name"]
    return name
