"""The train stage: tune the model into the workspace, on this machine or on several workers."""

import dataclasses
import gc
import shutil
from collections.abc import Mapping, Sequence

from finetune_api.job import FineTuneJob
from finetune_api.report import DataReport, Stage, TrainingReport
from finetune_api.spec import evaluates_only
from finetune_api.spec.compute import is_distributed, processes
from finetune_trainer.adjustment import adjusted
from finetune_trainer.check_stage import check_stage
from finetune_trainer.checkpoint import newest_complete, step_of
from finetune_trainer.checkpoint_upload import CheckpointUpload
from finetune_trainer.dataset import Dataset
from finetune_trainer.example import Encoded
from finetune_trainer.general_suite import general_texts, text_parts
from finetune_trainer.inputs import Inputs
from finetune_trainer.manifest import is_complete
from finetune_trainer.methods import count_parameters, prepare_model
from finetune_trainer.mixture import Mixture, TaskRows, plan_mixture
from finetune_trainer.model import ModelFiles, load_tokenizer, outline_model
from finetune_trainer.progress import Reporter
from finetune_trainer.published_model import PublishedModel
from finetune_trainer.renderer import Renderer
from finetune_trainer.run import Run, interruptible
from finetune_trainer.split import Split
from finetune_trainer.stage_input import (
    encode_rows,
    encode_split,
    fetch_base,
    fetch_base_to_train,
    find_start,
    inputs_of,
    is_unchanged,
    load_rows,
    make_renderer,
    rows_by_task,
)
from finetune_trainer.train import threads_of_each, train
from finetune_trainer.training_input import TrainingInput
from finetune_trainer.watched import Watched, find_watched


def train_stage(run: Run) -> TrainingReport:
    """Tune the model into the workspace; the test split is not opened."""
    workspace, shared = run.workspace, run.shared
    if shared is not None:
        shared.pull_results()
    if evaluates_only(run.job.spec.training):
        return _train_nothing(run)
    done = workspace.recall("training", TrainingReport)
    if done is not None and (is_complete(workspace.tuned) if shared is None else shared.has_tuned()):
        # This attempt goes on from the end: the one that came there was stopped before it could say so.
        return done.model_copy(update={"resumed_from_step": done.steps})
    reporter = interruptible(run, Stage.TRAIN)
    reporter.say("looking for a checkpoint to go on from")
    find_checkpoint(run)
    reporter.say("reading the rows")
    files = fetch_base_to_train(run)
    dataset = load_rows(run, (Split.TRAIN, Split.VALIDATION))
    start = find_start(run)
    inputs = inputs_of(dataset, files, start)
    if not is_unchanged(run, inputs, reporter):
        check_stage(run)
    report = _train(run, files, start, dataset, inputs, reporter)
    run.remember("training", report)
    shutil.rmtree(workspace.checkpoints, ignore_errors=True)
    if shared is not None:
        shared.drop_checkpoints()
    gc.collect()
    return report


def _train_nothing(run: Run) -> TrainingReport:
    """Describe the model that is to be evaluated as it is."""
    if (done := run.workspace.recall("training", TrainingReport)) is not None:
        return done
    if run.workspace.recall("data", DataReport) is None:
        check_stage(run)
    method, files = run.job.spec.method, fetch_base(run)
    parameters, trainable = count_parameters(prepare_model(outline_model(files), method, str(files.path)))
    report = TrainingReport(
        method=method.type.value, parameters=parameters, trainable_parameters=trainable, steps=0, epochs=0
    )
    run.remember("training", report)
    return report


def find_checkpoint(run: Run) -> int | None:
    """Bring the newest complete checkpoint into the workspace and return its step; absent when there is none.

    Workers on other nodes bring it to themselves.
    """
    if run.shared is not None and is_distributed(run.job.spec.compute):
        return next(iter(run.shared.complete_steps()), None)
    if run.shared is not None:
        if run.job.spec.evaluation.goes_back:
            run.shared.pull_checkpoints()
        else:
            run.shared.pull_checkpoint()
    newest = newest_complete(run.workspace.checkpoints)
    return None if newest is None else step_of(newest)


def _train(
    run: Run, files: ModelFiles, start: PublishedModel | None, dataset: Dataset, inputs: Inputs, reporter: Reporter
) -> TrainingReport:
    job = run.job
    renderer = make_renderer(job, files, load_tokenizer(files))
    rows, validation = (encode_split(run, files, renderer, dataset, split) for split in (Split.TRAIN, Split.VALIDATION))
    replayed = encode_rows(run, files, renderer, dataset, dataset.replay(), job.spec.data.loss_on)
    job = job.model_copy(update={"spec": adjusted(job.spec, run.adjustment)})
    mixture, by_task = _mixture(job, dataset), rows_by_task(dataset, Split.VALIDATION, validation)
    rows += replayed
    general = _prose(renderer) if job.spec.evaluation.forgetting is not None else ()
    watched = find_watched(job, dataset, renderer)
    if is_distributed(job.spec.compute):
        return _train_on_workers(run, job, inputs, rows, mixture, by_task, general, watched)
    given = TrainingInput(
        job,
        files,
        rows,
        mixture,
        by_task,
        run.workspace,
        run.sink,
        run.stop.event,
        general=general,
        watched=watched,
        start=start,
        mounts=run.mounts,
    )
    shared, keep = run.shared, job.spec.checkpoint.keep
    if shared is None:
        return train(given)
    with CheckpointUpload(run.workspace.uploads, lambda at, step: shared.push_checkpoint(at, step, keep)) as upload:
        report = train(dataclasses.replace(given, upload=upload))
    reporter.say("storing the tuned weights")
    shared.push_tuned()
    return report


def _prose(renderer: Renderer) -> Sequence[Encoded]:
    return renderer.raw().encode_continuations([text_parts(text) for text in general_texts()])


def _train_on_workers(
    run: Run,
    job: FineTuneJob,
    inputs: Inputs,
    rows: Sequence[Encoded],
    mixture: Mixture,
    validation: Mapping[str, Sequence[Encoded]],
    general: Sequence[Encoded],
    watched: Watched | None,
) -> TrainingReport:
    """Train as several processes, which fetch and store for themselves what is too large for this one."""
    # Imported here: what runs alone needs no cluster's client.
    from finetune_trainer.worker import Assignment
    from finetune_trainer.worker_group import train_on_workers

    shared, keep = run.shared, job.spec.checkpoint.keep
    assignment = Assignment(
        job,
        inputs,
        rows,
        mixture,
        validation,
        general,
        watched,
        run.workspace,
        run.mounts,
        prefix=None if shared is None else shared.prefix,
        # A pod's own variables say how many are meant for it.
        threads=threads_of_each(processes(job.spec.compute)) if shared is None else None,
    )

    def complete(step: int, nodes: int) -> None:
        if shared is not None:
            shared.complete_parts(step, nodes, keep)

    return train_on_workers(assignment, run.sink, run.stop.event, complete)


def _mixture(job: FineTuneJob, dataset: Dataset) -> Mixture:
    """Return how the training rows of all tasks, and behind them the replayed ones, are mixed."""
    data = job.spec.data
    places, rows = dataset.places(Split.TRAIN), len(dataset.examples(Split.TRAIN))
    tasks = [TaskRows(task.name, places[task.name], task.weight) for task in data.tasks]
    replay = range(rows, rows + len(dataset.replay()))
    return plan_mixture(
        tasks, data.mixing, job.spec.training.seed, replay, data.replay.fraction if data.replay else 0.0
    )
