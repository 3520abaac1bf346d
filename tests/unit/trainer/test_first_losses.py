"""A learning rate that is too high shows in the first losses; noise, few steps and a fall do not look like it."""

import random
from collections.abc import Sequence
from itertools import pairwise

import pytest

from finetune_api.report import LossPoint
from finetune_trainer.first_losses import FIRST_STEPS, find_high_rate, is_looked_at

RNG = random.Random(3)
NOISY = [2 * RNG.uniform(0.6, 1.4) for _ in range(FIRST_STEPS)]
CHAOS = [6.7, 10.4, 24.0, 49.2, 17.2, 70.4, 31.3, 40.3, 28.9, 28.1]
"""Tuned in full at a rate of 1."""


def curve(losses: Sequence[float], warm_up: int = 0) -> list[LossPoint]:
    return [
        LossPoint(step=step, loss=loss, learning_rate=0.5 * min(1.0, (step - 1) / max(1, warm_up)))
        for step, loss in enumerate(losses, start=1)
    ]


def fall_and_rise(steps: int) -> list[float]:
    """A loss that falls while the rate is still low, and climbs to three times its beginning behind ``steps``."""
    return [3 - step / steps for step in range(steps)] + [2 + step for step in range(FIRST_STEPS)]


QUIET = {
    "it falls": ([3 * 0.9**step for step in range(FIRST_STEPS)], 1),
    "it is flat, and a batch is a few rows": (NOISY, 1),
    "one batch is far off": ([3.0] * 9 + [40.0] + [3.0] * 10, 1),
    "it is a little higher": ([2.0] * 2 + [2.4] * 18, 1),
    "it rises for a moment and comes back": ([3.0, 3.0, 9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.5, 3.2, *[3.0] * 10], 1),
    "too few steps to tell": (CHAOS[:9], 0),
    "it rises long behind the warm-up": ([3.0] * FIRST_STEPS + [3.0] * 5 + [9.0] * 20, 5),
    "no step at all": ([], 0),
}


@pytest.mark.parametrize("losses, warm_up", QUIET.values(), ids=QUIET)
def test_nothing_is_said_where(losses: list[float], warm_up: int):
    assert find_high_rate(curve(losses, warm_up), warm_up) is None


RISES = {
    "at once": (CHAOS, 0, "rose from 6.7 to 36.2 by step 10 at a learning rate of 0.5:"),
    "to where it stays": ([3.0] + [9.0] * 19, 0, "rose from 3 to 9 by step 9"),
    "slowly": ([3.0 + step / 4 for step in range(FIRST_STEPS)], 1, "rose from 3.12 to 5.12 by step 13"),
    "only behind a warm-up": (fall_and_rise(60), 60, "rose from 2.99 to 7.5 by step 70 at a learning rate of 0.5:"),
}


@pytest.mark.parametrize("losses, warm_up, says", RISES.values(), ids=RISES)
def test_a_warning_names_losses_step_rate_and_remedy_where_the_loss_rises(losses: list[float], warm_up: int, says: str):
    warning = find_high_rate(curve(losses, warm_up), warm_up)
    assert warning is not None
    assert says in warning
    assert "Lower spec.training.learningRate" in warning


def test_points_of_the_curve_without_a_loss_are_passed_over():
    looks = [LossPoint(step=step, validation_loss=1.0) for step in (5, 10)]
    mixed = sorted([*curve(CHAOS), *looks], key=lambda point: point.step)
    assert find_high_rate(mixed, 0) == find_high_rate(curve(CHAOS), 0)


def test_the_first_steps_and_those_behind_the_warm_up_are_looked_at():
    looked_at = [step for step in range(1, 1000) if is_looked_at(step, 300)]
    assert [looked_at[0], looked_at[-1]] == [1, 320]
    assert [pair for pair in pairwise(looked_at) if pair[1] - pair[0] > 1] == [(FIRST_STEPS, 301)]
