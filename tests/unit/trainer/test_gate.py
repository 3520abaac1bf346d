"""Gates: what passes, what does not, and whether the sentence says why."""

import dataclasses
import re

import numpy as np
import pytest

from finetune_api.report import EvaluationReport, GateResult, MetricComparison
from finetune_api.spec import GateSpec, PublishOn
from finetune_trainer.figure import mean_figure, perplexity_figure
from finetune_trainer.gate import Measurement, judge_gates, why_kept_back
from finetune_trainer.statistics import paired_difference


def accuracy(base: float, tuned: float, rows: int = 400) -> Measurement:
    """Return models that are right on the first share of rows each: what one gains is gained on its own rows."""
    order = np.arange(rows) / rows
    figures = [mean_figure("accuracy", order < share) for share in (base, tuned)]
    difference = paired_difference(figures[0].rows, figures[1].rows, figures[0].combine, seed=1)
    return Measurement(figures[0].value, figures[1].value, difference, rows, higher_is_better=True)


def gate(**conditions: float) -> GateSpec:
    return GateSpec(metric="mood.accuracy", **conditions)


CASES = [
    ("a clear gain passes", {"min_delta": 0.02}, accuracy(0.70, 0.80), True, "at least"),
    (
        "an equal gain is not proven",
        {"min_delta": 0.1},
        accuracy(0.70, 0.80),
        False,
        "is certain with 95%",
    ),
    ("a gate without conditions asks for a gain", {}, accuracy(0.8, 0.8), False, "more than +0 is asked for"),
    ("a loss within the allowance passes", {"min_delta": -0.05}, accuracy(0.80, 0.79), True, "gain"),
    ("few rows decide nothing", {"min_delta": 0.0}, accuracy(0.2, 1.0, rows=20), False, "at least 30"),
    (
        "few groups decide nothing, however many rows they have",
        {"min_delta": 0.0},
        dataclasses.replace(accuracy(0.2, 1.0), groups=20),
        False,
        "20 groups of test rows decide nothing",
    ),
    ("the least value is reached", {"min": 0.75}, accuracy(0.9, 0.8), True, "0.8"),
    ("the least value is missed", {"min": 0.85}, accuracy(0.7, 0.8), False, "below the least allowed 0.85"),
    ("the most is passed", {"max": 0.75}, accuracy(0.7, 0.8), False, "above the most allowed 0.75"),
    ("both reasons are told", {"min": 0.9, "min_delta": 0.3}, accuracy(0.7, 0.8), False, "; the gain"),
]


@pytest.mark.parametrize(("sentence", "conditions", "found", "passed", "says"), CASES, ids=[case[0] for case in CASES])
def test_gate(sentence: str, conditions: dict[str, float], found: Measurement, passed: bool, says: str) -> None:
    (result,) = judge_gates([gate(**conditions)], {"mood.accuracy": found})
    assert result.passed is passed
    assert says in result.why


def test_a_missed_gain_says_how_many_rows_would_show_it() -> None:
    (result,) = judge_gates([gate(min_delta=0.0)], {"mood.accuracy": accuracy(0.78, 0.80, rows=100)})
    assert not result.passed
    assert "test rows would show it" in result.why


def test_lower_perplexity_is_a_gain() -> None:
    generator = np.random.default_rng(0)
    base = [-generator.random(5) - 1 for _ in range(100)]
    tuned = [row + 0.5 for row in base]
    figures = [perplexity_figure(logprobs) for logprobs in (base, tuned)]
    difference = paired_difference(figures[0].rows, figures[1].rows, figures[0].combine, seed=1)
    found = Measurement(figures[0].value, figures[1].value, difference, 100, higher_is_better=False)
    wanted = GateSpec(metric="mood.perplexity", min_delta=0.5)
    assert judge_gates([wanted], {"mood.perplexity": found})[0].passed
    back = Measurement(
        found.tuned, found.base, paired_difference(figures[1].rows, figures[0].rows, figures[0].combine, 1), 100, False
    )
    assert not judge_gates([wanted], {"mood.perplexity": back})[0].passed


PASSED = GateResult(metric="mood.accuracy", passed=True, why="mood.accuracy is 0.8")
FAILED = GateResult(metric="mood.macro_f1", passed=False, why="mood.macro_f1 is 0.4, below the least allowed 0.5")
KEPT_BACK = [
    ("nothing measured keeps nothing back", PublishOn.GATES, (), ""),
    ("gates that pass keep nothing back", PublishOn.GATES, (PASSED,), ""),
    ("a gate that fails says why", PublishOn.GATES, (PASSED, FAILED), "mood.macro_f1 did not pass: .* is 0.4, below"),
    ("several are named", PublishOn.GATES, (FAILED, PASSED, FAILED), "2 of 3 gates did not pass: mood.macro_f1, mood"),
    ("always asks no gate", PublishOn.ALWAYS, (FAILED,), ""),
    ("never asks no gate", PublishOn.NEVER, (PASSED,), "publishOn is never"),
]


@pytest.mark.parametrize(("sentence", "publish_on", "gates", "says"), KEPT_BACK, ids=[case[0] for case in KEPT_BACK])
def test_why_kept_back(sentence: str, publish_on: PublishOn, gates: tuple[GateResult, ...], says: str) -> None:
    why = why_kept_back(publish_on, [gate()] if gates else [], EvaluationReport(gates=gates))
    assert re.search(says, why) if says else why == ""


def change(low: float, high: float, **changes: object) -> MetricComparison:
    fields: dict[str, object] = {"task": "mood", "metric": "accuracy", "base": 0.91, "tuned": 0.72, "rows": 300}
    return MetricComparison.model_validate(fields | {"delta": (low + high) / 2, "low": low, "high": high} | changes)


UNCOMPARED = MetricComparison(task="mood", metric="accuracy", tuned=0.72, rows=300)


WORSE = change(-0.25, -0.13)
SURELY = r"^mood accuracy fell from 0\.910 to 0\.720 \(-0\.190, 95 % interval -0\.250 to -0\.130\)"
ANYWAY = r"; spec\.output\.publishOn: always publishes it anyway$"
BY_VERDICT = [
    ("surely worse is kept back", PublishOn.GATES, (), (WORSE,), SURELY + ANYWAY),
    ("perhaps worse is not", PublishOn.GATES, (), (change(-0.25, 0.01),), ""),
    ("no worse than nothing gained is not", PublishOn.GATES, (), (change(-0.25, 0.0),), ""),
    ("worse on few rows is not", PublishOn.GATES, (), (change(-0.25, -0.13, rows=29),), ""),
    ("better is not", PublishOn.GATES, (), (change(0.1, 0.2),), ""),
    (
        "perplexity that rose is worse",
        PublishOn.GATES,
        (),
        (change(1, 3, metric="perplexity", base=4.0, tuned=6.0, higher_is_better=False),),
        r"^mood perplexity rose from 4\.00 to 6\.00 \(\+2\.000",
    ),
    ("a figure that leads no task decides nothing", PublishOn.GATES, (), (change(-0.2, -0.1, metric="ece"),), ""),
    ("a base that was not asked", PublishOn.GATES, (), (UNCOMPARED,), ""),
    ("one task of two", PublishOn.GATES, (), (change(0.1, 0.2, task="topic"), WORSE), SURELY + ANYWAY),
    (
        "two tasks",
        PublishOn.GATES,
        (),
        (WORSE, change(-0.2, -0.1, task="topic")),
        SURELY + "; 2 tasks are worse" + ANYWAY,
    ),
    ("gates that pass decide alone", PublishOn.GATES, (PASSED,), (WORSE,), ""),
    ("always publishes what is worse", PublishOn.ALWAYS, (), (WORSE,), ""),
]


@pytest.mark.parametrize(
    ("sentence", "publish_on", "gates", "metrics", "says"), BY_VERDICT, ids=[case[0] for case in BY_VERDICT]
)
def test_without_gates_the_verdict_decides(
    sentence: str,
    publish_on: PublishOn,
    gates: tuple[GateResult, ...],
    metrics: tuple[MetricComparison, ...],
    says: str,
) -> None:
    found = EvaluationReport(metrics=metrics, gates=gates)
    why = why_kept_back(publish_on, [gate()] if gates else [], found)
    assert re.search(says, why) if says else why == ""
    assert len(why) < 200, "the status has 256 characters for it"


def test_general_ability_that_was_kept_does_not_excuse_a_task_that_is_worse() -> None:
    kept = GateResult(metric="forgetting", passed=True, why="The model kept its general ability")
    found = EvaluationReport(metrics=(WORSE,), gates=(kept,))
    assert re.search(SURELY, why_kept_back(PublishOn.GATES, [], found))
    lost = found.model_copy(update={"gates": (kept.model_copy(update={"passed": False}),)})
    assert "the gate on forgetting did not pass" in why_kept_back(PublishOn.GATES, [], lost)
