"""The stages of one job and their order: check, train, evaluate, which publishes too.

Each reads what it needs from the spec and the workspace, so a stage can run in a process or pod of its own, and a
finished one is not run again.
"""

import dataclasses
import gc
import heapq
import importlib.metadata
import itertools
import logging
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from finetune_api import __version__
from finetune_api.job import FineTuneJob, spec_hash
from finetune_api.report import (
    Artifact,
    ArtifactKind,
    DataReport,
    EvaluationReport,
    ParityReport,
    Rehearsal,
    Report,
    SplitRows,
    Stage,
    TradeOff,
    TrainingReport,
    VirtualToken,
)
from finetune_api.spec import FineTuneJobSpec, ForgettingRemedy, LossOn, MethodType, Preflight, evaluates_only
from finetune_api.spec.compute import is_distributed, processes
from finetune_api.stage_result import StageResult
from finetune_api.status import PlanStatus
from finetune_trainer.adapter_scale import SCALES, scaled
from finetune_trainer.adjustment import Adjustment, adjusted
from finetune_trainer.benchmark import BenchmarkRun, check_gates
from finetune_trainer.best_weights import schedule_note
from finetune_trainer.checkpoint import kept_weights, newest_complete, step_of
from finetune_trainer.checkpoint_upload import CheckpointUpload
from finetune_trainer.data_profile import describe_task, find_personal_data, find_warnings
from finetune_trainer.dataset import Dataset, load_dataset
from finetune_trainer.durable import disk_errors, write_file
from finetune_trainer.encoder_decoder import decoder_start
from finetune_trainer.errors import DataError, FineTuneError, SpecError, StorageError
from finetune_trainer.evaluation import LONGEST_ANSWER_TOKENS, evaluate, weigh_candidates
from finetune_trainer.example import Encoded, Example
from finetune_trainer.fit import LONGEST_TEXT, check_fit, find_room, find_row_length
from finetune_trainer.gate import why_kept_back
from finetune_trainer.general_source import name_sources, read_general_rows
from finetune_trainer.general_suite import (
    GeneralRow,
    GeneralSuite,
    general_rows,
    general_texts,
    open_questions,
)
from finetune_trainer.in_context import check_room
from finetune_trainer.inputs import Inputs, describe_change
from finetune_trainer.interrupt import StopFlag
from finetune_trainer.layout import Layout
from finetune_trainer.location import Mounts
from finetune_trainer.manifest import is_complete, read_manifest, write_manifest
from finetune_trainer.methods import count_parameters, prepare_model
from finetune_trainer.mixture import Mixture, TaskRows, plan_mixture
from finetune_trainer.model import ModelFiles, fetch_model, find_licence, load_tokenizer, outline_model, read_config
from finetune_trainer.overlap import find_overlaps
from finetune_trainer.pair import ModelPair, load_published, open_pair
from finetune_trainer.parity import (
    Evaluated,
    check_parity,
    choose_probes,
    encode_probes,
    probe_logits,
    require_effect,
)
from finetune_trainer.plan import Workload, expected_gpus, expected_precision, plan_run
from finetune_trainer.progress import Reporter, Sink
from finetune_trainer.publication import find_publication, record_publication
from finetune_trainer.publish import export_model, publish
from finetune_trainer.published_model import PublishedModel
from finetune_trainer.quantization import PACKAGE, require_four_bits
from finetune_trainer.records import StoredRows
from finetune_trainer.rehearsal import rehearse
from finetune_trainer.renderer import Renderer, encode_all
from finetune_trainer.report_page import render_page
from finetune_trainer.run import Run, interruptible, output_prefix
from finetune_trainer.scoring import Scorer
from finetune_trainer.shared_state import SharedState
from finetune_trainer.soft_prompt import describe_soft_prompt
from finetune_trainer.split import Split
from finetune_trainer.stage_summary import check_result, evaluate_result, failure, train_result
from finetune_trainer.start import check_start, fetch_start
from finetune_trainer.storage import Storage
from finetune_trainer.task_file import TaskFile, read_task_file
from finetune_trainer.token_cache import TokenCache, token_key
from finetune_trainer.tracker import put_event_files, require_trackers
from finetune_trainer.trade_off import Candidate, with_trade_off
from finetune_trainer.train import TrainingInput, threads_of_each, train
from finetune_trainer.workspace import Workspace

logger = logging.getLogger(__name__)

REHEARSED_PARAMETERS = 20_000_000
"""A model below this is tuned in about the time that its rehearsal would take."""


_NUMBERS_DEPEND_ON = ("torch", "transformers", "peft", "ray", "tokenizers", "rouge-score", "sacrebleu", "lm-eval")


@dataclass(frozen=True, slots=True)
class PodOptions:
    """What a stage is told that runs in a pod of its own."""

    adjustment: Adjustment = field(default_factory=Adjustment)
    """See `Run`."""


def run(job: FineTuneJob, folder: Path, sink: Sink) -> Report:
    """Run all stages, one after the other; a used workspace is gone on with.

    Raises:
        FineTuneError: what kept the job from its end.
    """
    mounts = Mounts.from_environment()
    workspace = Workspace(folder, mounts.cache)
    with workspace.claim(spec_hash(job.spec)), StopFlag() as stop:
        whole = Run(job, workspace, sink, stop, mounts)
        check_stage(whole)
        train_stage(whole)
        return evaluate_stage(whole)


def run_one(stage: Stage, job: FineTuneJob, folder: Path, sink: Sink, pod: PodOptions | None = None) -> StageResult:
    """Run a single stage and return how it ended, also when it failed.

    Args:
        stage: check, train or evaluate.
        job: resolved.
        folder: the workspace that the stages before it have left; in a pod, an empty folder.
        sink: who listens.
        pod: set when every stage has a pod of its own: results then go through the output store.
    """
    mounts = Mounts.from_environment()
    workspace = Workspace(folder, mounts.cache)
    shared: SharedState | None = None
    resumed_from: int | None = None
    try:
        with workspace.claim(spec_hash(job.spec)), StopFlag() as stop:
            if pod is not None:
                shared = SharedState(Storage(job.spec.output, mounts).open_output(), output_prefix(job), workspace)
            one = Run(job, workspace, sink, stop, mounts, shared, pod.adjustment if pod else Adjustment())
            match stage:
                case Stage.CHECK:
                    if shared is not None and (published := find_publication(shared.store, job)) is not None:
                        return published
                    report, inputs = check_stage(one)
                    return check_result(report, inputs.model, workspace.recall("plan", PlanStatus))
                case Stage.TRAIN:
                    if shared is not None:
                        shared.drop_useless_checkpoints(one.adjustment)
                    resumed_from = _find_checkpoint(one)
                    return train_result(train_stage(one))
                case Stage.EVALUATE:
                    result = _evaluated(one, evaluate_stage(one))
                    if shared is not None and result.published:
                        record_publication(shared.store, job, result)
                    return result
                case _:
                    raise ValueError(f"{stage} is no stage that runs by itself")
    except FineTuneError as error:
        return _failed(stage, error, shared, resumed_from)


def _evaluated(one: Run, report: Report) -> StageResult:
    manifest = read_manifest(one.workspace.report)
    uri = f"{one.storage.open_output().uri}/{output_prefix(one.job)}/report"
    return evaluate_result(report, uri, manifest.sha256, manifest.total_bytes)


def _failed(stage: Stage, error: FineTuneError, shared: SharedState | None, resumed_from: int | None) -> StageResult:
    result = failure(stage, error.exit_code, str(error)).model_copy(update={"resumed_from_step": resumed_from})
    # A store that does not answer has been waited for already.
    if stage is not Stage.TRAIN or shared is None or isinstance(error, StorageError):
        return result
    try:
        return result.model_copy(update={"checkpoints": shared.checkpoints()})
    except FineTuneError as other:
        # Must not hide why the stage ended.
        logger.warning("checkpoints not listed reason=%s", other)
        return result


# --- check


def check_stage(run: Run) -> tuple[DataReport, Inputs]:
    """Find what would go wrong later: output not writable, model or rows not what the job says.

    A workspace that was checked before is held against the rows and the model as they are now.

    Raises:
        DataError: test rows are trained on as well, and ``spec.runPolicy.preflight`` is enforce.
    """
    report, inputs = _inspect(run)
    reporter = interruptible(run, Stage.CHECK)
    for warning in report.warnings:
        reporter.say(f"note: {warning}")
    if (refusal := why_stopped(report)) and run.job.spec.run_policy.preflight is Preflight.ENFORCE:
        raise refusal
    return report, inputs


def why_stopped(report: DataReport) -> DataError | None:
    """Return what stops a job before it is trained, unless ``spec.runPolicy.preflight`` lets it pass."""
    if not report.leakage:
        return None
    return DataError(
        f"spec.data.tasks: {report.leakage} rows of validationSource or testSource are nearly equal to a training row, "
        f"first {report.first_leak}: what is measured on them is not what the model can do. Drop them from either "
        f"side, or set spec.runPolicy.preflight: warn to go on all the same."
    )


def check(job: FineTuneJob, folder: Path, sink: Sink) -> DataReport:
    """Run the check stage alone and return what was found; a run in the same workspace goes on from it.

    Raises:
        FineTuneError: what would keep the job from being trained, leakage aside.
    """
    mounts = Mounts.from_environment()
    workspace = Workspace(folder, mounts.cache)
    with workspace.claim(spec_hash(job.spec)), StopFlag() as stop:
        report, _ = _inspect(Run(job, workspace, sink, stop, mounts))
    return report


def _inspect(run: Run) -> tuple[DataReport, Inputs]:
    workspace = run.workspace
    reporter = interruptible(run, Stage.CHECK)
    if run.job.spec.method.type is MethodType.QLORA:
        # In a cluster the check has no GPU, and the image of the stages that do.
        require_four_bits(gpu=run.shared is None)
    require_trackers(run.job.spec)
    reporter.say("checking that the output can be written")
    run.storage.open_output().check_writable()
    if run.shared is not None:
        run.shared.pull_results()
    reporter.say("reading the base model's files")
    files = _fetch_model(run)
    reporter.say("reading, rendering and splitting the rows")
    dataset = _load_dataset(run)
    if (start := _fetch_start(run)) is not None:
        reporter.say(f"going on from {start.uri}, whose files are as its manifest says")
    inputs = _inputs(dataset, files, start)
    done = workspace.recall("data", DataReport)
    if done is not None and _is_unchanged(run, inputs, reporter):
        return done, inputs
    return _check(run, files, start, dataset, inputs, reporter), inputs


def _check(
    run: Run, files: ModelFiles, start: PublishedModel | None, dataset: Dataset, inputs: Inputs, reporter: Reporter
) -> DataReport:
    job = run.job
    check_fit(job.spec, files)
    if start is not None:
        check_start(start, job.spec, files)
    if note := find_row_length(job.spec, files).note:
        reporter.say(note)
    if note := schedule_note(job.spec.training):
        reporter.say(note)
    tokenizer = load_tokenizer(files)
    renderer = _renderer(job, files, tokenizer)
    if (suite := _load_suite(run)) is not None:
        reporter.say("reading the rows of the forgetting test")
        # What does not fit is found here.
        _check_suite(suite, renderer.raw(), find_room(job.spec, files))
    questions: dict[str, Sequence[str]] = {} if suite is None else {**suite.questions}
    if job.spec.evaluation.benchmarks:
        reporter.say("reading the benchmarks")
        questions |= _check_benchmarks(run, files, tokenizer, dataset)
    encoded: dict[Split, Sequence[Encoded]] = {}
    for split in Split:
        reporter.say(f"tokenising the {split.value} split")
        encoded[split] = _encode(run, files, renderer, dataset, split)
    if count := job.spec.evaluation.baselines.few_shot:
        reporter.say("trying how much room the shown rows leave")
        answer = job.spec.evaluation.generation.max_new_tokens or LONGEST_ANSWER_TOKENS
        check_room(
            dataset,
            renderer.with_length(LONGEST_TEXT),
            count,
            job.spec.training.seed,
            find_room(job.spec, files) - answer,
        )
    report = _describe_data(job, dataset, renderer, encoded, questions)
    if not evaluates_only(job.spec.training):
        reporter.say("working out what training needs")
        plan = _plan(run, files, encoded[Split.TRAIN])
        run.remember("plan", plan)
        if is_rehearsed(job.spec, plan):
            report = report.model_copy(update={"rehearsal": _rehearse(run, files, dataset, report)})
    run.remember("data", report)
    # Behind what belongs to them: whoever finds these finds the check's result.
    run.remember("inputs", inputs)
    reporter.share("checked", 1.0)
    return report


def _plan(run: Run, files: ModelFiles, rows: Sequence[Encoded]) -> PlanStatus:
    spec = run.job.spec
    gpus = expected_gpus(spec, is_local=run.shared is None)
    longest = heapq.nlargest(spec.training.global_batch_size, rows, key=lambda item: len(item.ids))
    return plan_run(
        spec,
        read_config(files),
        Workload(len(rows), longest),
        expected_precision(spec, on_gpu=gpus > 0),
        tokenizer_path=str(files.path),
        gpus=gpus,
    )


def is_rehearsed(spec: FineTuneJobSpec, plan: PlanStatus) -> bool:
    """Whether the job is worth a rehearsal: it is to be checked, and its model is not itself tuned in no time."""
    return spec.run_policy.preflight is not Preflight.SKIP and (plan.parameters or 0) >= REHEARSED_PARAMETERS


def _rehearse(run: Run, files: ModelFiles, dataset: Dataset, report: DataReport) -> Rehearsal:
    rehearsal = rehearse(run, files, dataset, report, (train_stage, evaluate_stage))
    if rehearsal.why_not:
        interruptible(run, Stage.CHECK).say(f"note: not rehearsed: {rehearsal.why_not}")
    return rehearsal


def _check_suite(suite: GeneralSuite, raw: Renderer, room: int) -> None:
    for (text, _), item in zip(suite.pairs, raw.encode_continuations(suite.pairs), strict=True):
        if len(item.ids) > room:
            raise DataError(
                f"spec.evaluation.forgetting: {text[:80]!r}… and what follows it take {len(item.ids):,} tokens, and "
                f"the model has places for {room:,}. Shorten the row in spec.evaluation.forgetting.sources."
            )


def _check_benchmarks(
    run: Run, files: ModelFiles, tokenizer: PreTrainedTokenizerBase, dataset: Dataset
) -> dict[str, Sequence[str]]:
    """Find what of the benchmarks cannot be asked or is not measured; return what they ask, by name."""
    benchmarks = _load_benchmarks(run, files, tokenizer, Layout.PADDED)
    assert benchmarks is not None
    for index, benchmark in enumerate(benchmarks.benchmarks):
        if benchmark.name in dataset.tasks:
            raise SpecError(
                f"spec.evaluation.benchmarks[{index}].suite: {benchmark.name!r} is a task of this job as well. Give "
                f"one of them another name."
            )
    figures = [figure for benchmark in benchmarks.benchmarks for figure in benchmark.figures]
    check_gates(run.job.spec.evaluation.gates, dataset.tasks, figures)
    return {benchmark.name: benchmark.questions() for benchmark in benchmarks.benchmarks}


def _is_unchanged(run: Run, inputs: Inputs, reporter: Reporter) -> bool:
    """Whether rows and model are those that the run began with; changes before training only mean another check.

    Raises:
        DataError: training began with others.
    """
    workspace = run.workspace
    known = workspace.recall("inputs", Inputs)
    change = "" if known is None else describe_change(known, inputs)
    if not change:
        return known is not None
    if workspace.recall("training", TrainingReport) is None and newest_complete(workspace.checkpoints) is None:
        reporter.say(f"{change} since the check; checking again")
        return False
    remedy = (
        f"delete {workspace.root}, or give another folder with --workspace"
        if run.shared is None
        else "apply the job under another name"
    )
    raise DataError(f"{change} since this run began training. Put them back to go on; to start anew, {remedy}.")


def _describe_data(
    job: FineTuneJob,
    dataset: Dataset,
    renderer: Renderer,
    encoded: Mapping[Split, Sequence[Encoded]],
    questions: Mapping[str, Sequence[str]],
) -> DataReport:
    totals = _count_tokens(itertools.chain.from_iterable(encoded.values()))
    trained = _count_tokens(encoded[Split.TRAIN])
    first = dataset.examples(Split.TRAIN)[0]
    whole = renderer.encode(first, dataset)
    report = DataReport(
        rows=SplitRows(**{split.value: len(items) for split, items in encoded.items()}),
        tokens=trained.tokens,
        completion_tokens=trained.completion_tokens,
        longest_tokens=totals.longest,
        max_length=renderer.max_length,
        truncated_percent=100 * totals.truncated / totals.rows,
        duplicates=dataset.duplicates.rows,
        exact_duplicates=dataset.duplicates.exact,
        leakage=len(dataset.leaks),
        first_leak="" if not dataset.leaks else "row {1} (counted from 0) of task {0}".format(*dataset.leaks[0]),
        personal_data=find_personal_data(
            itertools.chain(*(dataset.examples(split) for split in Split), dataset.replay())
        ),
        overlaps=tuple(find_overlaps(itertools.chain(dataset.examples(Split.TRAIN), dataset.replay()), questions)),
        tasks=tuple(
            describe_task(
                task,
                dataset.labels(task),
                {split: dataset.examples(split, task) for split in Split},
                {split: _by_task(dataset, split, encoded[split])[task] for split in Split},
                renderer.decode,
            )
            for task in dataset.tasks
        ),
        hash=dataset.hash,
        format=renderer.format,
        sample_prompt=renderer.decode(whole.prompt_ids),
        sample_completion=renderer.decode(whole.completion_ids),
    )
    return report.model_copy(update={"warnings": tuple(find_warnings(report))})


@dataclass(slots=True)
class _TokenCount:
    rows: int = 0
    tokens: int = 0
    completion_tokens: int = 0
    longest: int = 0
    truncated: int = 0


def _count_tokens(items: Iterable[Encoded]) -> _TokenCount:
    count = _TokenCount()
    for item in items:
        count.rows += 1
        count.tokens += len(item.ids)
        count.completion_tokens += len(item.ids) - item.prompt_length
        count.longest = max(count.longest, len(item.ids))
        count.truncated += item.truncated
    return count


# --- train


def train_stage(run: Run) -> TrainingReport:
    """Tune the model into the workspace; the test split is not opened."""
    workspace, shared = run.workspace, run.shared
    if shared is not None:
        shared.pull_results()
    if evaluates_only(run.job.spec.training):
        return _train_nothing(run)
    done = workspace.recall("training", TrainingReport)
    if done is not None and (is_complete(workspace.tuned) if shared is None else shared.has_tuned()):
        return done
    reporter = interruptible(run, Stage.TRAIN)
    reporter.say("looking for a checkpoint to go on from")
    _find_checkpoint(run)
    reporter.say("reading the rows")
    files = _fetch_model(run)
    dataset = _load_dataset(run, (Split.TRAIN, Split.VALIDATION))
    start = _fetch_start(run)
    inputs = _inputs(dataset, files, start)
    if not _is_unchanged(run, inputs, reporter):
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
    method, files = run.job.spec.method, _fetch_model(run)
    parameters, trainable = count_parameters(prepare_model(outline_model(files), method, str(files.path)))
    report = TrainingReport(
        method=method.type.value, parameters=parameters, trainable_parameters=trainable, steps=0, epochs=0
    )
    run.remember("training", report)
    return report


def _find_checkpoint(run: Run) -> int | None:
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
    renderer = _renderer(job, files, load_tokenizer(files))
    rows, validation = (_encode(run, files, renderer, dataset, split) for split in (Split.TRAIN, Split.VALIDATION))
    replayed = _tokens(run, files, renderer, dataset, dataset.replay(), job.spec.data.loss_on)
    job = job.model_copy(update={"spec": adjusted(job.spec, run.adjustment)})
    mixture, by_task = _mixture(job, dataset), _by_task(dataset, Split.VALIDATION, validation)
    rows += replayed
    if is_distributed(job.spec.compute):
        return _train_on_workers(run, job, inputs, rows, mixture, by_task)
    given = TrainingInput(
        job, files, rows, mixture, by_task, run.workspace, run.sink, run.stop.event, start=start, mounts=run.mounts
    )
    shared, keep = run.shared, job.spec.checkpoint.keep
    if shared is None:
        return train(given)
    with CheckpointUpload(run.workspace.uploads, lambda at, step: shared.push_checkpoint(at, step, keep)) as upload:
        report = train(dataclasses.replace(given, on_checkpoint=upload.submit))
    reporter.say("storing the tuned weights")
    shared.push_tuned()
    return report


def _train_on_workers(
    run: Run,
    job: FineTuneJob,
    inputs: Inputs,
    rows: Sequence[Encoded],
    mixture: Mixture,
    validation: Mapping[str, Sequence[Encoded]],
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


# --- evaluate and publish


def evaluate_stage(run: Run) -> Report:
    """Compare base and tuned model on the test split, then publish the report and, if the job says so, the model."""
    job, workspace, shared = run.job, run.workspace, run.shared
    reporter = interruptible(run, Stage.EVALUATE)
    tuned = _find_tuned(run, reporter)
    if shared is not None:
        shared.pull_predictions()
    reporter.say("loading the models")
    files = _fetch_model(run)
    tokenizer = load_tokenizer(files)
    pair = open_pair(job, files, tuned)
    layout = pair.layout
    renderer = _renderer(job, files, tokenizer)
    evaluation = workspace.recall("evaluation", EvaluationReport)
    if evaluation is not None and evaluation.forgetting and evaluation.forgetting.trade_off:
        _remedy(pair, evaluation.forgetting.trade_off, workspace.tuned)
    if evaluation is None:
        dataset = _load_dataset(run)
        # What training went on from is not read any more.
        known = workspace.recall("inputs", Inputs)
        lineage = known.lineage if known else ()
        _is_unchanged(run, Inputs(rows=dataset.hash, model=files.revision, lineage=lineage), reporter)
        suite = _load_suite(run)
        trade_off = _choose_remedy(run, pair, tokenizer, renderer, dataset, suite, reporter)
        if trade_off is not None:
            _remedy(pair, trade_off, workspace.tuned)
        evaluation, predictions = evaluate(
            pair,
            tokenizer,
            renderer,
            dataset,
            job,
            lambda model: Scorer(model, layout),
            reporter.tell,
            suite.deciding() if suite and trade_off else suite,
            _load_benchmarks(run, files, tokenizer, layout),
        )
        evaluation = with_trade_off(evaluation, trade_off)
        _write_predictions(predictions, workspace.predictions)
        if shared is not None:
            shared.push_predictions()
        run.remember("evaluation", evaluation)
    if evaluation.probe is not None:
        require_effect(evaluation.probe)
    report = _assemble(job, files, workspace, evaluation)
    report = report.model_copy(update={"soft_prompt": _soft_prompt(job, pair, tokenizer)})
    why_not = why_kept_back(job.spec.output.publish_on, evaluation.gates)
    if why_not:
        Reporter(run.sink, Stage.PUBLISH).say(f"the model is not published: {why_not}")
        return _publish(run, report.model_copy(update={"why_not_published": why_not}), ())
    exports, evaluated = _export(run, report, pair, tokenizer, renderer, find_licence(files))
    # What was evaluated makes room for what is loaded to be held against it.
    del pair
    gc.collect()
    parity = tuple(_check_export(run, files, folder, evaluated) for folder in exports)
    return _publish(run, report.model_copy(update={"parity": parity}), exports)


def _find_tuned(run: Run, reporter: Reporter) -> Path:
    """Return the folder of the weights that are evaluated, with the results of the stages before at hand."""
    if evaluates_only(run.job.spec.training):
        # No stage before has done it: there is no training pod.
        train_stage(run)
        return _find_unchanged_start(run).path
    if run.shared is not None:
        reporter.say("fetching the tuned weights")
        run.shared.pull_results()
        run.shared.pull_tuned()
    return run.workspace.tuned


def _find_unchanged_start(run: Run) -> PublishedModel:
    start, known = _fetch_start(run), run.workspace.recall("inputs", Inputs)
    assert start is not None and known is not None, "the spec demands one, and the check has seen it"
    if change := describe_change(known, known.model_copy(update={"lineage": start.lineage})):
        raise DataError(f"{change} since the check. Put it back, or apply the job under another name.")
    return start


def _choose_remedy(
    run: Run,
    pair: ModelPair,
    tokenizer: PreTrainedTokenizerBase,
    renderer: Renderer,
    dataset: Dataset,
    suite: GeneralSuite | None,
    reporter: Reporter,
) -> TradeOff | None:
    """Return how strong or how long trained the model is to be left; absent where the job asks for no remedy."""
    job = run.job
    budget = job.spec.evaluation.forgetting
    if suite is None or budget is None or budget.remedy is ForgettingRemedy.NONE:
        return None

    def strength(scale: float) -> Candidate:
        return Candidate(scale, lambda: scaled(pair.tuned(), scale))

    def checkpoint(step: int, weights: Path) -> Candidate:
        return Candidate(1.0, lambda: pair.earlier(weights), step)

    if budget.remedy is ForgettingRemedy.LORA_SCALE:
        reporter.say("trying how strong the adapter may be")
        candidates = [strength(scale) for scale in SCALES]
    else:
        reporter.say("trying the checkpoints")
        kept = kept_weights(run.workspace.tuned)
        candidates = [*(checkpoint(*one) for one in kept.items()), Candidate(1.0, pair.tuned)]
    trade_off = weigh_candidates(
        pair,
        candidates,
        tokenizer,
        renderer,
        dataset,
        job,
        lambda model: Scorer(model, pair.layout),
        # How far the whole stage is cannot be said yet.
        lambda progress: reporter.tell(progress.model_copy(update={"percent": None})),
        suite.development(),
    )
    reporter.say(trade_off.why)
    return trade_off


def _remedy(pair: ModelPair, chosen: TradeOff, tuned: Path) -> None:
    """Leave the tuned model as it was chosen to be."""
    if chosen.step is not None:
        pair.go_back(kept_weights(tuned)[chosen.step])
    elif chosen.scale != 1:
        pair.weaken(chosen.scale)


def _soft_prompt(job: FineTuneJob, pair: ModelPair, tokenizer: PreTrainedTokenizerBase) -> tuple[VirtualToken, ...]:
    if job.spec.method.type is not MethodType.PROMPT_TUNING:
        return ()
    with pair.tuned() as model:
        assert isinstance(model, PeftModel)
        return describe_soft_prompt(model, tokenizer)


def _assemble(job: FineTuneJob, files: ModelFiles, workspace: Workspace, evaluation: EvaluationReport) -> Report:
    data, training = workspace.recall("data", DataReport), workspace.recall("training", TrainingReport)
    if data is None or training is None:
        raise SpecError(
            f"workspace {workspace.root} holds no finished {'check' if data is None else 'train'} stage; run it first."
        )
    plan, inputs = workspace.recall("plan", PlanStatus), workspace.recall("inputs", Inputs)
    libraries = (*_NUMBERS_DEPEND_ON, PACKAGE) if job.spec.method.type is MethodType.QLORA else _NUMBERS_DEPEND_ON
    return Report(
        planned_memory_bytes=plan and plan.memory_bytes_per_gpu,
        name=job.metadata.name,
        namespace=job.metadata.namespace,
        spec_hash=spec_hash(job.spec),
        base_model=job.spec.model.source,
        base_revision=files.revision,
        lineage=inputs.lineage if inputs else (),
        data=data,
        training=training,
        evaluation=evaluation,
        seed=job.spec.training.seed,
        versions={name: importlib.metadata.version(name) for name in libraries} | {"finetune": __version__},
        resolved=job.spec.model_dump(mode="json", by_alias=True, exclude_none=True),
    )


def _export(
    run: Run,
    report: Report,
    pair: ModelPair,
    tokenizer: PreTrainedTokenizerBase,
    renderer: Renderer,
    licence: str | None,
) -> tuple[list[Path], Evaluated]:
    """Write what will be published; return the folders, and what the evaluated model says to the probes."""
    job, folder = run.job, run.workspace.export
    reporter = Reporter(run.sink, Stage.PUBLISH)
    folders = [folder / name for name in (("model", "merged") if job.spec.output.merge else ("model",))]
    rows = pq.read_table(run.workspace.predictions, columns=["prompt", "reference"]).to_pylist()
    texts = choose_probes((row["prompt"], row["reference"]) for row in rows)
    ids = encode_probes(tokenizer, texts)
    with pair.tuned() as model:
        logits = probe_logits(model, ids)
        folder.mkdir(exist_ok=True)
        for one in folders:
            reporter.say(f"writing {one.name}")
            merge = one.name == "merged"
            export_model(model, tokenizer, renderer, job, report, one, merge=merge, licence=licence)
        probe = report.evaluation and report.evaluation.probe
        return folders, Evaluated(texts, ids, logits, model.dtype, probe.effect if probe else None)


def _check_export(run: Run, files: ModelFiles, folder: Path, evaluated: Evaluated) -> ParityReport:
    Reporter(run.sink, Stage.PUBLISH).say(f"holding {folder.name}, loaded afresh, against the evaluated model")
    kind = ArtifactKind(read_manifest(folder).about["kind"])
    model = load_published(run.job, files, folder, kind)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return check_parity(evaluated, model, tokenizer, kind)


def _publish(run: Run, report: Report, exports: Sequence[Path]) -> Report:
    """Publish the exported folders, none where the model is kept back; then the report, which names them."""
    job, workspace = run.job, run.workspace
    reporter = Reporter(run.sink, Stage.PUBLISH)
    store = run.storage.open_output()
    prefix = output_prefix(job)
    artifacts: list[Artifact] = []
    for folder in exports:
        reporter.say(f"publishing {folder.name} to {store.uri}/{prefix}/{folder.name}")
        artifacts.append(publish(folder, store, f"{prefix}/{folder.name}"))
    report = report.model_copy(update={"artifacts": tuple(artifacts), "published": bool(artifacts)})
    reporter.say(f"publishing report to {store.uri}/{prefix}/report")
    _write_report(report, workspace.report, workspace.tuned)
    publish(workspace.report, store, f"{prefix}/report")
    reporter.share("published", 1.0)
    return report


def _write_report(report: Report, folder: Path, tuned: Path) -> None:
    write_file(folder / "report.json", report.model_dump_json(by_alias=True, indent=1).encode())
    write_file(folder / "report.html", render_page(report).encode())
    curve = (point.model_dump_json(by_alias=True, exclude_defaults=True) for point in report.training.curve)
    write_file(folder / "training.jsonl", "".join(f"{line}\n" for line in curve).encode())
    put_event_files(tuned, folder)
    write_manifest(folder, {"kind": ArtifactKind.REPORT.value, "specHash": report.spec_hash})


def _write_predictions(predictions: Sequence[Mapping[str, object]], path: Path) -> None:
    with disk_errors("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist([dict(row) for row in predictions]), path)


# --- what several stages need


def _fetch_model(run: Run) -> ModelFiles:
    """Return the base model's files; of a hub model, the commit that the check saw: a branch may have moved since."""
    model = run.job.spec.model
    known = run.workspace.recall("inputs", Inputs)
    if known is not None and model.source.startswith("hf://"):
        model = model.model_copy(update={"revision": known.model})
    return fetch_model(model, run.workspace.models, storage=run.storage)


def _fetch_start(run: Run) -> PublishedModel | None:
    return fetch_start(run.job.spec.model, run.storage, run.workspace.models)


def _inputs(dataset: Dataset, files: ModelFiles, start: PublishedModel | None) -> Inputs:
    return Inputs(rows=dataset.hash, model=files.revision, lineage=start.lineage if start else ())


def _load_dataset(run: Run, splits: Collection[Split] = tuple(Split)) -> Dataset:
    if run.dataset is not None:
        return run.dataset
    folder = run.workspace.rows
    return load_dataset(
        run.job.spec.data,
        splits,
        fetch=lambda uri, field, secret_ref: run.storage.fetch_rows(uri, field, secret_ref, folder),
        folder=run.workspace.root,
        subgroup_column=holistic.subgroup_column if (holistic := run.job.spec.evaluation.holistic) else None,
    )


def _load_suite(run: Run) -> GeneralSuite | None:
    """Return what general ability is measured on; absent where the job does not ask for it."""
    budget = run.job.spec.evaluation.forgetting
    if budget is None:
        return None
    own: list[GeneralRow] = []
    for index, (uri, name) in enumerate(zip(budget.sources, name_sources(budget.sources), strict=True)):
        field = f"spec.evaluation.forgetting.sources[{index}]"
        own += read_general_rows(run.storage.fetch_rows(uri, field, None, run.workspace.rows), name, field)
    return GeneralSuite((*general_rows(), *own), general_texts(), open_questions())


def _load_benchmarks(
    run: Run, files: ModelFiles, tokenizer: PreTrainedTokenizerBase, layout: Layout
) -> BenchmarkRun | None:
    """Return what ``spec.evaluation.benchmarks`` asks; absent where the job has none."""
    spec, storage = run.job.spec, run.storage
    if not spec.evaluation.benchmarks:
        return None
    # Imported here: the harness takes seconds to import.
    from finetune_trainer.harness import open_benchmarks

    def read(uri: str, field: str) -> TaskFile:
        content = storage.read_file(uri, field, run.workspace.rows)
        return read_task_file(
            uri, content, field, lambda rows, setting: storage.fetch_rows(rows, setting, None, run.workspace.rows)
        )

    return open_benchmarks(
        spec.evaluation.benchmarks, read, tokenizer, find_room(spec, files), lambda model: Scorer(model, layout)
    )


def _renderer(job: FineTuneJob, files: ModelFiles, tokenizer: PreTrainedTokenizerBase) -> Renderer:
    data = job.spec.data
    length = find_row_length(job.spec, files).tokens
    renderer = Renderer(tokenizer, data.format.value, data.system, length, decoder_start(read_config(files)))
    chats = next((index for index, task in enumerate(data.tasks) if task.messages is not None), None)
    if chats is not None and renderer.format == "raw":
        raise SpecError(
            f"spec.data.tasks[{chats}].messages: {job.spec.model.source} has no chat template, so it knows no turns. "
            "Choose an instruct model, or write templates."
        )
    return renderer


def _encode(run: Run, files: ModelFiles, renderer: Renderer, dataset: Dataset, split: Split) -> StoredRows[Encoded]:
    # lossOn is about what is learnt; scores are always of the completion.
    loss_on = run.job.spec.data.loss_on if split is Split.TRAIN else LossOn.COMPLETION
    return _tokens(run, files, renderer, dataset, dataset.examples(split), loss_on)


def _tokens(
    run: Run, files: ModelFiles, renderer: Renderer, dataset: Dataset, examples: Sequence[Example], loss_on: LossOn
) -> StoredRows[Encoded]:
    workspace = run.workspace

    def tokenise() -> StoredRows[Encoded]:
        encoded, _ = encode_all(renderer, dataset, examples, loss_on, workspace.root)
        return encoded

    goes_with_the_pod = run.shared is not None and workspace.cache is None
    if goes_with_the_pod or not examples:
        return tokenise()
    key = token_key(examples, dataset.specs, renderer, files.revision, loss_on)
    return TokenCache(workspace.tokens).tokens(key, tokenise, workspace.root)


def _by_task(dataset: Dataset, split: Split, encoded: Sequence[Encoded]) -> dict[str, Sequence[Encoded]]:
    return {task: encoded[places.start : places.stop] for task, places in dataset.places(split).items()}


def _mixture(job: FineTuneJob, dataset: Dataset) -> Mixture:
    """Return how the training rows of all tasks, and behind them the replayed ones, are mixed."""
    data = job.spec.data
    places, rows = dataset.places(Split.TRAIN), len(dataset.examples(Split.TRAIN))
    tasks = [TaskRows(task.name, places[task.name], task.weight) for task in data.tasks]
    replay = range(rows, rows + len(dataset.replay()))
    return plan_mixture(
        tasks, data.mixing, job.spec.training.seed, replay, data.replay.fraction if data.replay else 0.0
    )
