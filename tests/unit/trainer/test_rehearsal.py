"""What is rehearsed of a job: all that is its own, as little of it as there can be, nothing that is not there yet."""

from typing import Any

from finetune_api.resolve import resolve
from finetune_api.spec import FineTuneJobSpec, MethodType, PublishOn
from finetune_api.spec.compute import is_distributed
from finetune_trainer.rehearsal import STEPS, small_spec

from ..builders import make_job

SCRATCH = "s3://bucket/rehearsal"


def rehearsed(**changes: Any) -> FineTuneJobSpec:
    job = make_job({name.replace("__", "."): value for name, value in changes.items()})
    return small_spec(resolve(job).spec, SCRATCH)


def test_a_few_rows_are_trained_on_and_what_comes_out_is_published_beside():
    spec = rehearsed(spec__training={"maxSteps": 10_000, "globalBatchSize": 512, "microBatchSize": 64})
    training = spec.training
    assert (training.max_steps, training.global_batch_size, training.micro_batch_size) == (STEPS, 2, 1)
    assert spec.checkpoint.every_steps == training.eval_every_steps == 1
    assert (spec.output.uri, spec.output.publish_on) == (SCRATCH, PublishOn.ALWAYS)


def test_a_base_of_four_bits_is_rehearsed_as_a_whole_one_with_the_jobs_own_adapter():
    spec = rehearsed(spec__method={"type": "qlora", "lora": {"rank": 3}})
    assert spec.method.type is MethodType.LORA
    assert spec.method.lora is not None and spec.method.lora.rank == 3


def test_workers_and_what_another_job_has_published_are_not_waited_for():
    spec = rehearsed(
        spec__compute={"workers": 4, "gpusPerWorker": 2, "deepspeed": {"stage": 3}},
        spec__model__startFrom={"source": "s3://bucket/earlier"},
    )
    assert not is_distributed(spec.compute) and spec.compute.deepspeed is None
    assert spec.model.start_from is None


def test_what_the_check_proves_without_a_model_is_left_out():
    spec = rehearsed(
        spec__evaluation={
            "forgetting": {"maxDrop": 0.02},
            "gates": [{"metric": "sentiment.accuracy", "min": 0.9}],
            "generation": {"maxNewTokens": 400},
            "baselines": {"fewShot": 8},
        }
    )
    evaluation = spec.evaluation
    assert evaluation.forgetting is None and evaluation.gates == ()
    assert evaluation.baselines.few_shot == 2
    assert (evaluation.generation.max_new_tokens or 0) <= 8
