"""How the errors of a group of workers are named."""

import pickle

import pytest
from ray.exceptions import ActorDiedError, OutOfMemoryError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)

from finetune_trainer import errors
from finetune_trainer.worker_group import _named


@pytest.mark.parametrize(
    "found, expected",
    [(OutOfMemoryError("95 % of the memory"), errors.OutOfMemoryError), (ActorDiedError(), errors.WorkerLostError)],
    ids=["for its memory", "for whatever reason"],
)
def test_a_worker_that_ray_ended_or_lost_is_told_as_such(found: Exception, expected: type[errors.FineTuneError]):
    failed = WorkerHealthCheckFailedError("a worker is not healthy", failure=found)
    named = _named(WorkerGroupError("rank 1", {1: failed}), micro_batch=4)
    assert isinstance(named, errors.StepError) and type(named) is expected
    # It travels from the desk's process to the program's.
    assert pickle.loads(pickle.dumps(named)).micro_batch == 4


@pytest.mark.parametrize("cause", [WorkerGroupStartupTimeoutError(2), WorkerGroupStartupFailedError("a node died")])
def test_workers_that_never_stood_are_told_as_lost(cause: Exception):
    named = _named(ControllerError(cause), micro_batch=4)
    assert isinstance(named, errors.WorkerLostError)
    assert "did not start in 10 tries" in str(named)


def test_a_defect_stays_what_it_is():
    defect = WorkerGroupError("rank 1", {1: ValueError("a defect")})
    assert _named(defect, micro_batch=4) is defect
