import pytest

from finetune_api.report import Stage
from finetune_api.status import Attempt, FineTuneJobStatus, Phase, StageStatus
from finetune_operator.fence import Standing, standing

from .trainers import NOW


def attempt(stage: Stage, number: int, *, ended: bool = False) -> Attempt:
    return Attempt(stage=stage, number=number, child="child", end_time=NOW if ended else None)


CHECK, TRAIN_1, TRAIN_2 = attempt(Stage.CHECK, 1, ended=True), attempt(Stage.TRAIN, 1), attempt(Stage.TRAIN, 2)
TRAINED = StageStatus(stage=Stage.TRAIN, attempt=1)

CASES = {
    "the newest attempt speaks": (FineTuneJobStatus(attempts=(CHECK, TRAIN_1)), Standing.CURRENT),
    "an attempt that is not in the cache yet speaks": (FineTuneJobStatus(attempts=(CHECK,)), Standing.CURRENT),
    "a newer attempt silences it": (FineTuneJobStatus(attempts=(TRAIN_1, TRAIN_2)), Standing.SUPERSEDED),
    "a later stage silences it": (
        FineTuneJobStatus(attempts=(TRAIN_1, attempt(Stage.EVALUATE, 1))),
        Standing.SUPERSEDED,
    ),
    "an attempt that has ended is recorded": (
        FineTuneJobStatus(attempts=(attempt(Stage.TRAIN, 1, ended=True), TRAIN_2)),
        Standing.RECORDED,
    ),
    "an attempt that fell out of the list is recorded with its stage": (
        FineTuneJobStatus(stages=(TRAINED,)),
        Standing.RECORDED,
    ),
    "what was recorded stays so when the job ends": (
        FineTuneJobStatus(stages=(TRAINED,), phase=Phase.SUCCEEDED),
        Standing.RECORDED,
    ),
    "the end of the job silences it": (FineTuneJobStatus(attempts=(TRAIN_1,), phase=Phase.FAILED), Standing.SUPERSEDED),
    "a suspended job's pod still speaks": (
        FineTuneJobStatus(attempts=(TRAIN_1,), phase=Phase.SUSPENDED),
        Standing.CURRENT,
    ),
}


@pytest.mark.parametrize(("status", "expected"), CASES.values(), ids=CASES.keys())
def test_standing_of_the_first_training_attempt(status: FineTuneJobStatus, expected: Standing) -> None:
    assert standing(status, Stage.TRAIN, 1) is expected
