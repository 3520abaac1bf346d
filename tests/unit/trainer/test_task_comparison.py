"""A task with labels whose answers are written: what scikit-learn makes of them, answers that are no label included."""

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

from finetune_trainer.examiner import Answers
from finetune_trainer.example import Example
from finetune_trainer.paper import Paper
from finetune_trainer.split import Split
from finetune_trainer.task_comparison import confusions
from finetune_trainer.task_figure import figures_of

LABELS = ("good", "bad", "mixed")
OTHER = "other"
EXPECTED = ["good", "good", "bad", "bad", "mixed", "mixed", "good"]
WRITTEN = [" good", "bad", "bad\n", "no idea", "Mixed", "mixed", ""]
HEARD = ["good", "bad", "bad", OTHER, OTHER, "mixed", OTHER]
"""``WRITTEN`` as labels: white space aside, and not what only resembles one."""


def make_answers(texts: list[str]) -> Answers:
    rows = [
        Example(task="t", row=number, template=0, prompt="", completion=f" {label}", key="", values={})
        for number, label in enumerate(EXPECTED)
    ]
    return Answers(rows, [np.array([-1.0])] * len(rows), ["good"] * len(rows), texts)


def make_paper(labels: tuple[str, ...] = LABELS) -> Paper:
    return Paper(
        task="t",
        labels=labels,
        metrics=("generated_accuracy", "perplexity"),
        templates=1,
        choice=[],
        choice_split=Split.VALIDATION,
        test=make_answers(WRITTEN).examples,
        shown=[],
        commonest="good",
    )


def test_labels_in_writing_count_as_scikit_learn_counts_them():
    figures = {figure.name: figure.value for figure in figures_of(make_paper(), make_answers(WRITTEN))}
    assert figures["generated_accuracy"] == pytest.approx(accuracy_score(EXPECTED, HEARD))
    expected = f1_score(EXPECTED, HEARD, labels=LABELS, average="macro", zero_division=0)
    assert figures["generated_macro_f1"] == pytest.approx(expected)


def test_answers_that_are_no_label_have_a_row_and_a_column():
    (found,) = confusions(make_paper(), make_answers(EXPECTED), make_answers(WRITTEN))
    assert found.generated
    assert found.labels == (*LABELS, OTHER)
    assert np.array_equal(found.base, confusion_matrix(EXPECTED, EXPECTED, labels=found.labels))
    assert np.array_equal(found.tuned, confusion_matrix(EXPECTED, HEARD, labels=found.labels))


def test_a_label_that_is_called_other_is_told_from_other_answers():
    (found,) = confusions(make_paper((*LABELS, OTHER)), make_answers(EXPECTED), make_answers(WRITTEN))
    assert found.labels == (*LABELS, OTHER, "none of these 4")
    assert np.array(found.tuned)[:, -1].sum() == HEARD.count(OTHER)
    assert np.array(found.tuned)[:, -2].sum() == 0
