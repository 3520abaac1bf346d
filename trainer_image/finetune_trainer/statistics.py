"""Say how sure a difference between two models is that were measured on the same rows. Pure; every seed is given."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

FEW_ROWS = 30
"""Below this many rows a bootstrap interval is known to be too narrow; no verdict should rest on it."""

# 4M draws of 8 bytes: memory stays below 100 MB however many rows there are.
_DRAWS_AT_ONCE = 4_000_000


@dataclass(frozen=True, slots=True)
class Interval:
    """Where the true difference lies, at the confidence asked for."""

    low: float
    high: float


def paired_bootstrap(
    base: ArrayLike, tuned: ArrayLike, seed: int, samples: int = 2000, confidence: float = 0.95
) -> Interval:
    """Return the percentile interval of ``mean(tuned) - mean(base)``, resampling rows and keeping pairs together.

    Args:
        base: ``[rows]``, the base model's score of each row.
        tuned: ``[rows]``, the tuned model's score of the same rows in the same order.
        seed: equal seeds give equal intervals.
        samples: how often the rows are drawn again.
        confidence: share of the drawn differences inside the interval.

    Raises:
        ValueError: there is no row, or the two differ in length.
    """
    rows = _paired_columns(base, tuned)
    means = _resampled_sums(rows, seed, samples) / len(rows)
    return _percentiles(means[:, 1] - means[:, 0], confidence)


def paired_bootstrap_perplexity(
    base: tuple[ArrayLike, ArrayLike],
    tuned: tuple[ArrayLike, ArrayLike],
    seed: int,
    samples: int = 2000,
    confidence: float = 0.95,
) -> Interval:
    """Return the percentile interval of the difference in perplexity, resampling rows with all their tokens.

    Args:
        base: two arrays ``[rows]``: each row's summed negative log-likelihood in nats, and its number of tokens.
        tuned: the same of the tuned model, rows in the same order.
        seed: equal seeds give equal intervals.
        samples: how often the rows are drawn again.
        confidence: share of the drawn differences inside the interval.

    Raises:
        ValueError: there is no row, or the arrays differ in length.
    """
    sums = _resampled_sums(_paired_columns(*base, *tuned), seed, samples)
    with np.errstate(over="ignore"):
        perplexities = np.exp(sums[:, [0, 2]] / sums[:, [1, 3]])
    return _percentiles(perplexities[:, 1] - perplexities[:, 0], confidence)


def _paired_columns(*columns: ArrayLike) -> Floats:
    arrays = [np.asarray(column, dtype=np.float64) for column in columns]
    shapes = {array.shape for array in arrays}
    if len(shapes) != 1 or arrays[0].ndim != 1 or len(arrays[0]) == 0:
        raise ValueError(f"a paired bootstrap needs rows, equally many of each; got shapes {sorted(shapes)}")
    return np.stack(arrays, axis=1)


def _resampled_sums(rows: Floats, seed: int, samples: int) -> Floats:
    """Return ``[samples, columns]``: column sums of rows drawn with replacement, all columns by the same draw."""
    generator = np.random.default_rng(seed)
    step = max(1, _DRAWS_AT_ONCE // rows.size)
    parts = []
    for start in range(0, samples, step):
        drawn = generator.integers(len(rows), size=(min(step, samples - start), len(rows)))
        parts.append(rows[drawn].sum(axis=1))
    return np.concatenate(parts)


def _percentiles(differences: Floats, confidence: float) -> Interval:
    tail = (1 - confidence) / 2
    low, high = np.quantile(differences, [tail, 1 - tail])
    return Interval(float(low), float(high))
