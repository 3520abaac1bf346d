"""How several tasks share the training: which rows are seen, in which order. Pure; the seed is given.

Counts are exact: shares are turned into whole rows by largest remainders, and within a task no row is seen again
before all others were. Any epoch can be asked for by its number, so a resumed run draws what it would have drawn.
"""

import math
import random
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Generic, TypeVar

import numpy as np

from finetune_api.spec import REPLAY_TASK, Mixing, MixingSpec

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TaskRows:
    """The training rows of one task."""

    name: str
    rows: Sequence[int]
    """Their places in the training split."""
    weight: float = 1.0
    """Only for strategy weights."""


@dataclass(frozen=True)
class Mixture:
    """What every epoch is made of."""

    tasks: tuple[TaskRows, ...]
    shares: Mapping[str, float]
    """Of the rows seen, by task; they add up to 1."""
    counts: Mapping[str, int]
    """Rows of each task in one epoch."""
    seed: int

    @property
    def epoch_length(self) -> int:
        """Rows in one epoch."""
        return sum(self.counts.values())

    def epoch(self, number: int) -> Sequence[int]:
        """Return the places of the rows of the ``number``-th epoch from 0, shuffled."""
        places = array("q", chain.from_iterable(self._of_task(task, number) for task in self.tasks))
        random.Random(f"{self.seed}/order/{number}").shuffle(places)
        return places

    def drawn(self, seen: int) -> dict[str, int]:
        """Return how many of the first ``seen`` rows are of each task."""
        epochs, rest = divmod(seen, self.epoch_length)
        begun = np.array(self.epoch(epochs)[:rest])
        return {
            task.name: epochs * self.counts[task.name] + int(np.isin(begun, np.array(task.rows)).sum())
            for task in self.tasks
        }

    def _of_task(self, task: TaskRows, number: int) -> "array[int]":
        """Return what the epoch takes of a stream: all rows in a random order, then all again in another one."""
        count, size = self.counts[task.name], len(task.rows)
        start = number * count
        stream = array("q")
        first_cycle = start // size
        for cycle in range(first_cycle, math.ceil((start + count) / size)):
            shuffled = array("q", task.rows)
            random.Random(f"{self.seed}/{task.name}/{cycle}").shuffle(shuffled)
            stream += shuffled
        offset = start - first_cycle * size
        return stream[offset : offset + count]


class EpochRows(Generic[T]):
    """The rows of one epoch in its order, as a trainer's sequential sampler reads them.

    Behind them comes ``filler``, until their number is a multiple of ``together``, the rows that all workers take
    at once: else the last ones would be given rows of the epoch's beginning once more.
    """

    def __init__(self, rows: Sequence[T], mixture: Mixture, filler: T, together: int = 1) -> None:
        self._rows = rows
        self._mixture = mixture
        self._filler = filler
        self._together = together
        self._number = -1
        self.turn_to(0)

    def turn_to(self, number: int) -> None:
        """Go to the ``number``-th epoch, counted from 0."""
        if number != self._number:
            self._number, self._places = number, self._mixture.epoch(number)

    def __len__(self) -> int:
        return math.ceil(len(self._places) / self._together) * self._together

    def __getitem__(self, index: int) -> T:
        return self._rows[self._places[index]] if index < len(self._places) else self._filler


def plan_mixture(
    tasks: Sequence[TaskRows], mixing: MixingSpec, seed: int, replay: Sequence[int] = (), fraction: float = 0.0
) -> Mixture:
    """Return the mixture that the spec asks for; an epoch is as long as all capped tasks together, and the replay.

    Args:
        tasks: with at least one row each.
        mixing: the strategy.
        seed: orders the rows.
        replay: places of general rows that are mixed in besides.
        fraction: their share of the rows seen.
    """
    length = sum(min(len(task.rows), mixing.max_examples_per_task or len(task.rows)) for task in tasks)
    shares = task_shares(tasks, mixing)
    if not replay:
        return Mixture(tuple(tasks), shares, _allocate(length, shares), seed)
    replayed = max(1, round(length * fraction / (1 - fraction)))
    return Mixture(
        (*tasks, TaskRows(REPLAY_TASK, replay)),
        {name: share * (1 - fraction) for name, share in shares.items()} | {REPLAY_TASK: fraction},
        _allocate(length, shares) | {REPLAY_TASK: replayed},
        seed,
    )


def task_shares(tasks: Sequence[TaskRows], mixing: MixingSpec) -> dict[str, float]:
    """Return each task's share of the rows seen; they add up to 1.

    Sizes are capped at ``maxExamplesPerTask`` first. temperature raises them to 1/T (arXiv:1910.10683, section 3.5.2).
    """
    cap = mixing.max_examples_per_task or math.inf
    sizes = {task.name: min(len(task.rows), cap) for task in tasks}
    match mixing.strategy:
        case Mixing.PROPORTIONAL:
            parts = sizes
        case Mixing.EQUAL:
            parts = dict.fromkeys(sizes, 1.0)
        case Mixing.TEMPERATURE:
            parts = {name: size ** (1 / (mixing.temperature or 1.0)) for name, size in sizes.items()}
        case Mixing.WEIGHTS:
            parts = {task.name: task.weight for task in tasks}
    whole = sum(parts.values())
    return {name: part / whole for name, part in parts.items()}


def _allocate(total: int, shares: Mapping[str, float]) -> dict[str, int]:
    """Return whole numbers that add up to ``total``, each less than 1 away from its share of it."""
    counts = {name: math.floor(total * share) for name, share in shares.items()}
    remainders = sorted(shares, key=lambda name: counts[name] - total * shares[name])
    for name in remainders[: total - sum(counts.values())]:
        counts[name] += 1
    return counts
