"""What a Ray cluster of one's own costs: the same job on Ray workers and as a single pod, one after the other.

    python -m benchmarks.cluster_overhead

Example 05 with a tiny model, on two workers without GPUs and then on one, in the cluster that `make cluster` left
running, else in one made for it: with the images of this checkout, the real KubeRay and a real S3 server. From the
status: when the attempt at training was recorded, when its program ran, when it told its first step, when it ended. The
last line is JSON.
"""

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.cluster.cluster import find_cluster, start_cluster, stop_cluster
from tests.cluster.kuberay import install_kuberay
from tests.cluster.object_store import ObjectStore, start_object_store
from tests.cluster.project_image import OPERATOR, TRAINER, provide
from tests.e2e.object import Document, Job, Jobs
from tests.e2e.release import OperatorRelease
from tests.e2e.sample import CPUS, add_secret, example, fill_bucket

from finetune_api.report import Stage
from finetune_api.status import Attempt

NAMESPACE = "overhead"
SECONDS = 900
ENGINES: dict[str, Document] = {"ray": CPUS, "job": CPUS | {"workers": 1}}


def main() -> None:
    """Run both and print what each took."""
    with _place() as (jobs, s3):
        results = {engine: _measure(jobs, s3, engine) for engine in ENGINES}
    print("engine  program runs  first step     end  (seconds after the attempt was recorded)")
    for engine, found in results.items():
        print(f"{engine:6}  {found['running']:12.1f}  {found['first_step']:10.1f}  {found['end']:6.1f}")
    later = results["ray"]["first_step"] - results["job"]["first_step"]
    print(json.dumps({"results": results, "first_step_later_by": round(later, 1)}))


@contextlib.contextmanager
def _place() -> Iterator[tuple[Jobs, ObjectStore]]:
    """Yield a namespace with all that a job needs; a cluster that was made for it goes at the end."""
    running = find_cluster()
    try:
        cluster = running or start_cluster()
        OperatorRelease(cluster, provide(OPERATOR, cluster), provide(TRAINER, cluster)).install()
        install_kuberay(cluster)
        s3 = start_object_store(cluster)
        with tempfile.TemporaryDirectory() as folder:
            fill_bucket(s3, Path(folder))
        cluster.kubectl("create", "namespace", NAMESPACE)
        try:
            jobs = Jobs(cluster.kubeconfig, NAMESPACE)
            add_secret(jobs, s3)
            yield jobs, s3
        finally:
            cluster.kubectl("delete", "namespace", NAMESPACE, "--wait=false")
    finally:
        if running is None:
            stop_cluster()


def _measure(jobs: Jobs, s3: ObjectStore, engine: str) -> dict[str, float]:
    # Long enough to be told of: the status hears every five seconds.
    training = {"maxSteps": 300, "evalEverySteps": 300}
    changes = {"training": training, "compute": ENGINES[engine], "runPolicy": {"preflight": "skip"}}
    jobs.apply(example(s3, engine, of="05-multi-gpu-lora", **changes))
    first = jobs.wait(engine, "its first step", _has_learnt, SECONDS)
    ended = _training(jobs.wait(engine, "the end of training", _has_trained, SECONDS))
    assert first.status.progress and ended.record_time and ended.start_time and ended.end_time
    moments = {
        "running": ended.start_time,
        "first_step": first.status.progress.last_update_time,
        "end": ended.end_time,
    }
    return {name: round((moment - ended.record_time).total_seconds(), 1) for name, moment in moments.items()}


def _training(job: Job) -> Attempt:
    return next(one for one in job.status.attempts if one.stage is Stage.TRAIN)


def _has_trained(job: Job) -> bool:
    return _training(job).end_time is not None


def _has_learnt(job: Job) -> bool:
    progress = job.status.progress
    return progress is not None and progress.stage is Stage.TRAIN and bool(progress.step)


if __name__ == "__main__":
    main()
