"""The examples as tests apply them: their bucket, their Secret, how far a run has come."""

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from kubernetes import client

from finetune_api.report import Stage
from finetune_api.status import Phase

from ..cluster.object_store import ObjectStore
from ..integration.conftest import CHATML, save_tiny_encoder_decoder, save_tiny_model
from ..integration.jobs import write_reviews
from .object import Document, Job, Jobs

EXAMPLES = Path(__file__).parents[2] / "examples"
BUCKET = "finetune-demo"
SECRET = "s3-credentials"
ONE_THREAD: Document = {"env": [{"name": "OMP_NUM_THREADS", "value": "1"}]}
"""For pods without a share of CPUs of their own: each would take a thread for every core, and threads that wait for one
another's end keep the cores from the other pods."""

NO_SHARE: Document = {"resources": {"memory": "3Gi"}, "pod": ONE_THREAD}
"""In place of the CPU that example 06 asks for: two tests run at a time, and a node of two cores has one left at best,
for which a pod would wait until the other test is done."""

ONE_CPU: Document = {"resources": {"cpu": "1", "memory": "3Gi"}}
"""What example 06 asks for."""

CPUS: Document = NO_SHARE | {"workers": 2, "gpusPerWorker": 0, "sharedMemory": "1Gi"}
"""Two workers without GPUs, in place of those that an example asks for. Two cores leave 400m to each, with which Ray
alone takes a minute to start, so they go without a share of their own."""

UNCHECKED: Document = {"preflight": "skip"}
"""For what begins with training: other tests have the check as well."""

LONG = {
    "training": {"maxSteps": 4000, "evalEverySteps": 2000},
    "checkpoint": {"everySteps": 20},
    "runPolicy": UNCHECKED,
}
"""A run that lasts long enough to be disturbed."""

soak_only = pytest.mark.skipif(
    not os.environ.get("FINETUNE_SOAK"), reason="two clusters of Ray more: only `make soak` runs it"
)


def fill_bucket(s3: ObjectStore, folder: Path) -> None:
    """Put tiny models and rows where the examples look for theirs; ``folder`` holds them on the way.

    Example 06 names the bucket. What an example for a laptop reads lies below ``examples`` as it does in the project.
    """
    base, chat, both_ways = (folder / name for name in ("base", "chat", "both-ways"))
    save_tiny_model(base)
    save_tiny_model(chat, CHATML)
    save_tiny_encoder_decoder(both_ways)
    reviews = write_reviews(folder / "reviews.jsonl", rows=240)
    renamed = folder / "renamed.jsonl"
    rows = [json.loads(line) for line in reviews.read_text().splitlines()]
    renamed.write_text("".join(json.dumps({"review_body": row["text"], "label": row["label"]}) + "\n" for row in rows))
    content = {
        "models/base": base,
        "reviews.jsonl": reviews,
        "examples/01-sentiment-lora/prepared/model": chat,
        "examples/01-sentiment-lora/prepared/reviews.jsonl": renamed,
        "examples/02-full-tiny/prepared/model": base,
        "examples/09-encoder-decoder/prepared/model": both_ways,
        "examples/15-chat/prepared/model": chat,
    }
    beside = [file for file in EXAMPLES.glob("*/*") if file.suffix in (".csv", ".jsonl", ".yaml")]
    content |= {f"examples/{file.relative_to(EXAMPLES)}": file for file in beside}
    store = s3.client()
    s3.bucket(BUCKET)
    for key, path in content.items():
        for file in [path] if path.is_file() else sorted(path.iterdir()):
            store.upload_file(str(file), BUCKET, key if file is path else f"{key}/{file.name}")


def add_secret(jobs: Jobs, s3: ObjectStore, name: str = SECRET, **more: str) -> None:
    keys = {"AWS_ACCESS_KEY_ID": s3.access_key, "AWS_SECRET_ACCESS_KEY": s3.secret_key, "AWS_REGION": "us-east-1"}
    content = keys | more
    jobs.core.create_namespaced_secret(
        jobs.namespace, client.V1Secret(metadata=client.V1ObjectMeta(name=name), string_data=content)
    )


def example(
    s3: ObjectStore,
    name: str = "reviews-lora",
    of: str = "06-kubernetes",
    file: str = "finetunejob.yaml",
    **changes: Document,
) -> Document:
    """Return the job in ``file`` of example ``of``; ``changes`` are merged into the blocks of its spec.

    Its pods have no share of CPUs of their own unless ``compute`` gives them one. One for a laptop reads from the
    bucket what it reads there from folders.
    """
    folders = f"s3://{BUCKET}/examples"
    text = (EXAMPLES / of / file).read_text()
    text = text.replace("file://../", f"{folders}/").replace("file://./", f"{folders}/{of}/")
    document: Document = yaml.safe_load(text)
    document["metadata"]["name"] = name
    document["spec"]["output"] |= {"endpoint": s3.endpoint_in_cluster, "secretRef": {"name": SECRET}}
    for block, content in copy.deepcopy({"compute": NO_SHARE} | changes).items():
        document["spec"].setdefault(block, {}).update(content)
    return document


def lora_on_two(s3: ObjectStore) -> Document:
    """Return a long training on two workers, whose only checkpoints are those that are saved on request."""
    training = {"maxSteps": 500, "evalEverySteps": 500}
    # Each worker stores the part of the optimiser's state that is its own.
    compute = CPUS | {"deepspeed": {"stage": 2}}
    checkpoint = {"everySteps": 1000}
    return example(
        s3, of="05-multi-gpu-lora", training=training, checkpoint=checkpoint, compute=compute, runPolicy=UNCHECKED
    )


def add_claim(jobs: Jobs, name: str) -> None:
    resources = client.V1VolumeResourceRequirements(requests={"storage": "1Mi"})
    claim = client.V1PersistentVolumeClaimSpec(access_modes=["ReadWriteOnce"], resources=resources)
    jobs.core.create_namespaced_persistent_volume_claim(
        jobs.namespace, client.V1PersistentVolumeClaim(metadata=client.V1ObjectMeta(name=name), spec=claim)
    )


def full_on_two(s3: ObjectStore) -> Document:
    """Return a full fine-tuning whose weights are spread over two workers, and which saves on request alone."""
    training = {"maxSteps": 300, "evalEverySteps": 300}
    return example(
        s3,
        "reviews-full",
        of="04-full-deepspeed",
        training=training,
        checkpoint={"everySteps": 1000},
        compute=CPUS,
        runPolicy=UNCHECKED,
    )


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
