"""Say how sure a difference between two models is that were measured on the same rows. Pure; every seed is given."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

FEW_ROWS = 30
"""Below this many rows a bootstrap interval is known to be too narrow; no verdict should rest on it."""

FEW_GROUPS = 10
"""Below this many groups not even an interval widened by `widened_confidence` can be relied on."""

# 4M draws of 8 bytes: memory stays below 100 MB however many rows there are.
_DRAWS_AT_ONCE = 4_000_000


@dataclass(frozen=True, slots=True)
class Interval:
    """Where the true difference lies, at the confidence asked for."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Difference:
    """Tuned minus base of one figure: as measured, and as it comes out when the rows are drawn again."""

    measured: float
    drawn: Floats
    """``[samples]``, sorted."""
    base: Interval | None = None
    """Where the base's own figure lies, with 95 % confidence; absent where a draw is no number. Two such intervals that
    overlap do not tell that the models are alike: that is what the difference is for."""
    tuned: Interval | None = None
    """The same of the tuned model."""

    def interval(self, confidence: float = 0.95) -> Interval:
        """Return the percentile interval with ``confidence`` inside it."""
        return _percentiles(self.drawn, confidence)

    def lower_bound(self, confidence: float) -> float:
        """Return what the difference exceeds with one-sided ``confidence``."""
        return float(np.quantile(self.drawn, 1 - confidence))

    def upper_bound(self, confidence: float) -> float:
        """Return what the difference stays below with one-sided ``confidence``."""
        return float(np.quantile(self.drawn, confidence))

    @property
    def p_value(self) -> float:
        """Two-sided, of no difference: how often a draw is on the other side of zero; never 0, samples being finite.

        NaN when the difference is unknown.
        """
        if np.isnan(self.drawn).any():
            return math.nan
        tail = min(np.count_nonzero(self.drawn <= 0), np.count_nonzero(self.drawn >= 0))
        return min(1.0, 2 * (int(tail) + 1) / (len(self.drawn) + 1))


def paired_difference(
    base: Floats,
    tuned: Floats,
    combine: Callable[[Floats], Floats],
    seed: int,
    groups: Sequence[object] | None = None,
    samples: int = 2000,
) -> Difference:
    """Return how a figure of the tuned model differs from the base's, rows drawn again with both models' parts.

    Args:
        base: ``[rows, parts]``, what each row adds to the base's figure; see `finetune_trainer.figure`.
        tuned: the same of the tuned model, rows in the same order.
        combine: ``[…, parts]`` sums to ``[…]`` values.
        seed: equal seeds give equal differences.
        groups: ``[rows]``; rows of one group (a film, a customer) are drawn together, because they are alike.
        samples: how often the rows or groups are drawn again.

    Raises:
        ValueError: there is no row, or the two differ in shape.
    """
    if base.shape != tuned.shape or base.ndim != 2 or len(base) == 0:
        raise ValueError(f"a paired bootstrap needs rows, equally many of each; got {base.shape} and {tuned.shape}")
    parts = base.shape[1]
    both = np.concatenate([base, tuned], axis=1)
    if groups is not None:
        both = _sums_by_group(both, groups)
    sums = _resampled_sums(both, seed, samples)
    # Two infinite perplexities have no difference.
    with np.errstate(invalid="ignore"):
        of_base, of_tuned = combine(sums[:, :parts]), combine(sums[:, parts:])
        drawn = of_tuned - of_base
        measured = combine(tuned.sum(axis=0)) - combine(base.sum(axis=0))
    known = np.sort(drawn[~np.isnan(drawn)])
    return Difference(
        float(measured), known if len(known) else np.array([np.nan]), _own_interval(of_base), _own_interval(of_tuned)
    )


def adjusted_p_values(p_values: Sequence[float]) -> list[float]:
    """Return Holm's step-down adjustment: with many figures, some look better by luck (jstor.org/stable/4615733)."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def widened_confidence(confidence: float, groups: int) -> float:
    """Return the one-sided confidence at which to read a bootstrap over few groups, so that it holds what was asked.

    Percentiles of draws from few groups lie too close together, as a normal interval does where Student's t is due.
    Hesterberg's expanded percentiles (doi:10.1080/00031305.2015.1089789) make up for both that and the draws' variance,
    which is too small by (groups - 1) / groups. From `FEW_GROUPS` on, the series for t is exact to 0.002.
    """
    normal, free = NormalDist(), groups - 1
    z = normal.inv_cdf(confidence)
    student = z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
    return normal.cdf(student * math.sqrt(groups / free))


def rows_needed(difference: Difference, rows: int, margin: float, confidence: float, power: float = 0.9) -> int | None:
    """Return how many test rows would show with ``power`` that the difference exceeds ``margin``; absent when none do.

    By the normal approximation, taking the measured difference for the true one.
    """
    gain = difference.measured - margin
    error = float(difference.drawn.std())
    if gain <= 0 or not np.isfinite(error):
        return None
    normal = NormalDist()
    return max(1, math.ceil(rows * (error * (normal.inv_cdf(confidence) + normal.inv_cdf(power)) / gain) ** 2))


def _sums_by_group(rows: Floats, groups: Sequence[object]) -> Floats:
    number = {group: index for index, group in enumerate(dict.fromkeys(groups))}
    sums = np.zeros((len(number), rows.shape[1]))
    np.add.at(sums, [number[group] for group in groups], rows)
    return sums


def _resampled_sums(rows: Floats, seed: int, samples: int) -> Floats:
    """Return ``[samples, columns]``: column sums of rows drawn with replacement, all columns by the same draw."""
    generator = np.random.default_rng(seed)
    step = max(1, _DRAWS_AT_ONCE // rows.size)
    parts = []
    for start in range(0, samples, step):
        drawn = generator.integers(len(rows), size=(min(step, samples - start), len(rows)))
        parts.append(rows[drawn].sum(axis=1))
    return np.concatenate(parts)


def _own_interval(drawn: Floats) -> Interval | None:
    return _percentiles(drawn, 0.95) if np.isfinite(drawn).all() else None


def _percentiles(differences: Floats, confidence: float) -> Interval:
    tail = (1 - confidence) / 2
    low, high = np.quantile(differences, [tail, 1 - tail])
    return Interval(float(low), float(high))
