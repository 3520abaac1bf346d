"""Draws rows that are shown answered before a question: every label as often as can be, none that is like it."""

import random
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest

import numpy as np
import numpy.typing as npt

from finetune_trainer.example import Example

_NO_CLUSTER = -1


class Drawer:
    """Draws training rows of one task by their number: memory holds two numbers of each."""

    def __init__(self, rows: Sequence[Example], labels: Sequence[str]) -> None:
        self._rows = rows
        numbers = {label: number for number, label in enumerate(labels)}
        answers, clusters = array("q"), array("q")
        for row in rows:
            answers.append(numbers[row.completion.strip()] if numbers else 0)
            clusters.append(_NO_CLUSTER if row.cluster is None else row.cluster)
        self._clusters = np.array(clusters)
        found = np.array(answers)
        members = [np.flatnonzero(found == label) for label in range(len(labels) or 1)]
        self._pools = [_Pool.of(places, self._clusters[places]) for places in members]

    def draw(self, count: int, generator: random.Random, cluster: int | None = None) -> list[Example]:
        """Return ``count`` rows, or all there are, that are not of ``cluster``; every label as often as can be."""
        pools = generator.sample(self._pools, len(self._pools))
        turns = zip_longest(*(pool.places(generator, cluster) for pool in pools))
        drawn = list(islice((place for turn in turns for place in turn if place is not None), count))
        # Neighbours of one label would teach that labels come in runs.
        generator.shuffle(drawn)
        return [self._rows[place] for place in drawn]

    @property
    def largest_cluster(self) -> int:
        """Rows of the largest cluster."""
        return int(np.unique(self._clusters, return_counts=True)[1].max())

    def __len__(self) -> int:
        return len(self._rows)


@dataclass(frozen=True, slots=True)
class _Pool:
    """Rows of one label, or of an open task all; those of one cluster lie side by side."""

    rows: npt.NDArray[np.int64]
    clusters: npt.NDArray[np.int64]
    """Ascending."""

    @classmethod
    def of(cls, rows: npt.NDArray[np.int64], clusters: npt.NDArray[np.int64]) -> "_Pool":
        order = np.argsort(clusters, kind="stable")
        return cls(rows[order], clusters[order])

    def places(self, generator: random.Random, cluster: int | None) -> Iterator[int]:
        """Yield the rows that are not of ``cluster`` in a random order, drawn one by one."""
        first, last = (0, 0) if cluster is None else np.searchsorted(self.clusters, [cluster, cluster + 1]).tolist()
        for number in _shuffled(len(self.rows) - (last - first), generator):
            yield int(self.rows[number if number < first else number + last - first])


def _shuffled(size: int, generator: random.Random) -> Iterator[int]:
    """Yield the numbers below ``size`` in a random order; the first ones cost no more than they are."""
    moved: dict[int, int] = {}
    for last in range(size - 1, -1, -1):
        place = generator.randrange(last + 1)
        yield moved.get(place, place)
        moved[place] = moved.pop(last, last)
