"""The command line of what runs on a cluster; imports no client, so that the quick commands stay quick."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_api.report import Stage

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[Any]


def add_cluster_commands(commands: "Commands") -> None:
    """Add render, submit, status, logs, debug, report, cancel and resume."""
    _add_render(commands)
    submit = _command(commands, "submit", "hand a job to a cluster", "kubectl create, with every mistake named by line")
    submit.add_argument("file", type=Path, metavar="FILE", help="a FineTuneJob as YAML or JSON")
    submit.add_argument("-w", "--watch", action="store_true", help="follow it to its end; fails as the job fails")
    _add_output(submit)

    status = _command(commands, "status", "show what a cluster knows of a job, or of all jobs of a namespace")
    status.add_argument("job", nargs="?", metavar="NAME", help=f"{_JOB}; all jobs of the namespace when absent")
    status.add_argument("-w", "--watch", action="store_true", help="follow it to its end; fails as the job fails")
    _add_output(status)

    logs = _command(commands, "logs", "print what a job's pods print")
    logs.add_argument("job", metavar="NAME", help=_JOB)
    logs.add_argument("-f", "--follow", action="store_true", help="go on with every new pod until the job has ended")
    logs.add_argument(
        "--stage", choices=[stage.value for stage in _STAGES], help="default: the newest one that has begun"
    )

    debug = _command(commands, "debug", "write all that a cluster knows of a job into one file, to ask for help with")
    debug.add_argument("job", metavar="NAME", help=_JOB)
    debug.add_argument("-o", "--output", dest="file", type=Path, metavar="FILE", help="default: NAME-debug.txt")

    report = _command(commands, "report", "fetch a job's report, check it and open it in a browser")
    report.add_argument("job", metavar="NAME", help=_JOB)
    report.add_argument(
        "--output", dest="folder", type=Path, metavar="DIR", help="put it there instead; must be absent or empty"
    )
    report.add_argument(
        "--endpoint",
        metavar="URL",
        help="address of the S3 store as seen from here, where it differs from the one in the job",
    )

    cancel = _command(commands, "cancel", "delete a job and its pods; what it published stays")
    cancel.add_argument("job", metavar="NAME", help=_JOB)
    cancel.add_argument("--keep", action="store_true", help="stop it only, so that `finetune resume` goes on with it")
    cancel.add_argument("-y", "--yes", action="store_true", help="do not ask")

    resume = _command(commands, "resume", "go on with a job that `finetune cancel --keep` stopped")
    resume.add_argument("job", metavar="NAME", help=_JOB)


def _add_render(commands: "Commands") -> None:
    render = _command(
        commands,
        "render",
        "print the objects that the operator would create for a job",
        "needs no cluster; with --serve those that serve what jobs of a cluster have published",
    )
    what = render.add_mutually_exclusive_group(required=True)
    what.add_argument("file", nargs="?", type=Path, metavar="FILE", help="a FineTuneJob as YAML or JSON")
    what.add_argument(
        "--serve",
        nargs="+",
        metavar="NAME",
        help="a Deployment and a Service of vLLM with the adapters of these jobs on their one base",
    )
    render.add_argument("--image", help="vLLM's, for --serve; default: of the version that the arguments are for")
    render.add_argument(
        "--settings", type=Path, metavar="FILE", help="the operator's settings.yaml; default: as the chart has them"
    )
    render.add_argument("-o", "--output", choices=["yaml", "json"], default="yaml", help="documents, or one List")


_JOB = "name of a FineTuneJob, or the file it was submitted from"
_STAGES = (Stage.CHECK, Stage.TRAIN, Stage.EVALUATE)
"""Stages with a pod of their own."""


def _command(commands: "Commands", name: str, summary: str, more: str = "") -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=f"{summary}{f': {more}' if more else ''}."
    )
    where = parser.add_argument_group("which cluster", "as for kubectl")
    where.add_argument("-n", "--namespace", metavar="NAME", help="default: the manifest's, else the context's")
    where.add_argument("--context", metavar="NAME", help="default: the current one")
    where.add_argument("--kubeconfig", type=Path, metavar="FILE", help="default: $KUBECONFIG, else ~/.kube/config")
    return parser


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o",
        "--output",
        choices=["text", "json", "yaml"],
        default="text",
        help="for people, or the whole object for programs; watched, one object a change",
    )
