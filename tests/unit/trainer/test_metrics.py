"""Metrics against their reference implementation and against numbers worked out by hand."""

import math
import random

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer

from finetune_trainer.metrics import ROUGE_NAMES, Score, exact_match, perplexity, rouge, rouge_reads

REFERENCE = "It is cold outside"


def score(precision: float, recall: float) -> Score:
    """Return the score whose F1 is the harmonic mean of both."""
    total = precision + recall
    return Score(precision, recall, 2 * precision * recall / total if total else 0.0)


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        pytest.param(
            "It is very cold outside",
            # 4 of its 5 words; bigrams "it is" and "cold outside" of 4, where the reference has 3; all 4 in order.
            {"rouge1": score(4 / 5, 1), "rouge2": score(2 / 4, 2 / 3), "rougeL": score(4 / 5, 1)},
            id="a word more",
        ),
        pytest.param(
            "It is not cold outside",
            {"rouge1": score(4 / 5, 1), "rouge2": score(2 / 4, 2 / 3), "rougeL": score(4 / 5, 1)},
            id="the opposite scores the same: ROUGE does not understand",
        ),
        pytest.param(
            "cold cold cold cold",
            # Unclipped precision would be 4 / 4.
            {"rouge1": score(1 / 4, 1 / 4), "rouge2": score(0, 0), "rougeL": score(1 / 4, 1 / 4)},
            id="a repeated word counts once, as the reference has it once",
        ),
        pytest.param(
            "outside cold it is",
            # The longest common subsequence is "it is"; the only common bigram too.
            {"rouge1": score(1, 1), "rouge2": score(1 / 3, 1 / 3), "rougeL": score(2 / 4, 2 / 4)},
            id="word order does not matter to ROUGE-1",
        ),
        pytest.param(
            "It cold",
            # A subsequence may have gaps: both words count although "is" stands between them.
            {"rouge1": score(1, 2 / 4), "rouge2": score(0, 0), "rougeL": score(1, 2 / 4)},
            id="the common subsequence need not be contiguous",
        ),
        pytest.param("", {name: score(0, 0) for name in ROUGE_NAMES}, id="no answer"),
        pytest.param("IT IS COLD, OUTSIDE!", {name: score(1, 1) for name in ROUGE_NAMES}, id="case and punctuation"),
    ],
)
def test_rouge_worked_out_by_hand(prediction: str, expected: dict[str, Score]):
    found = rouge(prediction, REFERENCE)
    assert list(found) == list(ROUGE_NAMES)
    for name, wanted in expected.items():
        assert (found[name].precision, found[name].recall, found[name].f1) == pytest.approx(
            (wanted.precision, wanted.recall, wanted.f1)
        ), name


def test_rouge_equals_rouge_score_on_random_texts():
    draw = random.Random(5)
    words = ["cold", "Cold", "outside", "it", "is", "not", "very", "the", "café", "42", "-", "it's"]
    scorer = RougeScorer(list(ROUGE_NAMES), use_stemmer=False)
    cases = [[" ".join(draw.choices(words, k=draw.randint(0, 12))) for _ in range(2)] for _ in range(300)]
    for prediction, reference in cases:
        expected = scorer.score(target=reference, prediction=prediction)
        for name, found in rouge(prediction, reference).items():
            assert (found.precision, found.recall, found.f1) == tuple(expected[name])


@pytest.mark.parametrize(
    ("prediction", "reference", "matches"),
    [
        (" Paris\n", "Paris", True),
        ("paris", "Paris", False),
        ("Paris.", "Paris", False),
        ("New  York", "New York", False),
        ("", " ", True),
    ],
    ids=["white space around", "case", "punctuation", "white space inside", "both empty"],
)
def test_exact_match_forgives_surrounding_white_space_alone(prediction: str, reference: str, matches: bool):
    assert exact_match(prediction, reference) is matches


def test_rouge_says_which_texts_it_cannot_read():
    assert rouge_reads("It's 42 % cold!")
    assert not rouge_reads("Мне холодно")


def test_perplexity_of_a_uniform_guess_is_the_number_of_choices():
    rows = [np.log(np.full(length, 1 / 50)) for length in (1, 4, 7)]
    assert perplexity(rows) == pytest.approx(50)


def test_perplexity_weighs_tokens_and_not_rows():
    # (3 ln 2 + 1 ln 16) / 4 tokens = ln 2 * 7 / 4
    assert perplexity([np.log([0.5, 0.5, 0.5]), np.log([1 / 16])]) == pytest.approx(2 ** (7 / 4))


def test_perplexity_of_the_impossible_is_infinite():
    assert perplexity([np.array([-math.inf, -1.0])]) == math.inf
    assert perplexity([np.array([-1e6])]) == math.inf


def test_perplexity_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="at least one token"):
        perplexity([np.array([])])
