"""What an attempt does otherwise than the spec says: less memory or smaller steps, the same batch."""

from typing import Any

import pytest

from finetune_api.resolve import resolve
from finetune_api.spec import FineTuneJobSpec, GradientCheckpointing
from finetune_trainer.adjustment import Adjustment, Useless, adjusted, useless_checkpoints
from finetune_trainer.errors import SpecError

from ..builders import make_job


def spec_of(**changes: Any) -> FineTuneJobSpec:
    given = {"spec.training.globalBatchSize": 36, "spec.training.learningRate": 1e-3} | changes
    return resolve(make_job({name.replace("__", "."): value for name, value in given.items()})).spec


ON_FOUR = {"spec__compute": {"workers": 4, "gpusPerWorker": 0}}


def test_nothing_is_changed_by_default():
    assert adjusted(spec_of(), Adjustment()) == spec_of()


@pytest.mark.parametrize(
    "compute, asked, taken",
    [({}, 4, 4), ({}, 5, 4), (ON_FOUR, 4, 3), (ON_FOUR, 100, 9), (ON_FOUR, 1, 1)],
    ids=["a divisor", "no divisor", "no divisor of a share", "more than a share", "one row"],
)
def test_a_micro_batch_divides_what_each_process_does_of_the_batch(compute: dict[str, Any], asked: int, taken: int):
    training = adjusted(spec_of(**compute), Adjustment(micro_batch_size=asked)).training
    assert (training.micro_batch_size, training.global_batch_size) == (taken, 36)


def test_activations_are_computed_twice_and_steps_are_smaller():
    training = adjusted(spec_of(), Adjustment(gradient_checkpointing=True, learning_rate_scale=0.5)).training
    assert training.gradient_checkpointing is GradientCheckpointing.ALWAYS
    assert training.learning_rate == 5e-4


def test_a_zero_stage_keeps_what_else_the_spec_says_of_deepspeed():
    offloaded = {"workers": 2, "gpusPerWorker": 0, "deepspeed": {"stage": 2, "offload": "cpu"}}
    before = spec_of(spec__compute=offloaded)
    deepspeed = adjusted(before, Adjustment(zero_stage=3)).compute.deepspeed
    assert before.compute.deepspeed is not None
    assert deepspeed == before.compute.deepspeed.model_copy(update={"stage": 3})


def test_several_workers_take_a_zero_stage_that_the_spec_does_not_ask_for():
    deepspeed = adjusted(spec_of(**ON_FOUR), Adjustment(zero_stage=1)).compute.deepspeed
    assert deepspeed is not None
    assert deepspeed.stage == 1


def test_one_process_takes_no_zero_stage():
    with pytest.raises(SpecError, match=r"--zero-stage 2: one process.*spec\.compute\.workers"):
        adjusted(spec_of(), Adjustment(zero_stage=2))


@pytest.mark.parametrize(
    "before, now, useless",
    [
        ({}, {"micro_batch_size": 1, "gradient_checkpointing": True}, Useless.NONE),
        ({}, {"learning_rate_scale": 0.5}, Useless.NEWEST),
        ({"learning_rate_scale": 0.5}, {"learning_rate_scale": 0.5}, Useless.NONE),
        ({}, {"zero_stage": 3}, Useless.ALL),
        ({"zero_stage": 2}, {"zero_stage": 3, "learning_rate_scale": 0.5}, Useless.ALL),
    ],
    ids=["less memory", "smaller steps", "smaller steps again", "spread for the first time", "spread otherwise"],
)
def test_checkpoints_that_must_not_be_gone_on_from(before: dict[str, Any], now: dict[str, Any], useless: Useless):
    assert useless_checkpoints(Adjustment(**before), Adjustment(**now)) is useless
