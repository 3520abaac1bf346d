"""Whether what training holds fits its GPUs, and what would make it fit. Pure.

A plan is made on a CPU. What no row has a part in is counted there: weights, gradients, optimiser state. What rows keep
depends on kernels, and a GPU has others. So a job is refused for what is counted alone, and warned of for all of it.
"""

from collections.abc import Callable, Iterable

from finetune_api.spec import (
    HAVE_ONE_GPU,
    OWN_WEIGHTS,
    DeepspeedSpec,
    FineTuneJobSpec,
    MethodType,
    last_zero_stage,
    may_compute_twice,
    needs_whole_weights,
)
from finetune_api.spec.compute import is_offloaded, processes, zero_stage
from finetune_api.spec.training import largest_micro_batch
from finetune_api.status import PlanStatus
from finetune_trainer.adjustment import Adjustment, adjusted
from finetune_trainer.zero_memory import shares

USABLE = 0.92
"""Share of a GPU's memory that tensors may fill: its context, and holes between blocks, take the rest."""

_GRADIENT_BYTES = 4
"""Of a trained parameter beside frozen ones, which is float32 whatever products are computed in."""

_SPREADS_ALL = 3
"""The ZeRO stage that spreads everything but what rows take."""
_SPREAD_ALL = f"spec.compute.deepspeed.stage: {_SPREADS_ALL}"
_TWICE = ", gradientCheckpointing: always"

PlanAgain = Callable[[FineTuneJobSpec], PlanStatus]
"""Returns the plan of the same job with other settings."""


def hold_against_gpu(plan: PlanStatus, spec: FineTuneJobSpec, plan_again: PlanAgain) -> PlanStatus:
    """Return ``plan``, of the resolved ``spec``, with how many GPUs of its ``gpuMemory`` it needs.

    Where it does not fit those that it asks for, a warning says so.
    """
    if not _is_known(plan, spec):
        return plan
    plan = plan.model_copy(update={"gpus_needed": _gpus_needed(spec, zero_stage(spec.compute), plan_again)})
    if _fits(plan):
        return plan
    warning = (_what_is_too_large if _is_too_large(plan, spec) else _what_may_fit)(plan, spec, plan_again)
    return plan.model_copy(update={"warnings": (*plan.warnings, warning)})


def why_it_cannot_fit(plan: PlanStatus, spec: FineTuneJobSpec) -> str:
    """Return what is too large on each GPU whatever later attempts change, and what to do; empty where it may fit.

    ``plan`` is one that was held against its GPUs, and has warned of it last.
    """
    return plan.warnings[-1] if _is_too_large(plan, spec) else ""


def _is_too_large(plan: PlanStatus, spec: FineTuneJobSpec) -> bool:
    return _is_known(plan, spec) and _held_without_rows(plan, spec) > (plan.gpu_memory_bytes or 0)


def _is_known(plan: PlanStatus, spec: FineTuneJobSpec) -> bool:
    """Whether there is something to compare; what is offloaded is planned as if it lay on the GPU."""
    is_planned = plan.memory is not None and bool(plan.gpus)
    return is_planned and plan.gpu_memory_bytes is not None and not is_offloaded(spec.compute)


def _fits(plan: PlanStatus) -> bool:
    need, room = plan.memory_bytes_per_gpu, plan.gpu_memory_bytes
    return need is not None and room is not None and need <= USABLE * room


def _held_without_rows(plan: PlanStatus, spec: FineTuneJobSpec) -> int:
    """Return the bytes that a step of any attempt holds; of full, spread over all, as the last attempt does."""
    memory = plan.memory
    if memory is None or (spec.compute.deepspeed is not None and spec.method.type is not MethodType.FULL):
        # DeepSpeed keeps frozen weights in bfloat16 that are planned in float32.
        return 0
    now, is_full = shares(zero_stage(spec.compute), processes(spec.compute)), spec.method.type is MethodType.FULL
    weights = memory.weights * now.weights
    # Not those of the plan, which are there when rows take most, and may be none.
    gradients = weights if is_full else _GRADIENT_BYTES * (plan.trainable_parameters or 0)
    state = weights + gradients + memory.optimiser * now.optimiser
    return state // (processes(spec.compute) if is_full else 1) + memory.copies


def _what_is_too_large(plan: PlanStatus, spec: FineTuneJobSpec, plan_again: PlanAgain) -> str:
    smallest = f"{_SPREAD_ALL} and spec.training: {{microBatchSize: 1{_TWICE if may_compute_twice(spec) else ''}}}"
    return (
        f"training holds at least {in_gib(_held_without_rows(plan, spec))} on each GPU, however few rows it takes at a "
        f"time, and spec.compute.gpuMemory is {spec.compute.gpu_memory}: "
        f"{_ways_out(plan, spec, plan_again, smallest)}."
    )


def _what_may_fit(plan: PlanStatus, spec: FineTuneJobSpec, plan_again: PlanAgain) -> str:
    """Return which settings would do, or that none will.

    The smallest are planned first: a plan takes seconds where a model is large, and mostly decides about all of them.
    """
    need = f"training needs about {_gib(plan)} on each GPU"
    room = (
        f"spec.compute.gpuMemory is {spec.compute.gpu_memory}, of which tensors may fill "
        f"{in_gib(int(USABLE * (plan.gpu_memory_bytes or 0)))}"
    )
    smaller = _smaller(plan, spec)
    least = plan_again(adjusted(spec, smaller[-1])) if smaller else plan
    if least.memory is None:
        # A model that cannot compute its activations twice.
        least = plan
    if not _fits(least):
        found = "" if least is plan else f", {_gib(least)} with {_settings(smaller[-1], plan, least)}"
        these = "these settings"
        smallest = these if smaller and smaller[-1].zero_stage == _SPREADS_ALL else f"{_SPREAD_ALL} and {these}"
        ways = _ways_out(plan, spec, plan_again, smallest)
        return f"{need}{found}, and {room}: lower spec.data.maxLength; or {ways}."
    *milder, last = smaller
    plans = ((one, plan_again(adjusted(spec, one))) for one in milder)
    adjustment, after = next(((one, other) for one, other in plans if _fits(other)), (last, least))
    remedy = f"set {_settings(adjustment, plan, after)}, with which it needs {_gib(after)}"
    return f"{need}, and {room}: {remedy}. {_by_itself(smaller.index(adjustment), plan, spec)}"


def _by_itself(position: int, plan: PlanStatus, spec: FineTuneJobSpec) -> str:
    """Return whether attempts come to what is at ``position`` of `_smaller` before the job is given up."""
    # An attempt halves its rows and computes twice at once.
    is_skipped = may_compute_twice(spec) and (plan.micro_batch_size or 1) > 1
    attempts, retries = max(1, position) if is_skipped else position + 1, spec.run_policy.retries
    same = "Attempts that run out of memory come to the same"
    if attempts <= retries:
        return f"{same}."
    return f"{same} after {attempts} of them, which is more than spec.runPolicy.retries: {retries} allows."


def _smaller(plan: PlanStatus, spec: FineTuneJobSpec) -> list[Adjustment]:
    """Return what attempts that run out of memory come to, mildest first; see `finetune_operator.remedy`."""
    twice = may_compute_twice(spec)
    share, sizes = spec.training.global_batch_size // processes(spec.compute), [plan.micro_batch_size or 1]
    while sizes[-1] > 1:
        sizes.append(largest_micro_batch(share, sizes[-1] // 2))
    return [
        *(Adjustment(micro_batch_size=size, gradient_checkpointing=twice) for size in (sizes if twice else sizes[1:])),
        *(
            Adjustment(micro_batch_size=1, gradient_checkpointing=twice, zero_stage=stage)
            for stage in range(zero_stage(spec.compute) + 1, last_zero_stage(spec) + 1)
        ),
    ]


def _settings(adjustment: Adjustment, before: PlanStatus, after: PlanStatus) -> str:
    changes = []
    if after.micro_batch_size != before.micro_batch_size:
        changes.append(f"spec.training.microBatchSize: {after.micro_batch_size}")
    if adjustment.gradient_checkpointing:
        changes.append("spec.training.gradientCheckpointing: always")
    if adjustment.zero_stage is not None:
        changes.append(f"spec.compute.deepspeed.stage: {adjustment.zero_stage}")
    return " and ".join(changes)


def _ways_out(plan: PlanStatus, spec: FineTuneJobSpec, plan_again: PlanAgain, smallest: str) -> str:
    """Return what to do where smaller settings do not help; ``smallest`` is what they are called, spread wholly."""
    ways = []
    if plan.memory is not None and plan.memory.copies:
        ways.append("leave spec.method.regularization out")
    if spec.method.type in OWN_WEIGHTS:
        ways.append("take spec.method.type lora or qlora, which hold fewer bytes of each parameter")
    elif spec.method.type is not MethodType.QLORA:
        ways.append("take spec.method.type qlora, whose base lies in 4 bits")
    if spec.method.type in HAVE_ONE_GPU:
        ways.append("take a smaller model")
    if more := _more_gpus(plan, spec, plan_again, smallest):
        ways.append(f"train on {more}")
    if _may_spread_weights(spec):
        ways.append("set spec.compute: {engine: ray, deepspeed: {stage: 3, offload: cpu}}, much slower")
    return "; or ".join(ways)


def _may_spread_weights(spec: FineTuneJobSpec) -> bool:
    return spec.method.type not in HAVE_ONE_GPU and not needs_whole_weights(spec.method, spec.training)


def _more_gpus(plan: PlanStatus, spec: FineTuneJobSpec, plan_again: PlanAgain, smallest: str) -> str:
    """Return on how many GPUs the job fits as it is, or on fewer when more is spread; empty where on no number."""
    as_it_is = f"{plan.gpus_needed} such GPUs" if plan.gpus_needed else ""
    if not _may_spread_weights(spec):
        return as_it_is
    if spread := _gpus_needed(spec, _SPREADS_ALL, plan_again):
        if spread == plan.gpus_needed:
            return as_it_is
        return (
            f"{as_it_is}, or on {spread} with {_SPREAD_ALL}" if as_it_is else f"{spread} such GPUs with {_SPREAD_ALL}"
        )
    single = adjusted(spec, Adjustment(micro_batch_size=1, gradient_checkpointing=may_compute_twice(spec)))
    spread = _gpus_needed(single, _SPREADS_ALL, plan_again)
    return f"{spread} such GPUs with {smallest}" if spread else ""


def _gpus_needed(spec: FineTuneJobSpec, stage: int, plan_again: PlanAgain) -> int | None:
    """Return the least GPUs on which the job fits when they spread what a ZeRO stage spreads; None where on none."""
    return next((count for count in _counts(spec) if _fits(plan_again(_on(spec, count, stage)))), None)


def _counts(spec: FineTuneJobSpec) -> Iterable[int]:
    """Return on how many GPUs the job may be, least first: each does as many micro-batches of a step."""
    if spec.method.type in HAVE_ONE_GPU:
        return (1,)
    micro_batches = spec.training.global_batch_size // (spec.training.micro_batch_size or 1)
    return (count for count in range(1, micro_batches + 1) if micro_batches % count == 0)


def _on(spec: FineTuneJobSpec, count: int, stage: int) -> FineTuneJobSpec:
    asked = spec.compute.deepspeed
    deepspeed = None if asked is None and stage == 0 else (asked or DeepspeedSpec()).model_copy(update={"stage": stage})
    changes = {"workers": count, "gpus_per_worker": 1, "deepspeed": deepspeed}
    return spec.model_copy(update={"compute": spec.compute.model_copy(update=changes)})


def _gib(plan: PlanStatus) -> str:
    return in_gib(plan.memory_bytes_per_gpu or 0)


def in_gib(size: int) -> str:
    """Return bytes in words."""
    return f"{size / 1024**3:.1f} GiB"
