"""The general suite: large enough to decide, no answer favoured, and judged as a non-inferiority test."""

from collections import Counter

import numpy as np
import pytest

from finetune_api.report import Retention
from finetune_trainer.forgetting import judge_retention
from finetune_trainer.general_suite import GeneralSuite, general_rows, general_texts
from finetune_trainer.statistics import Difference


def test_suite_is_large_enough_and_the_halves_are_apart() -> None:
    rows = general_rows()
    assert len(rows) >= 300
    assert Counter(row.task for row in rows).keys() == {"knowledge", "grammar", "counting"}
    assert len({(row.prompt, row.choices) for row in rows}) == len(rows)
    suite = GeneralSuite(rows, general_texts())
    development, deciding = set(suite.development().rows), set(suite.deciding().rows)
    assert not development & deciding
    assert development | deciding == set(rows)
    assert not {(row.task, row.group) for row in development} & {(row.task, row.group) for row in deciding}
    assert abs(len(development) - len(deciding)) <= 10
    assert len(general_texts()) >= 20


def test_no_place_among_the_choices_is_right_more_often_than_chance() -> None:
    places = Counter(row.right for row in general_rows() if row.task == "knowledge")
    assert max(places.values()) - min(places.values()) <= 8
    grammar = Counter(row.right for row in general_rows() if row.task == "grammar")
    assert grammar[0] == grammar[1]


@pytest.mark.parametrize("row", general_rows(), ids=lambda row: row.prompt)
def test_row_has_one_right_answer_among_different_ones(row) -> None:
    assert len(set(row.choices)) == len(row.choices) >= 2
    assert 0 <= row.right < len(row.choices)
    assert all(choice.startswith(" ") and choice.strip() for choice in row.choices)
    assert not row.prompt.endswith(" ")


@pytest.mark.parametrize(
    ("middle", "spread", "expected"),
    [
        (0.0, 0.005, Retention.PASSED),
        (-0.01, 0.001, Retention.PASSED),
        (-0.1, 0.01, Retention.FAILED),
        (-0.02, 0.01, Retention.INCONCLUSIVE),
        (0.0, 0.05, Retention.INCONCLUSIVE),
    ],
)
def test_retention(middle: float, spread: float, expected: Retention) -> None:
    drawn = np.sort(middle + np.random.default_rng(0).normal(0, spread, 4000))
    verdict, why = judge_retention(Difference(middle, drawn), 0.02, 0.95, 300, 300)
    assert verdict is expected
    assert "0.02 is allowed" in why
