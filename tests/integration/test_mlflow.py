"""MLflow: what its own client has written of a real training, read back by it, and what it keeps to itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run as MlflowRun

from finetune_api.job import FineTuneJob
from finetune_trainer.interrupt import StopFlag
from finetune_trainer.run import Run, output_prefix
from finetune_trainer.stages import train_stage
from finetune_trainer.tracker import describe_settings
from finetune_trainer.workspace import Workspace

from .jobs import Silence, tiny_document, tiny_job
from .test_train import train_until


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is set for the library does not outlive the test; a folder is a store only where it is told so."""
    monkeypatch.setattr(os, "environ", os.environ | {"MLFLOW_ALLOW_FILE_STORE": "true"})


def job_told_to(store: Path, model: Path, folder: Path) -> FineTuneJob:
    """Return a job that writes to a folder, as only tests do: a spec names a server."""
    job = tiny_job(
        model, folder, training__reportTo={"mlflow": {"trackingUri": "http://mlflow.example", "experiment": "reviews"}}
    )
    wanted = job.spec.training.report_to
    assert wanted is not None and wanted.mlflow is not None
    mlflow = wanted.mlflow.model_copy(update={"tracking_uri": store.as_uri()})
    training = job.spec.training.model_copy(update={"report_to": wanted.model_copy(update={"mlflow": mlflow})})
    return job.model_copy(update={"spec": job.spec.model_copy(update={"training": training})})


def told_runs(client: MlflowClient) -> list[MlflowRun]:
    experiment = client.get_experiment_by_name("reviews")
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id]))


def drawn(client: MlflowClient, run: MlflowRun, name: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)]


def test_attempts_of_a_training_arrive_in_one_run_with_name_settings_and_figures(tiny_model_dir: Path, tmp_path: Path):
    job = job_told_to(tmp_path / "store", tiny_model_dir, tmp_path)
    client = MlflowClient((tmp_path / "store").as_uri())
    (workspace := Workspace(tmp_path / "workspace")).root.mkdir()
    train_until(5, job, workspace)
    assert [run.info.status for run in told_runs(client)] == ["KILLED"]
    report = train_stage(Run(job, workspace, Silence(), StopFlag()))
    (run,) = told_runs(client)
    assert (run.info.run_name, run.info.status) == (job.metadata.name, "FINISHED")
    assert run.data.tags["finetune.job"] == output_prefix(job)
    assert run.data.params == describe_settings(job.spec)
    points = report.curve
    losses = [(point.step, pytest.approx(point.loss)) for point in points if point.loss is not None]
    assert drawn(client, run, "train/loss") == losses
    looks = [
        (point.step, pytest.approx(point.validation_loss)) for point in points if point.validation_loss is not None
    ]
    assert drawn(client, run, "eval/loss") == looks
    assert drawn(client, run, "eval/sentiment_loss") == looks
    assert drawn(client, run, "train/learning_rate")
    assert report.resumed_from_step == 5
    assert report.warnings == ()


ASK_FOR_REPORTS_ON_ITSELF = """
from pathlib import Path
from sys import argv

from finetune_api.job import load_job
from finetune_api.resolve import resolve
from finetune_trainer.location import Mounts
from finetune_trainer.tracker import open_trackers
from finetune_trainer.workspace import Workspace

open_trackers(resolve(load_job(Path(argv[1]).read_text(), argv[1])), Workspace(Path(argv[1]).parent), Mounts())

from mlflow.telemetry.client import get_telemetry_client

print(get_telemetry_client())
"""


def test_the_library_reports_nothing_on_itself(tmp_path: Path):
    job = tmp_path / "job.yaml"
    told = {"mlflow": {"trackingUri": "http://mlflow.example"}}
    job.write_text(json.dumps(tiny_document(tmp_path, tmp_path, training__reportTo=told)))
    done = subprocess.run(
        [sys.executable, "-c", ASK_FOR_REPORTS_ON_ITSELF, str(job)],
        # It keeps quiet by itself where it finds pytest or a build server.
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "None"), done.stderr
