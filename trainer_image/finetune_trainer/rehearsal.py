"""The rehearsal: the whole pipeline on a CPU, with some of the job's rows and a tiny random model of its architecture.

Two steps of training, interrupted behind the first and gone on with from the checkpoint; then evaluation, and
publication below the job's own place in the output store, from where it is removed again. No number that comes out
means anything; what breaks would have broken later, on a machine that costs more.

Forgetting, benchmarks, other axes and gates are left out: what a job can say wrong about them the check stage
finds without a model.
"""

import dataclasses
import heapq
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from finetune_api.report import DataReport, Progress, Rehearsal, Stage, TrainingReport
from finetune_api.spec import Engine, FineTuneJobSpec, MethodType, PublishOn, SelectiveTrain
from finetune_trainer.dataset import Dataset
from finetune_trainer.durable import disk_errors
from finetune_trainer.errors import FineTuneError, OutOfMemoryError, Preempted, TrainingDivergedError
from finetune_trainer.example import Example
from finetune_trainer.inputs import Inputs
from finetune_trainer.interrupt import StopFlag
from finetune_trainer.model import ModelFiles, fetch_model, read_config
from finetune_trainer.progress import Reporter
from finetune_trainer.run import Run, interruptible, output_prefix
from finetune_trainer.shared_state import SharedState
from finetune_trainer.small_model import LAYERS, make_small
from finetune_trainer.split import Split
from finetune_trainer.storage import Storage
from finetune_trainer.workspace import Workspace

STEPS = 2
_ROWS = 8
"""Of every task, and at least one of every label."""
_UNSEEN_ROWS = 4
_LEARNING_RATE = 0.01
"""High: two steps have to change what the model says, or evaluation would rightly complain."""
_ANSWER_TOKENS = 8
_FOLDER = "rehearsal"

AnyStage = Callable[[Run], object]


def rehearse(
    run: Run, files: ModelFiles, dataset: Dataset, data: DataReport, stages: tuple[AnyStage, AnyStage]
) -> DataReport:
    """Take ``run`` through training and evaluation in small, leave nothing behind, and say in ``data`` how it went.

    Args:
        run: in its check stage.
        files: the base model.
        dataset: with its training rows open; no others are used.
        data: what the check found in them.
        stages: train and evaluate.

    Raises:
        FineTuneError: what a stage fails with; what the job would fail with later.
        Preempted: the run is stopped.
    """
    started = time.monotonic()
    folder = run.workspace.root / _FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    try:
        if why_not := make_small(files, folder / "model", _layers(run.job.spec, files)):
            return _not_rehearsed(data, why_not)
        small = _small_run(run, folder, dataset, data)
        _perform(small, run.stop, stages)
        training = small.workspace.recall("training", TrainingReport)
    except (OutOfMemoryError, TrainingDivergedError) as error:
        # Of this machine and of random weights; they say nothing about the job.
        return _not_rehearsed(data, str(error))
    except Preempted:
        raise
    except FineTuneError as error:
        raise type(error)(f"in the rehearsal: {error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        run.storage.open_output().delete_tree(f"{output_prefix(run.job)}/{_FOLDER}")
    rehearsal = Rehearsal(steps=STEPS, seconds=time.monotonic() - started)
    return data.model_copy(update={"rehearsal": rehearsal, "layout": "" if training is None else training.layout})


def _not_rehearsed(data: DataReport, why_not: str) -> DataReport:
    return data.model_copy(update={"rehearsal": Rehearsal(why_not=why_not)})


def _perform(small: Run, stop: StopFlag, stages: tuple[AnyStage, AnyStage]) -> None:
    train, evaluate = stages
    try:
        train(small)
    except Preempted:
        if stop.event.is_set():
            raise
    if small.shared is not None:
        # Behind an interruption comes another pod, which finds what is in the store.
        shutil.rmtree(small.workspace.checkpoints)
    rested = dataclasses.replace(small, stop=StopFlag())
    train(rested)
    if small.shared is not None:
        shutil.rmtree(small.workspace.tuned)
    evaluate(rested)


def _small_run(run: Run, folder: Path, dataset: Dataset, data: DataReport) -> Run:
    """Return a run that is interrupted behind its first step, in ``folder`` and below the job's own prefix."""
    spec = small_spec(run.job.spec, f"{run.job.spec.output.uri.rstrip('/')}/{output_prefix(run.job)}/{_FOLDER}")
    spec = spec.model_copy(update={"model": spec.model.model_copy(update={"source": (folder / "model").as_uri()})})
    job = run.job.model_copy(update={"spec": spec})
    workspace = Workspace(folder / "workspace")
    stop = StopFlag()
    small = Run(
        job,
        workspace,
        _Listener(interruptible(run, Stage.CHECK), stop),
        stop,
        run.mounts,
        run.shared and SharedState(Storage(spec.output, run.mounts).open_output(), output_prefix(job), workspace),
        dataset=small_dataset(dataset),
    )
    with disk_errors("create", workspace.root):
        workspace.root.mkdir(parents=True)
    small.remember("data", data)
    revision = fetch_model(spec.model, workspace.models, storage=small.storage).revision
    small.remember("inputs", Inputs(rows=dataset.hash, model=revision))
    return small


def small_spec(spec: FineTuneJobSpec, output_uri: str) -> FineTuneJobSpec:
    """Return what is rehearsed: the job's own method, metrics and output, as little of each as there can be. Pure.

    One process alone, and full precision where the job wants a base of four bits: both need what is not there yet.
    """
    method, evaluation = spec.method, spec.evaluation
    if method.type is MethodType.QLORA:
        method = method.model_copy(update={"type": MethodType.LORA})
    shown, answer = evaluation.baselines.few_shot, evaluation.generation.max_new_tokens or _ANSWER_TOKENS
    baselines = evaluation.baselines.model_copy(update={"few_shot": shown and min(shown, 2)})
    generation = evaluation.generation.model_copy(update={"max_new_tokens": min(answer, _ANSWER_TOKENS)})
    return spec.model_copy(
        update={
            "model": spec.model.model_copy(update={"revision": None, "secret_ref": None, "start_from": None}),
            "method": method,
            "training": spec.training.model_copy(
                update={
                    "max_steps": STEPS,
                    "learning_rate": _LEARNING_RATE,
                    "warmup_ratio": 0.0,
                    "global_batch_size": min(2, spec.training.global_batch_size),
                    "micro_batch_size": 1,
                    "eval_every_steps": 1,
                    "report_to": None,
                }
            ),
            "compute": spec.compute.model_copy(update={"engine": Engine.JOB, "workers": 1, "deepspeed": None}),
            "evaluation": evaluation.model_copy(
                update={
                    "baselines": baselines,
                    "generation": generation,
                    "forgetting": None,
                    "benchmarks": (),
                    "holistic": None,
                    "gates": (),
                }
            ),
            "output": spec.output.model_copy(update={"uri": output_uri, "publish_on": PublishOn.ALWAYS}),
            "checkpoint": spec.checkpoint.model_copy(update={"every_steps": 1}),
        }
    )


def small_dataset(dataset: Dataset) -> Dataset:
    """Return the data set with the shortest training rows of every task and label alone, in every split. Pure.

    Validation and test rows are left in peace.
    """
    train = [row for task in dataset.tasks for row in _short_rows(dataset, task, _ROWS)]
    unseen = [row for task in dataset.tasks for row in _short_rows(dataset, task, _UNSEEN_ROWS)]
    replay = heapq.nsmallest(_ROWS, dataset.replay(), key=_length)
    return dataset.with_examples({Split.TRAIN: train, Split.VALIDATION: unseen, Split.TEST: unseen}, replay)


def _short_rows(dataset: Dataset, task: str, count: int) -> list[Example]:
    groups: dict[str, list[Example]] = {}
    labelled = bool(dataset.labels(task))
    for row in dataset.examples(Split.TRAIN, task):
        shortest = groups.setdefault(row.completion if labelled else "", [])
        shortest.append(row)
        if len(shortest) > 2 * count:
            shortest[:] = sorted(shortest, key=_length)[:count]
    of_each = max(1, count // len(groups))
    return [row for rows in groups.values() for row in sorted(rows, key=_length)[:of_each]]


def _length(row: Example) -> int:
    return len(row.prompt) + len(row.completion) + sum(len(text) for _, text in row.earlier)


def _layers(spec: FineTuneJobSpec, files: ModelFiles) -> int:
    """Return how many layers must be kept: all, where the job says something of single ones."""
    selective, lora, ia3 = spec.method.selective, spec.method.lora, spec.method.ia3
    names = (*(lora.target_names if lora else ()), *(ia3.target_names if ia3 else ()))
    counts_layers = selective is not None and selective.train is not SelectiveTrain.BIAS
    if counts_layers or any(character.isdigit() for name in names for character in name):
        return int(read_config(files).num_hidden_layers)
    return LAYERS


@dataclasses.dataclass(frozen=True, slots=True)
class _Listener:
    """Tells the check's own listener, which ends with the real run, and interrupts behind the first step."""

    reporter: Reporter
    stop: StopFlag

    def report(self, progress: Progress) -> None:
        self.reporter.say(f"rehearsing: {progress.message}")
        if progress.step:
            self.stop.event.set()
