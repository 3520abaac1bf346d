"""What is valid but does not work yet, and what a place cannot reach."""

import json
from typing import Any

import pytest
from pydantic import BaseModel

from finetune_api.explanation import model_at
from finetune_api.job import FineTuneJob, InvalidJobError, load_job
from finetune_api.resolve import resolve
from finetune_api.support import ONLY, SCHEMES, Place, unreachable_fields, unsupported_fields

from .builders import ABSENT, make_job, make_manifest
from .test_spec import EVERYTHING

SUPPORTED = {
    "the minimum": {},
    "several tasks": {"spec.data.tasks[1].name": "other", "spec.data.tasks[1].maxExamples": 5},
    "weights": {"spec.data.mixing.strategy": "weights", "spec.data.tasks[0].weight": 3.0},
    "the template library": {"spec.data.tasks[0].templates": ABSENT, "spec.data.tasks[0].library": "sentiment"},
    "chats": {
        "spec.data.tasks[0].templates": ABSENT,
        "spec.data.tasks[0].messages": "turns",
        "spec.data.lossOn": "assistant",
    },
    "full": {"spec.method.type": "full"},
    "qlora": {"spec.method": {"type": "qlora", "lora": {"rank": 4, "useRslora": True}}},
    "prompt tuning": {"spec.method": {"type": "promptTuning", "promptTuning": {"init": "text", "initText": "Sort."}}},
    "prefix tuning": {
        "spec.method": {"type": "prefixTuning", "prefixTuning": {"virtualTokens": 10, "projection": True}}
    },
    "ia3": {"spec.method": {"type": "ia3", "ia3": {"targetNames": ["k", "up"], "feedforwardNames": ["up"]}}},
    "adapter": {
        "spec.method": {"type": "adapter", "adapter": {"bottleneck": 8, "placement": "pfeiffer", "activation": "silu"}}
    },
    "selective": {"spec.method": {"type": "selective", "selective": {"train": "lastLayers", "lastLayers": 1}}},
    "full with a pull back": {"spec.method": {"type": "full", "regularization": {"type": "kl", "strength": 0.1}}},
    "trackers": {
        "spec.training.reportTo": {
            "tensorboard": True,
            "mlflow": {"trackingUri": "http://mlflow:5000"},
            "wandb": {"project": "reviews"},
        }
    },
    "early stopping": {"spec.training.earlyStopping": {"metric": "sentiment.accuracy", "patience": 2}},
    "lora": {
        "spec.method.lora": {
            "rank": 4,
            "targets": "named",
            "targetNames": ["q_proj"],
            "useDora": True,
            "useRslora": True,
        }
    },
    "data": {
        "spec.data.splits": {
            "validation": 0.1,
            "test": 0.2,
            "groupBy": "film",
            "stratifyBy": "label",
            "seed": 3,
        },
        "spec.data.mixing": {"strategy": "temperature", "temperature": 3.0, "maxExamplesPerTask": 100},
        "spec.data.replay": {"source": "s3://bucket/general.jsonl", "fraction": 0.05},
        "spec.data.tasks[0].validationSource": "s3://bucket/validation.jsonl",
        "spec.data.tasks[0].testSource": "file:///test.jsonl",
        "spec.data.tasks[0].columns": {"text": "Review Body"},
        "spec.data.format": "chat",
        "spec.data.system": "Be brief.",
        "spec.data.lossOn": "all",
        "spec.data.packing": False,
        "spec.data.maxLength": 64,
    },
    "compute": {
        "spec.compute": {
            "profile": "a100",
            "workers": 1,
            "engine": "job",
            "image": "registry.example/trainer:1.0",
            "imagePullSecrets": [{"name": "pull"}],
            "priorityClassName": "high",
            "gpusPerWorker": 1,
            "gpuResource": "nvidia.com/gpu",
            "gpuMemory": "80Gi",
            "devicesPerWorker": {"rdma/nic": 1},
            "resources": {"cpu": "4", "memory": "8Gi"},
            "sharedMemory": "1Gi",
            "cacheVolume": {"claimName": "cache"},
            "pod": {"nodeSelector": {"gpu": "a100"}, "env": [{"name": "NCCL_DEBUG", "value": "INFO"}]},
        },
        "spec.evaluation.resources": {"memory": "16Gi"},
    },
    "several workers": {
        "spec.compute": {"workers": 2, "gpusPerWorker": 4, "engine": "ray"},
        "spec.compute.deepspeed": {"stage": 3, "offload": "cpu"},
    },
    "evaluation": {
        "spec.evaluation": {
            "metrics": ["accuracy", "exact_match", "token_f1", "rouge", "bleu", "chrf", "perplexity"],
            "gates": [{"metric": "sentiment.macro_f1", "min": 0.5}, {"metric": "sentiment.chrf", "minDelta": 0.0}],
            "baselines": {"zeroShot": True, "fewShot": 4},
            "forgetting": {
                "sources": ["s3://b/suite.jsonl"],
                "maxDrop": 0.05,
                "confidence": 0.9,
                "remedy": "loraScale",
            },
            "generation": {"maxNewTokens": 8},
            "maxExamples": 10,
            "benchmarks": [
                {"suite": "mmlu", "limit": 100},
                {"suite": "configMap://tasks/task.yaml"},
                {"suite": "s3://bucket/tasks/other.yaml"},
            ],
        }
    },
    "stores": {
        "spec.model": {"source": "s3://bucket/model", "secretRef": {"name": "models"}},
        "spec.data.tasks[0].source": "configMap://reviews/rows.jsonl",
        "spec.data.tasks[0].testSource": "hf://datasets/acme/reviews/data/test*",
        "spec.output": {"uri": "s3://bucket", "endpoint": "http://minio:9000", "secretRef": {"name": "output"}},
    },
    "a start": {"spec.model.startFrom": {"source": "s3://bucket/models/default/general-0123abcd/model"}},
    "volumes": {"spec.model.source": "pvc://models/base", "spec.output.uri": "pvc://results/here"},
    "output": {"spec.output": {"uri": "file:///m", "merge": True, "publishOn": "always"}, "spec.checkpoint.keep": 1},
    "how the run is looked after": {
        "spec.runPolicy": {
            "suspend": True,
            "activeDeadlineSeconds": 3600,
            "startDeadlineSeconds": 60,
            "childTtlSeconds": 0,
            "retries": 0,
            "preflight": "warn",
            "checkQueueName": "cpu",
        }
    },
}


def refusals(job: FineTuneJob) -> dict[str, str]:
    document = job.model_dump(mode="json", by_alias=True, exclude_none=True)
    return {".".join(map(str, path)): remedy for path, _, _, remedy in unsupported_fields(document["spec"])}


@pytest.mark.parametrize("given", SUPPORTED.values(), ids=SUPPORTED)
def test_what_works_is_accepted_as_written_and_as_resolved(given: dict[str, Any]):
    job = load_job(json.dumps(make_manifest(given)), "job.json")
    assert refusals(resolve(job)) == {}
    again = resolve(job).model_dump_json(by_alias=True, exclude_none=True)
    assert load_job(again, "spec.json") == resolve(job)


def test_every_field_that_does_not_work_yet_is_refused_by_name():
    found = refusals(make_job(EVERYTHING))
    names = {"".join("[]" if part.isdigit() else f".{part}" for part in path.split(".")[1:])[1:] for path in found}
    exceptions = {
        # Refused elsewhere in this manifest, or in no need of it.
        *("model.task", "compute.deepspeed.offload"),
        *SCHEMES,
        *("evaluation.baselines.zeroShot",),
    }
    assert names == set(ONLY) - exceptions


@pytest.mark.parametrize(
    "given, path, remedy",
    [
        (
            {"spec.evaluation.forgetting": {"sources": ["hf://a/b"]}},
            "spec.evaluation.forgetting.sources[0]",
            "file://",
        ),
        ({"spec.evaluation.baselines": {"zeroShot": False}}, "spec.evaluation.baselines.zeroShot", "Use true"),
        (
            {"spec.compute": {"workers": 2, "deepspeed": {"stage": 3, "offload": "nvme"}}},
            "spec.compute.deepspeed.offload",
            "none or cpu",
        ),
    ],
)
def test_a_job_that_asks_for_what_is_not_there_yet_is_told_what_to_do(given: dict[str, Any], path: str, remedy: str):
    with pytest.raises(InvalidJobError) as caught:
        load_job(json.dumps(make_manifest(given)), "job.json")
    (error,) = caught.value.errors
    assert error.path == path
    assert "not supported yet" in error.problem
    assert remedy in error.remedy


def test_what_is_not_supported_is_said_together_with_what_is_wrong():
    given = {"spec.training.epochs": "3", "spec.evaluation.baselines": {"zeroShot": False}}
    with pytest.raises(InvalidJobError) as caught:
        load_job(json.dumps(make_manifest(given)), "job.json")
    assert {error.path for error in caught.value.errors} == {
        "spec.training.epochs",
        "spec.evaluation.baselines.zeroShot",
    }


@pytest.mark.parametrize("name", [*ONLY, *SCHEMES])
def test_the_tables_name_fields_that_exist(name: str):
    *block, last = ("spec", *name.replace("[]", "").split("."))
    model: type[BaseModel] | None = model_at(FineTuneJob, tuple(block))
    assert model is not None
    assert last in {field.alias for field in model.model_fields.values()}


def test_a_cluster_reaches_no_folder_of_yours():
    spec = make_manifest({"spec.model.source": "file:///m"})["spec"]
    paths = {path for path, *_ in unreachable_fields(spec, Place.CLUSTER)}
    assert paths == {("spec", "model", "source"), ("spec", "data", "tasks", 0, "source"), ("spec", "output", "uri")}
    assert list(unreachable_fields(spec, Place.LOCAL)) == []


def test_a_laptop_reaches_nothing_that_a_cluster_mounts():
    spec = make_manifest({"spec.model.source": "pvc://models/m", "spec.output.uri": "s3://bucket"})["spec"]
    ((path, value, _, remedy),) = unreachable_fields(spec, Place.LOCAL)
    assert (path, value) == (("spec", "model", "source"), "pvc://models/m")
    assert "file:///" in remedy
