"""How several tasks share the training: which rows are seen, in which order. Pure; the seed is given.

Counts are exact: shares are turned into whole rows by largest remainders, and within a task no row is seen again
before all others were.
"""

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from finetune_api.spec import Mixing, MixingSpec


@dataclass(frozen=True, slots=True)
class TaskRows:
    """The training rows of one task."""

    name: str
    rows: Sequence[int]
    """Their places in the training split."""
    weight: float = 1.0
    """Only for strategy weights."""


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


def epoch_counts(tasks: Sequence[TaskRows], mixing: MixingSpec) -> dict[str, int]:
    """Return how many rows of each task one epoch holds; an epoch is as long as all capped tasks together."""
    cap = mixing.max_examples_per_task or math.inf
    length = int(sum(min(len(task.rows), cap) for task in tasks))
    return _allocate(length, task_shares(tasks, mixing))


def draw_rows(tasks: Sequence[TaskRows], mixing: MixingSpec, seed: int) -> Iterator[int]:
    """Yield places of rows for ever, epoch after epoch, each epoch shuffled."""
    counts = epoch_counts(tasks, mixing)
    streams = {task.name: _cycle(task.rows, f"{seed}/{task.name}") for task in tasks}
    order = random.Random(f"{seed}/order")
    while True:
        epoch = [next(streams[name]) for name, count in counts.items() for _ in range(count)]
        order.shuffle(epoch)
        yield from epoch


def _cycle(rows: Sequence[int], seed: str) -> Iterator[int]:
    """Yield all rows in a random order, then all again in another one."""
    generator = random.Random(seed)
    while True:
        shuffled = list(rows)
        generator.shuffle(shuffled)
        yield from shuffled


def _allocate(total: int, shares: Mapping[str, float]) -> dict[str, int]:
    """Return whole numbers that add up to ``total``, each less than 1 away from its share of it."""
    counts = {name: math.floor(total * share) for name, share in shares.items()}
    remainders = sorted(shares, key=lambda name: counts[name] - total * shares[name])
    for name in remainders[: total - sum(counts.values())]:
        counts[name] += 1
    return counts
