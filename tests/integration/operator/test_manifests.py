"""A job's children against a real API server: it takes every field of them, also where pods are restricted most."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import yaml

from finetune_api.job import spec_hash
from finetune_api.report import Stage
from finetune_api.status import ConditionType, Reason
from finetune_cli.serving import VLLM_IMAGE, serving_manifests
from finetune_operator.cluster import Cluster, RefusedError, load_connection
from finetune_operator.kuberay import KubeRay
from finetune_operator.manifest import spec_config_map, trust_config_map
from finetune_operator.observed import KubeRayState

from ...cluster.binary import source_folder
from ...cluster.kuberay import MODULE
from ...unit.operator.objects import CA, make_resolved, make_settings
from ...unit.test_cli_serving import jobs, published
from .api_server import ApiServer
from .conftest import StartOperator
from .test_operator import has_reason
from .workload import Workload

T = TypeVar("T")

GOLDEN = Path(__file__).resolve().parents[2] / "unit" / "operator" / "golden"
FILES = sorted(GOLDEN.glob("*.yaml"))
RAY_FILES = [file for file in FILES if file.stem == "workers-train"]
JOB_FILES = [file for file in FILES if file not in RAY_FILES]
DEFINITIONS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
STRICT = "fieldValidation=Strict&dryRun=All"


@pytest.fixture(scope="module")
def restricted(api_server: ApiServer) -> str:
    """The namespace of the golden files, with the restricted Pod Security Standard and what the files name."""
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    api_server.request("POST", "/api/v1/namespaces", {"metadata": {"name": "restricted", "labels": labels}})
    for name, value in (("high", 2), ("low", 1)):
        priority = {"metadata": {"name": name}, "value": value}
        api_server.request("POST", "/apis/scheduling.k8s.io/v1/priorityclasses", priority)
    return "restricted"


def placed(manifest: dict[str, Any], namespace: str) -> dict[str, Any]:
    return {**manifest, "metadata": {**manifest["metadata"], "namespace": namespace}}


@pytest.fixture(scope="module")
def kuberay_definition(api_server: ApiServer) -> Iterator[None]:
    """KubeRay's own definition of a RayJob."""
    file = source_folder(MODULE) / "config" / "crd" / "bases" / "ray.io_rayjobs.yaml"
    definition = yaml.load(file.read_text(encoding="utf-8"), yaml.CSafeLoader)
    api_server.request("POST", DEFINITIONS, definition)
    api_server.await_path("/apis/ray.io/v1/rayjobs")
    yield
    api_server.request("DELETE", f"{DEFINITIONS}/{definition['metadata']['name']}")


def templates(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the templates of all pods that come of ``manifest``."""
    spec = manifest["spec"]
    if manifest["kind"] == "Job":
        return [spec["template"]]
    cluster = spec["rayClusterSpec"]
    groups = (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])
    return [spec["submitterPodTemplate"], *(group["template"] for group in groups)]


def test_there_are_files_to_look_at():
    assert len(JOB_FILES) >= 6 and RAY_FILES


@pytest.mark.parametrize("file", JOB_FILES, ids=lambda file: file.stem)
def test_the_api_server_takes_every_field_of_a_job(api_server: ApiServer, restricted: str, file: Path):
    job = placed(yaml.safe_load(file.read_text(encoding="utf-8")), restricted)
    stored = api_server.request("POST", f"/apis/batch/v1/namespaces/{restricted}/jobs?{STRICT}", job)
    rules = stored["spec"]["podFailurePolicy"]["rules"]
    assert [rule["action"] for rule in rules] == ["FailJob", "FailJob"]


@pytest.mark.parametrize("file", RAY_FILES, ids=lambda file: file.stem)
def test_kuberays_definition_takes_every_field_of_a_ray_job(
    api_server: ApiServer, restricted: str, kuberay_definition: None, file: Path
):
    job = placed(yaml.safe_load(file.read_text(encoding="utf-8")), restricted)
    stored = api_server.request("POST", f"/apis/ray.io/v1/namespaces/{restricted}/rayjobs?{STRICT}", job)
    assert stored["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"] == 2


def ask(api_server: ApiServer, question: Callable[[Cluster], Awaitable[T]]) -> T:
    async def scenario() -> T:
        connection = await load_connection(api_server.kubeconfig)
        async with connection.connect() as cluster:
            return await question(cluster)

    return asyncio.run(scenario())


def await_state(api_server: ApiServer, state: KubeRayState) -> None:
    """Wait until the API server serves the definition that it was given last."""
    deadline = time.monotonic() + 30
    while (found := ask(api_server, lambda cluster: KubeRay(cluster, ()).state())) is not state:
        assert time.monotonic() < deadline, f"KubeRay is still {found}"
        time.sleep(0.1)


@contextlib.contextmanager
def older_kuberay(api_server: ApiServer, field: str) -> Iterator[None]:
    """Let the definition of a RayJob be without a field of its spec for a while."""
    await_state(api_server, KubeRayState.READY)
    place = f"{DEFINITIONS}/rayjobs.ray.io"
    pointer = "/spec/versions/0/schema/openAPIV3Schema/properties/spec/properties/" + field.replace(".", "/properties/")
    known = api_server.request("GET", place)
    for name in pointer[1:].split("/"):
        known = known[int(name) if name.isdigit() else name]

    def change(**operation: Any) -> None:
        api_server.request("PATCH", place, [{"path": pointer, **operation}], "application/json-patch+json")

    change(op="remove")
    try:
        await_state(api_server, KubeRayState.TOO_OLD)
        yield
    finally:
        change(op="add", value=known)
        await_state(api_server, KubeRayState.READY)


@pytest.mark.parametrize("field", ["rayClusterSpec.authOptions", "preRunningDeadlineSeconds"])
def test_an_older_kuberay_is_sent_nothing_that_it_would_store_without_a_field_until_it_is_upgraded(
    api_server: ApiServer, restricted: str, kuberay_definition: None, field: str
):
    with older_kuberay(api_server, field):
        job = placed(yaml.safe_load(RAY_FILES[0].read_text(encoding="utf-8")), restricted)
        with pytest.raises(RefusedError, match=f'unknown field "spec.{field}"'):
            ask(api_server, lambda cluster: cluster.create(job))
    assert api_server.request("GET", "/apis/ray.io/v1/rayjobs")["items"] == []


def test_beside_an_older_kuberay_jobs_of_one_worker_go_on(
    api_server: ApiServer, kuberay_definition: None, start_operator: StartOperator, workload: Workload
):
    unchecked: dict[str, Any] = {"spec__runPolicy__preflight": "skip"}
    with older_kuberay(api_server, "rayClusterSpec.authOptions"):
        start_operator(policy={"maxRunningJobs": 1})
        workload.apply("two-workers", spec__compute__workers=2, **unchecked)
        waits = has_reason(ConditionType.TRAINED, Reason.KUBERAY_MISSING)
        assert not workload.wait(waits, "word about KubeRay", "two-workers").attempts
        assert "1.6 or newer" in workload.message(ConditionType.TRAINED, "two-workers")
        workload.apply("one-worker", **unchecked)
        workload.wait_child(Stage.TRAIN, job="one-worker")
    assert api_server.request("GET", "/apis/ray.io/v1/rayjobs")["items"] == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_its_pods_are_let_in_where_pods_are_restricted_most(api_server: ApiServer, restricted: str, file: Path):
    for template in templates(yaml.safe_load(file.read_text(encoding="utf-8"))):
        metadata = {**template["metadata"], "name": "a-pod", "namespace": restricted}
        # What ServiceAccount admission, which this server goes without, fills in.
        spec = {"serviceAccountName": "default", **template["spec"]}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}
        stored = api_server.request("POST", f"/api/v1/namespaces/{restricted}/pods?{STRICT}", pod)
        assert stored["spec"]["automountServiceAccountToken"] is False


def test_the_api_server_takes_the_config_maps(api_server: ApiServer, restricted: str):
    job = make_resolved()
    for manifest in (spec_config_map(job, spec_hash(job.spec)), trust_config_map(job, CA, make_settings())):
        path = f"/api/v1/namespaces/{restricted}/configmaps?{STRICT}"
        assert api_server.request("POST", path, placed(manifest, restricted))["data"]


def test_the_api_server_takes_what_serves_adapters(api_server: ApiServer, restricted: str):
    in_a_bucket = published(model={"source": "hf://acme/tiny", "secretRef": {"name": "hub"}})
    on_a_volume = published("other", "pvc://tuned/other/model", model=in_a_bucket["spec"]["model"])
    deployment, service = serving_manifests(jobs(in_a_bucket, on_a_volume), VLLM_IMAGE)
    path = f"/apis/apps/v1/namespaces/{restricted}/deployments?{STRICT}"
    stored = api_server.request("POST", path, placed(deployment, restricted))
    assert stored["spec"]["template"]["spec"]["initContainers"]
    assert api_server.request("POST", f"/api/v1/namespaces/{restricted}/services?{STRICT}", placed(service, restricted))
    template = deployment["spec"]["template"]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {**template["metadata"], "name": "a-server"}}
    pod |= {"spec": {"serviceAccountName": "default", **template["spec"]}}
    assert api_server.request("POST", f"/api/v1/namespaces/{restricted}/pods?{STRICT}", placed(pod, restricted))
