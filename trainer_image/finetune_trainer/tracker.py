"""Experiment trackers: what training logs, passed on to transformers' own callbacks.

Each has a thread of its own that training never waits for without a limit: a tracker that is away, slow or broken costs
what it would have shown, and a warning.
"""

import contextlib
import copy
import hashlib
import importlib.util
import logging
import os
import queue
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import (
    MLflowCallback,
    TensorBoardCallback,
    WandbCallback,
    rewrite_logs,
)

from finetune_api.job import FineTuneJob
from finetune_api.spec import FineTuneJobSpec, MlflowSpec, SecretRef, WandbSpec
from finetune_trainer.durable import disk_errors
from finetune_trainer.errors import SpecError
from finetune_trainer.location import Mounts
from finetune_trainer.run import output_prefix
from finetune_trainer.s3_client import read_key
from finetune_trainer.workspace import EVENT_FILES, WANDB_FILES, Workspace

logger = logging.getLogger(__name__)

_PATIENCE_SECONDS = 10.0
"""For what a tracker has not taken yet when training ends."""


_PACKAGES = {"mlflow": "mlflow-skinny", "wandb": "wandb"}
"""What holds the modules that trackers need, by the name of module and field."""


@dataclass(frozen=True, slots=True)
class Tracker:
    """How one tracker is reached."""

    field: str
    """What asks for it."""
    connect: Callable[[], TrainerCallback]
    """Returns the callback that tells it; called until it succeeds, each time there is something to tell."""
    errors: tuple[type[Exception], ...]
    """What shows that it is away."""
    disconnect: Callable[[TrainerCallback, bool], None]
    """Ends what ``connect`` began; told whether training has come to its end."""
    needs_past: bool = False
    """Whether a run that goes on from a checkpoint must tell it again what came before."""


class Tracking(TrainerCallback):
    """Hears training and tells one tracker; to be called behind whoever writes validation losses into the history."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self._told: queue.SimpleQueue[Callable[[TrainerCallback], None] | None] = queue.SimpleQueue()
        self._is_over = False
        self._is_closing = False
        self._has_told_all = False
        self._lost = 0
        self._reason = ""
        # A daemon: the program must be able to end while a tracker does not answer.
        self._thread = threading.Thread(target=self._tell, name=tracker.field, daemon=True)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin; repeat the history of a run that goes on, where the tracker needs it."""
        self._thread.start()
        for entry in state.log_history if self._tracker.needs_past else ():
            past = copy.copy(state)
            past.global_step = int(entry["step"])
            self._pass_on(args, past, control, {**_without_step(entry), **validation_figures(entry)}, kwargs)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Tell of a look at the validation rows behind this step, which is in the history alone."""
        newest: Mapping[str, Any] = state.log_history[-1] if state.log_history else {}
        if newest.get("step") == state.global_step and (figures := validation_figures(newest)):
            self._pass_on(args, copy.copy(state), control, figures, kwargs)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Tell of what the trainer logs."""
        self._pass_on(args, copy.copy(state), control, dict(kwargs["logs"]), kwargs)

    def _pass_on(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        given: Mapping[str, Any],
    ) -> None:
        # The trainer's own state is another one by the time that the thread gets there.
        self._told.put(lambda callback: callback.on_log(args, state, control, logs=logs, model=given.get("model")))

    def close(self, is_over: bool) -> str | None:
        """Wait a while until the tracker has everything; return what went wrong, for people."""
        if self._thread.ident is None:
            return None  # training has not begun
        self._is_over = is_over
        self._told.put(None)
        self._is_closing = True
        self._thread.join(_PATIENCE_SECONDS)
        field = self._tracker.field
        if self._thread.is_alive():
            return f"{field}: the tracker has not taken everything within {_PATIENCE_SECONDS:.0f} s, and is left behind"
        if not self._has_told_all:
            return f"{field}: telling the tracker has failed, as the log says; this is a defect here or in its library"
        if self._reason:
            return f"{field}: the tracker missed {self._lost} reports: {self._reason}"
        return None

    def _tell(self) -> None:
        callback: TrainerCallback | None = None
        while (report := self._told.get()) is not None:
            try:
                callback = callback or self._tracker.connect()
                report(callback)
            except self._tracker.errors as error:
                self._miss(error)
                if callback is None and self._is_closing:
                    # Each further try would take as long; what else was told ends in None.
                    self._lost += self._told.qsize() - 1
                    break
        if callback is not None:
            try:
                self._tracker.disconnect(callback, self._is_over)
            except self._tracker.errors as error:
                self._miss(error)
        self._has_told_all = True

    def _miss(self, error: Exception) -> None:
        self._lost += 1
        self._reason = (" ".join(str(error).split()) or type(error).__name__)[:240]


@dataclass(slots=True)
class Trackers:
    """All trackers of a run; none where another worker has them."""

    callbacks: Sequence[Tracking] = ()
    warnings: list[str] = field(default_factory=list)
    """What went wrong; complete behind `close`."""

    def close(self, is_over: bool) -> Sequence[str]:
        """End reporting and return what went wrong.

        Args:
            is_over: whether training has come to its end, and not to a failure or an interruption.
        """
        for tracking in self.callbacks:
            if warning := tracking.close(is_over):
                logger.warning("tracker missed reports reason=%s", warning)
                self.warnings.append(warning)
        return self.warnings


def validation_figures(entry: Mapping[str, Any]) -> dict[str, float]:
    """Return the validation losses of an entry of the history, under such names as transformers gives. Pure."""
    if "validation_loss" not in entry:
        return {}
    by_task = {f"eval_{task}_loss": loss for task, loss in entry.get("validation_losses", {}).items()}
    return {"eval_loss": entry["validation_loss"], **by_task}


def _without_step(entry: Mapping[str, Any]) -> dict[str, float]:
    """Return what the trainer logged of an entry, which holds what only the report shows as well."""
    return {name: value for name, value in entry.items() if name != "step" and isinstance(value, int | float)}


def open_trackers(job: FineTuneJob, workspace: Workspace, mounts: Mounts) -> Trackers:
    """Return what tells the trackers that the job asks for; they are reached when there is something to tell.

    Raises:
        SpecError: a package is not installed; a check may have been skipped.
    """
    require_trackers(job.spec)
    wanted = job.spec.training.report_to
    if wanted is None:
        return Trackers()
    trackers = []
    if wanted.tensorboard:
        trackers.append(_event_files(workspace.root / EVENT_FILES))
    if wanted.mlflow is not None:
        trackers.append(_mlflow(wanted.mlflow, job, mounts))
    if wanted.wandb is not None:
        trackers.append(_wandb(wanted.wandb, job, workspace, mounts))
    return Trackers([Tracking(tracker) for tracker in trackers])


def require_trackers(spec: FineTuneJobSpec) -> None:
    """Find out whether the packages of the trackers are here; nothing is imported.

    Raises:
        SpecError: one is not installed.
    """
    wanted = spec.training.report_to
    for name, package in _PACKAGES.items():
        if wanted is not None and getattr(wanted, name) is not None and importlib.util.find_spec(name) is None:
            raise SpecError(
                f"spec.training.reportTo.{name} needs the package {name}, which is not installed here. Install "
                f"{package} as docs/trackers.md says, or leave it out."
            )


def _keys(secret_ref: SecretRef | None, mounts: Mounts, names: Sequence[str]) -> dict[str, str]:
    """Return those of ``names`` that the Secret has; none on a machine without Secrets, whose environment counts."""
    secret = None if secret_ref is None else mounts.secret(secret_ref.name)
    return {name: value for name in names if (value := read_key(secret, name)) is not None}


# --- TensorBoard


def _event_files(folder: Path) -> Tracker:
    """Return how to write event files into ``folder``, where those of an earlier attempt make room.

    They may tell of steps behind the checkpoint that this one goes on from.
    """

    def connect() -> TrainerCallback:
        # Imported here: few jobs need it.
        from tensorboardX import SummaryWriter

        shutil.rmtree(folder, ignore_errors=True)
        return TensorBoardCallback(SummaryWriter(str(folder)))

    def disconnect(callback: TrainerCallback, is_over: bool) -> None:
        cast(TensorBoardCallback, callback).tb_writer.close()

    return Tracker("spec.training.reportTo.tensorboard", connect, (OSError,), disconnect, needs_past=True)


def put_event_files(source: Path, target: Path) -> None:
    """Copy the event files below ``source``, where there are any, below ``target`` in the place of what is there."""
    files = source / EVENT_FILES
    with disk_errors("copy the event files to", target):
        shutil.rmtree(target / EVENT_FILES, ignore_errors=True)
        if files.is_dir():
            shutil.copytree(files, target / EVENT_FILES)


# --- MLflow

_TAG = "finetune.job"
_KEYS = ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
_MLFLOW_HABITS = {
    # The library would report its use to its makers.
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # Seconds. By default MLflow tries for a quarter of an hour.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    # Of transformers' callback, which would tell all its own settings; ours are told when the run begins.
    "MLFLOW_MAX_LOG_PARAMS": "0",
    # Standard output is progress for programs to read.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


class _PromptMLflowCallback(MLflowCallback):
    """Knows whether a report has arrived; otherwise MLflow tells its log alone, from a thread of its own.

    Figures have the names that the other trackers give them.
    """

    def setup(self, args: TrainingArguments, state: TrainerState, model: Any) -> None:
        super().setup(args, state, model)  # type: ignore[no-untyped-call]
        self._async_log = False

    def on_log(  # type: ignore[override]
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], model: Any
    ) -> None:
        super().on_log(args, state, control, rewrite_logs(logs), model)  # type: ignore[no-untyped-call]


def _mlflow(wanted: MlflowSpec, job: FineTuneJob, mounts: Mounts) -> Tracker:
    # Before the import, which begins some of the habits.
    os.environ.update(_MLFLOW_HABITS)
    # Imported here: few jobs need it, and it is not in every image.
    import mlflow
    from mlflow.exceptions import MlflowException

    name = output_prefix(job)

    def connect() -> TrainerCallback:
        os.environ.update(_keys(wanted.secret_ref, mounts, _KEYS))
        mlflow.set_tracking_uri(wanted.tracking_uri)
        run = mlflow.active_run()
        if run is None:
            places = [mlflow.set_experiment(wanted.experiment).experiment_id]
            known = mlflow.MlflowClient().search_runs(places, f"tags.`{_TAG}` = '{name}'", max_results=1)
            if known:
                run = mlflow.start_run(known[0].info.run_id)
            else:
                run = mlflow.start_run(run_name=job.metadata.name, tags={_TAG: name})
        # A parameter cannot be changed, and another attempt may have a smaller micro-batch.
        if not run.data.params:
            mlflow.log_params(describe_settings(job.spec))
        return _PromptMLflowCallback()  # type: ignore[no-untyped-call]

    def disconnect(callback: TrainerCallback, is_over: bool) -> None:
        mlflow.end_run("FINISHED" if is_over else "KILLED")

    return Tracker("spec.training.reportTo.mlflow", connect, (MlflowException,), disconnect)


# --- Weights & Biases

_WANDB_SECONDS = 4.0
"""For the beginning of a run, and for its end; less than half of `_PATIENCE_SECONDS`."""


class _PlainWandbCallback(WandbCallback):
    """Tells figures alone, where transformers' own would begin with the settings of trainer and model."""

    def setup(self, args: TrainingArguments, state: TrainerState, model: Any, **kwargs: Any) -> None:
        self._initialized = True
        self._wandb.define_metric("train/global_step")
        self._wandb.define_metric("*", step_metric="train/global_step", step_sync=True)


@dataclass(frozen=True, slots=True)
class _Complaints:
    """Stands where W&B would print: what it cannot upload is told nowhere else."""

    heard: list[str] = field(default_factory=list)

    def info(self, message: str) -> None:
        """Retries, which are no loss."""

    def warning(self, message: str) -> None:
        self.heard.append(message)

    def error(self, message: str) -> None:
        self.heard.append(message)


def _wandb(wanted: WandbSpec, job: FineTuneJob, workspace: Workspace, mounts: Mounts) -> Tracker:
    # Imported here: few jobs need it, and it is not in every image.
    import wandb

    files = workspace.root / WANDB_FILES
    complaints = _Complaints()

    def connect() -> TrainerCallback:
        # No reports on the library itself, and no logs in the home folder.
        os.environ.update({"WANDB_ERROR_REPORTING": "false", "WANDB_CACHE_DIR": str(files)})
        settings = wandb.Settings(
            base_url=wanted.base_url,
            api_key=_keys(wanted.secret_ref, mounts, ["WANDB_API_KEY"]).get("WANDB_API_KEY"),
            root_dir=str(workspace.root),
            use_dot_wandb=False,
            silent=True,
            init_timeout=_WANDB_SECONDS,
            finish_timeout=_WANDB_SECONDS,
            # By default a click on the server's page interrupts this program.
            stop_fn=lambda: None,
            # Figures and settings are no files: nothing of this machine, no code and no output is uploaded.
            ignore_globs=("*",),
            console="off",
            save_code=False,
            program="",
            x_disable_machine_info=True,
        )
        with contextlib.ExitStack() as at_failure:
            # Each try has a folder of its own, and the process of one that failed would hold the id.
            at_failure.callback(shutil.rmtree, files, ignore_errors=True)
            at_failure.callback(wandb.teardown)
            wandb.setup(settings)
            wandb.termsetup(settings, complaints)
            wandb.init(
                project=wanted.project,
                entity=wanted.entity,
                id=hashlib.sha256(output_prefix(job).encode()).hexdigest()[:16],
                resume="allow",
                name=job.metadata.name,
                config=describe_settings(job.spec),
            )
            at_failure.pop_all()
        return _PlainWandbCallback()  # type: ignore[no-untyped-call]

    def disconnect(callback: TrainerCallback, is_over: bool) -> None:
        try:
            wandb.finish(exit_code=0 if is_over else 1)
        finally:
            wandb.teardown()
        if complaints.heard:
            raise wandb.Error(complaints.heard[0])

    # ValueError: settings that this version of the library does not take.
    return Tracker("spec.training.reportTo.wandb", connect, (wandb.Error, OSError, ValueError), disconnect)


# --- what runs are compared by


def describe_settings(spec: FineTuneJobSpec) -> dict[str, str]:
    """Return what runs are compared by, each under the name that it has in the YAML. Pure."""
    document = {
        "model": {"source": spec.model.source},
        "method": spec.method.model_dump(mode="json", by_alias=True, exclude_none=True),
        "training": spec.training.model_dump(mode="json", by_alias=True, exclude_none=True, exclude={"report_to"}),
    }
    return dict(_flat(document))


def _flat(block: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in block.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(value)
