"""The stages of one job and their order: check, train, evaluate, which publishes too.

Each reads what it needs from the spec and the workspace, so a stage can run in a process or pod of its own, and a
finished one is not run again.
"""

import gc
import importlib.metadata
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from finetune_api.job import FineTuneJob, spec_hash
from finetune_api.report import (
    Artifact,
    ArtifactKind,
    DataReport,
    EvaluationReport,
    Progress,
    Report,
    SplitRows,
    Stage,
    TrainingReport,
)
from finetune_api.spec import LossOn, PublishOn
from finetune_trainer.dataset import Dataset, load_dataset
from finetune_trainer.durable import disk_errors, write_file
from finetune_trainer.errors import Preempted, SpecError
from finetune_trainer.evaluation import evaluate
from finetune_trainer.example import Encoded
from finetune_trainer.interrupt import StopFlag
from finetune_trainer.manifest import is_complete, write_manifest
from finetune_trainer.model import ModelFiles, fetch_model, find_licence, load_tokenizer
from finetune_trainer.pair import ModelPair, open_pair
from finetune_trainer.progress import Reporter, Sink
from finetune_trainer.publish import export_model, publish
from finetune_trainer.renderer import Renderer, encode_all
from finetune_trainer.report_page import render_page
from finetune_trainer.scoring import Scorer
from finetune_trainer.split import Split
from finetune_trainer.storage import open_store
from finetune_trainer.train import TrainingInput, train
from finetune_trainer.workspace import Workspace

logger = logging.getLogger(__name__)

_NUMBERS_DEPEND_ON = ("torch", "transformers", "peft", "ray", "tokenizers", "rouge-score", "finetune")


def run(job: FineTuneJob, folder: Path, sink: Sink) -> Report:
    """Run all stages, one after the other; a used workspace is gone on with.

    Raises:
        FineTuneError: what kept the job from its end.
    """
    workspace = Workspace(folder)
    with workspace.claim(spec_hash(job.spec)), StopFlag() as stop:
        check_stage(job, workspace, sink, stop)
        train_stage(job, workspace, sink, stop)
        return evaluate_stage(job, workspace, sink, stop)


def run_one(stage: Stage, job: FineTuneJob, folder: Path, sink: Sink) -> None:
    """Run a single stage on the workspace that the stages before it have left."""
    steps: dict[Stage, Callable[[FineTuneJob, Workspace, Sink, StopFlag], object]] = {
        Stage.CHECK: check_stage,
        Stage.TRAIN: train_stage,
        Stage.EVALUATE: evaluate_stage,
    }
    workspace = Workspace(folder)
    with workspace.claim(spec_hash(job.spec)), StopFlag() as stop:
        steps[stage](job, workspace, sink, stop)


# --- check


def check_stage(job: FineTuneJob, workspace: Workspace, sink: Sink, stop: StopFlag) -> DataReport:
    """Find what would go wrong later: output not writable, model or rows not what the job says."""
    done = workspace.recall("data", DataReport)
    if done is not None:
        return done
    reporter = _interruptible(sink, Stage.CHECK, stop)
    reporter.say("checking that the output can be written")
    open_store(job.spec.output.uri).check_writable()
    reporter.say("reading the base model's files")
    files = fetch_model(job.spec.model, workspace.models)
    tokenizer = load_tokenizer(files)
    reporter.say("reading, rendering and splitting the rows")
    dataset = load_dataset(job.spec.data)
    renderer = _renderer(job, tokenizer)
    encoded: dict[Split, list[Encoded]] = {}
    for split in Split:
        reporter.say(f"tokenising the {split.value} split")
        encoded[split] = _encode(job, renderer, dataset, split)
    report = _describe_data(job, dataset, renderer, encoded)
    workspace.remember("data", report)
    reporter.share("checked", 1.0)
    return report


def _describe_data(
    job: FineTuneJob, dataset: Dataset, renderer: Renderer, encoded: dict[Split, list[Encoded]]
) -> DataReport:
    everything = [item for items in encoded.values() for item in items]
    first = dataset.examples(Split.TRAIN)[0]
    whole = renderer.encode(first, dataset)
    return DataReport(
        rows=SplitRows(**{split.value: len(items) for split, items in encoded.items()}),
        tokens=sum(len(item.ids) for item in encoded[Split.TRAIN]),
        completion_tokens=sum(len(item.completion_ids) for item in encoded[Split.TRAIN]),
        longest_tokens=max(len(item.ids) for item in everything),
        truncated_percent=100 * sum(item.truncated for item in everything) / len(everything),
        duplicates=dataset.duplicates.rows,
        hash=dataset.hash,
        format=renderer.format,
        sample_prompt=renderer.decode(whole.ids[: whole.prompt_length]),
        sample_completion=renderer.decode(whole.completion_ids),
    )


# --- train


def train_stage(job: FineTuneJob, workspace: Workspace, sink: Sink, stop: StopFlag) -> TrainingReport:
    """Tune the model into the workspace; the test split is not opened."""
    done = workspace.recall("training", TrainingReport)
    if done is not None and is_complete(workspace.tuned):
        return done
    reporter = _interruptible(sink, Stage.TRAIN, stop)
    reporter.say("reading the rows")
    files = fetch_model(job.spec.model, workspace.models)
    renderer = _renderer(job, load_tokenizer(files))
    dataset = load_dataset(job.spec.data, splits=(Split.TRAIN, Split.VALIDATION))
    rows, validation = (_encode(job, renderer, dataset, split) for split in (Split.TRAIN, Split.VALIDATION))
    report = train(TrainingInput(job, files, rows, validation, workspace, sink, stop.event))
    workspace.remember("training", report)
    shutil.rmtree(workspace.checkpoints, ignore_errors=True)
    gc.collect()
    return report


# --- evaluate and publish


def evaluate_stage(job: FineTuneJob, workspace: Workspace, sink: Sink, stop: StopFlag) -> Report:
    """Compare base and tuned model on the test split, then publish the report and, if the job says so, the model."""
    reporter = _interruptible(sink, Stage.EVALUATE, stop)
    reporter.say("loading the models")
    files = fetch_model(job.spec.model, workspace.models)
    tokenizer = load_tokenizer(files)
    pair = open_pair(job, files, workspace.tuned)
    renderer = _renderer(job, tokenizer)
    evaluation = workspace.recall("evaluation", EvaluationReport)
    if evaluation is None:
        evaluation, predictions = evaluate(
            pair,
            tokenizer,
            renderer,
            load_dataset(job.spec.data),
            job,
            lambda model: Scorer(model, pair.layout),
            reporter.tell,
        )
        _write_predictions(predictions, workspace.report)
        workspace.remember("evaluation", evaluation)
    report = _assemble(job, files, workspace, evaluation)
    return _publish(job, report, pair, tokenizer, renderer, find_licence(files), workspace, sink)


def _assemble(job: FineTuneJob, files: ModelFiles, workspace: Workspace, evaluation: EvaluationReport) -> Report:
    data, training = workspace.recall("data", DataReport), workspace.recall("training", TrainingReport)
    if data is None or training is None:
        raise SpecError(
            f"workspace {workspace.root} holds no finished {'check' if data is None else 'train'} stage; run it first."
        )
    return Report(
        name=job.metadata.name,
        namespace=job.metadata.namespace,
        spec_hash=spec_hash(job.spec),
        base_model=job.spec.model.source,
        base_revision=files.revision,
        data=data,
        training=training,
        evaluation=evaluation,
        seed=job.spec.training.seed,
        versions={name: importlib.metadata.version(name) for name in _NUMBERS_DEPEND_ON},
        resolved=job.spec.model_dump(mode="json", by_alias=True, exclude_none=True),
    )


def _publish(
    job: FineTuneJob,
    report: Report,
    pair: ModelPair,
    tokenizer: PreTrainedTokenizerBase,
    renderer: Renderer,
    licence: str | None,
    workspace: Workspace,
    sink: Sink,
) -> Report:
    """Export and publish the model if the job says so; then the report, which names what was published."""
    reporter = Reporter(sink, Stage.PUBLISH)
    store = open_store(job.spec.output.uri)
    prefix = output_prefix(job)
    artifacts: list[Artifact] = []
    if job.spec.output.publish_on is not PublishOn.NEVER:
        with pair.tuned() as model:
            for merge in (False, True) if job.spec.output.merge else (False,):
                name = "merged" if merge else "model"
                reporter.say(f"publishing {name} to {store.uri}/{prefix}/{name}")
                folder = workspace.export / name
                workspace.export.mkdir(exist_ok=True)
                export_model(model, tokenizer, renderer, job, report, folder, merge=merge, licence=licence)
                artifacts.append(publish(folder, store, f"{prefix}/{name}"))
    report = report.model_copy(update={"artifacts": tuple(artifacts), "published": bool(artifacts)})
    reporter.say(f"publishing report to {store.uri}/{prefix}/report")
    _write_report(report, workspace.report)
    publish(workspace.report, store, f"{prefix}/report")
    reporter.share("published", 1.0)
    return report


def output_prefix(job: FineTuneJob) -> str:
    """Return where below ``spec.output.uri`` the job's results go: ``<namespace>/<name>-<first 8 of the uid>``.

    Without a cluster there is no uid; the hash of the spec takes its place, so that the same YAML finds its results.
    """
    return f"{job.metadata.namespace}/{job.metadata.name}-{(job.metadata.uid or spec_hash(job.spec))[:8]}"


def _write_report(report: Report, folder: Path) -> None:
    write_file(folder / "report.json", report.model_dump_json(by_alias=True, indent=1).encode())
    write_file(folder / "report.html", render_page(report).encode())
    curve = (point.model_dump_json(by_alias=True, exclude_none=True) for point in report.training.curve)
    write_file(folder / "training.jsonl", "".join(f"{line}\n" for line in curve).encode())
    write_manifest(folder, {"kind": ArtifactKind.REPORT.value, "specHash": report.spec_hash})


def _write_predictions(predictions: Sequence[Mapping[str, object]], folder: Path) -> None:
    with disk_errors("write", folder):
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist([dict(row) for row in predictions]), folder / "predictions.parquet")


# --- what several stages need


def _renderer(job: FineTuneJob, tokenizer: PreTrainedTokenizerBase) -> Renderer:
    data = job.spec.data
    return Renderer(tokenizer, data.format.value, data.system, data.max_length)


def _encode(job: FineTuneJob, renderer: Renderer, dataset: Dataset, split: Split) -> list[Encoded]:
    # lossOn: all is about what is learnt; scores are always of the completion.
    learn_prompt = split is Split.TRAIN and job.spec.data.loss_on is LossOn.ALL
    encoded, _ = encode_all(renderer, dataset, dataset.examples(split), learn_prompt)
    return encoded


def _interruptible(sink: Sink, stage: Stage, stop: StopFlag) -> Reporter:
    """Return a reporter for a stage that can be left at any report and run again."""
    return Reporter(_StoppingSink(sink, stop), stage)


@dataclass(frozen=True, slots=True)
class _StoppingSink:
    sink: Sink
    stop: StopFlag

    def report(self, progress: Progress) -> None:
        if self.stop.event.is_set():
            raise Preempted(f"stopped in the {progress.stage.value} stage, which starts again on the next run.")
        self.sink.report(progress)
