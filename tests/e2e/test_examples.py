"""The examples that a laptop runs, on a cluster: all at once, with tiny models, a few steps long, without a check of
their own where another example's checks the same kinds of rows and models.

Examples 04 and 05 need KubeRay (`test_rayjobs`), 06 is what most tests here apply, and 10 wants a GPU (`test_jobs`).
"""

import pytest

from finetune_api.status import Phase

from ..cluster.object_store import ObjectStore
from .object import Document, Jobs
from .sample import ONE_THREAD, UNCHECKED, example

FILES = {
    "sentiment-lora": "01-sentiment-lora/finetunejob.yaml",
    "full-tiny": "02-full-tiny/finetunejob.yaml",
    "sentiment-prompt": "03-prompt-tuning/finetunejob.yaml",
    "reviews-general": "07-chaining/general.yaml",
    "reviews-sentiment": "07-chaining/finetunejob.yaml",
    "mixture": "08-mixture/finetunejob.yaml",
    "headlines": "09-encoder-decoder/finetunejob.yaml",
    "requests-adapter": "11-other-methods/adapter.yaml",
    "requests-ia3": "11-other-methods/ia3.yaml",
    "requests-prefix": "11-other-methods/prefix.yaml",
    "requests-near-base": "12-forgetting/finetunejob.yaml",
    "requests-weakened": "12-forgetting/lora.yaml",
    "requests-measured": "13-evaluation-only/finetunejob.yaml",
    "requests-benchmark": "14-benchmark/finetunejob.yaml",
    "chats": "15-chat/finetunejob.yaml",
    "requests-questioned": "16-is-tuning-needed/finetunejob.yaml",
    "requests-by-topic": "17-template-library/finetunejob.yaml",
    "reviews-rslora": "18-several-adapters/rslora.yaml",
    "requests-lora": "18-several-adapters/lora.yaml",
    "requests-dora": "18-several-adapters/dora.yaml",
}
"""By the name of the job."""

CHECKED = ("full-tiny", "headlines", "chats")

GO_ON_FROM = {"reviews-sentiment": "reviews-general", "requests-measured": "requests-weakened"}
"""On a laptop these read a folder that their reader has copied; on a cluster they name the other job."""


@pytest.mark.alone
@pytest.mark.timeout(1200)
def test_the_examples_for_a_laptop_run_on_a_cluster_too(jobs: Jobs, s3: ObjectStore) -> None:
    for name in FILES:
        jobs.apply(shortened(name, s3))
    for name in FILES:
        job = jobs.wait_phase(name, Phase.SUCCEEDED, seconds=1100)
        assert job.status.evaluation is not None, name
        assert job.status.evaluation.tasks, name


def shortened(name: str, s3: ObjectStore) -> Document:
    folder, _, file = FILES[name].partition("/")
    cpu = {"gpusPerWorker": 0, "resources": {"memory": "3Gi"}, "pod": ONE_THREAD}
    checks = {} if name in CHECKED else UNCHECKED
    document = example(s3, name, folder, file, compute=cpu, runPolicy=checks)
    training = document["spec"]["training"]
    if "maxSteps" in training:
        training["maxSteps"] = 4
    if name in GO_ON_FROM:
        document["spec"]["model"]["startFrom"] = {"job": GO_ON_FROM[name]}
    return document
