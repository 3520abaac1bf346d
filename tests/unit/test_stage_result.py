"""The last words of a stage: whatever it has to say, the kubelet keeps all of it."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_api.report import ArtifactKind, ExitCode, GateResult, Stage
from finetune_api.stage_result import MOST_BYTES, StageResult, bounded
from finetune_api.status import (
    Checkpoint,
    DataStatus,
    EvaluationStatus,
    LabelStatus,
    MetricValue,
    OverlapStatus,
    PlanStatus,
    PublishedArtifact,
    RehearsalStatus,
    RowsStatus,
    Summary,
    TaskDataStatus,
    TaskResult,
)

SHA256 = "f" * 64


def task(number: int) -> TaskResult:
    return TaskResult(name=f"task-{number}", metric="accuracy", base="0.5", tuned="0.75", delta="0.25", low="0.1")


def full_result(message: str = "") -> StageResult:
    return StageResult(
        stage=Stage.EVALUATE,
        exit_code=ExitCode.OK,
        message=message,
        checkpoints=tuple(Checkpoint(step=step, uri="s3://b/" + "k" * 2000) for step in range(5, 0, -1)),
        latest_metrics=(MetricValue(name="loss", value="0.25"),),
        plan=PlanStatus(parameters=1, warnings=("w" * 512,) * 16),
        data=DataStatus(
            rows=RowsStatus(train=8, validation=1, test=1),
            overlaps=(OverlapStatus(source="s" * 256, questions=1, overlapping=1, given_away=0),) * 16,
            tasks=(TaskDataStatus(name="t", rows=8, labels=(LabelStatus(label="l" * 64, rows=1),) * 8),) * 16,
        ),
        evaluation=EvaluationStatus(
            tasks=tuple(task(number) for number in range(64)),
            benchmarks=tuple(task(number) for number in range(16)),
            gates=tuple(GateResult(metric=f"task-{n}.accuracy", passed=True, why="y" * 512) for n in range(32)),
        ),
        artifacts=(
            PublishedArtifact(kind=ArtifactKind.ADAPTER, uri="s3://bucket/model", sha256=SHA256, bytes=1),
            PublishedArtifact(kind=ArtifactKind.REPORT, uri="s3://bucket/report", sha256=SHA256, bytes=1),
        ),
        summary=Summary(metric="sentiment accuracy 0.950", delta="+0.075"),
        report_sha256=SHA256,
        published=True,
    )


def test_a_short_result_is_told_whole():
    result = StageResult(stage=Stage.TRAIN, exit_code=ExitCode.PREEMPTED, message="stopped", resumed_from_step=3)
    assert StageResult.model_validate_json(bounded(result)) == result


def test_a_long_result_keeps_what_matters_most():
    content = bounded(full_result("short"))
    assert len(content) <= MOST_BYTES
    kept = StageResult.model_validate_json(content)
    assert kept.message == "short"
    assert kept.artifacts == full_result().artifacts
    assert kept.summary == full_result().summary
    assert kept.evaluation is not None
    assert kept.evaluation.tasks[:4] == tuple(task(number) for number in range(4))
    assert len(kept.evaluation.gates) == 8
    assert kept.contract_version == json.loads(content)["contractVersion"]
    assert kept.published is True


def test_words_on_the_rows_give_way_before_warnings_do():
    rows = RowsStatus(train=8, validation=1, test=1)
    data = DataStatus(rows=rows, layout="語" * 256, rehearsal=RehearsalStatus(why_not="語" * 256))
    plan = PlanStatus(parameters=1, warnings=("w" * 512,) * 5)
    content = bounded(StageResult(stage=Stage.CHECK, exit_code=ExitCode.OK, plan=plan, data=data))
    assert len(content) <= MOST_BYTES
    kept = StageResult.model_validate_json(content)
    assert kept.plan == plan
    assert kept.data is not None and kept.data.rehearsal is not None
    assert kept.data.rehearsal.why_not == kept.data.layout == "語" * 32


def test_a_check_keeps_its_warnings_and_tells_of_as_many_tasks_as_there_is_room_for():
    result = StageResult(
        stage=Stage.CHECK,
        exit_code=ExitCode.OK,
        data=full_result().data,
        plan=PlanStatus(warnings=("look at this",)),
    )
    content = bounded(result.model_copy(update={"data": result.data.model_copy(update={"overlaps": ()})}))
    kept = StageResult.model_validate_json(content)
    assert kept.plan == result.plan
    assert kept.data is not None
    assert len(kept.data.tasks) == 4


@given(st.text(max_size=1024))
def test_any_message_fits_together_with_all_else(message: str):
    content = bounded(full_result(message))
    assert len(content) <= MOST_BYTES
    assert message.startswith(json.loads(content).get("message", ""))


@pytest.mark.parametrize("character", ["\0", "é", "\U0001f600", "\\"], ids=["control", "2 bytes", "4 bytes", "escaped"])
def test_a_message_of_large_characters_is_cut_and_not_dropped(character: str):
    content = bounded(StageResult(stage=Stage.CHECK, exit_code=ExitCode.BAD_DATA, message=character * 1024))
    assert len(content) <= MOST_BYTES
    assert len(json.loads(content)["message"]) > 400
