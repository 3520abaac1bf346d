"""Where workers leave what they have to say, and learn whether to stop: an actor beside the program that asks for them.

Workers and the program run on different nodes; the program alone keeps the sink, the signals and the store.
"""

import asyncio
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from finetune_api.report import Progress, TrainingReport
from finetune_trainer.errors import FineTuneError

Outcome = TrainingReport | FineTuneError


@dataclass(frozen=True, slots=True)
class Stored:
    """A node has stored its part of a checkpoint."""

    step: int
    node: int
    nodes: int


Letter = Progress | Stored

MOST_CALLERS = 100_000
"""Of whom all may wait for each other; no room is kept for them."""


class Desk:
    """Takes letters until they are collected; keeps the first outcome."""

    def __init__(self) -> None:
        self._letters: list[Letter] = []
        self._outcome: Outcome | None = None
        self._stop = False
        self._meeting: asyncio.Barrier | None = None

    def leave(self, letter: Letter) -> None:
        """Put a letter behind the others."""
        self._letters.append(letter)

    def end(self, outcome: Outcome) -> None:
        """Say how training ended; what follows a first error is its consequence."""
        if self._outcome is None:
            self._outcome = outcome

    def collect(self, stop: bool) -> list[Letter]:
        """Take the letters; ``stop`` asks all workers to save and end."""
        self._stop = self._stop or stop
        letters, self._letters = self._letters, []
        return letters

    def outcome(self) -> Outcome | None:
        """Return how training ended; absent while it has not."""
        return self._outcome

    def is_stop_asked(self) -> bool:
        """Whether workers shall save and end."""
        return self._stop

    async def meet(self, everybody: int) -> None:
        """Answer all workers when the last of them has asked, however long that takes."""
        self._meeting = self._meeting or asyncio.Barrier(everybody)
        await self._meeting.wait()


def open_desk() -> Any:
    """Return the handle of a new desk on this node: with another one the program's only link would be lost."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(Desk).options(num_cpus=0, scheduling_strategy=here, max_concurrency=MOST_CALLERS).remote()


class DeskSink:
    """Passes a worker's progress to the desk."""

    def __init__(self, desk: Any) -> None:
        self._desk = desk

    def report(self, progress: Progress) -> None:
        """Send it; nobody waits for it to arrive."""
        self._desk.leave.remote(progress)
