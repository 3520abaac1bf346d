"""Where a stage tells how far it is; who listens decides what to show."""

import time
from collections.abc import Callable
from typing import Protocol

from finetune_api.report import Progress, Stage


class Sink(Protocol):
    """Listens to the progress of a run."""

    def report(self, progress: Progress) -> None:
        """Take note of one moment; called a few times a second at most, must return quickly."""


class Reporter:
    """Tells a sink about one stage, at most ``per_second`` times a second, the last moment always."""

    def __init__(self, sink: Sink, stage: Stage, per_second: float = 4.0, clock: Callable[[], float] = time.monotonic):
        self._sink = sink
        self._stage = stage
        self._pause = 1 / per_second
        self._clock = clock
        self._last = float("-inf")

    def say(self, message: str) -> None:
        """Report what is being done now."""
        self._sink.report(Progress(stage=self._stage, message=message))

    def share(self, message: str, share: float) -> None:
        """Report that ``share`` (0 to 1) of what ``message`` names is done."""
        if self._due() or share >= 1:
            self._sink.report(Progress(stage=self._stage, message=message, percent=100 * share))

    def tell(self, progress: Progress, always: bool = False) -> None:
        """Report a moment built by the caller."""
        if always or self._due():
            self._sink.report(progress)

    def _due(self) -> bool:
        now = self._clock()
        if now - self._last < self._pause:
            return False
        self._last = now
        return True
