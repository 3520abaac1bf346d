"""What early stopping watches beside the loss."""

from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import sentinel

import numpy as np
import pytest
from numpy.typing import NDArray

from finetune_api.resolve import resolve
from finetune_trainer.watched import Watched, find_watched

from ..builders import make_job


class FixedScorer:
    def __init__(self, sums: Sequence[float]) -> None:
        self._sums = sums

    def token_logprobs(
        self, items: Sequence[object], on_progress: Callable[[float], None] = lambda share: None
    ) -> list[NDArray[np.float64]]:
        return [np.array([value]) for value in self._sums]


@pytest.mark.parametrize(
    ("metric", "expected"),
    # Two of three rows; F1 of 2/3 for a, 2/3 for b, and nobody says or expects c.
    [("sentiment.accuracy", 2 / 3), ("sentiment.macro_f1", (2 / 3 + 2 / 3 + 0) / 3)],
)
def test_the_likeliest_label_of_each_row_counts(metric: str, expected: float):
    watched = Watched(metric, ("a", "b", "c"), ["a", "b", "a"], [])
    scorer = FixedScorer([-1, -2, -9, -5, -4, -9, -3, -2, -9])
    assert watched.measure(scorer) == pytest.approx(expected)


@pytest.mark.parametrize("stopping", [{}, {"spec.training.earlyStopping": {"patience": 2}}], ids=["nothing", "loss"])
def test_without_a_tasks_figure_nothing_is_asked_for_it(stopping: dict[str, Any]):
    assert find_watched(resolve(make_job(stopping)), sentinel.dataset, sentinel.renderer) is None
