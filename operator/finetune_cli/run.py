"""``finetune run``: a job from its file to its published model, in this process."""

import sys
from pathlib import Path

from finetune_api.job import FineTuneJob, spec_hash
from finetune_api.report import ExitCode
from finetune_api.resolve import resolve
from finetune_cli.display import open_display
from finetune_cli.library_output import diverted_to
from finetune_cli.stage_runner import StageRunner, load_trainer
from finetune_cli.stop_notice import stop_notice

_EVALUATED = "evaluation.json"
"""What the trainer keeps in a workspace once all that takes long is done."""


def default_workspace(job: FineTuneJob, file: Path) -> Path:
    """Return where a run keeps what it needs to go on: ``.finetune/<name>-<hash>`` beside the job's file.

    The hash is the spec's, so that an edited job starts afresh and the old one can still be gone on with.
    """
    return file.resolve().parent / ".finetune" / f"{job.metadata.name}-{spec_hash(resolve(job).spec)[:8]}"


def run(job: FineTuneJob, workspace: Path, output: str, run_stages: StageRunner | None = None) -> ExitCode:
    """Run all stages of ``job``, show them, and show how it ended.

    Args:
        job: as read from the file.
        workspace: folder kept between attempts; a used one is gone on with.
        output: ``auto``, ``text`` or ``json``.
        run_stages: what does the work. Default: the trainer, imported only now.

    Raises:
        FineTuneError: what kept the job from its end.
    """
    display = open_display(output, sys.stdout)
    with display, diverted_to(workspace):
        if (workspace / _EVALUATED).is_file():
            display.notice(
                "This job was trained and evaluated before, which is kept; model and report are published again. "
                f"To do all of it anew, delete {workspace}."
            )
        if run_stages is None:
            display.notice("loading torch, transformers and ray")
            run_stages = load_trainer()
        with stop_notice(display.notice):
            report = run_stages(resolve(job), workspace, display)
    display.finish(report, workspace)
    return ExitCode.OK
