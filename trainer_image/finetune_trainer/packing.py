"""Lay token sequences out in one row so that nothing is computed twice and nothing is padded.

A causal model's hidden state at a position depends on the tokens up to it alone. Sequences that begin alike (the
system prompt, the template's instruction, the prompt before each candidate label) therefore share those states, and
their gradients add up. A `Pack` is the prefix tree of its sequences written depth first into one row. Attention is
computed per sequence (see `finetune_trainer.attention`), everything else once per token of the tree. This is exact,
not an approximation, for models in which attention alone moves information between positions; the probe in
`finetune_trainer.layout` finds out whether a model is one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Pack:
    """Several sequences in one row of ``length`` tokens; tokens that sequences begin with in common stand once."""

    tokens: Indices
    """``[length]``."""
    positions: Indices
    """``[length]``: a token's index in its own sequence."""
    places: tuple[Indices, ...]
    """For every sequence, in the order given, where in the row each of its tokens stands."""
    branches: tuple[Indices, ...]
    """The places of the sequences that no other one goes on from; every token stands in one of them."""

    def gather(self) -> Indices:
        """Return ``[branches, longest]``: where each token of each branch stands, 0 behind a branch's end."""
        longest = max(len(branch) for branch in self.branches)
        rows = np.zeros((len(self.branches), longest), dtype=np.int64)
        for row, branch in zip(rows, self.branches, strict=True):
            row[: len(branch)] = branch
        return rows

    def scatter(self) -> Indices:
        """Return ``[length]``: for every token of the row one place in the flattened ``gather`` that holds it."""
        longest = max(len(branch) for branch in self.branches)
        cells = np.empty(len(self.tokens), dtype=np.int64)
        for number, branch in enumerate(self.branches):
            cells[branch] = number * longest + np.arange(len(branch))
        return cells


def pack(sequences: Sequence[Sequence[int]]) -> Pack:
    """Write the prefix tree of ``sequences`` into one row.

    Raises:
        ValueError: there is no sequence, or one of them is empty.
    """
    if not sequences or not all(sequences):
        raise ValueError("a pack needs at least one sequence, and each needs at least one token")
    tokens: list[int] = []
    positions: list[int] = []
    places: dict[int, Indices] = {}
    branches: list[Indices] = []
    path: list[int] = []  # where the tokens of the previous sequence stand
    previous: Sequence[int] = ()
    # In sorted order a sequence shares its longest common beginning with its predecessor.
    for number in sorted(range(len(sequences)), key=lambda number: tuple(sequences[number])):
        sequence = sequences[number]
        shared = shared_length(previous, sequence)
        if branches and shared == len(previous):
            branches.pop()
        del path[shared:]
        path.extend(range(len(tokens), len(tokens) + len(sequence) - shared))
        tokens.extend(sequence[shared:])
        positions.extend(range(shared, len(sequence)))
        places[number] = np.array(path)
        branches.append(places[number])
        previous = sequence
    return Pack(
        np.array(tokens),
        np.array(positions),
        tuple(places[number] for number in range(len(sequences))),
        tuple(branches),
    )


def shared_length(left: Sequence[int], right: Sequence[int]) -> int:
    """Return how many tokens both begin with in common."""
    for length, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return length
    return min(len(left), len(right))
