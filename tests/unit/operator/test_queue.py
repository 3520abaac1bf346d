"""The queue: each key once, never two workers at one key, failures later and later."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

import pytest

from finetune_operator.queue import NEW_TO_OTHERS, Key, Queue, Result, RetryError

A, B = ("team", "a"), ("team", "b")
Process = Callable[[Key], Awaitable[Result]]


async def worked_off(queue: Queue, until: Callable[[], bool], seconds: float = 5) -> None:
    """Run the queue until the condition holds."""
    running = asyncio.create_task(queue.run())
    try:
        async with asyncio.timeout(seconds):
            while not until():
                await asyncio.sleep(0.001)
    finally:
        queue.stop()
        await running


def test_key_added_twice_is_processed_once() -> None:
    async def scenario() -> list[Key]:
        done: list[Key] = []

        async def process(key: Key) -> Result:
            done.append(key)
            return Result()

        queue = Queue(process, workers=2)
        for key in (A, A, B, A):
            queue.add(key)
        assert len(queue) == 2
        await worked_off(queue, lambda: len(done) == 2 and not queue.busy)
        return done

    assert sorted(asyncio.run(scenario())) == [A, B]


def test_key_is_never_with_two_workers_and_is_looked_at_again_when_it_changed_meanwhile() -> None:
    async def scenario() -> tuple[int, int]:
        at_work, most, looks = 0, 0, 0

        async def process(key: Key) -> Result:
            nonlocal at_work, most, looks
            at_work += 1
            looks += 1
            most = max(most, at_work)
            if looks == 1:
                queue.add(key)
                queue.add(key)
            await asyncio.sleep(0.01)
            at_work -= 1
            return Result()

        queue = Queue(process, workers=4)
        queue.add(A)
        await worked_off(queue, lambda: looks == 2 and not queue.busy)
        return most, looks

    assert asyncio.run(scenario()) == (1, 2)


def test_different_keys_are_processed_at_the_same_time_up_to_the_number_of_workers() -> None:
    async def scenario() -> int:
        at_work, most, done = 0, 0, 0

        async def process(key: Key) -> Result:
            nonlocal at_work, most, done
            at_work += 1
            most = max(most, at_work)
            await asyncio.sleep(0.01)
            at_work -= 1
            done += 1
            return Result()

        queue = Queue(process, workers=3)
        for number in range(9):
            queue.add(("team", str(number)))
        await worked_off(queue, lambda: done == 9)
        return most

    assert asyncio.run(scenario()) == 3


def test_failures_come_back_later_and_later_and_stop_nobody_else(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> tuple[list[float], int]:
        times: list[float] = []
        others = retries = 0

        def count() -> None:
            nonlocal retries
            retries += 1

        async def process(key: Key) -> Result:
            nonlocal others
            if key == A:
                times.append(asyncio.get_running_loop().time())
                raise ValueError("a defect") if len(times) == 1 else RetryError("the API server is away")
            others += 1
            return Result()

        queue = Queue(process, workers=1, on_retry=count)
        queue.add(A)
        queue.add(B)
        await worked_off(queue, lambda: len(times) == 3)
        assert others == 1
        return times, retries

    with caplog.at_level(logging.WARNING):
        times, retries = asyncio.run(scenario())
    first, second = times[1] - times[0], times[2] - times[1]
    assert first >= 0.2 and second >= 0.4
    assert retries == 3
    assert "a defect" in caplog.text and "the API server is away" in caplog.text


def test_key_that_never_settles_is_slowed_down() -> None:
    async def scenario() -> int:
        looks = 0

        async def process(key: Key) -> Result:
            nonlocal looks
            looks += 1
            return Result(settled=False)

        queue = Queue(process, workers=1)
        queue.add(A)
        running = asyncio.create_task(queue.run())
        await asyncio.sleep(0.3)
        queue.stop()
        await running
        return looks

    assert 10 <= asyncio.run(scenario()) <= 12


def test_earlier_of_two_times_wins() -> None:
    async def scenario() -> float:
        times: list[float] = []

        async def process(key: Key) -> Result:
            times.append(asyncio.get_running_loop().time())
            return Result()

        queue = Queue(process, workers=1)
        started = asyncio.get_running_loop().time()
        queue.add_after(A, 30)
        queue.add_after(A, 0.05)
        queue.add_after(A, 20)
        await worked_off(queue, lambda: bool(times))
        return times[0] - started

    assert 0.04 <= asyncio.run(scenario()) < 2


def test_result_says_when_to_look_again() -> None:
    async def scenario() -> int:
        looks = 0

        async def process(key: Key) -> Result:
            nonlocal looks
            looks += 1
            return Result(after_seconds=0.01)

        queue = Queue(process, workers=1)
        queue.add(A)
        await worked_off(queue, lambda: looks == 3)
        return looks

    assert asyncio.run(scenario()) >= 3


def test_stopping_lets_begun_work_end_and_begins_no_other() -> None:
    async def scenario() -> list[str]:
        log: list[str] = []
        begun = asyncio.Event()

        async def process(key: Key) -> Result:
            log.append(f"begin {key[1]}")
            begun.set()
            await asyncio.sleep(0.02)
            log.append(f"end {key[1]}")
            return Result()

        queue = Queue(process, workers=1)
        queue.add(A)
        queue.add(B)
        running = asyncio.create_task(queue.run())
        await begun.wait()
        queue.stop()
        async with asyncio.timeout(5):
            await running
        return log

    assert asyncio.run(scenario()) == ["begin a", "end a"]


def test_new_keys_go_first_and_the_others_get_a_turn_as_well() -> None:
    async def scenario() -> list[str]:
        done: list[str] = []

        async def process(key: Key) -> Result:
            done.append(key[1])
            return Result()

        queue = Queue(process, workers=1, is_new=lambda key: key[0] == "new")
        for number in range(2):
            queue.add(("known", f"known-{number}"))
        for number in range(NEW_TO_OTHERS + 1):
            queue.add(("new", f"new-{number}"))
        assert len(queue) == NEW_TO_OTHERS + 3
        await worked_off(queue, lambda: not len(queue) and not queue.busy)
        return done

    first = [f"new-{number}" for number in range(NEW_TO_OTHERS)]
    assert asyncio.run(scenario()) == [*first, "known-0", f"new-{NEW_TO_OTHERS}", "known-1"]
