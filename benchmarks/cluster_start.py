"""How much later a FineTuneJob's training starts than a bare Job with the same image, side by side in one cluster.

    python benchmarks/cluster_start.py --kubeconfig .cluster/kubeconfig --image finetune-trainer:dev --rounds 5

The operator must be installed. The check stage is off, so that the first pod is the training's. Both objects are
created at the same moment; what counts is when the API server says their container has started, to a second. The bare
Job's container only asks for its help text.
"""

import argparse
import statistics
import time
import uuid
from datetime import datetime
from pathlib import Path
from typing import Any

from kubernetes import client, config, watch

from finetune_api.crd import GROUP, PLURAL, VERSION

RESOURCES = {"cpu": "100m", "memory": "256Mi"}
SECONDS = 120


def main() -> None:
    """Run the rounds and print them with their medians."""
    options = _parse()
    api = config.new_client_from_config(str(options.kubeconfig))
    core = client.CoreV1Api(api)
    namespace = f"start-{uuid.uuid4().hex[:6]}"
    core.create_namespace({"metadata": {"name": namespace}})
    try:
        rounds = [_round(api, namespace, options.image, number) for number in range(options.rounds)]
    finally:
        core.delete_namespace(namespace)
    ours, bare = ([one[index] for one in rounds] for index in (0, 1))
    print("round  FineTuneJob  bare Job   later by")
    for number, (first, second) in enumerate(rounds):
        print(f"{number:5}  {first:9.1f} s  {second:6.1f} s  {first - second:7.1f} s")
    later = statistics.median(first - second for first, second in rounds)
    print(f"median {statistics.median(ours):9.1f} s  {statistics.median(bare):6.1f} s  {later:7.1f} s")


def _round(api: Any, namespace: str, image: str, number: int) -> tuple[float, float]:
    """Return the seconds from creation to the container's start: of the FineTuneJob, of the bare Job."""
    name = f"start-{number}"
    job = _fine_tune_job(name, image)
    began = time.time()
    client.CustomObjectsApi(api).create_namespaced_custom_object(GROUP, VERSION, namespace, PLURAL, job)
    client.BatchV1Api(api).create_namespaced_job(namespace, _bare_job(f"bare-{number}", image))
    starts = _await_starts(client.CoreV1Api(api), namespace, {f"{name}-train-a1", f"bare-{number}"})
    return starts[f"{name}-train-a1"].timestamp() - began, starts[f"bare-{number}"].timestamp() - began


def _await_starts(core: client.CoreV1Api, namespace: str, jobs: set[str]) -> dict[str, datetime]:
    starts: dict[str, datetime] = {}
    stream = watch.Watch()
    for event in stream.stream(core.list_namespaced_pod, namespace, timeout_seconds=SECONDS):
        pod = event["object"]
        owner = (pod.metadata.labels or {}).get("batch.kubernetes.io/job-name")
        for status in pod.status.container_statuses or ():
            state = status.state.running or status.state.terminated
            if owner in jobs and state is not None and state.started_at is not None:
                starts.setdefault(owner, state.started_at)
        if starts.keys() == jobs:
            stream.stop()
    if starts.keys() != jobs:
        raise SystemExit(f"not started within {SECONDS} s: {sorted(jobs - starts.keys())}")
    return starts


def _bare_job(name: str, image: str) -> dict[str, Any]:
    container = {
        "name": "trainer",
        "image": image,
        "args": ["train", "--help"],
        "imagePullPolicy": "IfNotPresent",
        "resources": {"requests": RESOURCES, "limits": RESOURCES},
    }
    template = {"spec": {"restartPolicy": "Never", "containers": [container]}}
    return {"metadata": {"name": name}, "spec": {"backoffLimit": 0, "template": template}}


def _fine_tune_job(name: str, image: str) -> dict[str, Any]:
    task = {
        "name": "sentiment",
        "source": "s3://nowhere/rows.jsonl",
        "templates": [{"prompt": "{{ text }}", "completion": " {{ label }}"}],
    }
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "FineTuneJob",
        "metadata": {"name": name},
        "spec": {
            "model": {"source": "s3://nowhere/model"},
            "data": {"tasks": [task]},
            "method": {"type": "lora"},
            "compute": {"image": image, "gpusPerWorker": 0, "resources": RESOURCES},
            "output": {"uri": "s3://nowhere/output"},
            "runPolicy": {"preflight": "skip", "retries": 0},
        },
    }


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kubeconfig", type=Path, required=True, help="of a cluster with the operator in it")
    parser.add_argument("--image", default="finetune-trainer:dev", help="trainer image that the nodes have")
    parser.add_argument("--rounds", type=int, default=5, help="default 5")
    return parser.parse_args()


if __name__ == "__main__":
    main()
