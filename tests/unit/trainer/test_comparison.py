"""What is said beside a difference: chance, chance among many figures, and the rows that would tell."""

import numpy as np
import pytest

from finetune_api.report import MetricComparison
from finetune_trainer.comparison import adjust_for_many, describe, measure
from finetune_trainer.figure import mean_figure, perplexity_figure
from finetune_trainer.statistics import FEW_ROWS


def compare(base_share: float, tuned_share: float, rows: int = 300) -> MetricComparison:
    """Return the comparison of two models whose right answers are drawn apart from each other."""
    base, tuned = np.random.default_rng(2).random((2, rows)) < [[base_share], [tuned_share]]
    return describe("mood", "accuracy", measure(*(mean_figure("accuracy", one) for one in (base, tuned)), seed=1))


def test_a_large_difference_is_not_by_chance_and_needs_fewer_rows_than_there_are():
    found = compare(0.5, 0.9)
    assert found.p_value is not None
    assert found.rows_needed is not None
    assert found.p_value < 0.01
    assert FEW_ROWS <= found.rows_needed < found.rows


def test_a_loss_needs_as_many_rows_as_the_gain_that_mirrors_it():
    base, tuned = np.random.default_rng(2).random((2, 200)) < [[0.5], [0.6]]
    figures = [mean_figure("accuracy", one) for one in (base, tuned)]
    gain, loss = (describe("mood", "accuracy", measure(*pair, seed=1)) for pair in (figures, figures[::-1]))
    assert gain.delta == -(loss.delta or 0.0)
    assert gain.rows_needed == loss.rows_needed
    assert gain.p_value == loss.p_value


def test_rows_needed_would_have_been_enough():
    needed = compare(0.7, 0.78).rows_needed
    assert needed is not None
    # What the normal approximation says of two independent shares, at the shares that were drawn.
    measured = compare(0.7, 0.78)
    assert measured.base is not None
    assert measured.delta is not None
    variance = sum(share * (1 - share) for share in (measured.base, measured.tuned))
    assert needed == pytest.approx(variance * ((1.96 + 1.2816) / measured.delta) ** 2, rel=0.15)


def test_nothing_is_said_of_no_difference():
    found = compare(1.0, 1.0)
    assert (found.p_value, found.rows_needed) == (1.0, None)


def test_nothing_is_said_of_an_unknown_difference():
    impossible = perplexity_figure([np.array([-1e9])] * 40)
    found = describe("mood", "perplexity", measure(impossible, impossible, seed=1))
    assert (found.p_value, found.rows_needed) == (None, None)


def test_every_p_value_is_corrected_for_how_many_there_are():
    plain = compare(0.6, 0.7)
    p_values = (0.01, None, 0.04, 0.03)
    adjusted = adjust_for_many([plain.model_copy(update={"p_value": value}) for value in p_values])
    assert [one.adjusted_p_value for one in adjusted] == [pytest.approx(0.03), None, *[pytest.approx(0.06)] * 2]
