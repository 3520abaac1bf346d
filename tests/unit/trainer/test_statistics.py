"""The bootstrap against a slow bootstrap, against theory, and how often it covers the truth."""

import numpy as np
import pytest

from finetune_trainer.statistics import Interval, paired_bootstrap, paired_bootstrap_perplexity


def test_the_interval_is_the_one_of_a_bootstrap_done_row_by_row():
    generator = np.random.default_rng(1)
    base, tuned = generator.random(40), generator.random(40)
    draws = np.random.default_rng(9).integers(40, size=(500, 40))
    differences = []
    for draw in draws:
        differences.append(sum(tuned[row] - base[row] for row in draw) / 40)
    found = paired_bootstrap(base, tuned, seed=9, samples=500)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(differences, [0.025, 0.975])))


def test_the_interval_of_a_large_sample_is_the_normal_one():
    generator = np.random.default_rng(2)
    base = generator.random(2000)
    tuned = base + generator.normal(0.1, 0.5, 2000)
    error = 1.96 * (tuned - base).std() / np.sqrt(2000)
    middle = (tuned - base).mean()
    found = paired_bootstrap(base, tuned, seed=3, samples=4000)
    # 4,000 draws know their 2.5 % quantile to about 3 % of a standard error.
    assert (found.low, found.high) == pytest.approx((middle - error, middle + error), abs=0.1 * error)


def test_pairs_are_kept_together():
    base = np.tile([0.0, 1.0], 50)
    assert paired_bootstrap(base, base + 0.25, seed=1) == Interval(pytest.approx(0.25), pytest.approx(0.25))


def test_equal_seeds_give_equal_intervals_and_others_do_not():
    base, tuned = np.tile([0.0, 1.0, 1.0], 30), np.tile([1.0, 1.0, 0.5], 30)
    assert paired_bootstrap(base, tuned, seed=4) == paired_bootstrap(base, tuned, seed=4)
    assert paired_bootstrap(base, tuned, seed=4) != paired_bootstrap(base, tuned, seed=5)


def test_drawing_in_parts_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    base, tuned = np.random.default_rng(0).random((2, 64))
    whole = paired_bootstrap(base, tuned, seed=4)
    monkeypatch.setattr("finetune_trainer.statistics._DRAWS_AT_ONCE", 1000)
    assert paired_bootstrap(base, tuned, seed=4) == whole


def test_more_confidence_is_a_wider_interval():
    base, tuned = np.random.default_rng(0).random((2, 64))
    narrow, wide = (paired_bootstrap(base, tuned, seed=1, confidence=share) for share in (0.5, 0.99))
    assert wide.low < narrow.low < narrow.high < wide.high


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    generator = np.random.default_rng(7)
    covered = 0
    for trial in range(200):
        base, tuned = (generator.random((2, 200)) < [[0.7], [0.8]]).astype(float)
        found = paired_bootstrap(base, tuned, seed=trial, samples=400)
        covered += found.low <= 0.1 <= found.high
    # Binomial with 200 trials and 0.95: 181 or fewer has a probability of 0.6 %.
    assert 182 <= covered <= 199


def test_perplexity_intervals_resample_rows_with_their_tokens():
    generator = np.random.default_rng(3)
    tokens = generator.integers(1, 9, 50)
    base, tuned = tokens * generator.random(50) * 3, tokens * generator.random(50)
    draws = np.random.default_rng(6).integers(50, size=(300, 50))
    differences = [np.exp(tuned[d].sum() / tokens[d].sum()) - np.exp(base[d].sum() / tokens[d].sum()) for d in draws]
    found = paired_bootstrap_perplexity((base, tokens), (tuned, tokens), seed=6, samples=300)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(differences, [0.025, 0.975])))


@pytest.mark.parametrize(("base", "tuned"), [([], []), ([1.0], [1.0, 2.0])], ids=["no rows", "unequal numbers"])
def test_rows_that_are_no_pairs_are_an_error(base: list[float], tuned: list[float]):
    with pytest.raises(ValueError, match="equally many"):
        paired_bootstrap(base, tuned, seed=1)
