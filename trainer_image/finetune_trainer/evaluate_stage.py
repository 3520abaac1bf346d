"""The evaluate stage: both models on the same test rows, then the report and, unless it is kept back, the model."""

import gc
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from finetune_api.report import EvaluationReport, Report, Stage
from finetune_api.spec import evaluates_only
from finetune_trainer.durable import disk_errors
from finetune_trainer.errors import DataError
from finetune_trainer.evaluation import evaluate
from finetune_trainer.examiner import Trial
from finetune_trainer.gate import why_kept_back
from finetune_trainer.inputs import Inputs, describe_change
from finetune_trainer.model import find_licence, load_tokenizer
from finetune_trainer.pair import open_pair
from finetune_trainer.parity import require_effect
from finetune_trainer.progress import Reporter
from finetune_trainer.publish_stage import assemble_report, check_export, publish_run, virtual_tokens, write_exports
from finetune_trainer.published_model import PublishedModel
from finetune_trainer.remedy import apply_remedy, choose_remedy
from finetune_trainer.run import Run, interruptible
from finetune_trainer.scoring import Scorer
from finetune_trainer.stage_input import (
    fetch_base,
    find_start,
    is_unchanged,
    load_benchmarks,
    load_rows,
    load_suite,
    make_renderer,
)
from finetune_trainer.trade_off import with_trade_off
from finetune_trainer.train_stage import train_stage


def evaluate_stage(run: Run) -> Report:
    """Compare base and tuned model on the test split, then publish the report and, if the job says so, the model."""
    job, workspace, shared = run.job, run.workspace, run.shared
    reporter = interruptible(run, Stage.EVALUATE)
    tuned = _find_tuned(run, reporter)
    if shared is not None:
        shared.pull_predictions()
    reporter.say("loading the models")
    files = fetch_base(run)
    tokenizer = load_tokenizer(files)
    pair = open_pair(job, files, tuned)
    layout = pair.layout
    renderer = make_renderer(job, files, tokenizer)
    evaluation = workspace.recall("evaluation", EvaluationReport)
    if evaluation is not None and evaluation.forgetting and evaluation.forgetting.trade_off:
        apply_remedy(pair, evaluation.forgetting.trade_off, workspace.tuned)
    if evaluation is None:
        dataset = load_rows(run)
        # What training went on from is not read any more.
        known = workspace.recall("inputs", Inputs)
        lineage = known.lineage if known else ()
        is_unchanged(run, Inputs(rows=dataset.hash, model=files.revision, lineage=lineage), reporter)
        suite = load_suite(run)
        trial = Trial(pair, tokenizer, renderer, dataset, job, lambda model: Scorer(model, layout), reporter.tell)
        trade_off = choose_remedy(trial, pair, suite, workspace.tuned, reporter)
        if trade_off is not None:
            apply_remedy(pair, trade_off, workspace.tuned)
        benchmarks = load_benchmarks(run, files, tokenizer, layout)
        evaluation, predictions = evaluate(trial, suite.deciding() if suite and trade_off else suite, benchmarks)
        evaluation = with_trade_off(evaluation, trade_off)
        _write_predictions(predictions, workspace.predictions)
        if shared is not None:
            shared.push_predictions()
        run.remember("evaluation", evaluation)
    if evaluation.probe is not None:
        require_effect(evaluation.probe)
    report = assemble_report(run, files, evaluation)
    report = report.model_copy(update={"soft_prompt": virtual_tokens(job, pair, tokenizer)})
    why_not = why_kept_back(job.spec.output.publish_on, job.spec.evaluation.gates, evaluation)
    if why_not:
        Reporter(run.sink, Stage.PUBLISH).say(f"the model is not published: {why_not}")
        return publish_run(run, report.model_copy(update={"why_not_published": why_not}), ())
    exports, evaluated = write_exports(run, report, pair, tokenizer, renderer, find_licence(files))
    # What was evaluated makes room for what is loaded to be held against it.
    del pair
    gc.collect()
    parity = tuple(check_export(run, files, folder, evaluated) for folder in exports)
    return publish_run(run, report.model_copy(update={"parity": parity}), exports)


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
    start, known = find_start(run), run.workspace.recall("inputs", Inputs)
    assert start is not None and known is not None, "the spec demands one, and the check has seen it"
    if change := describe_change(known, known.model_copy(update={"lineage": start.lineage})):
        raise DataError(f"{change} since the check. Put it back, or apply the job under another name.")
    return start


def _write_predictions(predictions: Sequence[Mapping[str, object]], path: Path) -> None:
    with disk_errors("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist([dict(row) for row in predictions]), path)
