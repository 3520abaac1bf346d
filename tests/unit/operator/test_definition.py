"""Which definition of FineTuneJob there is: looked at now and then for as long as the operator runs."""

import asyncio

import pytest

from finetune_operator.cluster import ClusterError, UnavailableError
from finetune_operator.definition import Definition, DefinitionReplacedError

from .fake_api_server import FakeApiServer

AWAY = UnavailableError("away")


class Definitions(FakeApiServer):
    """Tells these UIDs, one at a look; then it is asked no more."""

    def __init__(self, *answers: str | ClusterError | None) -> None:
        super().__init__()
        self.left = list(answers)

    async def definition(self) -> str | None:
        if not self.left:
            raise asyncio.CancelledError
        answer = self.left.pop(0)
        if isinstance(answer, ClusterError):
            raise answer
        return answer


@pytest.mark.parametrize(
    "answers",
    [
        ("one", None, "two", "two"),
        ("one", "two", "two"),
        (None, None, "one", "one"),
        ("one", None, "two", AWAY),
        (AWAY, "one", "one"),
    ],
    ids=["gone and back", "replaced", "installed later", "served when last seen", "not known at first"],
)
def test_watches_start_anew_with_another_definition(answers: tuple[str | ClusterError | None, ...]):
    with pytest.raises(DefinitionReplacedError):
        asyncio.run(Definition(Definitions(*answers), seconds=0.001).watch())


@pytest.mark.parametrize(
    "answers",
    [
        ("one", "one", "one"),
        ("one", None, None, "one", "one"),
        ("one", "two"),
        ("one", AWAY, AWAY, "one"),
        (None, None),
    ],
    ids=["the same", "a moment away", "not yet served for long", "not to be told", "none"],
)
def test_watches_go_on_with_the_same_one(answers: tuple[str | ClusterError | None, ...]):
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(Definition(Definitions(*answers), seconds=0.001).watch())
