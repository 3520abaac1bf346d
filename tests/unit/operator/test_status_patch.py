"""What is written of a status is the difference, and never progress."""

from typing import Any

import pytest

from finetune_api.report import Stage
from finetune_api.status import ConditionStatus, FineTuneJobStatus, Reason, StageStatus
from finetune_api.stored_status import read_status
from finetune_operator.status_patch import status_patch

PROGRESS = {"stage": "train", "step": 7, "lastUpdateTime": "2026-01-02T03:04:05Z"}


def make_status(**fields: Any) -> FineTuneJobStatus:
    return FineTuneJobStatus.model_validate(fields, by_alias=True, by_name=False)


@pytest.mark.parametrize(
    ("old", "new", "patch"),
    [
        pytest.param({"phase": "Training"}, {"phase": "Training"}, {}, id="nothing new is no patch"),
        pytest.param({}, {"phase": "Checking"}, {"phase": "Checking"}, id="what is new is written"),
        pytest.param({"phase": "Checking"}, {}, {"phase": None}, id="what is gone is removed"),
        pytest.param(
            {"resolved": {"configMap": "a", "image": "b"}},
            {"resolved": {"image": "b"}},
            {"resolved": {"configMap": None}},
            id="within a block only what differs",
        ),
        pytest.param(
            {"checkpoints": [{"step": 1, "uri": "a"}]},
            {"checkpoints": [{"step": 2, "uri": "b"}]},
            {"checkpoints": [{"step": 2, "uri": "b"}]},
            id="a list as a whole",
        ),
        pytest.param(
            {"progress": PROGRESS, "latestMetrics": [{"name": "loss", "value": "1"}], "phase": "Training"},
            {"phase": "Evaluating"},
            {"phase": "Evaluating"},
            id="progress is left alone",
        ),
        pytest.param(
            {"summary": {"progress": "7 %", "eta": "3m", "message": "a"}},
            {"summary": {"progress": "1 %", "message": "b"}},
            {"summary": {"message": "b"}},
            id="also in the summary",
        ),
        pytest.param(
            {"summary": {"progress": "100 %", "eta": "3m", "message": "a"}, "progress": PROGRESS},
            {"summary": {"progress": "100 %", "message": "b"}, "phase": "Failed"},
            {"phase": "Failed", "progress": None, "summary": {"message": "b", "eta": None}},
            id="at the end it may be cleared",
        ),
        pytest.param(
            {"progress": PROGRESS},
            {"progress": PROGRESS | {"step": 6}, "phase": "Failed"},
            {"phase": "Failed"},
            id="but not set back",
        ),
    ],
)
def test_patch(old: dict[str, Any], new: dict[str, Any], patch: dict[str, Any]) -> None:
    assert status_patch(old, make_status(**old), make_status(**new)) == patch


TIME = "2026-01-02T03:04:05Z"


def test_what_only_a_later_release_knows_stays_in_lists_that_are_written() -> None:
    accepted = {"type": "Accepted", "status": "True", "reason": "Praised", "lastTransitionTime": TIME, "by": "x"}
    blessed = accepted | {"type": "Blessed"}
    trained = {
        "type": "Trained",
        "status": "Unknown",
        "reason": "Overheated",
        "message": "",
        "lastTransitionTime": TIME,
    }
    distilled, check = {"stage": "distill", "attempt": 1}, {"stage": "check", "attempt": 1, "watts": 700}
    stored = {"conditions": [blessed, accepted, trained], "stages": [check, distilled]}
    old = read_status(stored)
    ended = StageStatus(stage=Stage.TRAIN, attempt=2)
    now = old.conditions[1].model_copy(update={"status": ConditionStatus.TRUE, "reason": Reason.STAGE_SUCCEEDED})
    new = old.model_copy(update={"conditions": (old.conditions[0], now), "stages": (*old.stages, ended)})
    patch = status_patch(stored, old, new)
    assert patch["conditions"] == [accepted, trained | {"status": "True", "reason": "StageSucceeded"}, blessed]
    assert patch["stages"] == [check, {"stage": "train", "attempt": 2, "message": ""}, distilled]


def test_what_could_not_be_read_gives_way_to_what_is_said_now() -> None:
    stored = {"stages": [{"stage": "train"}]}
    new = FineTuneJobStatus(stages=(StageStatus(stage=Stage.TRAIN, attempt=1),))
    assert status_patch(stored, read_status(stored), new)["stages"] == [{"stage": "train", "attempt": 1, "message": ""}]
