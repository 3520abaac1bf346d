"""What was stored under the first definition, in a real API server that has been given today's since."""

import copy
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from .api_server import ApiServer
from .conftest import CRD_FILE
from .definition import define, takes
from .operator_process import await_until
from .workload import MERGE

STORED = Path(__file__).resolve().parents[2] / "unit" / "stored"
FIRST_DEFINITION = STORED / "v1alpha1.definition.yaml"
"""As it was when the objects below ``v1alpha1`` were stored. Never edited."""
FILES = sorted((STORED / "v1alpha1").glob("*.yaml"))
NAMESPACE = "upgraded"
JOBS = f"/apis/finetune.dev/v1alpha1/namespaces/{NAMESPACE}/finetunejobs"


def read(file: Path) -> Any:
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def stored_job(file: Path) -> dict[str, Any]:
    job = read(file)["job"]
    return {**job, "metadata": {"name": file.stem, "labels": job["metadata"].get("labels", {})}}


def outdated(name: str, **spec: Any) -> dict[str, Any]:
    """Return a job of the first version with a spec that is refused today."""
    job = copy.deepcopy(stored_job(STORED / "v1alpha1" / "new.yaml"))
    return {**job, "metadata": {"name": name}, "spec": job["spec"] | spec}


OUTDATED = {
    # Of the spec as a whole.
    "a CEL rule": outdated("rule", method={"type": "qlora"}, output={"uri": "pvc://models/tuned", "merge": True}),
    # Of one field.
    "a pattern": outdated("pattern", output={"uri": "pvc://../tuned"}),
}
ALL = {file.stem: stored_job(file) for file in FILES} | OUTDATED


def takes_outdated(server: ApiServer) -> set[bool | None]:
    another = {"metadata": {"name": "another"}}
    return {takes(server, "POST", JOBS, job | another) for job in OUTDATED.values()}


@pytest.fixture(scope="module")
def upgraded(api_server: ApiServer) -> Iterator[ApiServer]:
    """The server after the upgrade, with what was stored before it."""
    api_server.request("POST", "/api/v1/namespaces", {"metadata": {"name": NAMESPACE}})
    try:
        define(api_server, read(FIRST_DEFINITION)["spec"])
        await_until(lambda: takes_outdated(api_server) == {True}, "the first definition rules")
        for job in ALL.values():
            api_server.request("POST", f"{JOBS}?fieldValidation=Strict", job)
            if "status" in job:
                path = f"{JOBS}/{job['metadata']['name']}/status?fieldValidation=Strict"
                api_server.request("PATCH", path, {"status": job["status"]}, MERGE)
    finally:
        define(api_server, read(CRD_FILE)["spec"])
    await_until(lambda: takes_outdated(api_server) == {False}, "today's definition rules")
    yield api_server
    # An operator of another test may look after the whole server.
    api_server.request("DELETE", JOBS)


def test_what_the_first_version_stored_is_there():
    assert len(FILES) >= 9


@pytest.mark.parametrize("job", ALL.values(), ids=ALL)
def test_stored_job_is_served_as_it_was_and_writing_its_status_changes_nothing_else(
    upgraded: ApiServer, job: dict[str, Any]
) -> None:
    path = f"{JOBS}/{job['metadata']['name']}"
    before = upgraded.request("GET", path)
    assert (before["spec"], before.get("status")) == (job["spec"], job.get("status"))
    after = upgraded.request("PATCH", f"{path}/status", {"status": {"observedGeneration": 7}}, MERGE)
    assert after["status"] == {**job.get("status", {}), "observedGeneration": 7}
    assert (after["spec"], after["metadata"]["generation"]) == (job["spec"], before["metadata"]["generation"])


def test_stored_job_that_would_be_refused_today_can_be_suspended_unless_a_rule_reads_the_whole_spec(
    upgraded: ApiServer,
) -> None:
    suspend = {"spec": {"runPolicy": {"suspend": True}}}
    assert upgraded.request("PATCH", f"{JOBS}/pattern?dryRun=All", suspend, MERGE)["spec"]["runPolicy"]["suspend"]
    with pytest.raises(urllib.error.HTTPError) as refusal:
        upgraded.request("PATCH", f"{JOBS}/rule?dryRun=All", suspend, MERGE)
    assert refusal.value.code == 422
    upgraded.request("DELETE", f"{JOBS}/rule?dryRun=All")
