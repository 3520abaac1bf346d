"""What the status says of a stage is what its report says."""

import pytest

from finetune_api.report import (
    Artifact,
    ArtifactKind,
    BenchmarkReport,
    DataReport,
    EvaluationReport,
    ExitCode,
    GateResult,
    LossPoint,
    MetricComparison,
    Overlap,
    PersonalData,
    Rehearsal,
    Report,
    SplitRows,
    Stage,
    TaskData,
    TrainingReport,
)
from finetune_api.status import PlanStatus, RehearsalStatus
from finetune_trainer.stage_summary import check_result, evaluate_result, failure, train_result

DATA = DataReport(
    rows=SplitRows(train=80, validation=10, test=10), tokens=900, truncated_percent=2.5, hash="a" * 64, format="raw"
)
TRAINING = TrainingReport(
    method="lora",
    parameters=100,
    trainable_parameters=10,
    steps=8,
    epochs=1.0,
    final_loss=float("nan"),
    curve=(LossPoint(step=4, validation_loss=0.5), LossPoint(step=8, loss=0.25)),
    resumed_from_step=4,
)
ACCURACY = MetricComparison(
    task="sentiment", metric="accuracy", base=0.5, tuned=0.75, delta=0.25, low=0.1, high=0.4, rows=100
)


def make_report(metrics: tuple[MetricComparison, ...] = (ACCURACY,)) -> Report:
    return Report(
        name="tiny",
        namespace="team",
        spec_hash="b" * 64,
        base_model="hf://acme/tiny",
        base_revision="c" * 40,
        data=DATA,
        training=TRAINING,
        evaluation=EvaluationReport(metrics=metrics),
        artifacts=(Artifact(kind=ArtifactKind.ADAPTER, uri="s3://b/model", sha256="d" * 64, bytes=5),),
        published=True,
        seed=1,
    )


def test_check_tells_the_rows_the_plan_and_the_models_revision():
    plan = PlanStatus(parameters=100, micro_batch_size=8)
    result = check_result(DATA, plan, "c" * 40)
    assert result.data is not None and result.plan == plan
    assert (result.data.rows.train, result.data.tokens, result.data.truncated_percent) == (80, 900, "2.5")
    assert (result.model_revision, result.data.hash) == ("c" * 40, "a" * 64)


def test_the_status_holds_what_the_check_found_in_the_rows_and_stays_small():
    sizes = SplitRows(train=80, validation=10, test=10)
    labels = {f"{'x' * 80} {number}": number for number in range(10)}
    report = DATA.model_copy(
        update={
            "exact_duplicates": 4,
            "longest_tokens": 90,
            "max_length": 64,
            "personal_data": PersonalData(emails=2, keys=1),
            "overlaps": (
                Overlap(source="clean", questions=5, overlapping=0),
                Overlap(source="shared", questions=5, overlapping=4),
                Overlap(source="told", questions=5, overlapping=1, given_away=1),
            ),
            "tasks": (TaskData(task="t", rows=sizes, labels=labels, languages={"en": 0.9, "de": 0.1}),) * 20,
            "layout": "padded: " + "y" * 300,
        }
    )
    data = check_result(report, None, "c" * 40).data
    assert data is not None and data.personal_data is not None
    assert (data.exact_duplicates, data.longest_tokens, data.max_length) == (4, 90, 64)
    assert (data.personal_data.emails, data.personal_data.phones, data.personal_data.keys) == (2, 0, 1)
    assert [(overlap.source, overlap.given_away) for overlap in data.overlaps] == [("told", 1), ("shared", 0)]
    assert (len(data.tasks), data.tasks[0].name, data.tasks[0].rows, data.tasks[0].language) == (16, "t", 80, "en")
    assert [label.rows for label in data.tasks[0].labels] == [9, 8, 7, 6, 5, 4, 3, 2]
    assert {len(label.label) for label in data.tasks[0].labels} == {64}
    assert data.layout.startswith("padded: y") and len(data.layout) == 256


@pytest.mark.parametrize(
    "rehearsal, said",
    [
        (None, None),
        (Rehearsal(steps=2, seconds=61.6), RehearsalStatus(seconds=62)),
        (Rehearsal(why_not="n" * 300), RehearsalStatus(why_not="n" * 255 + "…")),
    ],
)
def test_the_status_tells_how_the_rehearsal_went(rehearsal, said):
    data = check_result(DATA.model_copy(update={"rehearsal": rehearsal}), None, "c" * 40).data
    assert data is not None and data.rehearsal == said


def test_training_tells_its_last_figures_also_those_that_are_no_numbers():
    result = train_result(TRAINING)
    values = {metric.name: metric.value for metric in result.latest_metrics}
    assert values["loss"] == "nan"
    assert (values["steps"], values["validation_loss"]) == ("8", "0.5")
    assert result.resumed_from_step == 4
    assert result.message == ""


def test_training_tells_what_a_tracker_missed():
    result = train_result(TRAINING.model_copy(update={"warnings": ("the tracker missed 3 reports", "é" * 2000)}))
    assert result.message.startswith("the tracker missed 3 reports; é")
    assert result.exit_code is ExitCode.OK


def test_evaluation_tells_figures_verdict_and_what_was_published():
    result = evaluate_result(make_report(), "s3://b/report", "e" * 64, 7)
    assert result.evaluation is not None
    (task,) = result.evaluation.tasks
    assert (task.name, task.metric, task.base, task.tuned, task.low) == ("sentiment", "accuracy", "0.5", "0.75", "0.1")
    assert [(one.kind, one.uri) for one in result.artifacts] == [
        ("adapter", "s3://b/model"),
        ("report", "s3://b/report"),
    ]
    assert result.report_sha256 == "e" * 64
    assert result.summary is not None
    assert (result.summary.metric, result.summary.delta) == ("sentiment accuracy 0.750", "+0.250")
    assert result.summary.message.startswith("The tuned model is better")


def test_more_tasks_than_a_status_holds_are_left_to_the_report():
    many = tuple(ACCURACY.model_copy(update={"task": f"task-{number}"}) for number in range(70))
    result = evaluate_result(make_report(many), "s3://b/report", "e" * 64, 7)
    assert result.evaluation is not None
    assert len(result.evaluation.tasks) == 64


def test_a_long_message_is_cut():
    result = failure(Stage.TRAIN, ExitCode.BAD_DATA, "x" * 5000)
    assert len(result.message) == 1024
    assert result.message.endswith("…")


def test_a_model_that_a_gate_keeps_back_is_told_with_the_gate_first():
    gates = tuple(
        GateResult(metric=f"sentiment.{name}", passed=passed, why="y" * 300)
        for name, passed in (("accuracy", True), ("macro_f1", False))
    )
    report = make_report().model_copy(
        update={
            "evaluation": EvaluationReport(metrics=(ACCURACY,), gates=gates),
            "published": False,
            "why_not_published": "z" * 300,
        }
    )
    result = evaluate_result(report, "s3://b/report", "e" * 64, 7)
    assert (result.published, len(result.why_not_published)) == (False, 256)
    assert result.evaluation is not None
    assert [(gate.metric, gate.passed) for gate in result.evaluation.gates] == [
        ("sentiment.macro_f1", False),
        ("sentiment.accuracy", True),
    ]


def test_the_first_figure_of_every_benchmark_comes_before_the_others_of_any():
    def comparison(task: str, metric: str) -> MetricComparison:
        return MetricComparison(task=task, metric=metric, base=0.5, tuned=0.75, rows=40)

    suites = (
        BenchmarkReport(suite="mmlu", name="mmlu", metrics=tuple(comparison("mmlu", f"figure{n}") for n in range(20))),
        BenchmarkReport(suite="file:///pick.yaml", name="pick", metrics=(comparison("pick", "acc"),)),
    )
    report = make_report().model_copy(update={"evaluation": EvaluationReport(metrics=(ACCURACY,), benchmarks=suites)})
    found = evaluate_result(report, "file:///report", "e" * 64, 10).evaluation
    assert found is not None
    assert [(one.name, one.metric, one.tuned) for one in found.benchmarks][:3] == [
        ("mmlu", "figure0", "0.75"),
        ("pick", "acc", "0.75"),
        ("mmlu", "figure1", "0.75"),
    ]
    assert len(found.benchmarks) == 16
