"""A job's children against a real API server: it takes every field of them, also where pods are restricted most."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_api.job import spec_hash
from finetune_operator.manifest import spec_config_map, trust_config_map

from ...unit.operator.objects import CA, make_resolved, make_settings
from .api_server import ApiServer

GOLDEN = Path(__file__).resolve().parents[2] / "unit" / "operator" / "golden"
FILES = sorted(GOLDEN.glob("*.yaml"))
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


def test_there_are_files_to_look_at():
    assert len(FILES) >= 6


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_api_server_takes_every_field_of_a_job(api_server: ApiServer, restricted: str, file: Path):
    job = placed(yaml.safe_load(file.read_text(encoding="utf-8")), restricted)
    stored = api_server.request("POST", f"/apis/batch/v1/namespaces/{restricted}/jobs?{STRICT}", job)
    rules = stored["spec"]["podFailurePolicy"]["rules"]
    assert [rule["action"] for rule in rules] == ["FailJob", "FailJob"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_its_pod_is_let_in_where_pods_are_restricted_most(api_server: ApiServer, restricted: str, file: Path):
    template = yaml.safe_load(file.read_text(encoding="utf-8"))["spec"]["template"]
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
