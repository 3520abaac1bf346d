"""What the next attempt at training changes after a fault that would come again unchanged. Pure.

Out of memory: half the rows at a time, with twice the accumulation, and activations computed twice; where both are
used up and several workers train, the next ZeRO stage. A loss that is no number: half the learning rate, from a
checkpoint earlier, once. Global batch, order of the rows and seed stay, and later attempts keep what one has changed.
"""

from dataclasses import dataclass, field

from finetune_api.job import FineTuneJob
from finetune_api.report import Stage
from finetune_api.spec import last_zero_stage, may_compute_twice
from finetune_api.spec.compute import processes, zero_stage
from finetune_api.spec.training import largest_micro_batch
from finetune_api.status import Attempt, PlanStatus, Reason

ADJUSTMENTS = ("micro_batch_size", "gradient_checkpointing", "zero_stage", "learning_rate_scale")
"""Fields of an attempt in which it differs from the spec."""
LOWER_RATE = 0.5


@dataclass(frozen=True, slots=True)
class Remedy:
    """What is changed."""

    changes: tuple[str, ...]
    """In words: ``microBatchSize 8 -> 4``."""
    fields: dict[str, object] = field(default_factory=dict)
    """New values of an attempt's `ADJUSTMENTS`."""


def needs_remedy(attempt: Attempt) -> bool:
    """Return whether the attempt, which has ended, would end in the same way if it were simply run again."""
    return attempt.stage is Stage.TRAIN and attempt.reason in (Reason.OUT_OF_MEMORY, Reason.DIVERGED)


def find_remedy(attempt: Attempt, job: FineTuneJob, plan: PlanStatus | None) -> Remedy | None:
    """Return what the attempt after this one, which `needs_remedy`, is to change; None when all has been tried.

    Args:
        attempt: how it ended, and what it had changed itself.
        job: as resolved.
        plan: of the check stage, which knows the micro-batch that an absent one becomes.
    """
    if attempt.reason is Reason.DIVERGED:
        return _lower_rate(attempt, job)
    remedies = [
        remedy for remedy in (_smaller_micro_batch(attempt, job, plan), _recomputation(attempt, job)) if remedy
    ] or [remedy for remedy in (_next_zero_stage(attempt, job, plan),) if remedy]
    if not remedies:
        return None
    changes = tuple(change for remedy in remedies for change in remedy.changes)
    return Remedy(changes, {name: value for remedy in remedies for name, value in remedy.fields.items()})


def _smaller_micro_batch(attempt: Attempt, job: FineTuneJob, plan: PlanStatus | None) -> Remedy | None:
    size = _micro_batch(attempt, job, plan)
    share = job.spec.training.global_batch_size // processes(job.spec.compute)
    # Killed before it could say how many they were, behind no check: only one is fewer for sure.
    smaller = smaller_micro_batch(size, share) if size else 1
    if smaller is None:
        return None
    return Remedy((f"microBatchSize {size or 'auto'} -> {smaller}",), {"micro_batch_size": smaller})


def _micro_batch(attempt: Attempt, job: FineTuneJob, plan: PlanStatus | None) -> int | None:
    return attempt.micro_batch_size or job.spec.training.micro_batch_size or (plan.micro_batch_size if plan else None)


def smaller_micro_batch(size: int, share: int) -> int | None:
    """Return the largest divisor of a process's share of the global batch that is at most half of ``size``, if any."""
    return largest_micro_batch(share, size // 2) if size > 1 else None


def _recomputation(attempt: Attempt, job: FineTuneJob) -> Remedy | None:
    if attempt.gradient_checkpointing or not may_compute_twice(job.spec):
        return None
    return Remedy(("gradientCheckpointing auto -> always",), {"gradient_checkpointing": True})


def _next_zero_stage(attempt: Attempt, job: FineTuneJob, plan: PlanStatus | None) -> Remedy | None:
    stage = attempt.zero_stage or zero_stage(job.spec.compute)
    if stage >= last_zero_stage(job.spec):
        return None
    # One that is left open would be larger again: stages 2 and 3 take more rows at a time.
    size = _micro_batch(attempt, job, plan)
    kept = {} if size is None else {"micro_batch_size": size}
    return Remedy((f"deepspeed.stage {stage} -> {stage + 1}",), {"zero_stage": stage + 1, **kept})


def _lower_rate(attempt: Attempt, job: FineTuneJob) -> Remedy | None:
    rate = job.spec.training.learning_rate
    if attempt.learning_rate_scale is not None or rate is None:
        return None
    changes = (f"learningRate {rate:g} -> {rate * LOWER_RATE:g}", "from a checkpoint earlier")
    return Remedy(changes, {"learning_rate_scale": LOWER_RATE})
