"""Jobs that go on from what another job has published."""

import io
import json
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from finetune_api.job import FineTuneJob
from finetune_api.report import ArtifactKind, ExitCode, Progress, Report, Stage
from finetune_cli.__main__ import run_command
from finetune_trainer import folder_fetch, stages
from finetune_trainer.adapter_set import with_the_weights_of
from finetune_trainer.errors import DataError, FineTuneError
from finetune_trainer.inputs import Inputs, describe_change
from finetune_trainer.location import Mounts
from finetune_trainer.manifest import write_manifest
from finetune_trainer.model import fetch_model
from finetune_trainer.published_model import Lineage
from finetune_trainer.stages import PodOptions
from finetune_trainer.start import check_start, fetch_start
from finetune_trainer.storage import Storage

from .conftest import save_tiny_encoder_decoder, save_tiny_model
from .jobs import Silence, tiny_job
from .s3_server import S3Server

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"type": "lora", "lora": {"rank": 4, "dropout": 0.0}},
    "full": {"type": "full"},
    "promptTuning": {"type": "promptTuning", "promptTuning": {"virtualTokens": 4}},
    "adapter": {"type": "adapter", "adapter": {"bottleneck": 8}},
    "ia3": {"type": "ia3"},
    "prefixTuning": {"type": "prefixTuning", "prefixTuning": {"virtualTokens": 4}},
    "selective": {"type": "selective", "selective": {"train": "lastLayers", "lastLayers": 1}},
}
QUICKLY: dict[str, Any] = {
    "evaluation": {"metrics": ["perplexity"], "maxExamples": 4},
    "output__publishOn": "always",
    "training__maxSteps": 2,
    "training__evalEverySteps": 2,
}


@dataclass(frozen=True)
class Published:
    report: Report
    folder: Path
    """Of the job's results."""

    @property
    def model(self) -> Path:
        return self.folder / "model"


def run(job: FineTuneJob, folder: Path) -> Published:
    report = stages.run(job, folder / "workspace", Silence())
    (results,) = (folder / "output" / "default").iterdir()
    return Published(report, results)


@pytest.fixture(scope="module")
def first(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Published]:
    """What first jobs, one of each method, have published. Read only."""
    found = {}
    for name, method in METHODS.items():
        folder = tmp_path_factory.mktemp(f"first-{name}")
        # What begins as nothing is not far from it after two steps.
        rate = {"training__learningRate": 0.3} if name in ("adapter", "ia3") else {}
        found[name] = run(tiny_job(tiny_model_dir, folder, method=method, **QUICKLY, **rate), folder)
    return found


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize("method", METHODS)
def test_training_begins_with_the_weights_that_the_other_job_has_published(
    first: dict[str, Published], tiny_model_dir: Path, tmp_path: Path, method: str
):
    start = first[method].model
    changes = QUICKLY | {
        "model__startFrom": {"source": start.as_uri()},
        "method": METHODS[method],
        # One step of AdamW moves a weight by about the learning rate.
        "training__maxSteps": 1,
        "training__evalEverySteps": 1,
        "training__learningRate": 1e-9,
    }
    result = stages.run_one(Stage.TRAIN, tiny_job(tiny_model_dir, tmp_path, **changes), tmp_path / "w", Silence())
    assert result.exit_code is ExitCode.OK, result.message
    before, after = weights(start), weights(tmp_path / "w" / "tuned")
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.allclose(value, after[name], atol=1e-7), name


class StopsBehindAStep:
    """Asks for a stop as the kubelet does."""

    def __init__(self) -> None:
        self._has_asked = False

    def report(self, progress: Progress) -> None:
        if progress.step and not self._has_asked:
            self._has_asked = True
            os.kill(os.getpid(), signal.SIGTERM)


def test_an_interrupted_run_with_a_start_goes_on_to_the_same_end(
    first: dict[str, Published], tiny_model_dir: Path, tmp_path: Path
):
    changes = QUICKLY | {
        "model__startFrom": {"source": first["lora"].model.as_uri()},
        "method": METHODS["lora"],
        "training__maxSteps": 16,
    }
    job = tiny_job(tiny_model_dir, tmp_path, **changes)
    results = [
        stages.run_one(Stage.TRAIN, job, tmp_path / name, sink)
        for name, sink in (("straight", Silence()), ("broken", StopsBehindAStep()), ("broken", Silence()))
    ]
    assert [result.exit_code for result in results] == [ExitCode.OK, ExitCode.PREEMPTED, ExitCode.OK]
    assert results[2].resumed_from_step is not None
    straight, broken = (weights(tmp_path / name / "tuned") for name in ("straight", "broken"))
    assert all(torch.equal(straight[name], broken[name]) for name in straight)


def test_report_card_and_artifact_say_what_the_model_was_tuned_on_from(
    first: dict[str, Published], tiny_model_dir: Path, tmp_path: Path
):
    start = first["lora"]
    changes = QUICKLY | {"model__startFrom": {"source": start.model.as_uri()}, "method": METHODS["lora"]}
    second = run(tiny_job(tiny_model_dir, tmp_path, **changes), tmp_path)
    (ancestor,) = second.report.lineage
    (artifact,) = start.report.artifacts
    assert (ancestor.uri, ancestor.sha256) == (start.model.as_uri(), artifact.sha256)
    assert ancestor.spec_hash == start.report.spec_hash
    assert second.report.evaluation is not None
    metric = second.report.evaluation.metrics[0]
    assert start.report.evaluation is not None
    assert metric.base == pytest.approx(start.report.evaluation.metrics[0].base), "figures compare with the base"
    assert artifact.sha256 in (second.model / "README.md").read_text()
    assert artifact.sha256 in (second.folder / "report" / "report.html").read_text()
    # Who goes on from this one learns of both.
    third = fetch_start(
        tiny_job(tiny_model_dir, tmp_path, model__startFrom={"source": second.model.as_uri()}).spec.model,
        Storage(tiny_job(tiny_model_dir, tmp_path).spec.output, Mounts()),
        tmp_path,
    )
    assert third is not None
    assert third.lineage[1:] == (ancestor,)
    assert Lineage.model_validate_json((second.model / "lineage.json").read_bytes()).ancestors == (ancestor,)


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "another method": (
        {"method": METHODS["full"]},
        "lora",
        r"type \(full\): .* made by lora or qlora\. Set it to",
    ),
    "full weights under an adapter": (
        {"method": METHODS["lora"]},
        "full",
        r"type \(lora\): .* holds full weights.* Name them in spec\.model\.source",
    ),
    "another rank": (
        {"method": {"type": "lora", "lora": {"rank": 8}}},
        "lora",
        r"spec\.method\.lora\.rank \(8\): .* has 4\. Set it to 4",
    ),
    "another form": (
        {"method": {"type": "lora", "lora": {"rank": 4, "useDora": True}}},
        "lora",
        r"lora\.useDora \(true\): .* has false",
    ),
    "other layers": (
        {"method": {"type": "lora", "lora": {"rank": 4, "targets": "named", "targetNames": ["q_proj", "v_proj"]}}},
        "lora",
        r"acts on down_proj, .*, the job on q_proj, v_proj\. Set targetNames to \[down_proj, ",
    ),
    "another placement": (
        {"method": {"type": "adapter", "adapter": {"bottleneck": 8, "placement": "pfeiffer"}}},
        "adapter",
        r"adapter\.placement \(pfeiffer\): .* has houlsby",
    ),
    "bottlenecks under a lora": ({"method": METHODS["lora"]}, "adapter", r"made by adapter\. Set it to adapter"),
    "another length": (
        {"method": {"type": "promptTuning", "promptTuning": {"virtualTokens": 5}}},
        "promptTuning",
        r"promptTuning\.virtualTokens \(5\): .* has 4",
    ),
}


@pytest.mark.parametrize("changes, method, message", REFUSED.values(), ids=REFUSED)
def test_a_start_that_does_not_go_with_the_job_is_refused(
    first: dict[str, Published],
    tiny_model_dir: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    method: str,
    message: str,
):
    job = tiny_job(tiny_model_dir, tmp_path, model__startFrom={"source": first[method].model.as_uri()}, **changes)
    start = fetch_start(job.spec.model, Storage(job.spec.output, Mounts()), tmp_path)
    assert start is not None
    with pytest.raises(FineTuneError, match=message):
        check_start(start, job.spec, fetch_model(job.spec.model, tmp_path))


def test_another_base_model_is_found_in_the_check(first: dict[str, Published], tmp_path: Path):
    other = save_tiny_model(tmp_path / "other", num_hidden_layers=1)
    job = tiny_job(
        other, tmp_path, model__startFrom={"source": first["lora"].model.as_uri()}, method=METHODS["lora"], **QUICKLY
    )
    result = stages.run_one(Stage.CHECK, job, tmp_path / "w", Silence())
    assert result.exit_code is ExitCode.BAD_SPEC
    assert "spec.model.startFrom.source" in result.message
    assert "Name the same base model" in result.message


def spoilt(model: Path, how: str, folder: Path) -> Path:
    """Return a copy of a published folder with something wrong about it."""
    if how in ("absent", "the whole results"):
        return folder / "nothing" if how == "absent" else model.parent
    if how == "the report":
        return model.parent / "report"
    copy = shutil.copytree(model, folder / "copy")
    match how:
        case "changed":
            (copy / "adapter_model.safetensors").write_bytes(b"other")
        case "unfinished":
            (copy / "COMPLETE").unlink()
        case "of an older version":
            write_manifest(copy, {"kind": "adapter", "specHash": "a" * 64})
        case _:
            raise ValueError(how)
    return copy


SPOILT = {
    "absent": "is no folder",
    "the whole results": "holds a job's results. Write .*/model",
    "the report": "is no model but report",
    "changed": r"adapter_model\.safetensors: 5 bytes instead of",
    "unfinished": "is unfinished",
    "of an older version": "does not say which base model",
}


@pytest.mark.parametrize("how", SPOILT)
def test_what_is_no_whole_published_model_is_refused(first: dict[str, Published], tmp_path: Path, how: str):
    source = spoilt(first["lora"].model, how, tmp_path)
    job = tiny_job(tmp_path, tmp_path, model__startFrom={"source": source.as_uri()})
    with pytest.raises(FineTuneError, match=rf"spec\.model\.startFrom\.source.*{SPOILT[how]}"):
        fetch_start(job.spec.model, Storage(job.spec.output, Mounts()), tmp_path)


def test_a_start_in_a_bucket_is_read_as_the_output_is(first: dict[str, Published], server: S3Server, tmp_path: Path):
    bucket, model = server.make_bucket(), first["lora"].model
    for path in model.iterdir():
        server.client().upload_file(str(path), bucket, f"team/first/model/{path.name}")
    server.write_secret(tmp_path / "secrets" / "keys")
    output = {"uri": f"s3://{bucket}/out", "endpoint": server.url, "secretRef": {"name": "keys"}}
    job = tiny_job(tmp_path, tmp_path, model__startFrom={"source": f"s3://{bucket}/team/first/model"}, output=output)
    mounts = Mounts.from_environment({"FINETUNE_SECRETS": str(tmp_path / "secrets")})
    start = fetch_start(job.spec.model, Storage(job.spec.output, mounts), tmp_path / "cache")
    assert start is not None
    assert (start.path / "MANIFEST.json").read_bytes() == (model / "MANIFEST.json").read_bytes()


def test_a_server_gets_the_artifact_that_is_meant_or_none(
    first: dict[str, Published], server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    bucket, model = server.make_bucket(), first["lora"].model
    for path in model.iterdir():
        server.client().upload_file(str(path), bucket, f"model/{path.name}")
    server.write_secret(tmp_path / "secrets" / "keys")
    monkeypatch.setenv("FINETUNE_SECRETS", str(tmp_path / "secrets"))
    (artifact,) = first["lora"].report.artifacts
    where = [f"s3://{bucket}/model", str(tmp_path / "served"), "--endpoint", server.url, "--secret", "keys"]
    assert folder_fetch.main([*where, "--sha256", artifact.sha256]) is ExitCode.OK
    assert weights(tmp_path / "served").keys() == weights(model).keys()
    where[1] = str(tmp_path / "other")
    assert folder_fetch.main([*where, "--sha256", "0" * 64]) is ExitCode.BAD_DATA


def test_a_run_does_not_go_on_when_its_start_is_another_one(first: dict[str, Published], tmp_path: Path):
    job = tiny_job(tmp_path, tmp_path, model__startFrom={"source": first["lora"].model.as_uri()})
    start = fetch_start(job.spec.model, Storage(job.spec.output, Mounts()), tmp_path)
    assert start is not None
    before, now = Inputs(rows="r", model="m", lineage=start.lineage), Inputs(rows="r", model="m")
    assert "what spec.model.startFrom names changed" in describe_change(before, now)


ALONE: dict[str, Any] = {"training": {"epochs": 0}, "method": METHODS["lora"]}
PERPLEXITY = "sentiment.perplexity"


def test_a_published_model_is_evaluated_as_it_is_and_published_once_more(
    first: dict[str, Published], tiny_model_dir: Path, tmp_path: Path
):
    start = first["lora"]
    changes = {"evaluation": QUICKLY["evaluation"] | {"gates": [{"metric": PERPLEXITY, "max": 1e6}]}}
    job = tiny_job(tiny_model_dir, tmp_path, model__startFrom={"source": start.model.as_uri()}, **ALONE, **changes)
    done = run(job, tmp_path)
    assert (done.report.training.steps, done.report.training.curve) == (0, ())
    assert done.report.training.trainable_parameters == start.report.training.trainable_parameters
    assert done.report.published
    assert (done.model / "adapter_model.safetensors").read_bytes() == (
        start.model / "adapter_model.safetensors"
    ).read_bytes()
    assert start.report.evaluation is not None and done.report.evaluation is not None
    assert done.report.evaluation.metrics == start.report.evaluation.metrics
    assert "evaluated as it was published" in (done.folder / "report" / "report.html").read_text()
    assert "taken as it is from" in (done.model / "README.md").read_text()


def test_in_pods_nothing_is_trained_and_gates_decide(first: dict[str, Published], tiny_model_dir: Path, tmp_path: Path):
    changes = {"evaluation": QUICKLY["evaluation"] | {"gates": [{"metric": PERPLEXITY, "max": 0.5}]}}
    source = first["lora"].model.as_uri()
    job = tiny_job(tiny_model_dir, tmp_path, model__startFrom={"source": source}, **ALONE, **changes)
    checked, evaluated = (
        stages.run_one(stage, job, tmp_path / stage.value, Silence(), PodOptions())
        for stage in (Stage.CHECK, Stage.EVALUATE)
    )
    assert checked.exit_code is ExitCode.OK, checked.message
    assert evaluated.exit_code is ExitCode.OK, evaluated.message
    assert (evaluated.published, [artifact.kind for artifact in evaluated.artifacts]) == (False, [ArtifactKind.REPORT])
    assert evaluated.evaluation is not None
    assert [gate.passed for gate in evaluated.evaluation.gates] == [False]


def test_another_artifact_than_the_pinned_one_is_refused(first: dict[str, Published], tmp_path: Path):
    source = first["lora"].model.as_uri()
    job = tiny_job(tmp_path, tmp_path, model__startFrom={"source": source, "sha256": "0" * 64})
    with pytest.raises(
        DataError, match=r"startFrom\.sha256 is 0+, and the manifest .* not the artifact that was meant"
    ):
        fetch_start(job.spec.model, Storage(job.spec.output, Mounts()), tmp_path)


# --- several adapters on one base


@pytest.fixture(scope="module")
def second(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Published:
    """Another LoRA on the same base, further away from it. Read only."""
    folder = tmp_path_factory.mktemp("second-lora")
    changes = QUICKLY | {"training__learningRate": 0.1, "method": METHODS["lora"]}
    return run(tiny_job(tiny_model_dir, folder, **changes), folder)


def test_adapters_and_soft_prompts_on_one_base_answer_as_each_of_them_does_alone(
    first: dict[str, Published], second: Published, capsys: pytest.CaptureFixture[str]
):
    others = ("ia3", "adapter", "promptTuning", "prefixTuning")
    assert_each_answers_as_alone([first["lora"], second, *(first[kind] for kind in others)], capsys)


def test_adapters_and_soft_prompts_on_one_encoder_decoder_answer_as_each_of_them_does_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    # Its own output layer lets a random model say more than its end.
    base = save_tiny_encoder_decoder(tmp_path, like_flan=True)
    published = []
    for kind in ("lora", "ia3", "promptTuning", "prefixTuning"):
        folder = tmp_path / kind
        folder.mkdir()
        changes = QUICKLY | {"model__task": "seq2seq-lm", "method": METHODS[kind], "training__learningRate": 0.3}
        published.append(run(tiny_job(base, folder, **changes), folder))
    assert_each_answers_as_alone(published, capsys)


def assert_each_answers_as_alone(adapters: Sequence[Published], capsys: pytest.CaptureFixture[str]) -> None:
    """Ask all adapters on one base together, then each alone; each has to give an answer of its own."""
    places = [str(one.model) for one in adapters]
    row = json.dumps({"text": "The film was great."})

    def ask(*adapters: str) -> dict[str, str]:
        command = ["try", "--output", "json", "--max-new-tokens", "8", "--prompt", row, "--adapters", *adapters]
        assert run_command(command) is ExitCode.OK
        answers: dict[str, str] = json.loads(capsys.readouterr().out)["answers"]
        return answers

    together = ask(*places)
    alone = [ask(place) for place in places]
    assert list(together.values()) == [alone[0]["base"], *(list(one.values())[1] for one in alone)]
    assert {one["base"] for one in alone} == {together["base"]}
    assert list(together.values()).count(together["base"]) == 1, "else nothing shows who was asked"


def test_weights_that_several_adapters_stand_on_are_in_memory_once(tiny_model_dir: Path):
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    other = with_the_weights_of(base)
    assert other.model.layers[0].mlp is not base.model.layers[0].mlp
    for one, same in zip(base.parameters(), other.parameters(), strict=True):
        assert one is same


def test_standard_input_is_asked_line_by_line(
    first: dict[str, Published], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "stdin", io.StringIO("One\n\nTwo\n"))
    assert run_command(["try", "--max-new-tokens", "2", "--adapters", str(first["lora"].model)]) is ExitCode.OK
    output = capsys.readouterr().out
    assert [line for line in output.splitlines() if line.startswith(">")] == ["> One", "> Two"]
    assert output.count("base  ") == 2


def test_a_qlora_goes_on_from_a_lora(first: dict[str, Published], tiny_model_dir: Path, tmp_path: Path):
    method = METHODS["lora"] | {"type": "qlora"}
    source = first["lora"].model.as_uri()
    changes = {"model__startFrom": {"source": source}, "model__dtype": "auto", "method": method}
    job = tiny_job(tiny_model_dir, tmp_path, **changes)
    start = fetch_start(job.spec.model, Storage(job.spec.output, Mounts()), tmp_path)
    assert start is not None
    check_start(start, job.spec, fetch_model(job.spec.model, tmp_path))


def test_full_weights_are_no_adapter(first: dict[str, Published], capsys: pytest.CaptureFixture[str]):
    assert run_command(["try", "--prompt", "x", "--adapters", str(first["full"].model)]) is ExitCode.BAD_SPEC
    assert "holds full weights" in capsys.readouterr().err
