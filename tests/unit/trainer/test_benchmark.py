"""Benchmarks' figures from rows: equal to the usual definitions, drawn again like any other figure."""

import math

import numpy as np
import pytest
from sklearn.metrics import f1_score, matthews_corrcoef

from finetune_api.spec import GateSpec
from finetune_trainer.benchmark import Benchmark, BenchmarkRun, Scores, check_gates, figure_of, pool
from finetune_trainer.errors import SpecError

SEED = 4


def scores(values, aggregation="mean", figure="acc", value=0.0, higher_is_better=True) -> Scores:
    return Scores(figure, values, value, aggregation, higher_is_better)


def value_of(one: Scores) -> float:
    figure = figure_of(one)
    assert figure is not None
    return figure.value


def test_figures_from_sums_equal_those_of_the_libraries():
    draw = np.random.default_rng(0)
    for _ in range(200):
        count = int(draw.integers(1, 30))
        pairs = [(int(a), int(b)) for a, b in draw.integers(0, 2, (count, 2))]
        wanted, said = zip(*pairs, strict=True)
        assert value_of(scores(pairs, "f1")) == pytest.approx(f1_score(wanted, said, zero_division=0.0))
        if len({*wanted, *said}) > 1:  # with a single label scikit-learn warns
            assert value_of(scores(pairs, "matthews_corrcoef")) == pytest.approx(matthews_corrcoef(wanted, said))
        logprobs, weights = -draw.uniform(0.1, 9, count), draw.integers(1, 9, count)
        weighted = list(zip(logprobs, weights, strict=True))
        assert value_of(scores(list(logprobs))) == pytest.approx(logprobs.mean())
        assert value_of(scores(list(logprobs), "perplexity")) == pytest.approx(math.exp(-logprobs.mean()))
        assert value_of(scores(weighted, "weighted_perplexity")) == pytest.approx(
            math.exp(-logprobs.sum() / weights.sum())
        )
        assert value_of(scores(weighted, "bits_per_byte")) == pytest.approx(
            -logprobs.sum() / weights.sum() / math.log(2)
        )


@pytest.mark.parametrize("aggregation, values", [("", [1.0, 0.0]), ("f1", [(0, 2), (1, 1)])])
def test_what_is_no_sum_over_rows_is_not_drawn_again(aggregation, values):
    assert figure_of(scores(values, aggregation)) is None


def test_a_suite_has_the_figures_of_all_rows_together():
    (acc, tasks), (match, other) = pool(
        {
            "small": [scores([1, 0]), scores([(0, 1)], "f1", "f1")],
            "large": [scores([1, 1, 1, 1]), scores([0.5], figure="exact_match")],
        }
    )
    assert (acc.figure, acc.value, list(acc.values), tasks) == ("acc", pytest.approx(5 / 6), [1, 0, 1, 1, 1, 1], 2)
    assert (match.figure, match.value, other) == ("exact_match", 0.5, 1)


def run(*names: str) -> BenchmarkRun:
    return BenchmarkRun(
        [Benchmark(name, name, None, (), list, 10, lambda model, advance: advance(1.0) or {}) for name in names]
    )


def test_base_and_tuned_are_compared_row_by_row():
    base = np.arange(60) % 2
    tuned = np.minimum(base + (np.arange(60) % 4 == 0), 1)
    reports, measured = run("suite").compare(
        [{"one": [scores(list(base[:40]))], "two": [scores(list(base[40:]))]}],
        [{"one": [scores(list(tuned[:40]))], "two": [scores(list(tuned[40:]))]}],
        SEED,
    )
    whole, one, two = reports[0].metrics
    assert [metric.task for metric in reports[0].metrics] == ["suite", "one", "two"]
    assert set(measured) == {"suite.acc", "one.acc", "two.acc"}
    assert whole.note == "over all rows of 2 tasks"
    assert (whole.base, whole.tuned, whole.rows) == (pytest.approx(0.5), pytest.approx(0.75), 60)
    # By hand: the mean of rows drawn with replacement, both models' parts by the same draw.
    drawn = np.random.default_rng(1).integers(60, size=(20_000, 60))
    low, high = np.quantile((tuned - base)[drawn].mean(axis=1), [0.025, 0.975])
    assert (whole.low, whole.high) == (pytest.approx(low, abs=0.02), pytest.approx(high, abs=0.02))
    assert whole.p_value is not None and whole.p_value < 0.01
    assert whole.adjusted_p_value == pytest.approx(min(1.0, 3 * whole.p_value))
    assert one.rows == 40 and two.rows == 20


def test_a_figure_that_is_not_drawn_again_has_no_interval_and_no_gate():
    before, after = scores([1, 2], "", "odd", 0.25), scores([3, 4], "", "odd", 0.5)
    reports, measured = run("task").compare([{"task": [before]}], [{"task": [after]}], SEED)
    (metric,) = reports[0].metrics
    assert (metric.base, metric.tuned, metric.delta, metric.low, metric.p_value) == (0.25, 0.5, 0.25, None, None)
    assert "no interval" in metric.note
    assert measured == {}


def test_a_gate_must_be_about_what_is_measured():
    gates = [GateSpec(metric="sentiment.accuracy"), GateSpec(metric="mmlu.acc")]
    check_gates(gates, ["sentiment"], ["mmlu.acc"])
    with pytest.raises(SpecError, match=r"spec.evaluation.gates\[1\].metric: mmlu.acc is not measured.*glue.acc"):
        check_gates(gates, ["sentiment"], ["glue.acc"])


def test_every_benchmark_tells_how_far_it_is():
    told: list[tuple[int, float]] = []
    both = run("one", "two")
    assert both.ask(None, lambda count: lambda share: told.append((count, share))) == [{}, {}]
    assert told == [(10, 1.0), (10, 1.0)]
    assert both.requests == 20
