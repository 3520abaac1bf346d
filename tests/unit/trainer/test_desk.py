"""Workers wait for each other at the desk."""

import asyncio

from finetune_trainer.desk import Desk


def test_nobody_goes_on_before_the_last_has_come_however_often_they_meet():
    async def meet_twice() -> None:
        desk = Desk()
        for _ in range(2):
            early = [asyncio.create_task(desk.meet(3)) for _ in range(2)]
            await asyncio.sleep(0)
            assert not any(one.done() for one in early)
            await desk.meet(3)
            await asyncio.gather(*early)

    asyncio.run(meet_twice())
