"""Example 08 from its YAML to its report."""

from pathlib import Path

import pytest

from finetune_api.report import Report

from .conftest import report_of, run_example


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Report:
    """Run the example once; return its report."""
    return report_of(run_example("08-mixture", tmp_path_factory.mktemp("mixture"), steps=10))


def test_the_small_task_is_seen_as_often_as_the_square_root_of_its_size_says(report: Report) -> None:
    sentiment, request = report.training.mixture
    assert (sentiment.task, request.task) == ("sentiment", "request")
    roots = sentiment.rows**0.5, request.rows**0.5
    assert request.share == pytest.approx(roots[1] / sum(roots))
    assert sentiment.drawn + request.drawn == 10 * 16
    assert request.drawn > 3 * 160 * request.rows / (sentiment.rows + request.rows) / 2


def test_every_task_has_its_own_figures(report: Report) -> None:
    assert report.evaluation is not None
    assert {metric.task for metric in report.evaluation.metrics if metric.metric == "accuracy"} == {
        "sentiment",
        "request",
    }
    assert {question.task for question in report.training.samples} == {"sentiment", "request"}
    losses = next(point.validation_losses for point in reversed(report.training.curve) if point.validation_losses)
    assert losses.keys() == {"sentiment", "request"}
