"""Ask base and tuned model the same benchmarks, and put their figures side by side, with how sure the difference is.

What a benchmark asks and how an answer is counted is lm-evaluation-harness's affair, see `finetune_trainer.harness`;
what follows from the counts is decided here.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import nn

from finetune_api.report import BenchmarkReport, MetricComparison
from finetune_api.spec import GateSpec
from finetune_trainer.comparison import adjust_for_many, describe, measure
from finetune_trainer.errors import SpecError
from finetune_trainer.figure import Figure, divide, mean_figure, ratio
from finetune_trainer.gate import Measurement

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Scores:
    """One figure of one task, as one model has it."""

    figure: str
    """acc, acc_norm, exact_match: the harness's name."""
    values: Sequence[Any]
    """What each row adds: a number, or what the aggregation takes."""
    value: float
    """The harness's own figure over all rows."""
    aggregation: str
    """The harness's name for how rows become one figure; empty where it is a function of the task's own."""
    higher_is_better: bool


Advance = Callable[[float], None]
"""Is told which share, 0 to 1, is done."""

Answers = Mapping[str, Sequence[Scores]]
"""By task."""


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One entry of ``spec.evaluation.benchmarks``."""

    suite: str
    """As the spec names it."""
    name: str
    """What gates call it."""
    sha256: str | None
    """Of a task file and its rows."""
    figures: tuple[str, ...]
    """``<suite or task>.<figure>`` for what gates can be about."""
    questions: Callable[[], Sequence[str]]
    """Renders everything that is asked, without the answers."""
    requests: int
    """How often a model is asked: once for every answer to choose from, or for every text."""
    ask: Callable[[nn.Module, Advance], Answers]
    """Puts all its questions to a model."""


class Benchmarks(Protocol):
    """What an evaluation needs of the job's benchmarks."""

    @property
    def requests(self) -> int:
        """How often a model is asked."""

    def ask(self, model: nn.Module, part: Callable[[int], Advance]) -> Sequence[Answers]:
        """Return what ``model`` makes of each; ``part`` returns what is told how far so many requests are."""

    def compare(
        self, base: Sequence[Answers], tuned: Sequence[Answers], seed: int
    ) -> tuple[tuple[BenchmarkReport, ...], dict[str, Measurement]]:
        """Return both models' figures, for people and for gates."""


@dataclass(frozen=True, slots=True)
class BenchmarkRun:
    """The benchmarks of one job."""

    benchmarks: Sequence[Benchmark]

    @property
    def requests(self) -> int:
        """How often a model is asked."""
        return sum(benchmark.requests for benchmark in self.benchmarks)

    def ask(self, model: nn.Module, part: Callable[[int], Advance]) -> list[Answers]:
        """Return what ``model`` makes of each; ``part`` returns what is told how far so many requests are."""
        return [benchmark.ask(model, part(benchmark.requests)) for benchmark in self.benchmarks]

    def compare(
        self, base: Sequence[Answers], tuned: Sequence[Answers], seed: int
    ) -> tuple[tuple[BenchmarkReport, ...], dict[str, Measurement]]:
        """Return both models' figures, for people and, by ``<suite or task>.<figure>``, for gates."""
        measured: dict[str, Measurement] = {}
        metrics: list[list[MetricComparison]] = []
        for benchmark, before, after in zip(self.benchmarks, base, tuned, strict=True):
            found = list(_compare(benchmark.name, before, after, seed))
            metrics.append([comparison for comparison, _ in found])
            measured |= {f"{one.task}.{one.metric}": known for one, known in found if known is not None}
        corrected = iter(adjust_for_many([one for found in metrics for one in found]))
        reports = tuple(
            BenchmarkReport(
                suite=benchmark.suite,
                name=benchmark.name,
                sha256=benchmark.sha256,
                metrics=tuple(next(corrected) for _ in found),
            )
            for benchmark, found in zip(self.benchmarks, metrics, strict=True)
        )
        return reports, measured


def check_gates(gates: Sequence[GateSpec], own_tasks: Collection[str], measured: Collection[str]) -> None:
    """Find gates that neither a task of the job nor anything asked beside it answers.

    Args:
        gates: of the job.
        own_tasks: the job's own tasks, whose gates the spec has checked.
        measured: figures of benchmarks and other axes that a gate can be about.

    Raises:
        SpecError: there is one.
    """
    for index, gate in enumerate(gates):
        if gate.metric.partition(".")[0] not in own_tasks and gate.metric not in measured:
            known = ", ".join(list(measured)[:12]) or "nothing that a gate can be about"
            raise SpecError(
                f"spec.evaluation.gates[{index}].metric: {gate.metric} is not measured; beside the tasks' own figures "
                f"there are {known}."
            )


def _compare(
    name: str, base: Answers, tuned: Answers, seed: int
) -> Iterator[tuple[MetricComparison, Measurement | None]]:
    """Yield every figure: over the rows of all tasks first, then of each task."""
    if len(base) > 1:
        pooled = zip(pool(base), pool(tuned), strict=True)
        for (before, tasks), (after, _) in pooled:
            yield _side_by_side(name, before, after, seed, f"over all rows of {tasks} tasks")
    for task, scores in base.items():
        for before, after in zip(scores, tuned[task], strict=True):
            yield _side_by_side(task, before, after, seed, "")


def pool(answers: Answers) -> list[tuple[Scores, int]]:
    """Return the figures that are means of rows, over the rows of all tasks that have them, and how many those are.

    Tasks weigh by their rows, as the harness has it for MMLU.
    """
    by_figure: dict[str, list[Scores]] = {}
    for scores in answers.values():
        for one in scores:
            if one.aggregation == "mean":
                by_figure.setdefault(one.figure, []).append(one)
    pooled = []
    for figure, found in by_figure.items():
        values = [value for one in found for value in one.values]
        value = float(np.mean(values))
        pooled.append((Scores(figure, values, value, "mean", found[0].higher_is_better), len(found)))
    return pooled


def figure_of(scores: Scores) -> Figure | None:
    """Return the scores as a figure whose rows can be drawn again; absent where the harness combines them otherwise."""
    parts = _PARTS.get(scores.aggregation)
    if parts is None:
        return None
    to_rows, combine = parts
    rows = to_rows(scores.values)
    return None if rows is None else Figure(scores.figure, rows, combine, scores.higher_is_better)


def _side_by_side(
    task: str, base: Scores, tuned: Scores, seed: int, note: str
) -> tuple[MetricComparison, Measurement | None]:
    before, after = figure_of(base), figure_of(tuned)
    if before is None or after is None:
        delta = tuned.value - base.value
        return MetricComparison(
            task=task,
            metric=base.figure,
            base=base.value,
            tuned=tuned.value,
            delta=delta if math.isfinite(delta) else None,
            rows=len(base.values),
            higher_is_better=base.higher_is_better,
            note="; ".join(
                [*([note] if note else []), "no interval: the harness combines rows by a function of its own"]
            ),
        ), None
    found = measure(before, after, seed)
    return describe(task, base.figure, found, note), found


# --- how the harness's aggregations come from sums over rows


def _mean_rows(values: Sequence[Any]) -> Floats:
    return mean_figure("", values).rows


def _weighted_rows(values: Sequence[Any]) -> Floats:
    return np.array(values, dtype=np.float64)


def _binary_rows(values: Sequence[Any]) -> Floats | None:
    """Return what each pair of expected and said label adds: true and false positives, true and false negatives."""
    pairs = np.array(values, dtype=np.int64)
    if not np.isin(pairs, (0, 1)).all():
        return None
    wanted, said = pairs[:, 0], pairs[:, 1]
    cells = [wanted & said, (1 - wanted) & said, (1 - wanted) & (1 - said), wanted & (1 - said)]
    return np.stack(cells, axis=1).astype(np.float64)


def _f1(sums: Floats) -> Floats:
    hits, false_alarms, _, missed = np.moveaxis(sums, -1, 0)
    mentions = 2 * hits + false_alarms + missed
    return divide(2 * hits, mentions)


def _correlation(sums: Floats) -> Floats:
    hits, false_alarms, rejections, missed = np.moveaxis(sums, -1, 0)
    spread = (hits + false_alarms) * (hits + missed) * (rejections + false_alarms) * (rejections + missed)
    agreement = hits * rejections - false_alarms * missed
    return divide(agreement, np.sqrt(spread))


def _exp(sums: Floats) -> Floats:
    with np.errstate(over="ignore"):
        return np.exp(-ratio(sums))


def _bits(sums: Floats) -> Floats:
    bits: Floats = -ratio(sums) / np.log(2)
    return bits


_PARTS: dict[str, tuple[Callable[[Sequence[Any]], Floats | None], Callable[[Floats], Floats]]] = {
    "mean": (_mean_rows, ratio),
    "f1": (_binary_rows, _f1),
    "matthews_corrcoef": (_binary_rows, _correlation),
    "perplexity": (_mean_rows, _exp),
    "weighted_perplexity": (_weighted_rows, _exp),
    "bits_per_byte": (_weighted_rows, _bits),
}

COMBINED = frozenset(_PARTS)
"""Aggregations of the harness that can be computed from sums over rows, so that figures have intervals."""

BINARY = frozenset(name for name, (to_rows, _) in _PARTS.items() if to_rows is _binary_rows)
"""Those of them that are so for two labels alone."""
