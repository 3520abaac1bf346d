"""Whether the losses of the first steps show that the learning rate is too high. Pure."""

from collections.abc import Sequence

from finetune_api.report import LossPoint

FIRST_STEPS = 20
"""Steps, from the first one and again from the end of the warm-up, whose losses are looked at one by one."""
_IN_A_ROW = 8
_MARGIN = 1.25
_MARGIN_OVER_ONE = 2.0
"""Where a single loss, which may be low by chance, says where training began."""
# Simulated for losses that only fluctuate and learn nothing: 1.5 % of runs get so far where a loss is the mean of eight
# answers whose deviation is as large as their mean; of those that learn from one answer at a time, 5 % (12 % without a
# warm-up). Any fall makes it less. A running mean alone is reached by one outlier; held against its own scatter, it
# misses what really happens at such a rate: losses that jump between two and ten times the first one.


def is_looked_at(step: int, warm_up: int) -> bool:
    """Whether the loss of ``step`` (from 1) is needed by itself; ``warm_up`` is the number of its steps."""
    return step <= FIRST_STEPS or warm_up < step <= last_step(warm_up)


def last_step(warm_up: int) -> int:
    """Return the last step that is looked at."""
    return warm_up + FIRST_STEPS


def find_high_rate(curve: Sequence[LossPoint], warm_up: int) -> str | None:
    """Return a warning where `_IN_A_ROW` losses are all clearly above those that training began with.

    Args:
        curve: in the order of the steps; points without a loss are passed over.
        warm_up: steps of the warm-up.
    """
    losses = [(point, point.loss) for point in curve if point.loss is not None and point.step <= last_step(warm_up)]
    values = [loss for _, loss in losses]
    # A warm-up begins with a rate of 0, and so the second loss is the untouched model's as well.
    untouched, margin = (2, _MARGIN) if warm_up else (1, _MARGIN_OVER_ONE)
    beginning = values[:untouched]
    for start in range(untouched, len(values) - _IN_A_ROW + 1):
        window = values[start : start + _IN_A_ROW]
        if min(window) > margin * max(beginning):
            return _warning(_mean(beginning), _mean(window), losses[start + _IN_A_ROW - 1][0])
    return None


def _warning(began: float, rose: float, point: LossPoint) -> str:
    rate = "" if point.learning_rate is None else f" at a learning rate of {point.learning_rate:.3g}"
    return (
        f"the loss rose from {began:.3g} to {rose:.3g} by step {point.step}{rate}: the rate is too high, and the model "
        "may have lost what the base knew. Lower spec.training.learningRate, to a tenth first, or raise "
        "spec.training.warmupRatio."
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
