"""The table of bad specs against a real API server: what it refuses, what it leaves to the operator.

Nothing is stored: every manifest is sent as a dry run, with the field validation that kubectl asks for.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes import client, config

from finetune_api.crd import GROUP, PLURAL, VERSION

from ..cluster.cluster import Cluster
from ..unit.bad_specs import BAD_SPECS, REACHABLE, Admission, BadSpec
from ..unit.builders import make_manifest
from .release import OperatorRelease

EXAMPLES = sorted(
    file
    for file in (Path(__file__).parents[2] / "examples").glob("*/*.yaml")
    if "kind: FineTuneJob" in file.read_text()
)


@pytest.fixture(scope="module")
def objects(cluster: Cluster, operator: OperatorRelease) -> client.CustomObjectsApi:
    """Any client; the operator's chart has brought the definition."""
    return client.CustomObjectsApi(config.new_client_from_config(str(cluster.kubeconfig)))


def send(objects: client.CustomObjectsApi, manifest: dict[str, Any]) -> dict[str, Any] | None:
    """Return the API server's refusal of ``manifest``; absent when it would have stored it."""
    body = json.loads(json.dumps(manifest))
    body.setdefault("metadata", {})["namespace"] = "default"
    try:
        objects.create_namespaced_custom_object(
            GROUP, VERSION, "default", PLURAL, body, dry_run="All", field_validation="Strict"
        )
    except client.ApiException as error:
        return dict(json.loads(error.body))
    return None


def test_table_is_long_enough() -> None:
    assert len(BAD_SPECS) >= 60


@pytest.mark.parametrize("row", BAD_SPECS, ids=lambda row: row.sentence)
def test_bad_spec_meets_the_api_server_as_the_table_says(objects: client.CustomObjectsApi, row: BadSpec) -> None:
    refusal = send(objects, make_manifest(REACHABLE | row.given))
    if row.admission is Admission.PASSES:
        assert refusal is None, refusal
        return
    assert refusal is not None, "the API server would have stored it"
    assert refusal["code"] in (400, 422), refusal
    # JSON has no NaN: the server does not come as far as the field.
    is_read = "json parse error" not in refusal["message"]
    if is_read and row.admission is not Admission.RULE and row.path.startswith("spec."):
        assert row.path.split("[")[0].rsplit(".", 1)[-1] in refusal["message"], refusal["message"]


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_example_is_admitted_unless_it_names_folders(objects: client.CustomObjectsApi, file: Path) -> None:
    text = file.read_text()
    if "file://" in text:
        refusal = send(objects, yaml.safe_load(text))
        assert refusal is not None
        assert all("file://" in cause["message"] for cause in refusal["details"]["causes"]), refusal["message"]
    moved = re.sub(r"file://[./]*", "s3://bucket/", text)
    refusal = send(objects, yaml.safe_load(moved))
    assert refusal is None, refusal
