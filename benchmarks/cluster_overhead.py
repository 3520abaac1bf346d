"""What a Ray cluster of one's own costs: the same job on Ray workers and as a single pod, one after the other.

    python benchmarks/cluster_overhead.py --kubeconfig .cluster/kubeconfig --namespace team job.yaml

The job must be one that runs in that namespace, with `compute.workers` 2 or more; operator, KubeRay and the trainer's
image must be there. It is applied twice: as it is, and with one worker. From the status: when the attempt at training
was recorded, when its program ran, when it told its first step, when it ended. The last line is JSON.
"""

import argparse
import copy
import json
import uuid
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from kubernetes import client, config, watch

from finetune_api.crd import GROUP, PLURAL, VERSION
from finetune_api.report import Stage
from finetune_api.status import FineTuneJobStatus

SECONDS = 900


def main() -> None:
    """Run both and print what each took."""
    options = _parse()
    objects = client.CustomObjectsApi(config.new_client_from_config(str(options.kubeconfig)))
    job = yaml.safe_load(options.job.read_text(encoding="utf-8"))
    single = copy.deepcopy(job)
    single["spec"]["compute"] |= {"workers": 1, "engine": "job"}
    single["spec"]["compute"].pop("deepspeed", None)
    results = {name: _measure(objects, options.namespace, one) for name, one in {"ray": job, "job": single}.items()}
    print("engine  program runs  first step     end  (seconds after the attempt was recorded)")
    for name, found in results.items():
        print(f"{name:6}  {found['running']:12.1f}  {found['first_step']:10.1f}  {found['end']:6.1f}")
    later = results["ray"]["first_step"] - results["job"]["first_step"]
    print(json.dumps({"results": results, "first_step_later_by": round(later, 1)}))


def _measure(objects: client.CustomObjectsApi, namespace: str, job: dict[str, Any]) -> dict[str, float]:
    name = f"overhead-{uuid.uuid4().hex[:6]}"
    body = job | {"metadata": {"name": name}}
    objects.create_namespaced_custom_object(GROUP, VERSION, namespace, PLURAL, body)
    try:
        return _follow(objects, namespace, name)
    finally:
        objects.delete_namespaced_custom_object(GROUP, VERSION, namespace, PLURAL, name)


def _follow(objects: client.CustomObjectsApi, namespace: str, name: str) -> dict[str, float]:
    first_step: datetime | None = None
    selector, stream = f"metadata.name={name}", watch.Watch()
    for event in stream.stream(
        *(objects.list_namespaced_custom_object, GROUP, VERSION, namespace, PLURAL),
        field_selector=selector,
        timeout_seconds=SECONDS,
    ):
        status = FineTuneJobStatus.model_validate(event["object"].get("status") or {}, by_alias=True)
        trained = [one for one in status.attempts if one.stage is Stage.TRAIN]
        progress = status.progress
        if first_step is None and trained and progress and progress.stage is Stage.TRAIN and progress.step:
            first_step = progress.last_update_time
        if trained and trained[0].end_time and trained[0].record_time and trained[0].start_time and first_step:
            stream.stop()
            began, ran, ended = trained[0].record_time, trained[0].start_time, trained[0].end_time
            moments = {"running": ran, "first_step": first_step, "end": ended}
            return {name: round((moment - began).total_seconds(), 1) for name, moment in moments.items()}
        if status.phase is not None and status.phase.is_terminal:
            break
    raise SystemExit(f"{name} has not trained: {event['object'].get('status', {}).get('summary')}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", type=Path, help="a FineTuneJob with several workers")
    parser.add_argument("--kubeconfig", type=Path, required=True, help="of a cluster with operator and KubeRay in it")
    parser.add_argument("--namespace", default="default", help="where the job can run")
    return parser.parse_args()


if __name__ == "__main__":
    main()
