"""Choosing between labels by their likelihood: the normalisers, the choice of a prompt, the boundary of a label."""

import numpy as np
import pytest

from finetune_trainer.labels import (
    LabelScores,
    Normaliser,
    choose_prompt,
    collect_scores,
    confidences,
    harness_accuracy,
    label_prior,
    predict,
    with_label,
)

NO_PRIOR = np.zeros(2)


def make_scores(*rows: tuple[float, float], tokens: tuple[int, int] = (1, 1)) -> LabelScores:
    return LabelScores(np.array(rows, dtype=np.float64), np.tile(np.array(tokens), (len(rows), 1)))


def test_a_sum_prefers_the_shorter_label_and_a_mean_does_not():
    # Each token of the longer label is likelier, together they are not.
    scores = make_scores((-1.0, -1.6), tokens=(1, 2))
    assert predict(scores, Normaliser.SUM, NO_PRIOR).tolist() == [0]
    assert predict(scores, Normaliser.MEAN, NO_PRIOR).tolist() == [1]


def test_calibration_takes_away_what_a_model_says_whatever_it_is_asked():
    # Always leans to label 0, but less so in the second row.
    scores = make_scores((-0.1, -3.0), (-0.4, -1.0))
    assert predict(scores, Normaliser.SUM, NO_PRIOR).tolist() == [0, 0]
    assert label_prior(scores).tolist() == pytest.approx([-0.25, -2.0])
    assert predict(scores, Normaliser.CALIBRATED, label_prior(scores)).tolist() == [0, 1]


def test_scores_are_collected_row_by_row():
    scores = collect_scores([np.array([-1.0, -2.0]), np.array([-4.0]), np.array([-5.0, -6.0]), np.array([-7.0])], 2)
    assert scores.sums.tolist() == [[-3.0, -4.0], [-11.0, -7.0]]
    assert scores.tokens.tolist() == [[2, 1], [2, 1]]


def test_half_a_row_is_an_error():
    with pytest.raises(ValueError, match="3 scored completions are not whole rows of 2 labels"):
        collect_scores([np.zeros(1)] * 3, 2)


def test_the_prompt_with_the_highest_validation_accuracy_is_chosen_and_all_are_reported():
    references = np.array([0, 1])
    decision = choose_prompt(
        {0: make_scores((-1, -2), (-1, -2)), 1: make_scores((-1, -5), (-1, -2))}, references, tuple(Normaliser)
    )
    assert (decision.template, decision.normaliser, decision.accuracy) == (1, Normaliser.CALIBRATED, 1.0)
    assert decision.prior.tolist() == [-1.0, -3.5]
    assert decision.candidates == {
        "template 0, sum": 0.5,
        "template 0, mean": 0.5,
        "template 0, calibrated": 0.5,
        "template 1, sum": 0.5,
        "template 1, mean": 0.5,
        "template 1, calibrated": 1.0,
    }


def test_among_equals_the_first_is_chosen():
    decision = choose_prompt({0: make_scores((-1, -2)), 1: make_scores((-1, -2))}, np.array([0]), tuple(Normaliser))
    assert (decision.template, decision.normaliser) == (0, Normaliser.SUM)


def test_a_choice_without_rows_is_an_error():
    with pytest.raises(ValueError, match="at least one"):
        choose_prompt({0: make_scores((-1, -2))}, np.array([], dtype=np.int64), tuple(Normaliser))


@pytest.mark.parametrize(
    ("completion", "expected"),
    [(" positive", " negative"), ("positive", "negative"), (" positive\n", " negative\n")],
    ids=["a space before", "nothing around", "a line end behind"],
)
def test_a_label_takes_the_place_of_another_with_the_white_space_around_it(completion: str, expected: str):
    assert with_label(completion, "negative") == expected


def test_the_harness_counts_neither_the_end_token_nor_in_tokens():
    # Two rows of labels "no" and "certainly not"; the last number of each is the end token's.
    logprobs = [np.array(row) for row in ([-2.0, -9.0], [-1.0, -3.0, -0.1], [-2.0, -0.1], [-5.0, -9.0, -0.1])]
    acc, acc_norm = harness_accuracy(logprobs, ("no", "certainly not"), np.array([0, 1]), end_tokens=1)
    # Sums -2 > -4 and -2 > -14; per character -1 < -4 / 13 and -1 > -14 / 13.
    assert (acc, acc_norm) == (0.5, 0.0)


@pytest.mark.parametrize("normaliser", list(Normaliser))
def test_confidence_is_the_share_of_the_label_that_is_chosen(normaliser: Normaliser):
    sums = np.array([[-1.0, -2.0, -4.0], [-900.0, -901.0, -903.0]])
    scores = LabelScores(sums, np.array([[1, 2, 2], [1, 2, 2]]))
    prior = np.array([-1.0, -1.0, -3.0])
    comparable = {"sum": sums, "mean": sums / scores.tokens, "calibrated": sums - prior}[normaliser]
    for row, found in zip(comparable - comparable.max(), confidences(scores, normaliser, prior), strict=True):
        shares = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        assert found == pytest.approx(shares.max())
