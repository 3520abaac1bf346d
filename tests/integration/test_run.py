"""The whole thread as a user runs it: one command, interrupted and run again, and everything that can be wrong."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune_api.job import load_job, spec_hash
from finetune_api.report import ArtifactKind, ExitCode, Stage
from finetune_api.resolve import resolve
from finetune_trainer import stages
from finetune_trainer.errors import FineTuneError, SpecError, StorageError
from finetune_trainer.manifest import is_complete
from finetune_trainer.run import output_prefix
from finetune_trainer.split import Split
from finetune_trainer.workspace import Workspace

from .jobs import FIGURES, Silence, tiny_document, write_reviews

# Resuming restores order, optimiser, schedule and random state; with the same kernels nothing is left to differ.
SAME_LOSS = 1e-6


def write_job(folder: Path, document: dict[str, Any]) -> Path:
    path = folder / "job.yaml"
    path.write_text(json.dumps(document))
    return path


def start(job: Path, workspace: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "finetune_cli", "run", str(job), "--workspace", str(workspace), "--output", "json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    output, errors = process.communicate(timeout=240)
    assert process.returncode == ExitCode.OK, errors
    report: dict[str, Any] = json.loads(output.splitlines()[-1])["report"]
    return report


def test_sigterm_in_training_and_the_same_command_again_end_with_the_same_loss(tiny_model_dir: Path, tmp_path: Path):
    job = write_job(tmp_path, tiny_document(tiny_model_dir, tmp_path, training__maxSteps=60))
    straight = finish(start(job, tmp_path / "straight"))
    assert straight["training"]["estimate"]["step"] == 6
    assert straight["training"]["estimate"]["seconds"] > 0

    process = start(job, tmp_path / "interrupted")
    assert process.stdout is not None
    for line in process.stdout:
        progress = json.loads(line).get("progress", {})
        if progress.get("stage") == "train" and progress.get("step", 0) >= 2:
            process.send_signal(signal.SIGTERM)
            break
    _, errors = process.communicate(timeout=120)
    assert process.returncode == ExitCode.PREEMPTED, errors
    assert "finetune run" in errors

    resumed = finish(start(job, tmp_path / "interrupted"))
    assert 2 <= resumed["training"]["resumedFromStep"] < 60
    assert resumed["training"]["finalLoss"] == pytest.approx(straight["training"]["finalLoss"], abs=SAME_LOSS)
    assert resumed["evaluation"]["metrics"] == straight["evaluation"]["metrics"]


@pytest.mark.parametrize("method", ["full", "lora", "promptTuning"])
def test_every_method_is_tuned_evaluated_and_published(tiny_chat_model_dir: Path, tmp_path: Path, method: str):
    document = tiny_document(tiny_chat_model_dir, tmp_path, method={"type": method}, training__learningRate=0.01)
    job = resolve(load_job(json.dumps(document), str(tmp_path / "job.yaml")))
    report = stages.run(job, tmp_path / "workspace", Silence())
    published = tmp_path / "output" / output_prefix(job)
    for folder in ("model", "report"):
        assert is_complete(published / folder)
    assert not list(published.rglob("*.bin"))
    assert {metric.metric for metric in report.evaluation.metrics} == FIGURES
    html = (published / "report" / "report.html").read_text()
    assert "<svg" in html
    assert 0 < report.planned_memory_bytes < report.training.peak_memory_bytes, "the process holds more than tensors"
    kept = list((tmp_path / "workspace" / "tokens").iterdir())
    assert len(kept) == len(Split), "training uses the tokens that the check made"
    again = stages.run(job, tmp_path / "workspace", Silence())
    assert again.artifacts == report.artifacts
    assert sorted((tmp_path / "workspace" / "tokens").iterdir()) == sorted(kept)


GATES = [
    pytest.param({"max": 1e6}, "gates", True, id="a gate that passes lets the model through"),
    pytest.param({"max": 0.5}, "gates", False, id="a gate that fails keeps it back"),
    pytest.param({"max": 0.5}, "always", True, id="always asks no gate"),
]


@pytest.mark.parametrize(("gate", "publish_on", "is_published"), GATES)
def test_gates_decide_about_publication(
    tiny_model_dir: Path, tmp_path: Path, gate: dict[str, float], publish_on: str, is_published: bool
):
    document = tiny_document(
        tiny_model_dir,
        tmp_path,
        training__maxSteps=4,
        evaluation__gates=[{"metric": "sentiment.perplexity", **gate}],
        output__publishOn=publish_on,
    )
    job = resolve(load_job(json.dumps(document), str(tmp_path / "job.yaml")))
    report = stages.run(job, tmp_path / "workspace", Silence())
    published = tmp_path / "output" / output_prefix(job)
    assert {folder.name for folder in published.iterdir()} == ({"model", "report"} if is_published else {"report"})
    assert is_complete(published / "report")
    assert (report.published, bool(report.artifacts)) == (is_published, is_published)
    (verdict,) = report.evaluation.gates
    assert verdict.passed is (gate["max"] > 1)
    page = (published / "report" / "report.html").read_text()
    assert verdict.why in page
    assert ("The model was not published" in page) is not is_published
    if is_published:
        card = (published / "model" / "README.md").read_text()
        assert ("**not passed**" in card) is not verdict.passed
        assert report.why_not_published == ""
    else:
        assert verdict.why in report.why_not_published
    result = stages.run_one(Stage.EVALUATE, job, tmp_path / "workspace", Silence())
    assert (result.published, result.why_not_published) == (is_published, report.why_not_published)


def test_a_job_without_gates_that_makes_the_model_worse_keeps_it_back(tiny_model_dir: Path, tmp_path: Path):
    test = write_reviews(tmp_path / "test.jsonl", 60, seed=2)
    rows = [json.loads(line) for line in write_reviews(tmp_path / "reviews.jsonl").read_text().splitlines()]
    swapped = {"positive": "negative", "negative": "positive"}
    lines = [json.dumps(row | {"label": swapped[row["label"]]}) for row in rows]
    (tmp_path / "reviews.jsonl").write_text("\n".join(lines))
    document = tiny_document(
        tiny_model_dir,
        tmp_path,
        method={"type": "full"},
        training__maxSteps=24,
        evaluation__metrics=["accuracy"],
        runPolicy={"preflight": "skip"},
    )
    document["spec"]["data"]["tasks"][0]["testSource"] = test.as_uri()
    job = resolve(load_job(json.dumps(document), str(tmp_path / "job.yaml")))
    report = stages.run(job, tmp_path / "workspace", Silence())
    published = tmp_path / "output" / output_prefix(job)
    assert [folder.name for folder in published.iterdir()] == ["report"]
    assert not report.published
    assert report.why_not_published.startswith("sentiment accuracy fell from 0.500 to 0.")
    assert report.why_not_published in (published / "report" / "report.html").read_text()
    result = stages.run_one(Stage.EVALUATE, job, tmp_path / "workspace", Silence())
    assert (result.published, result.why_not_published) == (False, report.why_not_published)
    assert result.summary is not None
    assert result.summary.message.startswith("The tuned model is worse: accuracy on sentiment went from 0.500")
    assert [artifact.kind for artifact in result.artifacts] == [ArtifactKind.REPORT]


def test_two_runs_cannot_share_a_workspace(tiny_model_dir: Path, tmp_path: Path):
    job = resolve(load_job(json.dumps(tiny_document(tiny_model_dir, tmp_path)), str(tmp_path / "job.yaml")))
    claimed = Workspace(tmp_path / "workspace").claim(spec_hash(job.spec))
    with claimed, pytest.raises(StorageError, match="another process is running this job"):
        stages.run(job, tmp_path / "workspace", Silence())
    other = resolve(load_job(json.dumps(tiny_document(tiny_model_dir, tmp_path, training__seed=5)), "job.yaml"))
    with pytest.raises(SpecError, match="another version of this job"):
        stages.run(other, tmp_path / "workspace", Silence())


@dataclass(frozen=True)
class Bad:
    """One thing that is wrong: what spoils the job, how the run ends and words that the message must hold."""

    id: str
    spoil: Callable[[Path, dict[str, Any]], None]
    code: ExitCode
    words: tuple[str, ...]


def task_of(document: dict[str, Any]) -> dict[str, Any]:
    task: dict[str, Any] = document["spec"]["data"]["tasks"][0]
    return task


def rows_of(document: dict[str, Any]) -> Path:
    return Path(task_of(document)["source"].removeprefix("file://"))


def set_prompt(prompt: str) -> Callable[[Path, dict[str, Any]], None]:
    def spoil(folder: Path, document: dict[str, Any]) -> None:
        task_of(document)["templates"][0]["prompt"] = prompt

    return spoil


def set_labels(folder: Path, document: dict[str, Any]) -> None:
    task_of(document)["labels"] = ["negative", "neutral"]


def keep_two_rows(folder: Path, document: dict[str, Any]) -> None:
    write_reviews(rows_of(document), rows=2)


def truncate_line(folder: Path, document: dict[str, Any]) -> None:
    path = rows_of(document)
    path.write_text(path.read_text()[:-20])


def spoil_parquet(folder: Path, document: dict[str, Any]) -> None:
    path = folder / "rows.parquet"
    path.write_bytes(b"PAR1 and then nothing")
    task_of(document)["source"] = path.as_uri()


def remove_rows(folder: Path, document: dict[str, Any]) -> None:
    rows_of(document).unlink()


def model_without(name: str) -> Callable[[Path, dict[str, Any]], None]:
    def spoil(folder: Path, document: dict[str, Any]) -> None:
        for path in (folder / "model").glob(name):
            path.unlink()

    return spoil


def pickled_weights(folder: Path, document: dict[str, Any]) -> None:
    weights = folder / "model" / "model.safetensors"
    torch.save(load_file(weights), folder / "model" / "pytorch_model.bin")
    weights.unlink()


def cut_weights(folder: Path, document: dict[str, Any]) -> None:
    weights = folder / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def overflowing_weights(folder: Path, document: dict[str, Any]) -> None:
    path = folder / "model" / "model.safetensors"
    save_file({name: tensor * 1e30 for name, tensor in load_file(path).items()}, path, {"format": "pt"})


def output_below_a_file(folder: Path, document: dict[str, Any]) -> None:
    (folder / "occupied").write_text("a file, not a folder")
    document["spec"]["output"]["uri"] = (folder / "occupied" / "output").as_uri()


BAD = (
    Bad("a column that is not there", set_prompt("{{ body }}"), ExitCode.BAD_DATA, ("body", "label", "text")),
    Bad(
        "a template that fails at a row",
        set_prompt("{{ 1 // (label.find(label)) }}"),
        ExitCode.BAD_DATA,
        ("row ",),
    ),
    Bad("a template that is no Jinja", set_prompt("{{ text"), ExitCode.BAD_SPEC, ("templates[0].prompt",)),
    Bad("labels that miss a completion", set_labels, ExitCode.BAD_DATA, ("positive", "labels")),
    Bad("too few rows to split", keep_two_rows, ExitCode.BAD_DATA, ("spec.data.splits",)),
    Bad("a truncated last line", truncate_line, ExitCode.BAD_DATA, ("reviews.jsonl", "119")),
    Bad("a truncated parquet file", spoil_parquet, ExitCode.BAD_DATA, ("rows.parquet",)),
    Bad("a source that is not there", remove_rows, ExitCode.BAD_DATA, ("reviews.jsonl",)),
    Bad("a model folder without tokenizer", model_without("tokenizer*"), ExitCode.BAD_DATA, ("tokenizer",)),
    Bad("a model folder without config", model_without("config.json"), ExitCode.BAD_DATA, ("config.json",)),
    Bad("pickled weights", pickled_weights, ExitCode.BAD_SPEC, ("pytorch_model.bin", "safetensors")),
    Bad("truncated weights", cut_weights, ExitCode.BAD_DATA, ("model.safetensors",)),
    Bad(
        "weights that overflow", overflowing_weights, ExitCode.DIVERGED, ("gradient", "first step", "spec.model.dtype")
    ),
    Bad("an output that cannot be written", output_below_a_file, ExitCode.STORAGE, ("occupied",)),
)


@pytest.mark.parametrize("bad", BAD, ids=[bad.id for bad in BAD])
def test_bad_input_ends_with_a_named_error_and_nothing_published(bad: Bad, tiny_model_dir: Path, tmp_path: Path):
    model = tmp_path / "model"
    model.mkdir()
    for path in tiny_model_dir.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    document = tiny_document(model, tmp_path)
    bad.spoil(tmp_path, document)
    job = resolve(load_job(json.dumps(document), str(tmp_path / "job.yaml")))
    with pytest.raises(FineTuneError) as caught:
        stages.run(job, tmp_path / "workspace", Silence())
    message = str(caught.value)
    assert caught.value.exit_code == bad.code, message
    for word in bad.words:
        assert word in message
    assert not any((tmp_path / "output").rglob("*")) if (tmp_path / "output").is_dir() else True
