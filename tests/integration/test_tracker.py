"""Experiment trackers: what they are told of a real training, also behind an interruption, and when they are away."""

import json
import struct
import sys
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event

from finetune_api.report import ArtifactKind
from finetune_trainer.errors import SpecError
from finetune_trainer.interrupt import StopFlag
from finetune_trainer.run import Run
from finetune_trainer.stages import check_stage, run, train_stage
from finetune_trainer.workspace import Workspace

from .jobs import Silence, tiny_job
from .test_train import train_until


def read_event_files(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return by name what TensorBoard would draw: every step with its value, in the order of the files."""
    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        content, place = path.read_bytes(), 0
        while place < len(content):
            (length,) = struct.unpack_from("<Q", content, place)
            # Eight bytes of length, four each of check sums behind it and behind the event.
            event = Event.FromString(content[place + 12 : place + 12 + length])
            place += 16 + length
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def test_event_files_are_published_with_the_report_and_hold_its_curve(tiny_model_dir: Path, tmp_path: Path):
    job = tiny_job(tiny_model_dir, tmp_path, training__reportTo={"tensorboard": True}, evaluation__maxExamples=8)
    report = run(job, tmp_path / "workspace", Silence())
    (folder,) = (tmp_path / "output").glob("*/*/report")
    drawn = read_event_files(folder / "tensorboard")
    points = report.training.curve
    assert dict(drawn["train/loss"]) == pytest.approx({p.step: p.loss for p in points if p.loss is not None})
    looks = {point.step: point.validation_loss for point in points if point.validation_loss is not None}
    assert dict(drawn["eval/loss"]) == pytest.approx(looks)
    assert drawn["eval/sentiment_loss"] == drawn["eval/loss"]
    assert "train/learning_rate" in drawn
    listed = json.loads((folder / "MANIFEST.json").read_text())
    assert [entry for entry in listed["files"] if entry["path"].startswith("tensorboard/events.out.tfevents.")]
    assert listed["about"]["kind"] == ArtifactKind.REPORT.value
    assert report.training.warnings == ()


def test_behind_an_interruption_every_step_is_told_once(tiny_model_dir: Path, tmp_path: Path):
    job = tiny_job(tiny_model_dir, tmp_path, training__reportTo={"tensorboard": True})
    workspace = Workspace(tmp_path / "workspace")
    workspace.root.mkdir()
    train_until(5, job, workspace)
    assert [step for step, _ in read_event_files(workspace.root / "tensorboard")["train/loss"]] == [1, 2, 3, 4, 5]
    report = train_stage(Run(job, workspace, Silence(), StopFlag()))
    drawn = read_event_files(workspace.tuned / "tensorboard")["train/loss"]
    assert report.resumed_from_step == 5
    assert dict(drawn) == pytest.approx({point.step: point.loss for point in report.curve if point.loss is not None})
    assert [step for step, _ in drawn] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_tracker_that_fails_costs_a_warning_and_nothing_else(tiny_model_dir: Path, tmp_path: Path):
    job = tiny_job(tiny_model_dir, tmp_path, training__reportTo={"tensorboard": True})
    workspace = Workspace(tmp_path / "workspace")
    workspace.root.mkdir()
    # A file where the folder should be.
    (workspace.root / "tensorboard").write_text("")
    report = train_stage(Run(job, workspace, Silence(), StopFlag()))
    assert report.steps == 8
    assert len(report.warnings) == 1
    assert "spec.training.reportTo.tensorboard" in report.warnings[0]


@pytest.mark.parametrize(
    ("name", "given"), [("mlflow", {"trackingUri": "http://mlflow:5000"}), ("wandb", {"project": "reviews"})]
)
def test_a_check_ends_where_a_package_is_missing(
    name: str, given: dict[str, str], tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, name, None)
    job = tiny_job(tiny_model_dir, tmp_path, training__reportTo={name: given})
    workspace = Workspace(tmp_path / "workspace")
    workspace.root.mkdir()
    with pytest.raises(SpecError, match=f"needs the package {name}"):
        check_stage(Run(job, workspace, Silence(), StopFlag()))
    assert not (tmp_path / "output").exists(), "nothing was touched before"
