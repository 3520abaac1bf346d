"""`finetune compare`: several reports side by side, and a difference only where both answered the same rows."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune_api.report import (
    BenchmarkReport,
    DataReport,
    EvaluationReport,
    ExitCode,
    ForgettingReport,
    MetricComparison,
    Report,
    Retention,
    RetentionResult,
    TrainingReport,
)
from finetune_cli.__main__ import run_command
from finetune_trainer.statistics import adjusted_p_values

ROWS = 60
LABELS = ("negative", "positive")


def write_run(
    folder: Path,
    name: str,
    right: Sequence[int],
    *,
    first_row: int = 0,
    base_model: str = "hf://acme/tiny",
    base_revision: str | None = None,
    predictions: bool = True,
) -> Path:
    """Write a report of a model that answers the rows in ``right`` correctly; return its folder."""
    folder.mkdir()
    wanted = [LABELS[row % 2] for row in range(ROWS)]
    said = [label if row in right else LABELS[1 - row % 2] for row, label in enumerate(wanted)]
    accuracy, perplexity = len(right) / ROWS, math.exp(1 - len(right) / ROWS)
    metrics = (
        MetricComparison(
            task="sentiment", metric="accuracy", base=0.5, tuned=accuracy, delta=accuracy - 0.5, rows=ROWS
        ),
        MetricComparison(
            task="sentiment", metric="perplexity", base=9, tuned=perplexity, rows=ROWS, higher_is_better=False
        ),
    )
    report = Report(
        name=name,
        namespace="default",
        spec_hash="ab" * 32,
        base_model=base_model,
        base_revision=base_revision,
        data=DataReport(rows={"train": 1, "validation": 1, "test": ROWS}, hash="", format="raw"),
        training=TrainingReport(
            method="lora", parameters=1000, trainable_parameters=10, steps=3, epochs=1.0, seconds=83
        ),
        evaluation=EvaluationReport(metrics=metrics),
        published=name == "large",
        seed=17,
        resolved={"data": {"tasks": [{"name": "sentiment", "labels": list(LABELS)}]}},
    )
    (folder / "report.json").write_text(report.model_dump_json(by_alias=True))
    if predictions:
        rows = [
            {
                "task": "sentiment",
                "row": first_row + row,
                "reference": wanted[row],
                "tuned": None,
                "tuned_label": said[row],
                "tuned_logprob": -2.0 * (1 - len(right) / ROWS),
                "tuned_tokens": 2,
            }
            for row in range(ROWS)
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / "predictions.parquet")
    return folder


def add_general(folder: Path, *, tuned: float, change: float | None, sha256: str | None = None) -> None:
    """Write into a run's report what it made of a benchmark, and whether it kept its general ability."""
    report = Report.model_validate_json((folder / "report.json").read_bytes())
    assert report.evaluation is not None
    metrics = tuple(
        MetricComparison(task=task, metric="acc", base=0.5, tuned=tuned, delta=tuned - 0.5, rows=80)
        for task in ("quiz", "hard part")
    )
    kept = RetentionResult(source="general", verdict=Retention.PASSED, why="", rows=1601, change=change)
    evaluation = report.evaluation.model_copy(
        update={
            "benchmarks": (BenchmarkReport(suite="tasks/quiz.yaml", name="quiz", sha256=sha256, metrics=metrics),),
            "forgetting": ForgettingReport(verdict=Retention.PASSED, results=(kept,), tasks=()),
        }
    )
    changed = report.model_copy(update={"evaluation": evaluation})
    (folder / "report.json").write_text(changed.model_dump_json(by_alias=True))


def compared(capsys: pytest.CaptureFixture[str], *places: Path) -> list[dict[str, object]]:
    assert run_command(["compare", *map(str, places), "--output", "json"]) == ExitCode.OK
    figures: list[dict[str, object]] = json.loads(capsys.readouterr().out)["figures"]
    return figures


def test_runs_are_shown_side_by_side(tmp_path, capsys):
    small = write_run(tmp_path / "small", "small", range(30))
    large = write_run(tmp_path / "large", "large", range(54))
    assert run_command(["compare", str(small), str(large / "report.json")]) == ExitCode.OK
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[:3]] == [
        ["run", "job", "method", "base", "model", "trained", "training", "published", "report"],
        ["1", "small", "lora", "hf://acme/tiny", "1", "%", "1:23", "no", str(small / "report.json")],
        ["2", "large", "lora", "hf://acme/tiny", "1", "%", "1:23", "yes", str(large / "report.json")],
    ]
    assert [line.split()[:5] for line in lines[5:7]] == [
        ["sentiment", "accuracy", "1", "0.500", "+0.000"],
        ["sentiment", "accuracy", "2", "0.900", "+0.400"],
    ]
    assert lines[5].split()[5:] == ["-", "-", "-"], "the first run is what the others are held against"
    assert lines[6].split()[5] == "+0.400" and lines[6].endswith("  0.002")


def test_benchmarks_and_what_was_forgotten_stand_side_by_side(tmp_path, capsys):
    runs = [write_run(tmp_path / name, name, range(30)) for name in ("first", "other", "unasked")]
    add_general(runs[0], tuned=0.75, change=-0.004)
    add_general(runs[1], tuned=0.625, change=None)
    assert run_command(["compare", *map(str, runs)]) == ExitCode.OK
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line for line in lines if "acc" in line] == [
        ["quiz", "acc", "1", "0.750", "+0.250", "-", "-", "-"],
        ["quiz", "acc", "2", "0.625", "+0.125", "-", "-", "-"],
        ["quiz:", "hard", "part", "acc", "1", "0.750", "+0.250", "-", "-", "-"],
        ["quiz:", "hard", "part", "acc", "2", "0.625", "+0.125", "-", "-", "-"],
    ]
    assert [line for line in lines if line[:1] == ["general"]] == [
        ["general", "rows", "run", "forgetting", "over", "base", "rows"],
        ["general", "1", "passed", "-0.004", "1,601"],
        ["general", "2", "passed", "-", "1,601"],
    ]
    run_command(["compare", *map(str, runs), "--output", "json"])
    document = json.loads(capsys.readouterr().out)
    assert [(one["run"], one["verdict"], one["change"]) for one in document["forgetting"]] == [
        (0, "passed", -0.004),
        (1, "passed", None),
    ]
    assert {one["benchmark"] for one in document["figures"]} == {None, "quiz"}


def test_nothing_is_said_of_what_no_run_was_asked(tmp_path, capsys):
    runs = [write_run(tmp_path / name, name, range(30)) for name in ("first", "other")]
    run_command(["compare", *map(str, runs)])
    out = capsys.readouterr().out
    assert "forgetting" not in out and "benchmark" not in out


@pytest.mark.parametrize(
    ("sha256", "why"),
    [
        pytest.param("a" * 64, "answers to benchmarks are not kept", id="the same file"),
        pytest.param("b" * 64, "the benchmark quiz has not the same rows or task file", id="another file of its name"),
    ],
)
def test_a_benchmark_says_why_it_has_no_difference(tmp_path, capsys, sha256, why):
    runs = [write_run(tmp_path / name, name, range(30)) for name in ("first", "other")]
    for run, its_file in zip(runs, ("a" * 64, sha256), strict=True):
        add_general(run, tuned=0.75, change=0.0, sha256=its_file)
    found = {one["whyNot"] for one in compared(capsys, *runs) if (one["benchmark"], one["run"]) == ("quiz", 1)}
    assert found == {why}


def test_differences_are_paired_by_row_and_corrected_together(tmp_path, capsys):
    # Both are right on half of the rows: on the same half, then on the other one.
    first = write_run(tmp_path / "first", "first", range(30))
    same = write_run(tmp_path / "same", "same", range(30))
    other = write_run(tmp_path / "other", "other", range(30, 60))
    better = write_run(tmp_path / "better", "better", range(36))
    found = {
        figure["run"]: figure["againstFirst"]
        for figure in compared(capsys, first, same, other, better)
        if figure["metric"] == "accuracy"
    }
    assert found[0] is None
    assert (found[1]["low"], found[1]["high"], found[1]["pValue"]) == (0.0, 0.0, 1.0)
    assert found[2]["delta"] == 0.0 and found[2]["high"] - found[2]["low"] > 0.4
    assert found[3]["low"] > 0.0, "six rows gained, none lost"
    figures = [one["againstFirst"] for one in compared(capsys, first, same, other, better) if one["againstFirst"]]
    adjusted = [one["adjustedPValue"] for one in figures]
    assert adjusted == pytest.approx(adjusted_p_values([one["pValue"] for one in figures]))


def test_figures_from_predictions_are_those_of_the_reports(tmp_path, capsys):
    runs = write_run(tmp_path / "a", "a", range(20)), write_run(tmp_path / "b", "b", range(47))
    figures = {(figure["metric"], figure["run"]): figure for figure in compared(capsys, *runs)}
    for metric in ("accuracy", "perplexity"):
        expected = figures[metric, 1]["tuned"] - figures[metric, 0]["tuned"]
        assert figures[metric, 1]["againstFirst"]["delta"] == pytest.approx(expected), metric


@pytest.mark.parametrize(
    ("changes", "metric", "why"),
    [
        pytest.param({"first_row": 1}, "accuracy", "not the same test rows", id="other rows"),
        pytest.param({"predictions": False}, "accuracy", "no predictions.parquet beside the report", id="no rows"),
        pytest.param(
            {"base_model": "hf://acme/other"}, "perplexity", "count different tokens", id="perplexity of another base"
        ),
    ],
)
def test_what_cannot_be_paired_has_no_difference_and_says_why(tmp_path, capsys, changes, metric, why):
    first = write_run(tmp_path / "first", "first", range(30))
    other = write_run(tmp_path / "other", "other", range(40), **changes)
    (figure,) = (one for one in compared(capsys, first, other) if (one["metric"], one["run"]) == (metric, 1))
    assert figure["againstFirst"] is None and why in figure["whyNot"]
    run_command(["compare", str(first), str(other)])
    assert f"run 2 against run 1, where there is no difference: {figure['whyNot']}." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("one", "two", "same"),
    [
        pytest.param(("file:///a", "c" * 64), ("file:///b", "c" * 64), True, id="one revision under two paths"),
        pytest.param(("file:///a", "c" * 64), ("file:///a", "d" * 64), False, id="two revisions under one path"),
        pytest.param(("file:///a", None), ("file:///a", "d" * 64), True, id="a revision that is not known"),
    ],
)
def test_the_revision_tells_whether_two_bases_are_the_same(tmp_path, capsys, one, two, same):
    runs = [
        write_run(tmp_path / name, name, range(30), base_model=base, base_revision=revision)
        for name, (base, revision) in (("first", one), ("other", two))
    ]
    (figure,) = (f for f in compared(capsys, *runs) if (f["metric"], f["run"]) == ("perplexity", 1))
    assert (figure["againstFirst"] is not None, figure["whyNot"] == "") == (same, same)


def test_the_folder_of_a_job_holds_its_report(tmp_path, capsys):
    (tmp_path / "job").mkdir()
    write_run(tmp_path / "job" / "report", "inside", range(30))
    other = write_run(tmp_path / "other", "other", range(30))
    assert {figure["run"] for figure in compared(capsys, tmp_path / "job", other)} == {0, 1}


def test_bad_places_are_named_with_what_to_do(tmp_path, capsys):
    good = write_run(tmp_path / "good", "good", range(30))
    old = write_run(tmp_path / "old", "old", range(30)) / "report.json"
    old.write_text(json.dumps(json.loads(old.read_text()) | {"contractVersion": 99}))
    (tmp_path / "other.json").write_text('{"name": 3}')
    spoilt = write_run(tmp_path / "spoilt", "spoilt", range(30))
    (spoilt / "predictions.parquet").write_bytes(b"PAR1")
    bad = {
        tmp_path / "absent": (ExitCode.BAD_SPEC, "no report there; looked for"),
        tmp_path / "other.json": (ExitCode.BAD_DATA, "is no report of this version"),
        old: (ExitCode.BAD_DATA, "contract version 99"),
        spoilt: (ExitCode.BAD_DATA, "predictions.parquet cannot be read"),
    }
    for place, (code, said) in bad.items():
        assert run_command(["compare", str(good), str(place)]) == code
        error = capsys.readouterr().err
        assert said in error and str(place) in error
    assert run_command(["compare", str(good)]) == ExitCode.BAD_SPEC
    assert "two reports at least" in capsys.readouterr().err
