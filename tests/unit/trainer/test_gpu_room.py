"""What training holds, held against its GPUs: made-up plans, whose rows take the same each."""

from typing import Any

import pytest

from finetune_api.resolve import resolve
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.compute import processes
from finetune_api.spec.field import amount
from finetune_api.status import LONGEST_WARNING, MemoryStatus, PlanStatus
from finetune_trainer.gpu_room import hold_against_gpu, shares, why_it_cannot_fit

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
    """Return what makes plans: a row takes so many GiB, a quarter where activations are computed twice."""

    def plan(spec: FineTuneJobSpec) -> PlanStatus:
        compute, micro_batch = spec.compute, spec.training.micro_batch_size or 1
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
    plan = planner(of_a_row, trained)
    return hold_against_gpu(plan(spec), spec, plan).warnings


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
    assert why_it_cannot_fit(planner(1)(spec), spec) == ""


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
    assert why_it_cannot_fit(planner(of_a_row)(spec), spec) == ""


def test_rows_that_fit_in_no_attempt_are_warned_of_and_not_refused():
    spec = spec_of("40Gi")
    [warning] = warnings_of(spec, of_a_row=128)
    assert "needs about 1036.0 GiB on each GPU, 44.0 GiB with spec.training.microBatchSize: 1" in warning
    assert "spec.compute.gpuMemory is 40Gi, of which tensors may fill 36.8 GiB: lower spec.data.maxLength" in warning
    assert why_it_cannot_fit(planner(128)(spec), spec) == ""


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
    why = why_it_cannot_fit(planner(1, trained)(spec), spec)
    assert f"holds at least {held} GiB on each GPU, however few rows" in why and "gpuMemory is 1Gi" in why
    assert warnings_of(spec, 1, trained) == (why,)
    enough = spec_of(f"{held}Gi", **changes)
    assert why_it_cannot_fit(planner(1, trained)(enough), enough) == "", "what is as large as the GPU is not refused"


def test_weights_that_deepspeed_keeps_in_its_own_format_decide_nothing():
    spec = spec_of("1Gi", spec__method__type="lora", spec__compute={"gpusPerWorker": 4, "deepspeed": {"stage": 3}})
    assert why_it_cannot_fit(planner(1, 0.0)(spec), spec) == ""
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
    why = why_it_cannot_fit(planner(0.05)(spec), spec)
    assert not [words for words in named if words not in why]
    assert not [words for words in unnamed if words in why]


def test_copies_count_and_are_the_first_to_go():
    spec = spec_of("18Gi", spec__method__regularization={"type": "l2sp"})
    plan = planner(1)(spec)
    assert plan.memory is not None
    copied = plan.model_copy(update={"memory": plan.memory.model_copy(update={"copies": 4 * GIB})})
    why = why_it_cannot_fit(copied, spec)
    assert "holds at least 20.0 GiB" in why and "gpuMemory is 18Gi: leave spec.method.regularization out" in why


@pytest.mark.parametrize("of_a_row, memory", [(1, "1Gi"), (512, "40Gi"), (8, "24Gi")])
@pytest.mark.parametrize("method", ["full", "lora", "qlora", "promptTuning", "selective"])
def test_a_warning_has_room_in_the_status(method: str, of_a_row: float, memory: str):
    [warning] = warnings_of(spec_of(memory, spec__method__type=method), of_a_row)
    assert len(warning) <= LONGEST_WARNING
