"""The figures as `evaluate.Metric` modules: each against its reference implementation, and on sentences like traps."""

import random
from collections.abc import Callable

import numpy as np
import pytest
import sacrebleu
import torch
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score
from torchmetrics.functional.classification import binary_calibration_error
from torchmetrics.functional.text import squad

from finetune_trainer.metric_module import (
    Accuracy,
    BitsPerByte,
    Bleu,
    CalibrationError,
    Chrf,
    ConfusionMatrix,
    ExactMatch,
    MacroF1,
    Perplexity,
    Rouge,
    TokenF1,
)

CASES = 200
LABELS = ["no", "maybe", "yes"]
WORDS = ["it", "is", "not", "very", "cold", "outside", "the", "cat", "25", "."]
REFERENCE = "It is cold outside"

Texts = list[str]


def each_case(make: Callable[[random.Random], None]) -> None:
    for seed in range(CASES):
        make(random.Random(seed))


def texts(draw: random.Random, rows: int, least: int) -> Texts:
    return [" ".join(draw.choices(WORDS, k=draw.randint(least, 9))) for _ in range(rows)]


def test_labels_are_counted_as_scikit_learn_counts_them() -> None:
    accuracy, macro_f1 = Accuracy(keep_in_memory=True), MacroF1(keep_in_memory=True)
    matrix = ConfusionMatrix(keep_in_memory=True)

    def check(draw: random.Random) -> None:
        said, wanted = (draw.choices(LABELS, k=12) for _ in range(2))
        assert accuracy.compute(predictions=said, references=wanted) == {"accuracy": accuracy_score(wanted, said)}
        found = macro_f1.compute(predictions=said, references=wanted, labels=LABELS)
        expected = f1_score(wanted, said, labels=LABELS, average="macro", zero_division=0)
        assert found == {"macro_f1": pytest.approx(expected)}
        counted = matrix.compute(predictions=said, references=wanted, labels=LABELS)
        assert counted == {"confusion_matrix": confusion_matrix(wanted, said, labels=LABELS).tolist()}

    each_case(check)


def test_texts_are_measured_as_sacrebleu_and_rouge_score_measure_them() -> None:
    bleu, chrf, rouge = Bleu(keep_in_memory=True), Chrf(keep_in_memory=True), Rouge(keep_in_memory=True)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)

    def check(draw: random.Random) -> None:
        rows = draw.randint(1, 4)
        said, wanted = texts(draw, rows, 0), texts(draw, rows, 1)
        corpus = [sacrebleu.corpus_bleu(said, [wanted]).score, sacrebleu.corpus_chrf(said, [wanted]).score]
        assert bleu.compute(predictions=said, references=wanted)["bleu"] == pytest.approx(corpus[0] / 100)
        assert chrf.compute(predictions=said, references=wanted)["chrf"] == pytest.approx(corpus[1] / 100)
        found = rouge.compute(predictions=said, references=wanted)
        for name in ("rouge1", "rouge2", "rougeL"):
            scores = [scorer.score(target, text)[name] for target, text in zip(wanted, said, strict=True)]
            assert found[name] == pytest.approx(np.mean([score.fmeasure for score in scores]))
            assert found[f"{name}_precision"] == pytest.approx(np.mean([score.precision for score in scores]))
            assert found[f"{name}_recall"] == pytest.approx(np.mean([score.recall for score in scores]))

    each_case(check)


def test_bleu_and_chrf_say_how_they_were_computed() -> None:
    for module, name, theirs in ((Bleu, "bleu", BLEU()), (Chrf, "chrf", CHRF())):
        theirs.corpus_score([REFERENCE], [[REFERENCE]])
        assert module(keep_in_memory=True).compute(predictions=[REFERENCE], references=[REFERENCE]) == {
            name: pytest.approx(1.0),
            f"{name}_signature": str(theirs.get_signature()),
        }


def test_answers_are_compared_as_texts_and_as_bags_of_words_like_squad() -> None:
    exact, shared = ExactMatch(keep_in_memory=True), TokenF1(keep_in_memory=True)

    def check(draw: random.Random) -> None:
        said, wanted = (texts(draw, 3, 1) for _ in range(2))
        said[0] = f" {wanted[0]}\n"
        equal = [one.strip() == other for one, other in zip(said, wanted, strict=True)]
        assert exact.compute(predictions=said, references=wanted) == {"exact_match": pytest.approx(np.mean(equal))}
        theirs = squad(
            [{"id": str(row), "prediction_text": text} for row, text in enumerate(said)],
            [{"id": str(row), "answers": {"text": [text], "answer_start": [0]}} for row, text in enumerate(wanted)],
        )
        expected = float(theirs["f1"]) / 100
        assert shared.compute(predictions=said, references=wanted) == {"token_f1": pytest.approx(expected)}

    each_case(check)


def test_likelihoods_are_measured_as_torch_measures_them() -> None:
    perplexity, bits = Perplexity(keep_in_memory=True), BitsPerByte(keep_in_memory=True)

    def check(draw: random.Random) -> None:
        generator = torch.Generator().manual_seed(draw.randint(0, 10**6))
        logits = [torch.randn(draw.randint(1, 6), 20, generator=generator, dtype=torch.float64) for _ in range(4)]
        targets = [torch.randint(20, (len(row),), generator=generator) for row in logits]
        mean = torch.nn.functional.cross_entropy(torch.cat(logits), torch.cat(targets))
        picked = [
            row.log_softmax(-1).gather(1, target[:, None])[:, 0].tolist()
            for row, target in zip(logits, targets, strict=True)
        ]
        assert perplexity.compute(predictions=picked) == {"perplexity": pytest.approx(float(mean.exp()))}
        written = ["ß" * len(row) for row in picked]
        tokens, read = sum(map(len, picked)), sum(len(text.encode()) for text in written)
        expected = float(mean) * tokens / np.log(2) / read
        assert bits.compute(predictions=picked, references=written) == {"bits_per_byte": pytest.approx(expected)}

    each_case(check)


def test_calibration_error_is_that_of_torchmetrics() -> None:
    module = CalibrationError(keep_in_memory=True)

    def check(draw: random.Random) -> None:
        sure = [draw.random() for _ in range(30)]
        right = [draw.random() < one for one in sure]
        theirs = binary_calibration_error(torch.tensor(sure, dtype=torch.float64), torch.tensor(right), n_bins=15)
        assert module.compute(predictions=sure, references=right) == {"ece": pytest.approx(float(theirs), abs=1e-6)}

    each_case(check)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        # 4 of 5 words; 2 of 4 bigrams, of which the reference has 3; all 4 words in order, though not side by side.
        pytest.param("It is very cold outside", {"rouge1": 8 / 9, "rouge2": 4 / 7, "rougeL": 8 / 9}, id="a word more"),
        pytest.param("It is not cold outside", {"rouge1": 8 / 9, "rouge2": 4 / 7, "rougeL": 8 / 9}, id="negation"),
        pytest.param("cold cold cold cold", {"rouge1": 1 / 4, "rouge2": 0, "rougeL": 1 / 4}, id="repetition"),
        pytest.param("outside cold it is", {"rouge1": 1, "rouge2": 1 / 3, "rougeL": 1 / 2}, id="word order"),
    ],
)
def test_rouge_on_sentences_that_are_traps(said: str, expected: dict[str, float]) -> None:
    found = Rouge(keep_in_memory=True).compute(predictions=[said], references=[REFERENCE])
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    if said == "It is very cold outside":
        assert (found["rougeL_recall"], found["rougeL_precision"]) == pytest.approx((4 / 4, 4 / 5))
