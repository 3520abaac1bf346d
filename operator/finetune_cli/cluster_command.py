"""Run a command that needs a cluster: connect, find the job that is meant, do it."""

import argparse
import sys

from finetune_api.report import ExitCode, Stage
from finetune_cli.cluster_job import find_name
from finetune_cli.connection import connect
from finetune_cli.job_api import JobApi, Target


def run_on_cluster(options: argparse.Namespace) -> ExitCode:
    """Run the command that ``options`` name; each is imported only when it is asked for.

    Raises:
        FineTuneError: why it could not be done, or how the watched job failed.
    """
    return run_with(connect(Target(options.namespace, options.context, options.kubeconfig)), options)


def run_with(api: JobApi, options: argparse.Namespace) -> ExitCode:
    """As `run_on_cluster`, on a cluster that is given."""
    if options.command == "submit":
        from finetune_cli.submit import submit

        return submit(api, options.file, options.namespace, options.output, options.watch)
    if options.command == "render":
        from finetune_cli.serving import VLLM_IMAGE, render_serving

        names = [find_name(job, options.namespace, api.default_namespace) for job in options.serve]
        return render_serving(api, names, options.image or VLLM_IMAGE, options.output)
    if options.command == "status" and options.job is None:
        from finetune_cli.job_status import show_jobs

        return show_jobs(api, api.default_namespace, options.output)
    name = find_name(options.job, options.namespace, api.default_namespace)
    match options.command:
        case "status":
            from finetune_cli.job_status import fetch, watch_status, write_job

            job = fetch(api, name)
            return watch_status(api, job, options.output) if options.watch else write_job(job, options.output)
        case "logs":
            from finetune_cli.logs import show_logs

            return show_logs(api, name, Stage(options.stage) if options.stage else None, options.follow)
        case "debug":
            from finetune_cli.debug import debug

            return debug(api, name, options.file)
        case "report":
            from finetune_cli.report import show_report

            return show_report(api, name, options.folder, options.endpoint)
        case "cancel":
            from finetune_cli.cancel import cancel, suspend

            if options.keep:
                return suspend(api, name)
            return cancel(api, name, None if options.yes or not sys.stdin.isatty() else _ask)
        case "resume":
            from finetune_cli.cancel import resume

            return resume(api, name)
        case other:
            raise AssertionError(f"command {other!r} has a parser and no code")


def _ask(question: str) -> bool:
    sys.stdout.write(f"{question} [y/N] ")
    sys.stdout.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")
