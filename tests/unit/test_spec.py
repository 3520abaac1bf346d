"""What a spec may say: every rule has a row that breaks it, and good specs of every method pass."""

import json
import re
from collections import Counter

import pytest
from pydantic import ValidationError

from finetune_api.explanation import field_errors
from finetune_api.job import FineTuneJob
from finetune_api.spec import FineTuneJobSpec, LoraSpec, MethodType
from finetune_api.support import ONLY

from .bad_specs import BAD_SPECS, Admission, BadSpec
from .builders import make_job, make_manifest


def errors_of(manifest: dict[str, object]) -> list[tuple[str, str, str, str]]:
    try:
        FineTuneJob.model_validate(manifest, by_alias=True, by_name=False)
    except ValidationError as error:
        return [(one.path, one.value, one.problem, one.remedy) for one in field_errors(FineTuneJob, error, {})]
    return []


def test_the_table_of_bad_specs_is_no_stub():
    assert len(BAD_SPECS) >= 100
    assert Counter(row.sentence for row in BAD_SPECS).most_common(1)[0][1] == 1
    assert {row.admission for row in BAD_SPECS} == set(Admission)


@pytest.mark.parametrize("row", BAD_SPECS, ids=lambda row: row.sentence)
def test_a_bad_spec_is_refused_for_its_one_mistake(row: BadSpec):
    errors = errors_of(make_manifest(row.given))
    blamed = [error for error in errors if error[0] == row.path]
    assert len(blamed) == 1, errors
    _, value, problem, remedy = blamed[0]
    assert row.value in value if row.value else value == ""
    assert len(value) < 100
    for words in row.says:
        assert words in f"{problem} {remedy}"
    assert problem.endswith(".")
    assert remedy.endswith((".", "?"))
    assert {path for path, *_ in errors} - {row.path} == set(row.also), "an error that only follows from another"


def test_advice_names_no_choice_that_is_refused_then():
    checked = 0
    for row in BAD_SPECS:
        for path, _, _, remedy in errors_of(make_manifest(row.given)):
            name = re.sub(r"\[\d+\]", "[]", path.removeprefix("spec."))
            if name in ONLY and "Choose one of " in remedy:
                named = remedy.partition("Choose one of ")[2].removesuffix(".").split(", ")
                assert set(named) <= {str(value) for value in ONLY[name]}, row.sentence
                checked += 1
    assert checked


def test_all_mistakes_are_found_at_once():
    given = {
        "metadata.name": "Reviews",
        "spec.model.trustRemoteCode": True,
        "spec.model.dtpye": "auto",
        "spec.data.tasks[1].weight": 2.0,
        "spec.data.tasks[0].templates[1]": {"prompt": "", "completion": "x"},
        "spec.method": {"type": "promptTuning", "lora": {"rank": 0}},
        "spec.training.epochs": "3",
        "spec.compute.workers": 2,
        "spec.compute.image": "A B",
        "spec.evaluation.gates": [{"metric": "mood.accuracy"}],
        "spec.output": {"merge": True},
    }
    assert {path for path, *_ in errors_of(make_manifest(given))} == {
        "metadata.name",
        "spec.model.trustRemoteCode",
        "spec.model.dtpye",
        "spec.data.tasks[0].templates[1].prompt",
        "spec.data.tasks[1].name",
        "spec.data.tasks[1].weight",
        "spec.method.lora.rank",
        "spec.method.lora",
        "spec.training.epochs",
        "spec.compute.workers",
        "spec.compute.image",
        "spec.evaluation.gates[0].metric",
        "spec.output.uri",
        "spec.output.merge",
    }


EVERYTHING = {
    "metadata.namespace": "team-a",
    "metadata.labels": {"kueue.x-k8s.io/queue-name": "team-a"},
    "spec.model.revision": "main",
    "spec.model.secretRef": {"name": "hf-token"},
    "spec.model.startFrom": {"job": "reviews-general"},
    "spec.data.tasks[1]": {"name": "nli", "source": "configMap://rows/nli.jsonl", "library": "nli", "weight": 2.0},
    "spec.data.tasks[2]": {"name": "chat", "source": "s3://bucket/chat.jsonl", "messages": "turns", "maxExamples": 10},
    "spec.data.mixing": {"strategy": "weights", "maxExamplesPerTask": 50000},
    "spec.data.splits": {"validation": 0.1, "test": 0.2, "groupBy": "film", "stratifyBy": "label", "seed": 1},
    "spec.data.format": "chat",
    "spec.data.system": "Be brief.",
    "spec.data.replay": {"source": "s3://bucket/general.jsonl", "fraction": 0.1},
    "spec.method": {
        "type": "lora",
        "lora": {"rank": 8, "targets": "named", "targetNames": ["q_proj"], "useDora": True, "useRslora": True},
    },
    "spec.training.earlyStopping": {"metric": "sentiment.accuracy", "patience": 3},
    "spec.training.reportTo": {
        "tensorboard": True,
        "mlflow": {
            "trackingUri": "https://mlflow.example",
            "experiment": "reviews",
            "secretRef": {"name": "mlflow-keys"},
        },
        "wandb": {
            "baseUrl": "https://wandb.example",
            "project": "reviews",
            "entity": "team-a",
            "secretRef": {"name": "wandb-keys"},
        },
    },
    "spec.compute": {
        "profile": "a100-80g",
        "engine": "ray",
        "image": "registry.example/trainer:1.0",
        "imagePullSecrets": [{"name": "pull"}],
        "priorityClassName": "high",
        "workers": 2,
        "gpusPerWorker": 4,
        "gpuResource": "nvidia.com/gpu",
        "gpuMemory": "80Gi",
        "devicesPerWorker": {"rdma/hca_shared_devices_a": 1, "vpc.amazonaws.com/efa": 64, "nvidia.com/hostdev": 8},
        "resources": {"cpu": "4", "memory": "32Gi", "ephemeralStorage": "1Ti"},
        "deepspeed": {"stage": 2, "offload": "cpu"},
        "sharedMemory": "8Gi",
        "cacheVolume": {"claimName": "model-cache"},
        "pod": {
            "nodeSelector": {"zone": "a"},
            "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
            "affinity": {
                "nodeAffinity": {
                    "requiredDuringSchedulingIgnoredDuringExecution": {
                        "nodeSelectorTerms": [
                            {"matchExpressions": [{"key": "gpu", "operator": "In", "values": ["a100"]}]}
                        ]
                    }
                },
                "podAntiAffinity": {
                    "requiredDuringSchedulingIgnoredDuringExecution": [
                        {"labelSelector": {"matchLabels": {"a": "b"}}, "topologyKey": "kubernetes.io/hostname"}
                    ]
                },
            },
            "labels": {"cost": "research"},
            "annotations": {"note": "long text is fine here"},
            "env": [
                {"name": "NCCL_DEBUG", "value": "INFO"},
                {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hf", "key": "token"}}},
            ],
            "volumes": [{"name": "v", "persistentVolumeClaim": {"claimName": "c", "readOnly": True}}],
            "volumeMounts": [{"name": "v", "mountPath": "/v", "subPath": "a", "readOnly": True}],
            "serviceAccountName": "trainer",
            "terminationGracePeriodSeconds": 300,
        },
    },
    "spec.evaluation": {
        "metrics": ["accuracy", "rouge", "bleu", "chrf", "exact_match", "token_f1", "perplexity"],
        "baselines": {"zeroShot": True, "fewShot": 4},
        "generation": {"maxNewTokens": 64, "numBeams": 1},
        "maxExamples": 2000,
        "resources": {"memory": "16Gi"},
        "forgetting": {
            "sources": ["s3://b/suite.jsonl"],
            "maxDrop": 0.02,
            "confidence": 0.95,
            "remedy": "none",
        },
        "benchmarks": [{"suite": "mmlu", "limit": 200}],
        "holistic": {"subgroupColumn": "domain", "perturbations": ["typos", "case"]},
        "gates": [
            {"metric": "sentiment.accuracy", "minDelta": 0.02, "confidence": 0.95},
            {"metric": "chat.rougeL", "minDelta": 0.0},
        ],
    },
    "spec.output": {
        "uri": "s3://bucket/models",
        "endpoint": "http://minio:9000",
        "secretRef": {"name": "s3-write"},
        "merge": True,
        "publishOn": "gates",
    },
    "spec.checkpoint": {"everySteps": 200, "keep": 2},
    "spec.runPolicy": {
        "suspend": False,
        "activeDeadlineSeconds": 3600,
        "startDeadlineSeconds": 1800,
        "childTtlSeconds": 86400,
        "retries": 3,
        "preflight": "enforce",
        "checkQueueName": "cpu-queue",
    },
}
GOOD = {
    "the minimum": {},
    "everything": EVERYTHING,
    "full with a pull back": {"spec.method": {"type": "full", "regularization": {"type": "kl", "strength": 0.1}}},
    "promptTuning from words": {
        "spec.method": {"type": "promptTuning", "promptTuning": {"init": "text", "initText": "Sort reviews."}}
    },
    "prefixTuning": {"spec.method": {"type": "prefixTuning", "prefixTuning": {"virtualTokens": 10}}},
    "ia3": {"spec.method": {"type": "ia3", "ia3": {"targetNames": ["k", "up"], "feedforwardNames": ["up"]}}},
    "adapter": {
        "spec.method": {"type": "adapter", "adapter": {"bottleneck": 32, "placement": "pfeiffer", "activation": "relu"}}
    },
    "selective by patterns": {
        "spec.method": {"type": "selective", "selective": {"train": "patterns", "patterns": [r"layers\.2[0-9]\."]}}
    },
    "rows that are relative to the manifest": {"spec.data.tasks[0].source": "file://./rows.jsonl"},
    "a gate on a task without labels": {
        "spec.data.tasks[0].labels": [],
        "spec.evaluation.gates": [{"metric": "sentiment.rouge2"}, {"metric": "sentiment.perplexity"}],
    },
}


@pytest.mark.parametrize("given", GOOD.values(), ids=GOOD)
def test_a_good_spec_comes_back_from_json_as_it_was(given: dict[str, object]):
    assert errors_of(make_manifest(given)) == []
    job = make_job(given)
    document = json.loads(job.model_dump_json(by_alias=True, exclude_none=True))
    assert document == job.model_dump(mode="json", by_alias=True, exclude_none=True)
    assert FineTuneJob.model_validate(document, by_alias=True, by_name=False) == job


def test_what_the_api_server_adds_to_metadata_is_passed_over():
    job = make_job({"metadata.uid": "0a1b2c3d-0000", "metadata.managedFields": [{"manager": "kubectl"}]})
    assert job.metadata.uid == "0a1b2c3d-0000"


def test_alpha_is_twice_the_rank_unless_given():
    assert LoraSpec(rank=4).alpha == 8
    assert LoraSpec(rank=4, alpha=4).alpha == 4


def test_every_method_has_its_place_in_the_contract():
    blocks = set(FineTuneJobSpec.model_fields["method"].annotation.model_fields)  # type: ignore[union-attr]
    assert blocks == {
        *("type", "regularization", "lora", "prompt_tuning", "prefix_tuning", "ia3", "adapter", "selective"),
    }
    assert len(MethodType) == 8


def test_a_spec_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        make_job().spec.training.epochs = 5  # type: ignore[misc]
