"""Which trackers a job's words lead to, and how they are spoken to, without their packages."""

import importlib.machinery
import os
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetune_api.job import FineTuneJob
from finetune_api.resolve import resolve
from finetune_trainer import tracker
from finetune_trainer.errors import SpecError
from finetune_trainer.location import Mounts
from finetune_trainer.tracker import describe_settings, open_trackers, require_trackers
from finetune_trainer.workspace import Workspace

from ..builders import make_job

MLFLOW = {
    "spec.training.reportTo": {
        "mlflow": {
            "trackingUri": "https://mlflow.example",
            "experiment": "reviews",
            "secretRef": {"name": "mlflow-keys"},
        }
    }
}


class AwayError(Exception):
    """As MLflow's own."""


class MlflowDouble(types.ModuleType):
    """Of MLflow what is used here: keeps what it is told, and knows the runs of a server."""

    __version__ = "3.17.2"

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.__spec__ = importlib.machinery.ModuleSpec("mlflow", None)
        self.MlflowClient = lambda: self
        self.utils = types.SimpleNamespace(
            validation=types.SimpleNamespace(MAX_PARAM_VAL_LENGTH=6000, MAX_PARAMS_TAGS_PER_BATCH=100)
        )
        self.told: list[tuple[Any, ...]] = []
        self.runs: list[Any] = []
        self.is_away = False
        self._active: Any = None

    def set_tracking_uri(self, uri: str) -> None:
        self.told.append(("server", uri, os.environ.get("MLFLOW_TRACKING_TOKEN")))

    def is_tracking_uri_set(self) -> bool:
        return True

    def get_tracking_uri(self) -> str:
        return ""

    def set_experiment(self, name: str) -> Any:
        if self.is_away:
            raise AwayError("no route\nto the host")
        self.told.append(("experiment", name))
        return types.SimpleNamespace(experiment_id="1")

    def search_runs(self, experiments: list[str], words: str, max_results: int) -> list[Any]:
        return [run for run in self.runs if f"tags.`finetune.job` = '{run.tag}'" == words]

    def start_run(self, run_id: str | None = None, run_name: str = "", tags: dict[str, str] | None = None) -> Any:
        if run_id is None:
            assert tags is not None
            data = types.SimpleNamespace(params={})
            info = types.SimpleNamespace(run_id=f"run-{len(self.runs)}")
            self.runs.append(types.SimpleNamespace(tag=tags["finetune.job"], data=data, info=info))
            run_id = info.run_id
        self._active = next(run for run in self.runs if run.info.run_id == run_id)
        self.told.append(("run", run_id))
        return self._active

    def active_run(self) -> Any:
        return self._active

    def log_params(self, params: dict[str, str]) -> None:
        self._active.data.params = params

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.told.append((step, metrics))

    def end_run(self, status: str) -> None:
        self._active = None
        self.told.append(("end", status))


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> MlflowDouble:
    double = MlflowDouble()
    exceptions = types.ModuleType("mlflow.exceptions")
    exceptions.MlflowException = AwayError  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mlflow", double)
    monkeypatch.setitem(sys.modules, "mlflow.exceptions", exceptions)
    # What is set for the library must not outlive the test.
    monkeypatch.setattr(os, "environ", dict(os.environ))
    return double


@pytest.fixture
def mounts(tmp_path: Path) -> Mounts:
    folder = tmp_path / "secrets" / "mlflow-keys"
    folder.mkdir(parents=True)
    (folder / "MLFLOW_TRACKING_TOKEN").write_text("not-shown\n")
    return Mounts(secrets=tmp_path / "secrets")


def job_with(given: dict[str, Any]) -> FineTuneJob:
    return resolve(make_job({"metadata.uid": "0a1b2c3d-0000"} | given))


def attempt(job: FineTuneJob, folder: Path, mounts: Mounts, steps: range, is_over: bool) -> list[str]:
    """Let a run of ``steps`` be heard, and return the warnings."""
    trackers = open_trackers(job, Workspace(folder), mounts)
    for callback in trackers.callbacks:
        hear(callback, folder, steps)
    return list(trackers.close(is_over))


def hear(callback: TrainerCallback, folder: Path, steps: range) -> None:
    arguments = TrainingArguments(output_dir=str(folder), report_to="none", use_cpu=True)
    state, control = TrainerState(is_world_process_zero=True), TrainerControl()
    callback.on_train_begin(arguments, state, control)
    for step in steps:
        state.global_step = step
        state.log_history.append({"step": step, "validation_loss": 2.0, "validation_losses": {"sentiment": 2.0}})
        callback.on_step_end(arguments, state, control)
        callback.on_log(arguments, state, control, logs={"loss": 1.0 / step})


def test_without_a_word_nothing_is_told(tmp_path: Path):
    assert not open_trackers(job_with({}), Workspace(tmp_path), Mounts()).callbacks


def test_attempts_of_a_job_go_on_in_one_run(mlflow: MlflowDouble, mounts: Mounts, tmp_path: Path):
    job = job_with(MLFLOW)
    assert attempt(job, tmp_path, mounts, range(1, 3), is_over=False) == []
    server, looked = ("server", "https://mlflow.example", "not-shown"), {"eval/loss": 2.0, "eval/sentiment_loss": 2.0}
    assert mlflow.told == [
        *(server, ("experiment", "reviews"), ("run", "run-0")),
        *((1, looked), (1, {"train/loss": 1.0}), (2, looked), (2, {"train/loss": 0.5}), ("end", "KILLED")),
    ]
    assert mlflow.runs[0].tag == "default/reviews-0a1b2c3d"
    assert mlflow.runs[0].data.params == describe_settings(job.spec)
    mlflow.told.clear()
    smaller = job.spec.training.model_copy(update={"micro_batch_size": 1})
    again = job.model_copy(update={"spec": job.spec.model_copy(update={"training": smaller})})
    assert attempt(again, tmp_path, mounts, range(3, 4), is_over=True) == []
    assert mlflow.told[2] == ("run", "run-0")
    assert mlflow.told[-1] == ("end", "FINISHED")
    assert mlflow.runs[0].data.params == describe_settings(job.spec), "MLflow refuses other values"


def test_a_server_that_is_away_is_tried_again_and_told_of_once(mlflow: MlflowDouble, mounts: Mounts, tmp_path: Path):
    mlflow.is_away = True
    (warning,) = attempt(job_with(MLFLOW), tmp_path, mounts, range(1, 4), is_over=True)
    assert warning == "spec.training.reportTo.mlflow: the tracker missed 6 reports: no route to the host"


def test_a_server_that_is_away_when_training_ends_is_not_tried_for_each_report(
    mlflow: MlflowDouble, mounts: Mounts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    trackers = open_trackers(job_with(MLFLOW), Workspace(tmp_path), mounts)
    (tracking,) = trackers.callbacks
    tries = []

    def fail_at_the_end(name: str) -> None:
        tries.append(name)
        while not tracking._is_closing:
            time.sleep(0.001)
        raise AwayError("no route")

    monkeypatch.setattr(mlflow, "set_experiment", fail_at_the_end)
    hear(tracking, tmp_path, range(1, 4))
    assert trackers.close(is_over=True) == ["spec.training.reportTo.mlflow: the tracker missed 6 reports: no route"]
    assert tries == ["reviews"]


def test_a_tracker_that_never_answers_is_left_behind(
    mlflow: MlflowDouble, mounts: Mounts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    release = threading.Event()

    def wait(name: str) -> None:
        release.wait(60)
        raise AwayError

    monkeypatch.setattr(mlflow, "set_experiment", wait)
    monkeypatch.setattr(tracker, "_PATIENCE_SECONDS", 0.1)
    (warning,) = attempt(job_with(MLFLOW), tmp_path, mounts, range(1, 2), is_over=True)
    assert "left behind" in warning
    release.set()
    for thread in threading.enumerate():
        if thread.name == "spec.training.reportTo.mlflow":
            thread.join()


def test_what_runs_are_compared_by_has_the_names_of_the_yaml():
    told = describe_settings(job_with(MLFLOW).spec)
    assert told["method.lora.rank"] == "16"
    assert told["training.globalBatchSize"] == "16"
    assert not [name for name in told if "reportTo" in name]


@pytest.mark.parametrize(
    ("name", "given", "package"),
    [
        ("mlflow", MLFLOW["spec.training.reportTo"]["mlflow"], "mlflow-skinny"),
        ("wandb", {"project": "reviews"}, "wandb"),
    ],
)
def test_a_package_that_is_not_here_is_named_also_where_the_check_is_skipped(
    name: str, given: dict[str, Any], package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setitem(sys.modules, name, None)
    job = job_with({"spec.training.reportTo": {name: given}})
    message = rf"reportTo\.{name} needs the package {name}.*Install {package} as docs/trackers\.md"
    with pytest.raises(SpecError, match=message):
        require_trackers(job.spec)
    with pytest.raises(SpecError, match=message):
        open_trackers(job, Workspace(tmp_path), Mounts())
    require_trackers(job_with({"spec.training.reportTo": {"tensorboard": True}}).spec)
