"""Weights & Biases: what its own client tells a server of a real training, and what it costs when that fails."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import wandb

from finetune_api.job import FineTuneJob
from finetune_api.report import TrainingReport
from finetune_api.spec import WandbSpec
from finetune_trainer import tracker
from finetune_trainer.interrupt import StopFlag
from finetune_trainer.location import Mounts
from finetune_trainer.run import Run
from finetune_trainer.stages import train_stage
from finetune_trainer.tracker import describe_settings
from finetune_trainer.workspace import Workspace

from .jobs import Silence, tiny_job
from .test_train import losses, train, train_until
from .wandb_server import FakeWandb, serve_wandb

KEY = "not-shown-0123456789abcdef0123456789abcdef01234567"
SECRET = {"secretRef": {"name": "wandb-keys"}}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder without a key; what is set for the library does not outlive the test."""
    (folder := tmp_path / "home").mkdir()
    monkeypatch.setattr(os, "environ", os.environ | {"HOME": str(folder)})
    return folder


@pytest.fixture
def server() -> Iterator[FakeWandb]:
    with serve_wandb(KEY) as fake:
        yield fake


@pytest.fixture
def mounts(tmp_path: Path) -> Mounts:
    (folder := tmp_path / "secrets" / "wandb-keys").mkdir(parents=True)
    (folder / "WANDB_API_KEY").write_text(f"{KEY}\n")
    return Mounts(secrets=tmp_path / "secrets")


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine is no fault of the server."""
    monkeypatch.setattr(tracker, "_WANDB_SECONDS", 60.0)
    monkeypatch.setattr(tracker, "_PATIENCE_SECONDS", 120.0)


@pytest.fixture(scope="module")
def untold(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of a training that no tracker hears of."""
    return losses(train(tiny_model_dir, tmp_path_factory.mktemp("untold")))


def job_told_to(url: str, model: Path, folder: Path, **given: object) -> FineTuneJob:
    place = {"baseUrl": url, "project": "reviews", "entity": "team-a"}
    return tiny_job(model, folder, training__reportTo={"wandb": place | given})


def train_told(job: FineTuneJob, folder: Path, mounts: Mounts) -> TrainingReport:
    workspace = Workspace(folder / "workspace")
    workspace.root.mkdir(exist_ok=True)
    return train_stage(Run(job, workspace, Silence(), StopFlag(), mounts))


def helpers() -> list[psutil.Process]:
    """Processes of the library."""
    return [one for one in psutil.Process().children(recursive=True) if one.name().startswith("wandb")]


def lose_helpers(*_: object, **__: object) -> None:
    for one in helpers():
        one.kill()
        one.wait()


@pytest.mark.usefixtures("patience")
def test_a_training_arrives_with_name_settings_and_figures_and_nothing_else(
    server: FakeWandb,
    mounts: Mounts,
    home: Path,
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
):
    (code := tmp_path / "code" / "program.py").parent.mkdir()
    code.write_text("answer = 42\n")
    monkeypatch.setenv("WANDB_SAVE_CODE", "true")
    monkeypatch.setenv("WANDB_CODE_DIR", str(code.parent))
    (elsewhere := tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(elsewhere)
    begin, commands = tracker._PlainWandbCallback.setup, []

    def look_and_begin(*given: Any) -> None:
        commands.extend(one.cmdline() for one in helpers())
        # What pytest captures would not be heard anyway.
        assert wandb.run.settings.console == "off"
        begin(*given)

    monkeypatch.setattr(tracker._PlainWandbCallback, "setup", look_and_begin)
    job = job_told_to(server.url, tiny_model_dir, tmp_path, **SECRET)
    report = train_told(job, tmp_path, mounts)
    (run,) = server.runs.values()
    assert (run.entity, run.project, run.name, run.exit_codes) == ("team-a", "reviews", "tiny", [0])
    own_note = run.config.pop("_wandb")
    assert run.config == describe_settings(job.spec)
    points = report.curve
    assert dict(run.drawn("train/loss")) == pytest.approx({p.step: p.loss for p in points if p.loss is not None})
    looks = {point.step: point.validation_loss for point in points if point.validation_loss is not None}
    assert dict(run.drawn("eval/loss")) == pytest.approx(looks)
    assert run.drawn("eval/sentiment_loss") == run.drawn("eval/loss")
    assert run.drawn("train/learning_rate")
    assert report.warnings == ()

    assert not server.foreign
    assert set(own_note) == {"cli_version", "python_version", "t", "m"}, "versions, use of the library, axes"
    (command,) = commands
    assert "--no-observability" in command, "no reports on the library itself"
    said = capfd.readouterr()
    assert "wandb" not in said.out + said.err
    files = [path for path in (tmp_path / "workspace").rglob("*") if path.is_file()]
    assert [path for path in files if "wandb" in path.parts]
    kept = [path.read_bytes().decode(errors="replace") for path in files]
    assert not [text for text in (*said, caplog.text, *server.asked, *kept, *os.environ.values()) if KEY in text]
    assert not [*home.iterdir(), *elsewhere.iterdir()]
    assert not helpers()


@pytest.mark.usefixtures("patience")
def test_another_attempt_goes_on_in_the_run_with_the_key_of_the_environment(
    server: FakeWandb, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    job = job_told_to(server.url, tiny_model_dir, tmp_path)
    # As in a cluster; without it the hash of the spec makes the run's id.
    job = job.model_copy(update={"metadata": job.metadata.model_copy(update={"uid": "0a1b2c3d-0000"})})
    (workspace := Workspace(tmp_path / "workspace")).root.mkdir()
    train_until(5, job, workspace)
    (run,) = server.runs.values()
    assert run.exit_codes == [1]
    smaller = job.spec.training.model_copy(update={"micro_batch_size": 1})
    again = job.model_copy(update={"spec": job.spec.model_copy(update={"training": smaller})})
    report = train_told(again, tmp_path, Mounts())
    assert report.resumed_from_step == 5
    assert list(server.runs.values()) == [run]
    assert run.config["training.microBatchSize"] == "1"
    assert [step for step, _ in run.drawn("train/loss")] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [row["_step"] for row in run.history] == list(range(len(run.history)))
    assert run.exit_codes == [1, 0]
    assert not server.foreign


def test_the_public_service_is_where_the_library_says():
    assert WandbSpec(project="reviews").base_url == wandb.Settings().base_url


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("is away", "connection refused"),
        ("is slow", "deadline exceeded"),
        ("refuses the key", "invalid API key"),
        ("is given no key", "40+ characters"),
        ("takes no figures", "Fatal error while uploading"),
        ("stops in the middle", "Timed out finishing run"),
        ("loses the library's process", "Connection "),
    ],
)
def test_a_server_that_fails_costs_a_warning_in_time_and_nothing_else(
    fault: str,
    reason: str,
    server: FakeWandb,
    mounts: Mounts,
    untold: list[float],
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(tracker, "_WANDB_SECONDS", 1.0)
    url = server.url
    match fault:
        case "is away":
            url = "http://127.0.0.1:9"
        case "is slow":
            server.gate.clear()
        case "refuses the key":
            server.key = "another"
        case "is given no key":
            (mounts.secrets / "wandb-keys" / "WANDB_API_KEY").write_text("short")
        case "takes no figures":
            server.refused_stream = 403
        case "stops in the middle":
            server.refused_stream = 503
        case "loses the library's process":
            monkeypatch.setattr(tracker._PlainWandbCallback, "setup", lose_helpers)
    report = train_told(job_told_to(url, tiny_model_dir, tmp_path, **SECRET), tmp_path, mounts)
    assert losses(report) == untold
    (warning,) = report.warnings
    assert warning.startswith("spec.training.reportTo.wandb: the tracker missed ")
    assert reason in warning
    assert not helpers()
