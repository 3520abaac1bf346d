import asyncio

from finetune_api.report import ExitCode, Stage
from finetune_api.stage_result import StageResult
from finetune_operator.inbox import Inbox
from finetune_operator.observed import DeliveredResult

from .trainers import make_job

JOB = make_job()


def result(message: str = "", attempt: int = 1) -> DeliveredResult:
    return DeliveredResult(
        Stage.TRAIN, attempt, StageResult(stage=Stage.TRAIN, exit_code=ExitCode.BAD_DATA, message=message)
    )


def deliver(inbox: Inbox, *delivered: DeliveredResult) -> None:
    """Deliver one after the other, and wait for nothing."""

    async def all_of_them() -> None:
        for one in delivered:
            assert not await inbox.deliver(JOB, one, 0.0)

    asyncio.run(all_of_them())


def test_a_delivery_wakes_its_job() -> None:
    woken: list[tuple[str, str]] = []
    deliver(Inbox(woken.append), result())
    assert woken == [JOB.key]


def test_a_newer_delivery_takes_the_place_of_the_earlier() -> None:
    inbox = Inbox(lambda key: None)
    deliver(inbox, result("first"), result("second"), result("third", attempt=2))
    assert [one.result.message for one in inbox.take(JOB.uid)] == ["second", "third"]


def test_what_was_recorded_is_not_what_came_meanwhile() -> None:
    async def scenario() -> None:
        inbox = Inbox(lambda key: None)
        await inbox.deliver(JOB, result("first"), 0)
        recorded = inbox.take(JOB.uid)
        second = asyncio.create_task(inbox.deliver(JOB, result("second"), 5))
        await asyncio.sleep(0)
        inbox.acknowledge(JOB.uid, recorded)
        assert [one.result.message for one in inbox.take(JOB.uid)] == ["second"]
        inbox.acknowledge(JOB.uid, inbox.take(JOB.uid))
        assert await second

    asyncio.run(scenario())


def test_everybody_who_delivers_the_same_is_answered() -> None:
    async def scenario() -> None:
        inbox = Inbox(lambda key: None)
        senders = [asyncio.create_task(inbox.deliver(JOB, result(), 5)) for _ in range(3)]
        await asyncio.sleep(0)
        inbox.acknowledge(JOB.uid, inbox.take(JOB.uid))
        assert await asyncio.gather(*senders) == [True] * 3

    asyncio.run(scenario())


def test_a_job_that_is_gone_leaves_nothing() -> None:
    inbox = Inbox(lambda key: None)
    deliver(inbox, result())
    inbox.forget(JOB.uid)
    assert inbox.take(JOB.uid) == ()
