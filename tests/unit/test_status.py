"""The status: bounded, and no measured value can make the API server refuse a patch."""

import json
import re
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from finetune_api.report import ExitCode
from finetune_api.status import Figure, FineTuneJobStatus, Phase, Reason, figure

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def condition(**changes: Any) -> dict[str, Any]:
    return {
        "type": "Trained",
        "status": "False",
        "reason": "OutOfMemory",
        "message": "no memory left on the GPU; trying again with microBatchSize 4",
        "lastTransitionTime": NOW,
    } | changes


def attempt(number: int) -> dict[str, Any]:
    return {"number": number, "child": f"reviews-train-a{number}"}


def test_an_empty_status_is_a_status() -> None:
    assert FineTuneJobStatus().model_dump(exclude_none=True, exclude_defaults=True) == {}


def test_a_status_survives_the_wire() -> None:
    status = FineTuneJobStatus.model_validate(
        {
            "observedGeneration": 3,
            "phase": "Training",
            "conditions": [condition()],
            "summary": {"metric": "sentiment accuracy 0.950", "delta": "+0.075"},
            "progress": {"stage": "train", "percent": 42, "step": 84, "totalSteps": 200, "lastUpdateTime": NOW},
            "latestMetrics": [{"name": "loss", "value": "nan"}],
            "plan": {
                "parameters": 134_515_008,
                "trainablePercent": "0.68",
                "gpus": 1,
                "warnings": ["small test split"],
            },
            "data": {"rows": {"train": 2400, "validation": 300, "test": 300}, "hash": "0" * 64},
            "attempts": [attempt(1) | {"exitCode": 71, "reason": "OutOfMemory", "change": "microBatchSize 8 -> 4"}],
            "checkpoints": [{"step": 50, "uri": "s3://bucket/models/step-50", "validationLoss": "0.412"}],
            "evaluation": {
                "tasks": [{"name": "sentiment", "metric": "accuracy", "base": "0.875", "tuned": "0.95", "low": "0.03"}],
                "gates": [{"metric": "sentiment.accuracy", "passed": True, "why": "0.03 is above 0.02"}],
            },
            "artifacts": [{"kind": "adapter", "uri": "s3://bucket/model", "sha256": "f" * 64, "bytes": 3_700_000}],
            "resolved": {"specHash": "a" * 64, "modelRevision": "main", "outputPath": "s3://bucket/models/ns/job-1"},
        }
    )
    wire = json.dumps(status.model_dump(mode="json", by_alias=True, exclude_none=True), allow_nan=False)
    assert FineTuneJobStatus.model_validate_json(wire) == status


@given(st.floats())
def test_every_number_has_a_figure(value: float) -> None:
    assert TypeAdapter(Figure).validate_python(figure(value)) == figure(value)


@pytest.mark.parametrize("text", ["", "0.4.1", "1e", "NaN", "0,5", "1 ", "--1", "+1"])
def test_other_text_is_no_figure(text: str) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(Figure).validate_python(text)


@pytest.mark.parametrize(
    ("field", "items"),
    [
        pytest.param("attempts", [attempt(number) for number in range(1, 12)], id="eleven attempts"),
        pytest.param("checkpoints", [{"step": step, "uri": "s3://b/k"} for step in range(6)], id="six checkpoints"),
        pytest.param("latestMetrics", [{"name": f"m{index}", "value": "1"} for index in range(33)], id="33 metrics"),
        pytest.param("conditions", [condition(message="x" * 1025)], id="a message of 1025 characters"),
        pytest.param("conditions", [condition(type="Happy")], id="an unknown condition"),
        pytest.param("conditions", [condition(reason="because")], id="an unknown reason"),
        pytest.param("conditions", [condition(status=True)], id="a boolean as a condition's status"),
        pytest.param("conditions", [condition(lastTransitionTime="2026-01-02T03:04:05")], id="a time without a zone"),
    ],
)
def test_what_does_not_fit_is_refused(field: str, items: list[dict[str, Any]]) -> None:
    with pytest.raises(ValidationError, match=field):
        FineTuneJobStatus.model_validate({field: items})


def test_two_phases_are_the_end() -> None:
    assert [phase for phase in Phase if phase.is_terminal] == [Phase.SUCCEEDED, Phase.FAILED]


def test_every_way_to_fail_has_a_reason() -> None:
    assert {code.name for code in ExitCode if code is not ExitCode.OK} <= Reason.__members__.keys()


def test_reasons_are_words_for_programs() -> None:
    assert [reason for reason in Reason if not re.fullmatch("[A-Z][A-Za-z]{1,40}", reason)] == []
