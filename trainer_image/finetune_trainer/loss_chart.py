"""Lay out the loss curve: numbers in, coordinates out. Knows no HTML: the page's template draws."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from finetune_api.report import LossPoint
from finetune_trainer.axis import Tick, label_of, round_values

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 66, 26, 14, 54
MOST_POINTS = 400
"""More than a chart of this width can show; longer curves are averaged in equal stretches."""


@dataclass(frozen=True, slots=True)
class LossChart:
    """Everything the drawing needs, in the units of its view box."""

    training: str
    """Points of a polyline; empty without a training curve."""
    validation: str
    validation_dots: tuple[tuple[float, float], ...]
    steps: tuple[Tick, ...]
    losses: tuple[Tick, ...]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


Points = list[tuple[float, float]]


def lay_out_loss(curve: Sequence[LossPoint]) -> LossChart | None:
    """Return the layout, or nothing where there are not two points to connect; points that are not finite are left out.

    The axis of losses does not start at zero: what matters is the shape.
    """
    training = _thinned([(p.step, p.loss) for p in curve if p.loss is not None and math.isfinite(p.loss)])
    validation = [
        (float(p.step), p.validation_loss)
        for p in curve
        if p.validation_loss is not None and math.isfinite(p.validation_loss)
    ]
    points = training + validation
    if max(len(training), len(validation)) < 2:
        return None
    steps = round_values(min(x for x, _ in points), max(x for x, _ in points), whole=True)
    losses = round_values(min(y for _, y in points), max(y for _, y in points), whole=False)
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    low, high = losses[0], losses[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - first) / ((last - first) or 1) * (WIDTH - LEFT - RIGHT)
        down = HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM)
        return round(across, 1), round(down, 1)

    return LossChart(
        training=_polyline([place(*point) for point in training]),
        validation=_polyline([place(*point) for point in validation]),
        validation_dots=tuple(place(*point) for point in validation) if len(validation) <= 40 else (),
        steps=tuple(Tick(place(x, low)[0], f"{x:,.0f}") for x in steps if first <= x <= last),
        losses=tuple(Tick(place(first, y)[1], label_of(y, losses[1] - losses[0])) for y in losses),
    )


def lay_out_general_loss(curve: Sequence[LossPoint]) -> LossChart | None:
    """Return the layout of the loss on general prose, drawn as looks at a validation loss are."""
    return lay_out_loss([LossPoint(step=point.step, validation_loss=point.general_loss) for point in curve])


def _thinned(points: Sequence[tuple[int, float]]) -> Points:
    stretch = math.ceil(len(points) / MOST_POINTS) or 1
    parts = [points[start : start + stretch] for start in range(0, len(points), stretch)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


def _polyline(points: Points) -> str:
    return " ".join(f"{x:g},{y:g}" for x, y in points)
