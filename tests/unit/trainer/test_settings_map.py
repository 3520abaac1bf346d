"""From the spec to what the libraries are told: the global batch holds, ZeRO's stages are as asked for."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainingArguments, get_scheduler

from finetune_api.spec import DeepspeedSpec, Offload, Schedule, TrainingSpec
from finetune_trainer.errors import SpecError
from finetune_trainer.settings_map import Steps, deepspeed_config, estimating_step, plan_steps, training_arguments

STEPS = Steps(micro_batch=2, accumulation=4, total=10, per_epoch=5, workers=3)


@given(workers=st.integers(1, 64), share=st.integers(1, 64), longest=st.integers(1, 5000))
def test_the_global_batch_holds_whatever_the_number_of_workers(workers: int, share: int, longest: int):
    training = TrainingSpec(global_batch_size=workers * share)
    steps = plan_steps(training, rows=100_000, longest_tokens=longest, workers=workers)
    assert steps.micro_batch * steps.accumulation * workers == workers * share
    assert steps.rows == workers * share


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("micro_batch", [1, 2, 4, 5, 8, None])
@pytest.mark.parametrize("rows", [1, 7, 12, 13])
def test_fewer_rows_than_a_step_has_are_one_step_whatever_is_taken_at_a_time(
    rows: int, micro_batch: int | None, workers: int
):
    training = TrainingSpec(global_batch_size=240, micro_batch_size=micro_batch, epochs=2)
    steps = plan_steps(training, rows=rows, longest_tokens=300, workers=workers)
    assert (steps.per_epoch, steps.total) == (1, 2)
    assert steps.micro_batch <= (micro_batch or 6)
    assert rows <= steps.rows < rows + steps.accumulation * workers


def test_fewer_rows_than_workers_are_trained_on():
    assert plan_steps(TrainingSpec(global_batch_size=8), rows=3, longest_tokens=10, workers=4).micro_batch == 1


@pytest.mark.parametrize(("zero_stage", "micro_batch"), [(0, 4), (1, 4), (2, 16), (3, 16)])
def test_where_gradients_travel_behind_every_pass_there_are_fewer_passes(zero_stage: int, micro_batch: int):
    training = TrainingSpec(global_batch_size=64)
    steps = plan_steps(training, rows=1000, longest_tokens=500, workers=2, zero_stage=zero_stage)
    assert (steps.micro_batch, steps.rows) == (micro_batch, 64)


def told_to_deepspeed(
    asked: DeepspeedSpec, *, autocast: bool = False, without_gpu: bool = False, trainable_parameters: int = 10**9
) -> dict[str, Any]:
    return deepspeed_config(asked, TrainingSpec(), STEPS, autocast, without_gpu, trainable_parameters)


def test_deepspeed_is_told_the_same_batch_as_the_trainer():
    told = told_to_deepspeed(DeepspeedSpec(stage=1), autocast=True)
    assert told["train_batch_size"] == 2 * 4 * 3
    assert told["bf16"] == {"enabled": True}


def test_bfloat16_products_under_deepspeed_need_a_gpu():
    with pytest.raises(SpecError, match=r"spec\.training\.precision.*Take fp32"):
        told_to_deepspeed(DeepspeedSpec(stage=2), autocast=True, without_gpu=True)


@pytest.mark.parametrize(("total", "warm_up"), [(1, 0), (2, 1), (100, 3)])
def test_a_job_of_one_step_learns_in_it(total: int, warm_up: int):
    # The first step of a warm-up has a learning rate of 0.
    steps = replace(STEPS, total=total)
    told = training_arguments(TrainingSpec(), steps, Path("checkpoints"), 100, False, autocast=False, use_cpu=True)
    assert told["warmup_steps"] == warm_up


FALLS: dict[Schedule, Callable[[float], float]] = {
    Schedule.COSINE: lambda done: (1 + math.cos(math.pi * done)) / 2,
    Schedule.LINEAR: lambda done: 1 - done,
    Schedule.CONSTANT: lambda done: 1,
}
"""The rate behind the warm-up, as a share of the highest, by how much of what follows it is done."""


@pytest.mark.parametrize("schedule", Schedule)
def test_the_rate_rises_in_the_warm_up_and_falls_as_its_schedule_says(schedule: Schedule, tmp_path: Path):
    training = TrainingSpec(schedule=schedule, warmup_ratio=0.2, learning_rate=0.5)
    told = training_arguments(training, STEPS, tmp_path, 100, False, autocast=False, use_cpu=True)
    arguments = TrainingArguments(**told)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=arguments.learning_rate)
    scheduler = get_scheduler(arguments.lr_scheduler_type, optimizer, arguments.get_warmup_steps(10), 10)
    rates = []
    for _ in range(10):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0, 0.25, *(0.5 * FALLS[schedule](step / 8) for step in range(8))])


@pytest.mark.parametrize(
    ("first", "total", "step"), [(0, 9, None), (0, 10, 5), (0, 101, 11), (60, 69, None), (60, 160, 70)]
)
def test_the_time_is_estimated_a_tenth_of_the_way_when_most_is_still_to_come(first: int, total: int, step: int | None):
    assert estimating_step(first, total) == step


WHOLE = {
    "stage3_gather_16bit_weights_on_model_save": True,
    "stage3_max_live_parameters": 10**9,
    "stage3_prefetch_bucket_size": 50_000_000,
}


@pytest.mark.parametrize(
    "stage, offload, spread",
    [
        (0, Offload.NONE, {"stage": 0}),
        (2, Offload.CPU, {"stage": 2, "offload_optimizer": {"device": "cpu"}}),
        (3, Offload.NONE, {"stage": 3} | WHOLE),
        (
            3,
            Offload.CPU,
            {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}} | WHOLE,
        ),
    ],
)
def test_what_deepspeed_spreads(stage: int, offload: Offload, spread: dict[str, object]):
    asked = DeepspeedSpec(stage=stage, offload=offload)
    told = told_to_deepspeed(asked)
    assert told["zero_optimization"] == spread | {"reduce_bucket_size": 50_000_000}


def test_cpus_exchange_gradients_in_pieces_that_need_no_new_memory():
    told = told_to_deepspeed(DeepspeedSpec(stage=2), without_gpu=True)
    assert told["zero_optimization"]["reduce_bucket_size"] * 4 < 32 * 2**20, "beyond, malloc asks the kernel each time"


@pytest.mark.parametrize("without_gpu", [True, False])
def test_no_bucket_is_larger_than_all_gradients(without_gpu: bool):
    told = told_to_deepspeed(DeepspeedSpec(stage=2), without_gpu=without_gpu, trainable_parameters=1000)
    assert told["zero_optimization"]["reduce_bucket_size"] == 1000
