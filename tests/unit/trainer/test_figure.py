"""Every figure against its reference implementation on random cases, and by hand on sentences that are traps."""

import math
import random

import numpy as np
import pytest
import sacrebleu
from sklearn.metrics import confusion_matrix as sklearn_confusion_matrix
from sklearn.metrics import f1_score

from finetune_trainer.figure import (
    bits_per_byte_figure,
    bleu_figure,
    calibration_figure,
    chrf_figure,
    confusion_matrix,
    macro_f1_figure,
    mean_figure,
    perplexity_figure,
    signatures,
    token_f1,
)
from finetune_trainer.metrics import perplexity

WORDS = ["the", "a", "an", "It", "is", "not", "cold", "outside", "cat", "sat", ",", ".", "25", "Straße"]
CASES = 200


def sentence(generator: random.Random, least: int) -> str:
    return " ".join(generator.choices(WORDS, k=generator.randint(least, 9)))


@pytest.mark.parametrize("seed", range(CASES))
def test_bleu_and_chrf_are_those_of_sacrebleu(seed: int) -> None:
    generator = random.Random(seed)
    rows = generator.randint(1, 6)
    said = [sentence(generator, 0) for _ in range(rows)]
    wanted = [sentence(generator, 1) for _ in range(rows)]
    assert bleu_figure(said, wanted).value == pytest.approx(sacrebleu.corpus_bleu(said, [wanted]).score / 100)
    assert chrf_figure(said, wanted).value == pytest.approx(sacrebleu.corpus_chrf(said, [wanted]).score / 100)


BY_HAND = {
    # All 12 words are the reference's, "I" and "am" twice in both. Of 11 pairs "happy that" and "a cup" are not; of 10
    # triples the four around them; of 9 fours "I am very happy", "that I am drinking" and "I am drinking a" are.
    "words left out": (
        "I am very happy that I am drinking a cup of tea",
        "I am very happy to say that I am drinking a warm cup of tea",
        math.exp(1 - 15 / 12) * (12 / 12 * 9 / 11 * 6 / 10 * 3 / 9) ** (1 / 4),
    ),
    # Of 3 pairs "does drink" is not the reference's. No triple of 2 and no four of 1 is: the first that counts none
    # counts 1/2 instead, the next 1/4.
    "the opposite": (
        "Mike does drink coffee",
        "Mike does not drink coffee",
        math.exp(1 - 5 / 4) * (4 / 4 * 2 / 3 * (1 / 2) / 2 * (1 / 4) / 1) ** (1 / 4),
    ),
    # "the" counts twice, as often as the reference has it. The 6 pairs, 5 triples and 4 fours count 1/2, 1/4 and 1/8;
    # what is as long as its reference is not held too short.
    "one word over and over": (
        "the the the the the the the",
        "the cat is on the mat today",
        (2 / 7 * (1 / 2) / 6 * (1 / 4) / 5 * (1 / 8) / 4) ** (1 / 4),
    ),
}


@pytest.mark.parametrize("said, wanted, expected", BY_HAND.values(), ids=BY_HAND)
def test_bleu_is_the_mean_of_clipped_precisions_times_the_penalty_for_brevity(
    said: str, wanted: str, expected: float
) -> None:
    assert bleu_figure([said], [wanted]).value == pytest.approx(expected)
    assert sacrebleu.corpus_bleu([said], [[wanted]]).score / 100 == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(CASES))
def test_token_f1_is_that_of_precision_and_recall_counted_word_by_word(seed: int) -> None:
    generator = random.Random(seed)
    said, wanted = sentence(generator, 0), sentence(generator, 0)
    skipped = ("the", "a", "an", ",", ".")
    words = [[word.lower() for word in text.split() if word not in skipped] for text in (said, wanted)]
    left, shared = list(words[1]), 0
    for word in words[0]:
        if word in left:
            left.remove(word)
            shared += 1
    precision, recall = (shared / len(part) if part else 0 for part in words)
    expected = 2 * precision * recall / (precision + recall) if shared else float(words[0] == words[1] == [])
    assert token_f1(said, wanted) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(CASES))
def test_macro_f1_and_confusion_are_those_of_scikit_learn(seed: int) -> None:
    generator = random.Random(seed)
    labels = ["no", "maybe", "yes", "never"][: generator.randint(2, 4)]
    said, wanted = (generator.choices(labels, k=generator.randint(1, 1) * 30) for _ in range(2))
    expected = f1_score(wanted, said, labels=labels, average="macro", zero_division=0)
    assert macro_f1_figure(said, wanted, labels).value == pytest.approx(expected)
    assert (confusion_matrix(said, wanted, labels) == sklearn_confusion_matrix(wanted, said, labels=labels)).all()


@pytest.mark.parametrize("seed", range(CASES))
def test_calibration_error_is_the_one_computed_bin_by_bin(seed: int) -> None:
    generator = np.random.default_rng(seed)
    sure = generator.random(50)
    right = generator.random(50) < sure**2
    expected = 0.0
    for start in range(15):
        inside = [row for row in range(50) if start / 15 <= sure[row] < (start + 1) / 15]
        if inside:
            gap = abs(sum(sure[row] for row in inside) - sum(right[row] for row in inside)) / len(inside)
            expected += gap * len(inside) / 50
    assert calibration_figure(sure, right).value == pytest.approx(expected)


def test_certainty_that_is_always_right_is_calibrated() -> None:
    assert calibration_figure([1.0, 1.0], [True, True]).value == 0


def test_sums_of_perplexity_give_the_perplexity_of_all_tokens() -> None:
    generator = np.random.default_rng(0)
    logprobs = [-generator.random(size) for size in (3, 5, 1)]
    assert perplexity_figure(logprobs).value == pytest.approx(perplexity(logprobs))


def test_bits_per_byte_count_bytes_of_utf8_and_not_letters() -> None:
    assert bits_per_byte_figure([np.log([0.25, 0.5])], ["ß"]).value == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("said", "higher"),
    [
        ("It is cold outside", "It is very cold outside"),
        ("It is cold outside", "outside cold is It"),
        ("It is cold outside", "cold cold cold cold"),
        ("It is cold outside", "It is not warm inside"),
    ],
    ids=["an added word", "another order", "repetition", "negation"],
)
def test_what_strays_from_the_reference_scores_less(said: str, higher: str) -> None:
    reference = ["It is cold outside"]
    for figure in (bleu_figure, chrf_figure):
        assert figure([higher], reference).value < figure([said], reference).value == pytest.approx(1)


def test_repeating_the_right_word_is_clipped() -> None:
    assert token_f1("cold cold cold cold", "It is cold outside") == pytest.approx(2 * 1 / 8)


def test_signatures_name_versions_and_settings() -> None:
    assert f"version:{sacrebleu.__version__}" in signatures()["bleu"]
    assert "nc:6" in signatures()["chrf"]


def test_a_mean_is_the_mean() -> None:
    assert mean_figure("accuracy", [1, 0, 1, 1]).value == 0.75
