"""Example 06 as tests apply it: its bucket, its Secret, how far a run of it has come."""

import copy
from collections.abc import Callable
from pathlib import Path

import yaml
from kubernetes import client

from finetune_api.report import Stage
from finetune_api.status import Phase

from ..cluster.object_store import ObjectStore
from ..integration.conftest import CHATML, save_tiny_model
from ..integration.jobs import write_reviews
from .object import Document, Job, Jobs

EXAMPLES = Path(__file__).parents[2] / "examples"
BUCKET = "finetune-demo"
SECRET = "s3-credentials"
LONG = {"training": {"maxSteps": 4000, "evalEverySteps": 2000}, "checkpoint": {"everySteps": 20}}
"""A run that lasts long enough to be disturbed."""

CPUS: Document = {
    "workers": 2,
    "gpusPerWorker": 0,
    "resources": {"memory": "3Gi"},
    "sharedMemory": "1Gi",
    "pod": {"env": [{"name": "OMP_NUM_THREADS", "value": "1"}]},
}
"""Two workers without GPUs, in place of those that an example asks for. Two cores leave 400m to each, with which Ray
alone takes a minute to start, so they go without a share of their own."""


def fill_bucket(s3: ObjectStore, folder: Path) -> None:
    """Put a tiny model and rows into the bucket that example 06 names; ``folder`` holds them on the way."""
    store = s3.client()
    s3.bucket(BUCKET)
    for name, template in {"base": None, "chat": CHATML}.items():
        (model := folder / name).mkdir()
        for file in sorted(save_tiny_model(model, template).iterdir()):
            store.upload_file(str(file), BUCKET, f"models/{name}/{file.name}")
    store.upload_file(str(write_reviews(folder / "reviews.jsonl", rows=240)), BUCKET, "reviews.jsonl")


def add_secret(jobs: Jobs, s3: ObjectStore, name: str = SECRET) -> None:
    content = {"AWS_ACCESS_KEY_ID": s3.access_key, "AWS_SECRET_ACCESS_KEY": s3.secret_key, "AWS_REGION": "us-east-1"}
    jobs.core.create_namespaced_secret(
        jobs.namespace, client.V1Secret(metadata=client.V1ObjectMeta(name=name), string_data=content)
    )


def example(s3: ObjectStore, name: str = "reviews-lora", of: str = "06-kubernetes", **changes: Document) -> Document:
    """Return the job of example ``of``; ``changes`` are merged into the blocks of its spec."""
    text = (EXAMPLES / of / "finetunejob.yaml").read_text()
    document: Document = yaml.safe_load(text)
    if "file://" in text:
        _move_to_bucket(document["spec"])
    document["metadata"]["name"] = name
    document["spec"]["output"]["endpoint"] = s3.endpoint_in_cluster
    for block, content in copy.deepcopy(changes).items():
        document["spec"].setdefault(block, {}).update(content)
    return document


def _move_to_bucket(spec: Document) -> None:
    """Let an example for a laptop read and write what example 06 does; its rows have the text in another column."""
    chats = spec["data"].get("format") == "chat"
    spec["model"]["source"] = f"s3://{BUCKET}/models/{'chat' if chats else 'base'}"
    spec["data"]["tasks"][0] |= {"source": f"s3://{BUCKET}/reviews.jsonl", "columns": {"review_body": "text"}}
    spec["output"] = {"uri": f"s3://{BUCKET}/output", "secretRef": {"name": SECRET}}


def is_training(steps: int, attempt: int = 1) -> Callable[[Job], bool]:
    """Say whether that attempt at training is at work and has come as far; what an earlier one said does not count."""

    def reached(job: Job) -> bool:
        progress = job.status.progress
        started = [one.start_time for one in job.status.attempts if (one.stage, one.number) == (Stage.TRAIN, attempt)]
        if progress is None or progress.stage is not Stage.TRAIN or not started or started[0] is None:
            return False
        return progress.last_update_time > started[0] and (progress.step or 0) >= steps

    return reached


def uploaded_steps(s3: ObjectStore, job: Job) -> list[str]:
    assert job.status.resolved is not None and job.status.resolved.output_path is not None
    prefix = job.status.resolved.output_path.removeprefix(f"s3://{BUCKET}/")
    found = s3.client().list_objects_v2(Bucket=BUCKET, Prefix=f"{prefix}/checkpoints/").get("Contents", [])
    return sorted(one["Key"] for one in found if one["Key"].endswith("/COMPLETE"))


def has_checkpoint(s3: ObjectStore) -> Callable[[Job], bool]:
    return lambda job: job.phase is Phase.TRAINING and is_training(1)(job) and bool(uploaded_steps(s3, job))


def download(s3: ObjectStore, uri: str, folder: Path) -> Path:
    prefix = uri.removeprefix(f"s3://{BUCKET}/")
    store = s3.client()
    for one in store.list_objects_v2(Bucket=BUCKET, Prefix=f"{prefix}/")["Contents"]:
        file = folder / one["Key"].removeprefix(f"{prefix}/")
        file.parent.mkdir(parents=True, exist_ok=True)
        store.download_file(BUCKET, one["Key"], str(file))
    return folder
