"""Round numbers along the axis of a chart. Pure; knows no HTML."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tick:
    """A labelled place on an axis."""

    at: float
    label: str


def round_values(low: float, high: float, whole: bool) -> list[float]:
    """Return about five round numbers around the range; the first is at or below it, the last at or above."""
    rough = (high - low) / 4 or max(abs(high) / 4, 1e-3)
    magnitude = 10 ** math.floor(math.log10(rough))
    step = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= rough * 0.999)
    if whole:
        step = max(1, round(step))
    start = math.floor(low / step)
    end = max(math.ceil(high / step), start + 1)
    return [index * step for index in range(start, end + 1)]


def label_of(value: float, step: float) -> str:
    """Return ``value`` with the digits that tell it from its neighbours, ``step`` away."""
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value:.{min(digits, 6)}f}"
