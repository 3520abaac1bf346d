"""What is written of a status is the difference, and never progress."""

from typing import Any

import pytest

from finetune_api.status import FineTuneJobStatus
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
    assert status_patch(make_status(**old), make_status(**new)) == patch
