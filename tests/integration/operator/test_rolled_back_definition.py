"""What a later release stored, in a real API server that has been given today's definition again."""

import copy
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest

from finetune_api.report import Stage
from finetune_api.status import ConditionStatus, ConditionType, Reason
from finetune_api.stored_status import read_status
from finetune_operator import attempt as attempts
from finetune_operator.condition import Statement, stated
from finetune_operator.status_patch import status_patch

from .api_server import ApiServer
from .conftest import CRD_FILE
from .definition import define, takes
from .operator_process import await_until
from .test_upgraded_definition import STORED, read, stored_job
from .workload import MERGE

NAMESPACE = "rolled-back"
JOBS = f"/apis/finetune.dev/v1alpha1/namespaces/{NAMESPACE}/finetunejobs"
TIME = "2026-01-02T03:04:05Z"
STATUS = {
    "phase": "Training",
    "conditions": [
        {"type": "Blessed", "status": "True", "reason": "Praised", "lastTransitionTime": TIME},
        {"type": "Accepted", "status": "True", "reason": "Praised", "lastTransitionTime": TIME},
    ],
    "stages": [{"stage": "distill", "attempt": 1}, {"stage": "check", "attempt": 1}],
    "attempts": [
        {"stage": "check", "number": 1, "child": "a", "endTime": TIME, "reason": "Praised", "watts": 700},
        {"stage": "train", "number": 1, "child": "b", "startTime": TIME},
    ],
}


def later_definition() -> dict[str, Any]:
    """Return how a release defines the job that knows more: reasons, a condition, a stage, a phase, a field."""
    spec = copy.deepcopy(read(CRD_FILE)["spec"])
    status = spec["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["status"]["properties"]
    condition, stage, attempt = (status[name]["items"]["properties"] for name in ("conditions", "stages", "attempts"))
    for field, value in (
        (condition["type"], "Blessed"),
        (condition["reason"], "Praised"),
        (attempt["reason"], "Praised"),
        (stage["stage"], "distill"),
        (status["phase"], "Dreaming"),
    ):
        field["enum"].append(value)
    attempt["watts"] = {"type": "integer"}
    return spec


@pytest.fixture
def job_path(api_server: ApiServer) -> Iterator[str]:
    """Path of a job that a later release has stored."""
    job = stored_job(STORED / "v1alpha1" / "new.yaml")
    path = f"{JOBS}/{job['metadata']['name']}"

    def may_dream() -> bool | None:
        return takes(api_server, "PATCH", f"{path}/status", {"status": {"phase": "Dreaming"}}, MERGE)

    api_server.request("POST", "/api/v1/namespaces", {"metadata": {"name": NAMESPACE}})
    try:
        define(api_server, later_definition())
        api_server.request("POST", JOBS, job)
        await_until(may_dream, "the later definition rules")
        api_server.request("PATCH", f"{path}/status?fieldValidation=Strict", {"status": STATUS}, MERGE)
    finally:
        define(api_server, read(CRD_FILE)["spec"])
    await_until(lambda: may_dream() is False, "today's definition rules")
    yield path
    api_server.request("DELETE", path)


def test_what_has_happened_is_recorded_beside_what_only_a_later_release_knows(
    api_server: ApiServer, job_path: str
) -> None:
    stored, now = api_server.request("GET", job_path)["status"], datetime.now(UTC)
    old = read_status(stored)
    assert [one.reason for one in old.attempts] == [Reason.UNKNOWN, None]
    ended = old.attempts[1].model_copy(update={"end_time": now, "reason": Reason.PREEMPTED})
    told = Statement(ConditionType.TRAINED, ConditionStatus.UNKNOWN, Reason.RETRYING)
    new = stated(attempts.replaced(old, ended), [told], now, 1)
    patch = {"status": status_patch(stored, old, new)}
    written = api_server.request("PATCH", f"{job_path}/status", patch, MERGE)["status"]
    assert written["stages"] == STATUS["stages"]
    assert [(one["type"], one["reason"]) for one in written["conditions"]] == [
        ("Accepted", "Praised"),
        ("Trained", "Retrying"),
        ("Blessed", "Praised"),
    ]
    assert [one["reason"] for one in written["attempts"]] == ["Unknown", "Preempted"]
    assert read_status(written).attempts[1].stage is Stage.TRAIN
