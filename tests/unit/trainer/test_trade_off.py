"""The choice of an adapter's strength: the best gain within the budget, on numbers made up for it."""

from contextlib import nullcontext

import numpy as np
import pytest

from finetune_api.report import TradeOff, TradeOffPoint
from finetune_api.spec import ForgettingRemedy, ForgettingSpec
from finetune_trainer.forgetting import GeneralAnswers
from finetune_trainer.general_suite import GeneralRow
from finetune_trainer.trade_off import Candidate, Findings, choose, weigh
from finetune_trainer.trade_off_chart import lay_out_trade_off

BUDGET = ForgettingSpec(max_drop=0.02)


def point(scale: float, gain: float, within: bool) -> TradeOffPoint:
    return TradeOffPoint(
        scale=scale, gain=gain, gains={"sentiment": gain}, change=-scale / 10, low=-scale / 5, within_budget=within
    )


@pytest.mark.parametrize(
    ("points", "scale", "why"),
    [
        pytest.param(
            [(0.25, 0.1, True), (0.5, 0.3, True), (1.0, 0.5, False)], 0.5, "2 of 3 scales", id="the best gain within"
        ),
        pytest.param([(0.25, 0.3, True), (0.5, 0.3, True)], 0.25, "best gain", id="the weakest of equally good ones"),
        pytest.param([(0.5, 0.3, True), (1.0, 0.5, True)], 1.0, "best gain", id="as trained where nothing is lost"),
        pytest.param([(0.25, 0.3, False), (1.0, 0.5, False)], 1.0, "stays as trained", id="none is within"),
    ],
)
def test_the_best_gain_within_the_budget_is_chosen(points, scale, why):
    found = choose([point(*one) for one in points], BUDGET, 100, 300)
    assert found.scale == scale
    assert why in found.why
    assert "0.02" in found.why


def rows(source: str, count: int) -> list[GeneralRow]:
    return [GeneralRow(source, f"{n}", f"{source} {n}", (" a", " b"), 0, source) for n in range(count)]


def at(scale: float) -> Candidate:
    return Candidate(scale, nullcontext)  # type: ignore[arg-type] # lends nothing: it is not asked


def findings(accuracy: dict[str, float], right: np.ndarray) -> Findings:
    return Findings(accuracy, GeneralAnswers(right, []))


def test_every_source_must_be_within_the_budget_and_the_worst_one_is_shown():
    suite = [*rows("general", 200), *rows("mine", 200)]
    base = findings({"one": 0.5, "two": 0.2}, np.ones(400, dtype=bool))
    right = np.ones(400, dtype=bool)
    right[200:240] = False
    lost = weigh(at(0.5), base, findings({"one": 0.9, "two": 0.4}, right), suite, BUDGET, seed=3)
    assert lost.gains == pytest.approx({"one": 0.4, "two": 0.2})
    assert lost.gain == pytest.approx(0.3)
    assert lost.change == pytest.approx(-0.2)
    assert lost.low < lost.change
    assert not lost.within_budget
    kept = weigh(at(0.5), base, findings({"one": 0.9, "two": 0.4}, base.general.right), suite, BUDGET, seed=3)
    assert kept.within_budget


def test_few_general_rows_show_nothing_to_be_within_the_budget():
    suite = rows("general", 20)
    base = findings({"one": 0.5}, np.ones(20, dtype=bool))
    assert not weigh(at(1.0), base, base, suite, BUDGET, seed=3).within_budget


def made(*points: TradeOffPoint, max_drop: float = 0.02) -> TradeOff:
    return TradeOff(
        points=points, scale=points[0].scale, why="", max_drop=max_drop, validation_rows=10, general_rows=10
    )


def test_the_chart_holds_every_point_and_the_budget():
    chart = lay_out_trade_off(made(point(0.25, 0.2, True), point(1.0, -0.4, False)))
    assert [mark.label for mark in chart.marks] == ["0.25", "1"]
    assert [mark.chosen for mark in chart.marks] == [True, False]
    weak, strong = chart.marks
    assert weak.across > strong.across, "less lost is farther right"
    assert weak.down < strong.down, "a larger gain is higher up"
    for mark in chart.marks:
        assert chart.left <= mark.across <= chart.right
        assert chart.top <= mark.down <= chart.bottom
    assert chart.left <= chart.budget <= chart.right


def test_the_chart_stands_where_nothing_changed():
    still = TradeOffPoint(scale=1.0, gain=0, gains={"a": 0}, change=0, low=0, within_budget=True)
    chart = lay_out_trade_off(made(still, still, max_drop=0))
    assert all(chart.left <= mark.across <= chart.right for mark in chart.marks)


@pytest.mark.parametrize(
    ("within", "step", "why", "labels"),
    [
        pytest.param((True, True, False), 20, "step 20 has the best gain", (False, True, False), id="best"),
        pytest.param((True, True, True), None, "the end of training has the best gain", (False, False, True), id="end"),
        pytest.param((False, False, False), None, "no checkpoint is within", (False, False, True), id="none"),
    ],
)
def test_of_checkpoints_the_best_gain_within_the_budget_is_chosen(within, step, why, labels):
    points = [
        point(1.0, gain, is_within).model_copy(update={"step": at_step})
        for gain, is_within, at_step in zip((0.1, 0.2, 0.3), within, (10, 20, None), strict=True)
    ]
    budget = ForgettingSpec(max_drop=0.02, remedy=ForgettingRemedy.EARLIER_CHECKPOINT)
    found = choose(points, budget, 100, 300)
    assert (found.remedy, found.step, found.scale) == ("earlierCheckpoint", step, 1.0)
    assert why in found.why
    marks = lay_out_trade_off(found).marks
    assert [mark.label for mark in marks] == ["10", "20", "end"]
    assert tuple(mark.chosen for mark in marks) == labels
