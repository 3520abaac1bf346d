"""What an attempt changes after memory was short or the loss no number any more."""

from typing import Any

import pytest

from finetune_api.report import Stage
from finetune_api.status import Attempt, PlanStatus, Reason
from finetune_operator.remedy import Remedy, find_remedy, needs_remedy, smaller_micro_batch

from .objects import make_resolved

SHARDED = {"spec.compute": {"workers": 2, "deepspeed": {"stage": 2}}, "spec.method": {"type": "full"}}


def ended(reason: Reason = Reason.OUT_OF_MEMORY, **changes: Any) -> Attempt:
    return Attempt(stage=Stage.TRAIN, number=1, child="c", reason=reason).model_copy(update=changes)


def remedies(attempt: Attempt, given: dict[str, Any], plan: PlanStatus | None = None) -> list[Remedy]:
    """Every remedy in turn, until there is none."""
    found = []
    while (remedy := find_remedy(attempt, make_resolved(given), plan)) is not None:
        found.append(remedy)
        attempt = attempt.model_copy(update=remedy.fields)
    return found


def words(found: list[Remedy]) -> list[str]:
    return ["; ".join(remedy.changes) for remedy in found]


@pytest.mark.parametrize(("size", "share", "smaller"), [(8, 16, 4), (6, 12, 3), (5, 15, 1), (7, 14, 2), (1, 16, None)])
def test_a_smaller_micro_batch_still_divides_the_whole(size: int, share: int, smaller: int | None):
    assert smaller_micro_batch(size, share) == smaller


def test_a_smaller_micro_batch_divides_what_each_worker_takes_of_a_step():
    given = {"spec.compute": {"workers": 2}, "spec.training": {"globalBatchSize": 30, "microBatchSize": 15}}
    assert words(remedies(ended(), given))[0].startswith("microBatchSize 15 -> 5;")


def test_memory_is_saved_step_by_step_until_nothing_is_left():
    assert words(remedies(ended(), SHARDED | {"spec.training.microBatchSize": 4})) == [
        "microBatchSize 4 -> 2; gradientCheckpointing auto -> always",
        "microBatchSize 2 -> 1",
        "deepspeed.stage 2 -> 3",
    ]


def test_a_further_stage_takes_no_more_rows_at_a_time_than_ran_out_of_memory():
    given = {"spec.compute": {"workers": 2}, "spec.method": {"type": "full"}}
    found = remedies(ended(), given, PlanStatus(micro_batch_size=1))
    assert [remedy.fields for remedy in found if "zero_stage" in remedy.fields] == [
        {"zero_stage": stage, "micro_batch_size": 1} for stage in (1, 2, 3)
    ]


def test_an_adapter_has_nothing_to_spread():
    given = {"spec.compute": {"workers": 2}, "spec.training.microBatchSize": 1}
    assert words(remedies(ended(), given)) == ["gradientCheckpointing auto -> always"]


def test_one_worker_has_nobody_to_spread_to():
    given = {"spec.method": {"type": "full"}, "spec.training.microBatchSize": 1}
    assert words(remedies(ended(), given)) == ["gradientCheckpointing auto -> always"]


def test_without_deepspeed_the_first_stage_follows():
    given = {"spec.compute": {"workers": 2}, "spec.method": {"type": "full"}, "spec.training.microBatchSize": 1}
    assert words(remedies(ended(), given))[1:] == [f"deepspeed.stage {stage} -> {stage + 1}" for stage in range(3)]


@pytest.mark.parametrize(
    "wanted", [{"spec.training.earlyStopping": {}}, {"spec.method.regularization": {"type": "l2sp"}}]
)
def test_weights_that_are_kept_or_compared_whole_are_not_spread(wanted: dict[str, Any]):
    given = {"spec.compute": {"workers": 2}, "spec.method": {"type": "full"}, "spec.training.microBatchSize": 1}
    assert words(remedies(ended(), given | wanted))[-1] == "deepspeed.stage 1 -> 2"


def test_bfloat16_without_gpus_is_not_spread_for_deepspeed_refuses_it():
    cpus = {"spec.compute": {"workers": 2, "gpusPerWorker": 0}, "spec.method": {"type": "full"}}
    given = cpus | {"spec.training.microBatchSize": 1, "spec.training.precision": "bf16"}
    assert words(remedies(ended(), given)) == ["gradientCheckpointing auto -> always"]


def test_computing_twice_is_no_change_where_it_was_done_already():
    given = {"spec.training.microBatchSize": 2, "spec.compute": {"workers": 2, "deepspeed": {"stage": 3}}}
    assert words(remedies(ended(), given)) == ["microBatchSize 2 -> 1"]


def test_what_the_user_forbids_is_not_tried():
    given = {"spec.training.gradientCheckpointing": "never", "spec.training.microBatchSize": 2}
    assert words(remedies(ended(), given)) == ["microBatchSize 2 -> 1"]


def test_the_plan_knows_the_micro_batch_that_the_spec_leaves_open():
    assert words(remedies(ended(), {}, PlanStatus(micro_batch_size=2)))[0].startswith("microBatchSize 2 -> 1")


def test_where_nobody_has_said_how_many_rows_did_not_fit_one_at_a_time_are_tried():
    assert words(remedies(ended(), {})) == ["microBatchSize auto -> 1; gradientCheckpointing auto -> always"]


def test_the_learning_rate_is_lowered_once():
    [remedy] = remedies(ended(Reason.DIVERGED), {"spec.training.learningRate": 0.002})
    assert remedy.fields == {"learning_rate_scale": 0.5}
    assert remedy.changes == ("learningRate 0.002 -> 0.001", "from a checkpoint earlier")


@pytest.mark.parametrize(
    ("stage", "reason", "needed"),
    [
        (Stage.TRAIN, Reason.OUT_OF_MEMORY, True),
        (Stage.TRAIN, Reason.DIVERGED, True),
        (Stage.TRAIN, Reason.PREEMPTED, False),
        (Stage.EVALUATE, Reason.OUT_OF_MEMORY, False),
    ],
)
def test_only_training_has_remedies(stage: Stage, reason: Reason, needed: bool):
    assert needs_remedy(ended(reason, stage=stage)) is needed
