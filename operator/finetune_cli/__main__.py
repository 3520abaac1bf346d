"""Parse the command line, run one command, turn whatever ends it into a message and an exit code."""

import argparse
import io
import os
import re
import signal
import sys
from pathlib import Path
from typing import NoReturn

from finetune_api.job import FineTuneJob, InvalidJobError
from finetune_api.report import ExitCode
from finetune_api.spec.field import QUANTITY
from finetune_cli.cluster_options import add_cluster_commands
from finetune_cli.failure import (
    describe_error,
    describe_interrupt,
    describe_invalid_job,
    print_failure,
    record_crash,
)
from finetune_cli.stage_runner import StageRunner
from finetune_trainer.errors import FineTuneError
from finetune_trainer.garbage import exit_at_once
from finetune_trainer.interrupt import stopped_at_once

_JOB = "a FineTuneJob as YAML or JSON; -: standard input"
_CRD_FILE = Path("crds/finetune.dev_finetunejobs.yaml")


def main() -> NoReturn:
    """Run the command that this process was started with, and end it with the exit code."""
    _accept_any_text()
    try:
        code = run_command(sys.argv[1:])
    except KeyboardInterrupt:
        # Another Ctrl-C while the first was being answered.
        code = ExitCode.PREEMPTED
    # All is said. What follows is Python's own cleaning up, which a late Ctrl-C would end with a traceback.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    exit_at_once(code)


def run_command(given: list[str], run_stages: StageRunner | None = None) -> ExitCode:
    """Run one command and return its exit code; whatever ends it early is told in words.

    Args:
        given: the command line without the program's name.
        run_stages: what ``finetune run`` gives the job to. Default: the trainer, imported when it is needed.
    """
    options = _parser().parse_args(given)
    try:
        code = _dispatch(options, given, run_stages)
        _flush_output()
        return code
    except InvalidJobError as error:
        failure = describe_invalid_job(error)
    except FineTuneError as error:
        failure = describe_error(error, given)
    except KeyboardInterrupt:
        failure = describe_interrupt(given)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and options.command != "run":
            # The reader has what it wanted: `finetune crd | head`. In a run, whose display outlives its reader, this
            # error is a network's.
            _flush_output()
            return ExitCode.OK
        failure = record_crash(error, options.workspace)
    print_failure(failure, as_json=options.output == "json")
    _flush_output()
    return failure.exit_code


def _dispatch(options: argparse.Namespace, given: list[str], run_stages: StageRunner | None) -> ExitCode:
    """Run the command; each is imported only when it is asked for, so that the quick ones stay quick."""
    match options.command:
        case "validate":
            from finetune_cli.validate import validate

            return validate(options.files, as_json=options.output == "json")
        case "crd":
            from finetune_cli.crd import check_crd, print_crd

            return check_crd(options.check) if options.check else print_crd()
        case "init":
            from finetune_cli.init import print_starter

            return print_starter(options.name, options.method)
        case "templates":
            from finetune_cli.templates import show_templates

            return show_templates(options.name, options.file)
        case "run":
            from finetune_cli.preparation import preparation_named
            from finetune_cli.run import run

            with stopped_at_once("stopped while no stage was at work; nothing is lost."):
                job = _open(options)
                with preparation_named(job, options.file):
                    return run(job, options.workspace, options.output, run_stages)
        case "plan":
            from finetune_cli.plan import plan

            return plan(options.file, options.gpu_memory, options.output)
        case "check":
            from finetune_cli.check import check
            from finetune_cli.preparation import preparation_named

            with stopped_at_once("stopped while nothing was at work."):
                job = _open(options)
                with preparation_named(job, options.file):
                    return check(job, options.workspace, options.output)
        case "compare":
            from finetune_cli.compare import compare

            return compare(options.reports, as_json=options.output == "json")
        case "try":
            from finetune_cli.trial import try_adapters

            return try_adapters(options.adapters, options.prompt, options.model, options.max_new_tokens, options.output)
        case "render" if options.serve:
            from finetune_cli.cluster_command import run_on_cluster

            return run_on_cluster(options)
        case "render":
            from finetune_cli.render import render

            return render(options.file, options.settings, options.namespace, options.output)
        case "submit" | "status" | "logs" | "debug" | "report" | "cancel" | "resume":
            from finetune_cli.cluster_command import run_on_cluster

            return run_on_cluster(options)
        case other:
            raise AssertionError(f"command {other!r} has a parser and no code")


def _open(options: argparse.Namespace) -> FineTuneJob:
    """Return the job of the command line, whose workspace is settled by it where none is named."""
    from finetune_cli.manifest import read_job
    from finetune_cli.run import default_workspace

    job = read_job(options.file)
    options.workspace = options.workspace or default_workspace(job, options.file)
    return job


def _accept_any_text() -> None:
    # A terminal or pipe that cannot show a character gets a question mark, not the end of the run.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _flush_output() -> None:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        # Python would try again at exit, complain and change the exit code.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# --- the command line


class _Parser(argparse.ArgumentParser):
    """Ends with EX_USAGE instead of 2, as everything wrong with what was asked does."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(ExitCode.BAD_SPEC, f"error: {message}\n")


def _quantity(text: str) -> str:
    if not re.fullmatch(QUANTITY, text):
        raise argparse.ArgumentTypeError(f"{text!r} is no quantity such as 24Gi")
    return text


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="finetune",
        description="Tune a language model on your rows, measure it against its base, publish it.",
        epilog="Start with: finetune init > job.yaml",
    )
    parser.set_defaults(output=None, workspace=None)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    validate = commands.add_parser("validate", help="say everything that is wrong with a job; loads no model, no rows")
    validate.add_argument("files", nargs="+", type=Path, metavar="FILE", help=_JOB)
    validate.add_argument("--output", choices=["text", "json"], default="text", help="for people or for programs")

    plan = commands.add_parser("plan", help="say what a job trains and the memory it needs; loads no weights, no rows")
    plan.add_argument("file", type=Path, metavar="FILE", help=_JOB)
    plan.add_argument(
        "--gpu-memory",
        type=_quantity,
        metavar="SIZE",
        help="of one GPU: 24Gi, instead of spec.compute.gpuMemory; warns of what does not fit",
    )
    plan.add_argument("--output", choices=["text", "json"], default="text", help="for people or for programs")

    crd = commands.add_parser("crd", help="print the CustomResourceDefinition of FineTuneJob")
    crd.add_argument(
        "--check",
        nargs="?",
        type=Path,
        const=_CRD_FILE,
        metavar="FILE",
        help=f"print nothing; fail when FILE (default {_CRD_FILE}) differs",
    )

    init = commands.add_parser("init", help="print a commented starter job")
    init.add_argument("name", nargs="?", default="my-job", metavar="NAME", help="name of the job (default my-job)")
    init.add_argument("--method", choices=["full", "lora", "promptTuning"], default="lora", help="default lora")

    templates = commands.add_parser("templates", help="show the template library, and your rows through it")
    templates.add_argument("name", nargs="?", metavar="NAME", help="an entry; all are listed when absent")
    templates.add_argument("--file", type=Path, metavar="FILE", help="show phrasings on the rows of this job")

    run = commands.add_parser("run", help="check, train, evaluate and publish; interrupted, the same command goes on")
    run.add_argument("file", type=Path, metavar="FILE", help=_JOB)
    run.add_argument(
        "--workspace", type=Path, metavar="DIR", help="default .finetune/<name>-<hash of the spec> beside FILE"
    )
    run.add_argument(
        "--output",
        choices=["auto", "text", "json"],
        default="auto",
        help="auto: live on a terminal, else text; json: one object a line, the report in the last",
    )

    check = commands.add_parser("check", help="look at a job's rows and model without training; run goes on from it")
    check.add_argument("file", type=Path, metavar="FILE", help=_JOB)
    check.add_argument("--workspace", type=Path, metavar="DIR", help="as of run")
    check.add_argument("--output", choices=["text", "json"], default="text", help="for people or for programs")

    compare = commands.add_parser("compare", help="put the reports of several jobs side by side")
    compare.add_argument(
        "reports", nargs="+", type=Path, metavar="REPORT", help="a report.json, or the folder of a report or of a job"
    )
    compare.add_argument("--output", choices=["text", "json"], default="text", help="for people or for programs")

    trial = commands.add_parser("try", help="ask a base model and adapters of it the same, side by side")
    trial.add_argument(
        "--adapters", nargs="+", required=True, metavar="PLACE", help="folders or URIs of published adapters"
    )
    trial.add_argument(
        "--prompt",
        metavar="TEXT",
        help="a prompt as it stands, or a row as JSON, which goes through each adapter's own template; absent: every "
        "line of standard input",
    )
    trial.add_argument("--model", metavar="URI", help="the base, where it is not where it was at their tuning")
    trial.add_argument("--max-new-tokens", type=_count, default=64, metavar="N", help="longest answer (default 64)")
    trial.add_argument("--output", choices=["text", "json"], default="text", help="for people or for programs")
    add_cluster_commands(commands)
    return parser


if __name__ == "__main__":
    main()
