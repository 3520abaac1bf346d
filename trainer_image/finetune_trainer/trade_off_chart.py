"""Lay out what tuning gains against what it costs, by scale or step: numbers in, coordinates out. Knows no HTML."""

from dataclasses import dataclass

from finetune_api.report import TradeOff, TradeOffPoint
from finetune_api.spec import ForgettingRemedy
from finetune_trainer.axis import Tick, label_of, round_values

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 66, 40, 24, 54


@dataclass(frozen=True, slots=True)
class Mark:
    """One scale, or one checkpoint."""

    across: float
    down: float
    label: str
    within_budget: bool
    chosen: bool


@dataclass(frozen=True, slots=True)
class TradeOffChart:
    """Everything the drawing needs, in the units of its view box."""

    line: str
    """Points of a polyline, weakest or earliest first."""
    marks: tuple[Mark, ...]
    changes: tuple[Tick, ...]
    """Across: change in general accuracy."""
    gains: tuple[Tick, ...]
    budget: float
    """Across: where the largest allowed drop is."""
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def label_of_point(found: TradeOff, point: TradeOffPoint) -> str:
    """Return a point's scale, or its checkpoint's step."""
    if found.remedy == ForgettingRemedy.EARLIER_CHECKPOINT:
        return "end" if point.step is None else f"{point.step:,}"
    return f"{point.scale:g}"


def lay_out_trade_off(found: TradeOff) -> TradeOffChart:
    """Return the layout; the axes reach the budget and no gain as well as every point."""
    changes = round_values(
        min(-found.max_drop, *(point.change for point in found.points)),
        max(0.0, *(point.change for point in found.points)),
        whole=False,
    )
    gains = round_values(
        min(0.0, *(point.gain for point in found.points)),
        max(0.0, *(point.gain for point in found.points)),
        whole=False,
    )

    def place(change: float, gain: float) -> tuple[float, float]:
        across = LEFT + (change - changes[0]) / (changes[-1] - changes[0]) * (WIDTH - LEFT - RIGHT)
        down = HEIGHT - BOTTOM - (gain - gains[0]) / (gains[-1] - gains[0]) * (HEIGHT - TOP - BOTTOM)
        return round(across, 1), round(down, 1)

    marks = tuple(
        Mark(
            *place(point.change, point.gain),
            label=label_of_point(found, point),
            within_budget=point.within_budget,
            chosen=(point.scale, point.step) == (found.scale, found.step),
        )
        for point in found.points
    )
    return TradeOffChart(
        line=" ".join(f"{mark.across:g},{mark.down:g}" for mark in marks),
        marks=marks,
        changes=tuple(Tick(place(x, gains[0])[0], label_of(x, changes[1] - changes[0])) for x in changes),
        gains=tuple(Tick(place(changes[0], y)[1], label_of(y, gains[1] - gains[0])) for y in gains),
        budget=place(-found.max_drop, gains[0])[0],
    )
