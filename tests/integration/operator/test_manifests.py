"""A job's children against a real API server: it takes every field of them, also where pods are restricted most."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_api.job import spec_hash
from finetune_cli.serving import VLLM_IMAGE, serving_manifests
from finetune_operator.manifest import spec_config_map, trust_config_map

from ...cluster.binary import source_folder
from ...cluster.kuberay import MODULE
from ...unit.operator.objects import CA, make_resolved, make_settings
from ...unit.test_cli_serving import jobs, published
from .api_server import ApiServer

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
    definition = yaml.safe_load(file.read_text(encoding="utf-8"))
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
