"""The chart of a task: every model on one scale that starts at zero, its interval around it."""

import numpy as np
import pytest

from finetune_api.report import FewShotComparison, MetricComparison, Span
from finetune_trainer.comparison import describe, measure
from finetune_trainer.figure import mean_figure
from finetune_trainer.report_page import render_page
from finetune_trainer.task_chart import lay_out_tasks

from .test_report_page import make_accuracy, make_report


def make_charted(**changes: object) -> MetricComparison:
    spans = {"base_interval": Span(low=0.83, high=0.91), "tuned_interval": Span(low=0.92, high=0.97)}
    return make_accuracy(**(spans | changes))


def test_models_stand_on_one_scale_with_their_intervals():
    shown = FewShotComparison(value=0.9, interval=Span(low=0.86, high=0.93), delta=0.05, low=0.01, high=0.09)
    (chart,) = lay_out_tasks([make_charted(few_shot=shown), make_charted(metric="macro_f1")])
    assert [(bar.name, bar.value) for bar in chart.bars] == [
        ("base", "0.875"),
        ("with examples", "0.900"),
        ("tuned", "0.950"),
    ]
    places = [bar.across for bar in chart.bars]
    assert places == sorted(places)
    for bar in chart.bars:
        assert chart.left <= bar.low < bar.across < bar.high <= chart.right
    assert (chart.values[0].label, chart.values[0].at) == ("0.0", chart.left)


def test_a_figure_without_interval_or_base_is_drawn_as_far_as_it_is_known():
    (chart,) = lay_out_tasks([make_charted(base_interval=None)])
    assert chart.bars[0].low == chart.bars[0].high == chart.bars[0].across
    assert lay_out_tasks([make_charted(base=None)]) == ()


def test_models_that_reach_nothing_are_drawn():
    nothing = Span(low=0, high=0)
    (chart,) = lay_out_tasks([make_charted(base=0, tuned=0, base_interval=nothing, tuned_interval=nothing)])
    assert [bar.across for bar in chart.bars] == [chart.left, chart.left]


def test_the_page_has_a_chart_for_each_task():
    evaluation = make_report().evaluation
    assert evaluation is not None
    two = evaluation.model_copy(update={"metrics": (make_charted(), make_charted(task="other"))})
    page = render_page(make_report(evaluation=two))
    assert page.count('<rect class="tuned"') == page.count('<rect class="base"') == 2


@pytest.mark.parametrize("groups", [None, [number // 4 for number in range(200)]], ids=["rows", "groups"])
def test_the_interval_is_that_of_a_bootstrap_written_out(groups: list[int] | None):
    right = np.random.default_rng(4).random((2, 200)) < [[0.6], [0.8]]
    found = describe("t", "accuracy", measure(*(mean_figure("accuracy", one) for one in right), seed=9, groups=groups))
    units = right if groups is None else right.reshape(2, 50, 4).sum(axis=2)
    draws = np.random.default_rng(9).integers(units.shape[1], size=(2000, units.shape[1]))
    for span, one in ((found.base_interval, units[0]), (found.tuned_interval, units[1])):
        expected = np.quantile(one[draws].sum(axis=1) / 200, [0.025, 0.975])
        assert span is not None
        assert (span.low, span.high) == pytest.approx(tuple(expected))
