"""What thousands of FineTuneJobs cost the operator and the API server, beside as many TrainJobs of Kubeflow Trainer.

    python -m benchmarks.control_plane --jobs 200 1000

etcd, API server, Job controller and scheduler are the real ones, as processes of this machine, built from Go modules
the first time; nodes and pods are kwok's. A FineTuneJob lives its whole life: check, train, evaluate, end. A TrainJob
lives until it has its JobSet. The last line is JSON.
"""

import argparse
import asyncio
import dataclasses
import json
import shutil
import sys
import tempfile
from pathlib import Path

from tests.cluster.binary import ensure_binaries

from . import finetune, kubeflow
from .cluster import PROGRAMS, Cpu
from .finetune import Beginning, Life
from .kubeflow import Start

KUBEFLOW = {"kubeflow-trainer": "as released", "kubeflow-trainer-unlimited": "500 requests/s, 10 workers"}


def main() -> None:
    """Measure and print."""
    options = _parse()
    peers = [] if options.no_peer else list(KUBEFLOW)
    ensure_binaries({*PROGRAMS, *peers})
    work = Path(tempfile.mkdtemp(prefix="control-plane-"))
    print(f"logs are in {work}", file=sys.stderr)
    results: list[Life | Beginning | Start] = []
    for jobs in options.jobs:
        folder = work / f"finetune-{jobs}"
        if options.beginning:
            results.append(beginning := asyncio.run(finetune.begin(jobs, folder, options.workers)))
            _print_beginning(beginning)
        else:
            results.append(life := asyncio.run(finetune.live(jobs, folder, options.workers)))
            _print_life(life)
        for peer in peers:
            theirs = asyncio.run(kubeflow.begin(peer, jobs, work / f"{peer}-{jobs}"))
            _print_start(theirs)
            results.append(theirs)
    if not options.keep:
        shutil.rmtree(work)
    print(json.dumps([dataclasses.asdict(one) for one in results]))


def _print_life(life: Life) -> None:
    print(f"{life.jobs} FineTuneJobs")
    print(f"  apply to child p50 {life.apply_p50:.2f} s, p99 {life.apply_p99:.2f} s")
    _print_cpu(life.apply_cpu, "operator")
    print(f"  three stages of 5 to 15 s in {life.life_seconds:.0f} s, {life.looks_per_second:.0f} reconciles/s")
    print(f"  {life.writes_per_job:.2f} writes per job and {life.events_per_job:.2f} events")
    for kind, count in life.writes.items():
        print(f"    {count:6.2f}  {kind}")
    print(f"  operator: at most {life.memory_mb:.0f} MB, {life.cpu_seconds_per_job * 1000:.0f} ms CPU per job")
    print(f"  restart to quiet {life.restart_running:.1f} s, all running; {life.restart_ended:.1f} s, all ended")
    print(f"  {life.writes_at_rest} writes in two minutes at rest", flush=True)


def _print_beginning(beginning: Beginning) -> None:
    print(f"{beginning.jobs} FineTuneJobs, until each has its child")
    print(f"  apply to child p50 {beginning.apply_p50:.2f} s, p99 {beginning.apply_p99:.2f} s")
    _print_cpu(beginning.apply_cpu, "operator")
    for kind, count in beginning.writes.items():
        print(f"    {count:6.2f}  {kind}")
    print(
        f"  operator: at most {beginning.memory_mb:.0f} MB; restart until all are looked at {beginning.restart:.1f} s"
    )
    sys.stdout.flush()


def _print_start(start: Start) -> None:
    print(f"{start.jobs} TrainJobs, {KUBEFLOW[start.program]}")
    print(f"  apply to JobSet p50 {start.apply_p50:.2f} s, p99 {start.apply_p99:.2f} s")
    _print_cpu(start.apply_cpu, "controller")
    print(f"  controller: at most {start.memory_mb:.0f} MB", flush=True)


def _print_cpu(cpu: Cpu, controller: str) -> None:
    print(
        f"  until then {controller} {cpu.controller * 1000:.1f} ms CPU per job, API server {cpu.server * 1000:.1f} ms"
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, nargs="+", default=[200, 1000], metavar="N", help="default 200 1000")
    parser.add_argument("--workers", type=int, default=32, help="of the operator; default 32, as the chart's")
    parser.add_argument("--beginning", action="store_true", help="no life: stop when every job has its first child")
    parser.add_argument("--no-peer", action="store_true", help="leave Kubeflow out")
    parser.add_argument("--keep", action="store_true", help="keep logs and data")
    return parser.parse_args()


if __name__ == "__main__":
    main()
