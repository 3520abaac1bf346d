"""kopf's answer to whether everything is listed: who waits hears of it once, when it is so."""

import asyncio

import pytest
from kopf._cogs.aiokits import aiotoggles
from kopf._core.reactor import orchestration

from finetune_operator.toggle import QuietToggleSet, quiet_toggles


class Counted(QuietToggleSet):
    """Counts how often somebody who waits has been woken and has asked."""

    asked = 0

    def is_on(self) -> bool:
        self.asked += 1
        return super().is_on()


async def breathe() -> None:
    """Let everybody who can go on do so."""
    for _ in range(10):
        await asyncio.sleep(0)


def test_all_who_wait_go_on_when_the_last_object_is_indexed() -> None:
    async def scenario() -> list[int]:
        toggles = QuietToggleSet(all)
        objects = [await toggles.make_toggle(name=str(number)) for number in range(3)]
        waiting = [asyncio.create_task(toggles.wait_for(True)) for _ in objects]
        gone_on = []
        for toggle in objects:
            await toggles.drop_toggle(toggle)
            await breathe()
            gone_on.append(sum(task.done() for task in waiting))
        return gone_on

    assert asyncio.run(scenario()) == [0, 0, 3]


def test_who_waits_is_not_asked_again_for_every_other_object() -> None:
    async def asked(objects: int) -> int:
        toggles = Counted(all)
        first = await toggles.make_toggle()
        waiting = [asyncio.create_task(toggles.wait_for(True)) for _ in range(50)]
        await breathe()
        toggles.asked = 0
        for _ in range(objects):
            await toggles.drop_toggle(await toggles.make_toggle())
            await breathe()
        everyday = toggles.asked
        await toggles.drop_toggle(first)
        await asyncio.gather(*waiting)
        return everyday

    # Two answers to each of the two changes, and none of the fifty has asked.
    assert asyncio.run(asked(objects=10)) == 40


def test_who_waits_for_the_opposite_hears_of_a_new_object() -> None:
    async def scenario() -> bool:
        toggles = QuietToggleSet(all)
        waiting = asyncio.create_task(toggles.wait_for(False))
        await breathe()
        early = waiting.done()
        await toggles.make_toggle()
        await waiting
        return early

    assert asyncio.run(scenario()) is False


def test_kopf_takes_the_quiet_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aiotoggles, "ToggleSet", aiotoggles.ToggleSet)
    quiet_toggles()
    assert orchestration.aiotoggles.ToggleSet is QuietToggleSet
