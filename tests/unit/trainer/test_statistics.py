"""The bootstrap against a slow bootstrap, against theory, and how often it covers the truth."""

from statistics import NormalDist

import numpy as np
import pytest
from numpy.typing import ArrayLike

from finetune_trainer.figure import Figure, mean_figure, perplexity_figure
from finetune_trainer.statistics import (
    Difference,
    Interval,
    adjusted_p_values,
    paired_difference,
    rows_needed,
    widened_confidence,
)


def difference_of(base: Figure, tuned: Figure, seed: int, samples: int = 2000) -> Difference:
    return paired_difference(base.rows, tuned.rows, base.combine, seed, samples=samples)


def difference_of_means(base: ArrayLike, tuned: ArrayLike, seed: int, samples: int = 2000) -> Difference:
    return difference_of(mean_figure("score", base), mean_figure("score", tuned), seed, samples)


def test_the_interval_is_the_one_of_a_bootstrap_done_row_by_row():
    generator = np.random.default_rng(1)
    base, tuned = generator.random(40), generator.random(40)
    draws = np.random.default_rng(9).integers(40, size=(500, 40))
    differences = []
    for draw in draws:
        differences.append(sum(tuned[row] - base[row] for row in draw) / 40)
    found = difference_of_means(base, tuned, seed=9, samples=500).interval()
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(differences, [0.025, 0.975])))


def test_the_interval_of_a_large_sample_is_the_normal_one():
    generator = np.random.default_rng(2)
    base = generator.random(2000)
    tuned = base + generator.normal(0.1, 0.5, 2000)
    error = 1.96 * (tuned - base).std() / np.sqrt(2000)
    middle = (tuned - base).mean()
    found = difference_of_means(base, tuned, seed=3, samples=4000).interval()
    # 4,000 draws know their 2.5 % quantile to about 3 % of a standard error.
    assert (found.low, found.high) == pytest.approx((middle - error, middle + error), abs=0.1 * error)


def test_pairs_are_kept_together():
    base = np.tile([0.0, 1.0], 50)
    found = difference_of_means(base, base + 0.25, seed=1).interval()
    assert found == Interval(pytest.approx(0.25), pytest.approx(0.25))


def test_equal_seeds_give_equal_intervals_and_others_do_not():
    base, tuned = np.tile([0.0, 1.0, 1.0], 30), np.tile([1.0, 1.0, 0.5], 30)
    first, again, other = (difference_of_means(base, tuned, seed).interval() for seed in (4, 4, 5))
    assert first == again != other


def test_drawing_in_parts_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    base, tuned = np.random.default_rng(0).random((2, 64))
    whole = difference_of_means(base, tuned, seed=4)
    monkeypatch.setattr("finetune_trainer.statistics._DRAWS_AT_ONCE", 1000)
    assert (difference_of_means(base, tuned, seed=4).drawn == whole.drawn).all()


def test_more_confidence_is_a_wider_interval():
    base, tuned = np.random.default_rng(0).random((2, 64))
    narrow, wide = (difference_of_means(base, tuned, seed=1).interval(share) for share in (0.5, 0.99))
    assert wide.low < narrow.low < narrow.high < wide.high


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    generator = np.random.default_rng(7)
    covered = 0
    for trial in range(200):
        base, tuned = (generator.random((2, 200)) < [[0.7], [0.8]]).astype(float)
        found = difference_of_means(base, tuned, seed=trial, samples=400).interval()
        covered += found.low <= 0.1 <= found.high
    # Binomial with 200 trials and 0.95: 181 or fewer has a probability of 0.6 %.
    assert 182 <= covered <= 199


def test_perplexity_intervals_resample_rows_with_their_tokens():
    generator = np.random.default_rng(3)
    tokens = generator.integers(1, 9, 50)
    base_logprobs, tuned_logprobs = ([-generator.random(count) * most for count in tokens] for most in (3, 1))
    base, tuned = (np.array([-row.sum() for row in rows]) for rows in (base_logprobs, tuned_logprobs))
    draws = np.random.default_rng(6).integers(50, size=(300, 50))
    differences = [np.exp(tuned[d].sum() / tokens[d].sum()) - np.exp(base[d].sum() / tokens[d].sum()) for d in draws]
    figures = perplexity_figure(base_logprobs), perplexity_figure(tuned_logprobs)
    found = difference_of(*figures, seed=6, samples=300).interval()
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(differences, [0.025, 0.975])))


@pytest.mark.parametrize(("base", "tuned"), [([], []), ([1.0], [1.0, 2.0])], ids=["no rows", "unequal numbers"])
def test_rows_that_are_no_pairs_are_an_error(base: list[float], tuned: list[float]):
    with pytest.raises(ValueError, match="equally many"):
        difference_of_means(base, tuned, seed=1)


def test_the_difference_is_tuned_minus_base():
    base, tuned = np.random.default_rng(0).random((2, 64))
    assert difference_of_means(base, tuned, seed=4).measured == pytest.approx((tuned - base).mean())


def test_a_difference_of_infinite_perplexities_is_unknown():
    impossible = perplexity_figure([np.array([-1e9])] * 40)
    found = difference_of(impossible, impossible, seed=1)
    assert np.isnan([found.measured, found.interval().low, found.lower_bound(0.95)]).all()


def test_rows_of_one_group_are_drawn_together():
    base = np.zeros(100)
    tuned = np.repeat(np.random.default_rng(1).normal(0.1, 1, 10), 10)
    figures = [mean_figure("score", column) for column in (base, tuned)]
    alone, grouped = (
        paired_difference(figures[0].rows, figures[1].rows, figures[0].combine, seed=1, groups=groups)
        for groups in (None, np.repeat(np.arange(10), 10).tolist())
    )
    # Ten rows that say the same are one observation: the spread grows by the root of ten.
    assert grouped.drawn.std() / alone.drawn.std() == pytest.approx(np.sqrt(10), rel=0.2)


@pytest.mark.parametrize(("groups", "quantile"), [(10, 1.8331), (17, 1.7459), (34, 1.6924)])
def test_few_groups_widen_a_bound_to_students_quantile(groups: int, quantile: float):
    """Quantiles of t at 0.95 with one degree of freedom less than groups, from a table."""
    widened = NormalDist().inv_cdf(widened_confidence(0.95, groups))
    assert widened == pytest.approx(quantile * (groups / (groups - 1)) ** 0.5, abs=0.003)


def test_a_widened_bound_over_ten_groups_is_wrong_no_oftener_than_it_says():
    generator = np.random.default_rng(4)
    missed = {0.95: 0, widened_confidence(0.95, 10): 0}
    for seed in range(800):
        change = generator.normal(0, 1, 10)
        found = difference_of_means(np.zeros(10), change, seed, samples=1000)
        for confidence in missed:
            missed[confidence] += found.lower_bound(confidence) > 0
    plain, widened = (count / 800 for count in missed.values())
    # Standard error at 5 %: 0.008.
    assert plain > 0.065
    assert 0.03 < widened < 0.065


def test_p_value_of_no_difference_is_spread_evenly():
    generator = np.random.default_rng(3)
    p_values = []
    for trial in range(200):
        p_values.append(difference_of_means(*generator.random((2, 60)), trial, samples=400).p_value)
    # 200 trials know a share of 0.05 to 0.03 (two standard errors).
    assert np.mean(np.array(p_values) < 0.05) == pytest.approx(0.05, abs=0.04)
    assert np.mean(np.array(p_values) < 0.5) == pytest.approx(0.5, abs=0.1)


def test_p_value_of_an_unknown_difference_is_unknown():
    assert np.isnan(Difference(np.nan, np.array([np.nan])).p_value)


def test_holm_adjustment_by_hand():
    assert adjusted_p_values([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert adjusted_p_values([0.6, 0.9]) == [1.0, 1.0]


def test_rows_needed_shrink_with_the_square_of_the_gain():
    def difference(gain: float) -> Difference:
        return Difference(gain, gain + np.random.default_rng(0).normal(0, 0.02, 4000))

    small, large = (rows_needed(difference(gain), 300, 0.0, 0.95) for gain in (0.02, 0.04))
    assert small is not None and large is not None
    assert small / large == pytest.approx(4, rel=0.02)
    assert rows_needed(difference(0.01), 300, 0.02, 0.95) is None
