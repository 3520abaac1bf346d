"""The check stage: find what would go wrong later, before anything is paid for."""

import heapq
from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from finetune_api.report import DataReport, Stage
from finetune_api.spec import FineTuneJobSpec, MethodType, Preflight, evaluates_only, holistic_figures
from finetune_api.spec.compute import gpu_memory_bytes
from finetune_api.status import PlanStatus
from finetune_trainer.benchmark import check_gates
from finetune_trainer.best_weights import schedule_note
from finetune_trainer.data_description import describe_data
from finetune_trainer.dataset import Dataset
from finetune_trainer.errors import DataError, SpecError
from finetune_trainer.examiner import LONGEST_ANSWER_TOKENS
from finetune_trainer.example import Encoded
from finetune_trainer.fit import LONGEST_TEXT, check_fit, find_room, find_row_length
from finetune_trainer.general_suite import GeneralSuite
from finetune_trainer.gpu_room import why_it_cannot_fit
from finetune_trainer.in_context import check_room, check_shown
from finetune_trainer.inputs import Inputs
from finetune_trainer.layout import Layout, load_for_rows
from finetune_trainer.methods import why_padded
from finetune_trainer.model import ModelFiles, load_tokenizer, read_config
from finetune_trainer.plan import Workload, expected_gpus, expected_precision, plan_run
from finetune_trainer.progress import Reporter
from finetune_trainer.published_model import PublishedModel
from finetune_trainer.quantization import require_four_bits
from finetune_trainer.rehearsal import rehearse
from finetune_trainer.renderer import Renderer
from finetune_trainer.run import Run, interruptible
from finetune_trainer.split import Split
from finetune_trainer.stage_input import (
    encode_split,
    fetch_base,
    find_start,
    inputs_of,
    is_unchanged,
    load_benchmarks,
    load_rows,
    load_suite,
    make_renderer,
)
from finetune_trainer.start import check_start
from finetune_trainer.tracker import require_trackers

REHEARSED_PARAMETERS = 20_000_000
"""A model below this is tuned in about the time that its rehearsal would take."""


def check_stage(run: Run) -> tuple[DataReport, Inputs]:
    """Find what would go wrong later: output not writable, model or rows not what the job says.

    A workspace that was checked before is held against the rows and the model as they are now.

    Raises:
        DataError: training rows give a test away, and ``spec.runPolicy.preflight`` is enforce.
    """
    report, inputs = inspect_job(run)
    reporter = interruptible(run, Stage.CHECK)
    plan = run.workspace.recall("plan", PlanStatus)
    refusal = report.why_refused() if run.job.spec.run_policy.preflight is Preflight.ENFORCE else ""
    for warning in (*(plan.warnings if plan else ()), *report.warnings):
        if warning not in refusal:
            reporter.say(f"note: {warning}")
    if refusal:
        raise DataError(refusal)
    return report, inputs


def inspect_job(run: Run) -> tuple[DataReport, Inputs]:
    """Return what is in the job's rows, and what it begins with; leakage is told, not refused.

    Raises:
        SpecError: training cannot fit the GPUs, and ``spec.runPolicy.preflight`` is enforce.
    """
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
    files = fetch_base(run)
    reporter.say("reading, rendering and splitting the rows")
    dataset = load_rows(run)
    if (start := find_start(run)) is not None:
        reporter.say(f"going on from {start.uri}, whose files are as its manifest says")
    inputs = inputs_of(dataset, files, start)
    done = workspace.recall("data", DataReport)
    if done is not None and is_unchanged(run, inputs, reporter) and _is_planned_for(run):
        return done, inputs
    return _check(run, files, start, dataset, inputs, reporter), inputs


def _check(
    run: Run, files: ModelFiles, start: PublishedModel | None, dataset: Dataset, inputs: Inputs, reporter: Reporter
) -> DataReport:
    job, workspace = run.job, run.workspace
    # What is found from here on is told also where the check then fails.
    for name in ("inputs", "data", "plan"):
        workspace.forget(name)
    check_fit(job.spec, files)
    if start is not None:
        check_start(start, job.spec, files)
    if note := find_row_length(job.spec, files).note:
        reporter.say(note)
    if note := schedule_note(job.spec.training):
        reporter.say(note)
    tokenizer = load_tokenizer(files)
    renderer = make_renderer(job, files, tokenizer)
    if (suite := load_suite(run)) is not None:
        reporter.say("reading the rows of the forgetting test")
        # What does not fit is found here.
        _check_suite(suite, renderer.raw(), find_room(job.spec, files))
    questions: dict[str, Sequence[str]] = {} if suite is None else {**suite.questions}
    if job.spec.evaluation.benchmarks:
        reporter.say("reading the benchmarks")
        questions |= _check_benchmarks(run, files, tokenizer, dataset)
    check_shown(dataset)
    encoded: dict[Split, Sequence[Encoded]] = {}
    for split in Split:
        reporter.say(f"tokenising the {split.value} split")
        encoded[split] = encode_split(run, files, renderer, dataset, split)
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
    report = describe_data(job, dataset, renderer, encoded, questions)
    workspace.remember("data", report)
    if not evaluates_only(job.spec.training):
        reporter.say("working out what training needs")
        plan = _plan(run, files, encoded[Split.TRAIN])
        run.remember("plan", plan)
        if (why := why_it_cannot_fit(plan, job.spec)) and job.spec.run_policy.preflight is Preflight.ENFORCE:
            raise SpecError(f"{why} Or set spec.runPolicy.preflight: warn to go on all the same.")
        if is_rehearsed(job.spec, plan):
            report = _rehearse(run, files, dataset, report)
        elif plan.parameters is not None and plan.parameters < REHEARSED_PARAMETERS:
            _, layout = load_for_rows(files, torch.float32, why_padded(job.spec))
            report = report.model_copy(update={"layout": str(layout)})
        if report.layout:
            reporter.say(f"rows are {report.layout}")
    run.remember("data", report)
    # Behind what belongs to them: whoever finds these finds the check's result.
    run.remember("inputs", inputs)
    reporter.share("checked", 1.0)
    return report


def _is_planned_for(run: Run) -> bool:
    """Whether what was found before was held against GPUs as large as the spec now says, which may change."""
    plan = run.workspace.recall("plan", PlanStatus)
    return plan is None or plan.gpu_memory_bytes == gpu_memory_bytes(run.job.spec.compute)


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


def _rehearse(run: Run, files: ModelFiles, dataset: Dataset, report: DataReport) -> DataReport:
    # Imported here: what is rehearsed checks, too, where it was not checked before.
    from finetune_trainer.evaluate_stage import evaluate_stage
    from finetune_trainer.train_stage import train_stage

    report = rehearse(run, files, dataset, report, (train_stage, evaluate_stage))
    if report.rehearsal is not None and report.rehearsal.why_not:
        interruptible(run, Stage.CHECK).say(f"note: not rehearsed: {report.rehearsal.why_not}")
    return report


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
    benchmarks = load_benchmarks(run, files, tokenizer, Layout.PADDED)
    assert benchmarks is not None
    for index, benchmark in enumerate(benchmarks.benchmarks):
        if benchmark.name in dataset.tasks:
            raise SpecError(
                f"spec.evaluation.benchmarks[{index}].suite: {benchmark.name!r} is a task of this job as well. Give "
                f"one of them another name."
            )
    figures = [figure for benchmark in benchmarks.benchmarks for figure in benchmark.figures]
    spec = run.job.spec
    check_gates(spec.evaluation.gates, dataset.tasks, [*figures, *holistic_figures(spec.data.tasks, spec.evaluation)])
    return {benchmark.name: benchmark.questions() for benchmark in benchmarks.benchmarks}
