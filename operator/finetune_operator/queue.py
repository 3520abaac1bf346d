"""A queue of keys: each at most once, never two workers at one key, failures come back later and later.

What controller-runtime's workqueue does, for one event loop.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

logger = logging.getLogger(__name__)

Key = tuple[str, str]
"""Namespace and name."""

FIRST_PAUSE_SECONDS = 0.2
LONGEST_PAUSE_SECONDS = 60.0
ROUNDS_WITHOUT_PAUSE = 10
"""How often a key may ask to be looked at again at once; one that never settles is slowed down like one that fails."""
NEW_TO_OTHERS = 7
"""How many keys that nobody has looked at yet go before one of the others, while both wait: neither waits for ever."""


class RetryError(Exception):
    """What was begun could not be done now, for a reason that is nobody's mistake; it is tried again."""


@dataclass(frozen=True, slots=True)
class Result:
    """How a look at a key ended."""

    settled: bool = True
    """False: something was done, look again at once."""
    after_seconds: float | None = None
    """Look again then although nothing happens."""


@dataclass(slots=True)
class _Retry:
    failures: int = 0
    rounds: int = 0

    @property
    def pause_seconds(self) -> float:
        excess = self.failures + max(0, self.rounds - ROUNDS_WITHOUT_PAUSE)
        # 2 ** 20 seconds are enough; more overflows a float after weeks of failures.
        return min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2.0 ** min(20, excess - 1)) if excess else 0.0


class Queue:
    """Runs ``process`` for every key that was added."""

    def __init__(
        self,
        process: Callable[[Key], Awaitable[Result]],
        workers: int,
        on_retry: Callable[[], None] = lambda: None,
        is_new: Callable[[Key], bool] = lambda key: False,
        is_listed: Callable[[Key], bool] = lambda key: True,
    ):
        """Process ``workers`` keys at the same time, those that are new first; call ``on_retry`` at every failure.

        A key that is not ``is_listed`` is kept until `release` finds that it is.
        """
        self._process = process
        self._workers = workers
        self._on_retry = on_retry
        self._is_new = is_new
        self._is_listed = is_listed
        self._new: deque[Key] = deque()
        self._waiting: deque[Key] = deque()
        """All others."""
        self._held: deque[Key] = deque()
        """Those that are not listed yet."""
        self._new_in_a_row = 0
        self._known: set[Key] = set()
        """Waiting, or to be looked at again as soon as its worker is done."""
        self._busy: set[Key] = set()
        self._timers: dict[Key, asyncio.TimerHandle] = {}
        self._retries: dict[Key, _Retry] = {}
        self._filled = asyncio.Event()
        self._stopping = False

    def __len__(self) -> int:
        return len(self._new) + len(self._waiting) + len(self._held)

    @property
    def busy(self) -> int:
        """Keys that are being looked at."""
        return len(self._busy)

    def release(self) -> None:
        """Look also at those keys that have been listed meanwhile."""
        held, self._held = self._held, deque()
        for key in held:
            self._append(key)

    def add(self, key: Key) -> None:
        """Look at ``key`` as soon as a worker is free."""
        if key in self._known:
            return
        self._known.add(key)
        if key not in self._busy:
            self._append(key)

    def add_after(self, key: Key, seconds: float) -> None:
        """Look at ``key`` after ``seconds``, or earlier when it was to be looked at earlier anyway."""
        loop = asyncio.get_running_loop()
        timer = self._timers.get(key)
        if timer is not None:
            if timer.when() <= loop.time() + seconds:
                return
            timer.cancel()
        self._timers[key] = loop.call_later(seconds, self._ring, key)

    def forget(self, key: Key) -> None:
        """Drop what is remembered of a key that is gone."""
        self._retries.pop(key, None)
        self._cancel_timer(key)

    async def run(self) -> None:
        """Process keys until `stop` is called, then let the workers end what they have begun."""
        async with asyncio.TaskGroup() as group:
            for number in range(self._workers):
                group.create_task(self._work(), name=f"worker {number}")

    def stop(self) -> None:
        """Begin no other key."""
        self._stopping = True
        for key in list(self._timers):
            self._cancel_timer(key)
        self._filled.set()

    def _ring(self, key: Key) -> None:
        del self._timers[key]
        self.add(key)

    def _cancel_timer(self, key: Key) -> None:
        if timer := self._timers.pop(key, None):
            timer.cancel()

    def _append(self, key: Key) -> None:
        if not self._is_listed(key):
            self._held.append(key)
            return
        (self._new if self._is_new(key) else self._waiting).append(key)
        self._filled.set()

    def _next(self) -> Key:
        if self._new and (self._new_in_a_row < NEW_TO_OTHERS or not self._waiting):
            self._new_in_a_row += 1
            return self._new.popleft()
        self._new_in_a_row = 0
        return self._waiting.popleft()

    async def _work(self) -> None:
        while True:
            await self._filled.wait()
            if self._stopping:
                return
            if not self._new and not self._waiting:
                self._filled.clear()
                continue
            key = self._next()
            self._known.discard(key)
            self._cancel_timer(key)
            self._busy.add(key)
            try:
                await self._look(key)
            finally:
                self._busy.discard(key)
                if key in self._known:
                    self._append(key)

    async def _look(self, key: Key) -> None:
        retry = self._retries.setdefault(key, _Retry())
        try:
            result = await self._process(key)
        except RetryError as error:
            logger.warning("reconcile put off job=%s/%s failures=%d why=%s", *key, retry.failures + 1, error)
            self._put_off(key, retry)
            return
        # Whatever is wrong with one job, the others go on; it is logged, and tried again ever more slowly.
        except Exception:
            logger.exception("reconcile failed job=%s/%s failures=%d", *key, retry.failures + 1)
            self._put_off(key, retry)
            return
        retry.failures = 0
        if result.settled:
            self._retries.pop(key, None)
            if result.after_seconds is not None:
                self.add_after(key, result.after_seconds)
        else:
            retry.rounds += 1
            self.add_after(key, retry.pause_seconds) if retry.pause_seconds else self.add(key)

    def _put_off(self, key: Key, retry: _Retry) -> None:
        retry.failures += 1
        self._on_retry()
        self.add_after(key, retry.pause_seconds)
