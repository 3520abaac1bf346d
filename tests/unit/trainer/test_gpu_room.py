"""What training holds, held against its GPUs: made-up plans, whose rows take the same each."""

import re
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError

from finetune_api.resolve import resolve
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.compute import processes
from finetune_api.spec.field import amount
from finetune_api.spec.training import largest_micro_batch
from finetune_api.status import LONGEST_WARNING, Attempt, MemoryStatus, PlanStatus, Reason
from finetune_operator.remedy import find_remedy
from finetune_trainer.adjustment import Adjustment, adjusted
from finetune_trainer.gpu_room import USABLE, hold_against_gpu, why_it_cannot_fit
from finetune_trainer.zero_memory import shares

from ..builders import make_job

GIB = 1024**3
PARAMETERS = GIB
"""So that each takes 4 GiB in float32: as weight, as gradient, and 8 for the optimiser's two moments."""


def spec_of(gpu_memory: str | None = "80Gi", **changes: Any) -> FineTuneJobSpec:
    given: dict[str, Any] = {
        "spec.method.type": "full",
        "spec.training": {"globalBatchSize": 32, "microBatchSize": 8},
        **{name.replace("__", "."): value for name, value in changes.items()},
    }
    return resolve(make_job(given if gpu_memory is None else {**given, "spec.compute.gpuMemory": gpu_memory})).spec


def planner(of_a_row: float, trained: float = 1.0) -> Any:
    """Return what makes plans: a row takes so many GiB, a quarter where activations are computed twice.

    As many of up to 8 are taken at a time as divide a process's share, where the spec leaves that open.
    """

    def plan(spec: FineTuneJobSpec) -> PlanStatus:
        compute, share = spec.compute, spec.training.global_batch_size // processes(spec.compute)
        micro_batch = spec.training.micro_batch_size or largest_micro_batch(share, 8)
        now = shares(compute.deepspeed.stage if compute.deepspeed else 0, processes(compute))
        twice = spec.training.gradient_checkpointing.value == "always"
        memory = MemoryStatus(
            weights=4 * GIB // now.weights,
            gradients=0,
            optimiser=int(8 * GIB * trained) // now.optimiser,
            activations=int(of_a_row * micro_batch * GIB) // (4 if twice else 1),
            logits=0,
        )
        return PlanStatus(
            parameters=PARAMETERS,
            trainable_parameters=int(PARAMETERS * trained),
            memory=memory,
            memory_bytes_per_gpu=sum(memory.model_dump().values()),
            gpus=0 if compute.gpus_per_worker == 0 else processes(compute),
            gpu_memory_bytes=None if compute.gpu_memory is None else int(amount(compute.gpu_memory)),
            micro_batch_size=micro_batch,
        )

    return plan


def warnings_of(spec: FineTuneJobSpec, of_a_row: float, trained: float = 1.0) -> tuple[str, ...]:
    return held(spec, planner(of_a_row, trained)).warnings


def held(spec: FineTuneJobSpec, plan: Any) -> PlanStatus:
    return hold_against_gpu(plan(spec), spec, plan)


def why(spec: FineTuneJobSpec, plan: Any) -> str:
    return why_it_cannot_fit(held(spec, plan), spec)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gpu_memory": None},
        {"gpu_memory": "1Gi", "spec__compute": {"gpusPerWorker": 0}},
        {"gpu_memory": "1Gi", "spec__compute": {"engine": "ray", "deepspeed": {"stage": 3, "offload": "cpu"}}},
    ],
    ids=["it fits", "nobody says how large a GPU is", "there is no GPU", "it is offloaded"],
)
def test_nothing_is_said(changes: dict[str, Any]):
    spec = spec_of(**changes)
    assert warnings_of(spec, of_a_row=1) == ()
    assert why(spec, planner(1)) == ""


@pytest.mark.parametrize(
    "changes, of_a_row, says",
    [
        ({}, 8, "set spec.training.gradientCheckpointing: always, with which it needs 28.0 GiB"),
        (
            {"gpu_memory": "24Gi"},
            8,
            "set spec.training.microBatchSize: 4 and spec.training.gradientCheckpointing: always, with which it needs "
            "20.0 GiB",
        ),
        (
            {"spec__training__gradientCheckpointing": "never"},
            32,
            "set spec.training.microBatchSize: 1, with which it needs 44.0 GiB",
        ),
        (
            {"gpu_memory": "16Gi", "spec__compute": {"gpusPerWorker": 4}},
            16,
            "set spec.training.microBatchSize: 1 and spec.training.gradientCheckpointing: always and "
            "spec.compute.deepspeed.stage: 1, with which it needs 10.0 GiB",
        ),
    ],
    ids=["computing twice", "half the rows", "single rows, nothing twice", "another stage"],
)
def test_the_mildest_settings_that_fit_are_named(changes: dict[str, Any], of_a_row: float, says: str):
    spec = spec_of(**changes)
    [warning] = warnings_of(spec, of_a_row)
    assert says in warning and "run out of memory come to the same" in warning
    assert why(spec, planner(of_a_row)) == ""


@pytest.mark.parametrize(
    "changes, of_a_row, attempts",
    [
        ({}, 8, 1),
        ({"gpu_memory": "24Gi"}, 8, 1),
        ({"gpu_memory": "24Gi"}, 16, 2),
        ({"spec__training__gradientCheckpointing": "never"}, 32, 3),
        ({"spec__training__microBatchSize": 1}, 70, 1),
        ({"gpu_memory": "16Gi", "spec__compute": {"gpusPerWorker": 4}}, 16, 4),
    ],
)
def test_a_warning_says_when_the_job_is_given_up_before_its_attempts_come_to_what_fits(
    changes: dict[str, Any], of_a_row: float, attempts: int
):
    enough, too_few = (spec_of(**changes, spec__runPolicy__retries=retries) for retries in (attempts, attempts - 1))
    [warning] = warnings_of(enough, of_a_row)
    assert warning.endswith("come to the same.")
    [warning] = warnings_of(too_few, of_a_row)
    assert warning.endswith(
        f"after {attempts} of them, which is more than spec.runPolicy.retries: {attempts - 1} allows."
    )
    assert len(warning) <= LONGEST_WARNING
    # As many as the operator needs.
    attempt = Attempt(number=1, child="c", reason=Reason.OUT_OF_MEMORY)
    for _ in range(attempts):
        remedy = find_remedy(attempt, make_job().model_copy(update={"spec": enough}), planner(of_a_row)(enough))
        assert remedy is not None and not fits(attempt, enough, of_a_row)
        attempt = attempt.model_copy(update=remedy.fields)
    assert fits(attempt, enough, of_a_row)


def fits(attempt: Attempt, spec: FineTuneJobSpec, of_a_row: float) -> bool:
    names = ("micro_batch_size", "gradient_checkpointing", "zero_stage")
    given = {name: value for name in names if (value := getattr(attempt, name)) is not None}
    plan = planner(of_a_row)(adjusted(spec, Adjustment(**given)))
    return bool(plan.memory_bytes_per_gpu <= USABLE * plan.gpu_memory_bytes)


def test_rows_that_fit_in_no_attempt_are_warned_of_and_not_refused():
    spec = spec_of("40Gi")
    [warning] = warnings_of(spec, of_a_row=128)
    assert "needs about 1036.0 GiB on each GPU, 44.0 GiB with spec.training.microBatchSize: 1" in warning
    assert "spec.compute.gpuMemory is 40Gi, of which tensors may fill 36.8 GiB: lower spec.data.maxLength" in warning
    assert why(spec, planner(128)) == ""


def test_a_model_that_cannot_compute_twice_is_judged_as_it_is():
    spec, plan = spec_of(spec__training__microBatchSize=1), planner(of_a_row=80)
    found = hold_against_gpu(plan(spec), spec, lambda other: PlanStatus(gpu_memory_bytes=80 * GIB))
    [warning] = found.warnings
    assert "needs about 92.0 GiB on each GPU, and" in warning and "lower spec.data.maxLength" in warning


@pytest.mark.parametrize(
    "changes, trained, held",
    [
        ({}, 1.0, "16.0"),
        ({"spec__method__type": "lora"}, 0.0, "4.0"),
        ({"spec__compute": {"gpusPerWorker": 4}}, 1.0, "4.0"),
        ({"spec__compute": {"gpusPerWorker": 4, "deepspeed": {"stage": 2}}}, 1.0, "4.0"),
        ({"spec__compute": {"gpusPerWorker": 4, "deepspeed": {"stage": 3}}}, 1.0, "4.0"),
        ({"spec__compute": {"gpusPerWorker": 4}, "spec__method__type": "lora"}, 0.0, "4.0"),
    ],
    ids=["full", "an adapter", "full on four", "full on four, spread in part", "spread wholly", "an adapter on four"],
)
def test_what_no_attempt_does_without_decides(changes: dict[str, Any], trained: float, held: str):
    spec = spec_of("1Gi", **changes)
    told = why(spec, planner(1, trained))
    assert f"holds at least {held} GiB on each GPU, however few rows" in told and "gpuMemory is 1Gi" in told
    assert warnings_of(spec, 1, trained) == (told,)
    enough = spec_of(f"{held}Gi", **changes)
    assert why(enough, planner(1, trained)) == "", "what is as large as the GPU is not refused"


def test_weights_that_deepspeed_keeps_in_its_own_format_decide_nothing():
    spec = spec_of("1Gi", spec__method__type="lora", spec__compute={"gpusPerWorker": 4, "deepspeed": {"stage": 3}})
    assert why(spec, planner(1, 0.0)) == ""
    assert len(warnings_of(spec, 1, 0.0)) == 1


WHOLE = "set spec.compute: {engine: ray, deepspeed: {stage: 3, offload: cpu}}"
WAYS = {
    "full": ({}, ("type lora or qlora", "train on 4 such GPUs with spec.compute.deepspeed.stage: 3", WHOLE), ()),
    "lora": ({"spec__method__type": "lora"}, ("type qlora", WHOLE), ("lora or",)),
    "qlora": ({"spec__method__type": "qlora"}, ("take a smaller model",), ("type qlora", "deepspeed")),
    "a pull": (
        {"spec__method__regularization": {"type": "l2sp"}},
        ("type lora or qlora",),
        ("deepspeed", "regularization out"),
    ),
}


@pytest.mark.parametrize("changes, named, unnamed", WAYS.values(), ids=WAYS)
def test_the_ways_out_are_those_of_the_method(
    changes: dict[str, Any], named: tuple[str, ...], unnamed: tuple[str, ...]
):
    spec = spec_of("3.9Gi", **changes)
    told = why(spec, planner(0.05))
    assert not [words for words in named if words not in told]
    assert not [words for words in unnamed if words in told]


def test_copies_count_and_are_the_first_to_go():
    spec = spec_of("18Gi", spec__method__regularization={"type": "l2sp"})
    plan = planner(1)

    def copied(asked: FineTuneJobSpec) -> PlanStatus:
        made = plan(asked)
        return made.model_copy(update={"memory": made.memory.model_copy(update={"copies": 4 * GIB})})

    told = why(spec, copied)
    assert "holds at least 20.0 GiB" in told and "gpuMemory is 18Gi: leave spec.method.regularization out" in told


@pytest.mark.parametrize("of_a_row, memory", [(1, "1Gi"), (512, "40Gi"), (8, "24Gi")])
@pytest.mark.parametrize("method", ["full", "lora", "qlora", "promptTuning", "selective"])
def test_a_warning_has_room_in_the_status(method: str, of_a_row: float, memory: str):
    [warning] = warnings_of(spec_of(memory, spec__method__type=method), of_a_row)
    assert len(warning) <= LONGEST_WARNING


def zero(stage: int, workers: int = 1) -> dict[str, Any]:
    return {"engine": "ray", "workers": workers, "gpusPerWorker": 1, "deepspeed": {"stage": stage}}


LORA, OPEN = {"spec__method__type": "lora"}, {"spec__training": {"globalBatchSize": 32}}
NEEDED: dict[str, tuple[str | None, dict[str, Any], float, int | None]] = {
    "one holds it": ("24Gi", {}, 1, 1),
    "one holds it, and four are asked for": ("24Gi", {"spec__compute": {"gpusPerWorker": 4}}, 1, 1),
    "nothing is spread": ("18Gi", {"spec__compute": {"gpusPerWorker": 4}}, 1, None),
    "the optimiser is spread": ("18Gi", {"spec__compute": zero(1)}, 1, 2),
    "the optimiser is spread over more": ("17Gi", {"spec__compute": zero(1, workers=2)}, 1, 4),
    "all is spread": ("12Gi", {"spec__compute": zero(3)}, 1, 4),
    "fewer hold it than are asked for": ("17Gi", {"spec__compute": zero(3, workers=4)}, 1, 2),
    "there are no more micro-batches": ("11Gi", {"spec__compute": zero(3)}, 1, None),
    "smaller micro-batches make more": ("11Gi", {"spec__compute": zero(3), **OPEN}, 1, 8),
    "smaller micro-batches take less by themselves": ("18Gi", OPEN, 1, 8),
    "two cannot share the batch": (
        "18Gi",
        {"spec__compute": zero(1), "spec__training": {"globalBatchSize": 24, "microBatchSize": 8}},
        1,
        3,
    ),
    "rows alone leave no room": ("80Gi", {"spec__compute": zero(3)}, 10, None),
    "an adapter's weights are on each": ("12Gi", {"spec__compute": {"gpusPerWorker": 4}, **LORA}, 1, None),
    "an adapter's weights are spread": ("12Gi", {"spec__compute": zero(3), **LORA}, 1, 2),
    "a method of one GPU fits": ("24Gi", {"spec__method__type": "qlora", **OPEN}, 1, 1),
    "a method of one GPU does not fit": ("12Gi", {"spec__method__type": "qlora", **OPEN}, 1, None),
    "nobody says how large a GPU is": (None, {}, 1, None),
    "there is no GPU": ("80Gi", {"spec__compute": {"gpusPerWorker": 0}}, 1, None),
    "it is offloaded": (
        "80Gi",
        {"spec__compute": {"engine": "ray", "deepspeed": {"stage": 3, "offload": "cpu"}}},
        1,
        None,
    ),
}


@pytest.mark.parametrize("gpu_memory, changes, of_a_row, needed", NEEDED.values(), ids=NEEDED)
def test_as_many_gpus_are_needed(gpu_memory: str | None, changes: dict[str, Any], of_a_row: float, needed: int | None):
    trained = 0.0 if changes.get("spec__method__type") == "lora" else 1.0
    assert held(spec_of(gpu_memory, **changes), planner(of_a_row, trained)).gpus_needed == needed


@given(
    stage=st.integers(0, 3),
    asked=st.integers(1, 8),
    gpu_memory=st.integers(1, 40),
    of_a_row=st.sampled_from([0.0, 0.1, 0.5, 1.0, 2.0]),
    batch=st.sampled_from([1, 6, 8, 12, 32]),
    micro_batch=st.sampled_from([None, 1, 2, 4, 8]),
)
def test_the_job_fits_on_the_number_that_is_needed_and_on_no_smaller_one(
    stage: int, asked: int, gpu_memory: int, of_a_row: float, batch: int, micro_batch: int | None
):
    training = {"globalBatchSize": batch} | ({} if micro_batch is None else {"microBatchSize": micro_batch})

    def on(count: int) -> FineTuneJobSpec | None:
        try:
            return spec_of(f"{gpu_memory}Gi", spec__compute=zero(stage, count), spec__training=training)
        except ValidationError:
            return None

    spec = on(asked)
    assume(spec is not None)
    possible = {count: other for count in range(1, batch + 1) if (other := on(count)) is not None}
    fits = [count for count, other in possible.items() if not warnings_of(other, of_a_row)]
    assert held(spec, planner(of_a_row)).gpus_needed == min(fits, default=None)


def number_told(warning: str) -> tuple[int, str]:
    found = re.search(r"train on (\d+) such GPUs([^;]*)", warning)
    assert found is not None, warning
    return int(found[1]), found[2]


@pytest.mark.parametrize("gpu_memory, of_a_row", [("4Gi", 0.05), ("12Gi", 1)])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_the_number_for_stage_3_is_what_the_job_needs_once_it_is_set(gpu_memory: str, of_a_row: float, stage: int):
    plan, found = planner(of_a_row), held(spec_of(gpu_memory, spec__compute=zero(stage)), planner(of_a_row))
    [warning] = found.warnings
    number, beside = number_told(warning)
    assert (found.gpus_needed, beside) == (None, " with spec.compute.deepspeed.stage: 3")
    assert held(spec_of(gpu_memory, spec__compute=zero(3)), plan).gpus_needed == number


def test_a_warning_tells_the_number_that_is_needed_as_the_job_is_and_a_smaller_one_at_stage_3():
    for stage, beside in ((1, ", or on 2 with spec.compute.deepspeed.stage: 3"), (3, "")):
        spec = spec_of("7.2Gi", spec__compute=zero(stage), spec__training={"globalBatchSize": 32, "microBatchSize": 1})
        found = held(spec, planner(0.5))
        [warning] = found.warnings
        assert number_told(warning) == (found.gpus_needed, beside)


SINGLE = {"microBatchSize": 1, "gradientCheckpointing": "always"}


@pytest.mark.parametrize(
    "gpu_memory, of_a_row, beside",
    [
        ("3.9Gi", 1, "spec.training: {microBatchSize: 1, gradientCheckpointing: always}"),
        ("16Gi", 16, "these settings"),
    ],
    ids=["too large without rows", "too large with them"],
)
def test_smaller_micro_batches_are_named_where_stage_3_takes_them(gpu_memory: str, of_a_row: float, beside: str):
    [warning] = warnings_of(spec_of(gpu_memory, spec__compute=zero(2)), of_a_row)
    number, told = number_told(warning)
    assert told == f" with spec.compute.deepspeed.stage: 3 and {beside}"
    single = spec_of(gpu_memory, spec__compute=zero(3), spec__training={"globalBatchSize": 32, **SINGLE})
    assert held(single, planner(of_a_row)).gpus_needed == number


def test_a_stage_that_was_named_is_not_named_again():
    spec = spec_of("8Gi", spec__compute={"gpusPerWorker": 2}, spec__training={"globalBatchSize": 32})
    [warning] = warnings_of(spec, of_a_row=16)
    number, told = number_told(warning)
    assert "with spec.training.microBatchSize: 1 and" in warning and told == " with these settings"
    single = spec_of("8Gi", spec__compute=zero(3), spec__training={"globalBatchSize": 32, **SINGLE})
    assert held(single, planner(16)).gpus_needed == number


def test_computing_twice_is_not_advised_where_it_is_done_anyway():
    [warning] = warnings_of(spec_of("24Gi", spec__compute=zero(3)), of_a_row=8)
    assert "set spec.training.microBatchSize: 1, with which it needs" in warning
