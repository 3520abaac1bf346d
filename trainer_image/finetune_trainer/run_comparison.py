"""Put the tuned models of several finished jobs side by side, each against the first. Pure.

Where two jobs have answered the same test rows their models are compared row by row; a difference of two means over
different rows says little, so there is none then. Answers to benchmarks are not kept, so that theirs stand side by side
alone.
"""

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from finetune_api.model import ApiModel
from finetune_api.report import MetricComparison, Report, Retention
from finetune_trainer.comparison import measure
from finetune_trainer.figure import (
    Figure,
    Floats,
    bits_per_byte_figure,
    bleu_figure,
    calibration_figure,
    chrf_figure,
    macro_f1_figure,
    mean_of,
    perplexity_figure,
    token_f1,
)
from finetune_trainer.metrics import exact_match, rouge
from finetune_trainer.statistics import adjusted_p_values

Predictions = Sequence[Mapping[str, object]]
"""Rows of predictions.parquet."""


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """One job's report and what its models said to the test rows."""

    report: Report
    predictions: Predictions
    """Empty where they are not known."""


class PairedDifference(ApiModel):
    """What a run's tuned model has over the first run's, on the same test rows."""

    delta: float
    """This run's figure minus the first's."""
    low: float
    """Lower bound of the 95 % confidence interval of ``delta`` (paired bootstrap over rows)."""
    high: float
    p_value: float
    """Two-sided, of no difference, by the same bootstrap."""
    adjusted_p_value: float
    """``p_value`` corrected by Holm's method for all differences of the comparison."""


class RunFigure(ApiModel):
    """One figure of one run's tuned model."""

    benchmark: str | None = None
    """As gates call it; absent where the figure is one of the job's own tasks."""
    task: str
    metric: str
    run: int
    """Index of the run in the order given."""
    tuned: float
    over_base: float | None = None
    """tuned - base of that run."""
    higher_is_better: bool
    rows: int
    against_first: PairedDifference | None = None
    """Absent for the first run itself, and where ``why_not`` says why."""
    why_not: str = ""
    """Why there is no difference from the first run, for people."""


class RunRetention(ApiModel):
    """What one run's tuned model lost of its base's general ability, on the rows of one source."""

    run: int
    """Index of the run in the order given."""
    source: str
    verdict: Retention
    rows: int
    change: float | None = None
    """As of `finetune_api.report.RetentionResult`."""


class _Name(NamedTuple):
    """What tells a figure from the others of a run."""

    benchmark: str | None
    task: str
    metric: str


def compare_runs(runs: Sequence[FinishedRun]) -> tuple[RunFigure, ...]:
    """Return every figure of every run, benchmarks last: in the order they first appear, then runs as given."""
    names = dict.fromkeys(name for run in runs for name in _metrics(run))
    ordered = sorted(names, key=lambda name: name.benchmark is not None)
    figures = [figure for name in ordered for figure in _figures_of(name, runs)]
    tested = [figure.against_first for figure in figures if figure.against_first is not None]
    adjusted = iter(adjusted_p_values([difference.p_value for difference in tested]))
    return tuple(
        one.model_copy(update={"against_first": _corrected(one.against_first, next(adjusted))})
        if one.against_first
        else one
        for one in figures
    )


def retained_abilities(runs: Sequence[FinishedRun]) -> tuple[RunRetention, ...]:
    """Return the verdict on every source of general rows, each source's runs together; empty where no run asked."""
    found = [
        RunRetention(run=index, source=one.source, verdict=one.verdict, rows=one.rows, change=one.change)
        for index, run in enumerate(runs)
        if run.report.evaluation and run.report.evaluation.forgetting
        for one in run.report.evaluation.forgetting.results
    ]
    sources = list(dict.fromkeys(one.source for one in found))
    return tuple(sorted(found, key=lambda one: sources.index(one.source)))


def tuned_figure(metric: str, predictions: Predictions, labels: Sequence[str]) -> Figure:
    """Return a figure of the tuned model from what it said.

    Args:
        metric: as in `finetune_api.report.MetricComparison`.
        predictions: of one task.
        labels: of that task; macro F1 is a mean over them.
    """
    wanted = [str(row["reference"]) for row in predictions]
    said = [str(row["tuned_label"]) for row in predictions]
    texts = [str(row["tuned"]) for row in predictions]
    match metric:
        case "accuracy":
            return mean_of(operator.eq, metric, said, wanted)
        case "macro_f1":
            return macro_f1_figure(said, wanted, labels)
        case "generated_accuracy":
            return mean_of(exact_match, metric, texts, wanted)
        case "generated_macro_f1":
            return macro_f1_figure([text.strip() for text in texts], wanted, labels, metric)
        case "rouge1" | "rouge2" | "rougeL":
            return mean_of(lambda text, reference: rouge(text, reference)[metric].f1, metric, texts, wanted)
        case "exact_match":
            return mean_of(exact_match, metric, texts, wanted)
        case "token_f1":
            return mean_of(token_f1, metric, texts, wanted)
        case "bleu":
            return bleu_figure(texts, wanted)
        case "chrf":
            return chrf_figure(texts, wanted)
        case "ece":
            confidences = [_number(row["tuned_confidence"]) for row in predictions]
            return calibration_figure(confidences, [one == other for one, other in zip(said, wanted, strict=True)])
        case "perplexity":
            return perplexity_figure(_logprobs(predictions))
        case "bits_per_byte":
            return bits_per_byte_figure(_logprobs(predictions), wanted)
        case _:
            raise ValueError(f"{metric!r} is no figure of evaluation")


def _logprobs(predictions: Predictions) -> list[Floats]:
    """Return the log-probabilities of every row's tokens; how its sum is spread over them makes no difference."""
    sums = [(_number(row["tuned_logprob"]), int(_number(row["tuned_tokens"]))) for row in predictions]
    return [np.full(tokens, logprob / tokens) for logprob, tokens in sums]


def _figures_of(name: _Name, runs: Sequence[FinishedRun]) -> Iterator[RunFigure]:
    for index, run in enumerate(runs):
        found = _metrics(run).get(name)
        if found is None:
            continue
        difference, why_not = (None, "") if index == 0 else _difference(name, runs[0], run)
        yield RunFigure(
            benchmark=name.benchmark,
            task=name.task,
            metric=name.metric,
            run=index,
            tuned=found.tuned,
            over_base=found.delta,
            higher_is_better=found.higher_is_better,
            rows=found.rows,
            against_first=difference,
            why_not=why_not,
        )


def _difference(name: _Name, first: FinishedRun, other: FinishedRun) -> tuple[PairedDifference | None, str]:
    """Return the difference, or why there is none."""
    benchmark, task, metric = name
    if name not in _metrics(first):
        return None, "the first run has not measured it"
    if benchmark is not None:
        return None, _why_unpaired(benchmark, first.report, other.report)
    if not first.predictions or not other.predictions:
        return None, "no predictions.parquet beside the report"
    one, two = (_rows_by_key(run, task) for run in (first, other))
    if not one or one.keys() != two.keys():
        return None, "not the same test rows"
    if metric == "perplexity" and not _same_base(first.report, other.report):
        return None, "not known to be the same base model, and perplexities of different ones count different tokens"
    labels = sorted({*_labels(first, task), *_labels(other, task)})
    before, after = (tuned_figure(metric, [rows[key] for key in one], labels) for rows in (one, two))
    groups = [str(row["group"]) for row in one.values()] if all("group" in row for row in one.values()) else None
    found = measure(before, after, first.report.seed, groups).difference
    interval = found.interval()
    return (
        PairedDifference(
            delta=found.measured,
            low=interval.low,
            high=interval.high,
            p_value=found.p_value,
            adjusted_p_value=found.p_value,
        ),
        "",
    )


def _same_base(first: Report, other: Report) -> bool:
    """Return whether both are known to stand on the same files: one path may hold two revisions, two paths one."""
    if first.base_revision and other.base_revision:
        return first.base_revision == other.base_revision
    return first.base_model == other.base_model


def _corrected(difference: PairedDifference, p_value: float) -> PairedDifference:
    return difference.model_copy(update={"adjusted_p_value": p_value})


def _metrics(run: FinishedRun) -> dict[_Name, MetricComparison]:
    evaluation = run.report.evaluation
    if evaluation is None:
        return {}
    own = {_Name(None, one.task, one.metric): one for one in evaluation.metrics}
    asked = {
        _Name(benchmark.name, one.task, one.metric): one
        for benchmark in evaluation.benchmarks
        for one in benchmark.metrics
    }
    return own | asked


def _why_unpaired(benchmark: str, first: Report, other: Report) -> str:
    """Return why a benchmark that both runs were asked has no difference."""
    files = [
        {one.sha256 for one in report.evaluation.benchmarks if one.name == benchmark} if report.evaluation else set()
        for report in (first, other)
    ]
    if files[0] != files[1]:
        return f"the benchmark {benchmark} has not the same rows or task file"
    return "answers to benchmarks are not kept"


def _rows_by_key(run: FinishedRun, task: str) -> dict[tuple[object, object], Mapping[str, object]]:
    return {(row["row"], row["reference"]): row for row in run.predictions if row["task"] == task}


def _labels(run: FinishedRun, task: str) -> set[str]:
    """Return the task's labels: nobody else is ever expected or said."""
    rows = [row for row in run.predictions if row["task"] == task and row["tuned_label"] is not None]
    declared = _declared_labels(run.report, task)
    return {*declared} or {str(row[column]) for row in rows for column in ("reference", "tuned_label")}


def _declared_labels(report: Report, task: str) -> Sequence[str]:
    data = report.resolved.get("data")
    tasks = data.get("tasks", ()) if isinstance(data, dict) else ()
    return next((one.get("labels") or () for one in tasks if one.get("name") == task), ())


def _number(value: object) -> float:
    if not isinstance(value, int | float):
        raise TypeError(f"{value!r} is no number")
    return float(value)
