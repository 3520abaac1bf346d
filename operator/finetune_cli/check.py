"""``finetune check``: look at a job's rows and base model without training, and say what was found."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from finetune_api.job import FineTuneJob
from finetune_api.plain_text import one_line, printable
from finetune_api.report import DataReport, ExitCode, TaskData
from finetune_api.resolve import resolve
from finetune_api.spec import Preflight
from finetune_cli.display import open_display
from finetune_cli.library_output import diverted_to
from finetune_cli.stop_notice import stop_notice
from finetune_trainer.errors import DataError
from finetune_trainer.garbage import kept_for_good
from finetune_trainer.progress import Sink

CheckRunner = Callable[[FineTuneJob, Path, Sink], DataReport]
"""Takes the resolved job, the workspace and who listens; raises FineTuneError."""

_BAR = 40
_SAMPLE_CHARACTERS = 1500


def check(job: FineTuneJob, workspace: Path, output: str, run_check: CheckRunner | None = None) -> ExitCode:
    """Run the check stage of ``job`` and print what it found.

    Args:
        job: as read from the file.
        workspace: a run in it goes on from what was found.
        output: ``text`` or ``json``.
        run_check: what does the work. Default: the trainer, imported only now.

    Raises:
        FineTuneError: what would keep the job from being trained; behind what was found, where rows are the reason.
    """
    display = open_display("text", sys.stderr)
    with display, diverted_to(workspace):
        if run_check is None:
            display.notice("loading torch and transformers")
            with kept_for_good():
                from finetune_trainer import stages

            run_check = stages.check
        with stop_notice(display.notice):
            report = run_check(resolve(job), workspace, display)
    if output == "json":
        sys.stdout.write(json.dumps({"data": report.model_dump(mode="json", by_alias=True)}) + "\n")
    else:
        for line in describe(report):
            sys.stdout.write(f"{printable(line)}\n")
    if (refusal := report.why_refused()) and job.spec.run_policy.preflight is Preflight.ENFORCE:
        raise DataError(refusal)
    return ExitCode.OK


def describe(report: DataReport) -> Iterator[str]:
    """Yield what was found, for people."""
    rows = report.rows
    yield f"rows        {rows.train:,} training, {rows.validation:,} validation, {rows.test:,} test"
    yield (
        f"tokens      {report.tokens or 0:,} training, {report.completion_tokens or 0:,} of them answers; longest row "
        f"{report.longest_tokens or 0:,} of {report.max_length or 0:,}"
    )
    yield f"shortened   {report.truncated_percent:.1f} %"
    yield f"duplicates  {report.duplicates:,} rows nearly equal another one, {report.exact_duplicates:,} exactly"
    yield f"leakage     {report.leakage:,}"
    personal = report.personal_data
    yield f"personal    {personal.emails:,} e-mail, {personal.phones:,} telephone, {personal.keys:,} secret keys"
    for overlap in report.overlaps:
        yield (
            f"overlap     {overlap.overlapping:,} of {overlap.questions:,} questions of {one_line(overlap.source)}, "
            f"{overlap.given_away:,} as a whole"
        )
    yield f"format      {report.format}"
    yield f"layout      {one_line(report.layout) or 'not probed'}"
    yield f"rehearsed   {_rehearsed(report)}"
    for task in report.tasks:
        yield from _describe_task(task)
    for warning in report.warnings:
        yield f"note: {warning}"


def _rehearsed(report: DataReport) -> str:
    rehearsal = report.rehearsal
    if rehearsal is None:
        return "no: nothing is trained, the model is tiny itself, or spec.runPolicy.preflight is skip"
    if rehearsal.why_not:
        return f"no: {one_line(rehearsal.why_not)}"
    return f"yes: train, resume, evaluate and publish in small, in {rehearsal.seconds:.0f} s"


def _describe_task(task: TaskData) -> Iterator[str]:
    yield ""
    yield f"task {task.task}: {task.rows.train:,} + {task.rows.validation:,} + {task.rows.test:,} rows"
    most = max((bar.rows for bar in task.lengths), default=1)
    for bar in task.lengths:
        length = "#" * round(_BAR * bar.rows / most)
        yield f"  up to {bar.up_to:>6,} tokens  {bar.rows:>9,}  {length}".rstrip()
    for column in task.columns:
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in column.kinds.items())
        distinct = "" if column.distinct is None else f"; {column.distinct:,} different"
        yield f"  column {one_line(column.name)}: {kinds}{distinct}"
    if task.unused:
        yield f"  columns not used: {one_line(task.unused)}"
    if task.languages:
        yield f"  language (a guess): {', '.join(f'{name} {share:.0%}' for name, share in task.languages.items())}"
    for label, count in task.labels.items():
        yield f"  label {one_line(label)}: {count:,} training rows"
    if task.sample:
        yield "  the first training row; only what is between >> and << is learnt:"
        text = "".join(f">>{piece.text}<<" if piece.learnt else piece.text for piece in task.sample)
        yield from (f"  | {line}" for line in text[:_SAMPLE_CHARACTERS].splitlines())
    yield ""
