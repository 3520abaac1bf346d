"""The examples that a laptop runs, on a cluster: all at once, with tiny models, a few steps long, without a check of
their own where another example's checks the same kinds of rows and models. A new release of the chart comes meanwhile.

Examples 04 and 05 need KubeRay (`test_rayjobs`), 06 is what most tests here apply, and 10 wants a GPU (`test_jobs`).
"""

import shutil
import time
from pathlib import Path

import pytest
import yaml

from finetune_api.report import ExitCode
from finetune_api.status import Phase

from ..cluster.cluster import await_condition
from ..cluster.object_store import ObjectStore
from .object import Document, Jobs
from .release import CHART, OperatorRelease
from .sample import NO_SHARE, UNCHECKED, example

SECONDS = 2000
"""For all jobs together: they share what the machine has, and whichever is awaited first waits for nearly all."""

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

STOPPED = {"requests-leaking": "19-leak/finetunejob.yaml"}
"""By its check."""

CHECKED = ("full-tiny", "headlines", "chats", *STOPPED)

GO_ON_FROM = {"reviews-sentiment": "reviews-general", "requests-measured": "requests-weakened"}
"""On a laptop these read a folder that their reader has copied; on a cluster they name the other job."""


@pytest.mark.alone
@pytest.mark.timeout(2700)
def test_the_examples_for_a_laptop_run_on_a_cluster_too_and_an_upgrade_leaves_them_alone(
    jobs: Jobs, s3: ObjectStore, operator: OperatorRelease, tmp_path: Path
) -> None:
    for name in FILES | STOPPED:
        jobs.apply(shortened(name, s3))
    await_condition(lambda: len(at_work(jobs)) > 1, "pods at work", 120)
    working, operators = at_work(jobs), operator.pods()

    operator.install("--set=settings.backoffSeconds=11", chart=another_release(tmp_path))
    try:
        assert set(operator.pods()).isdisjoint(operators)
        deadline = time.monotonic() + SECONDS
        ended = {name: jobs.wait_phase(name, Phase.SUCCEEDED, deadline - time.monotonic()) for name in FILES}
    finally:
        operator.install()
    for name in STOPPED:
        stopped = jobs.wait_phase(name, Phase.FAILED, seconds=200)
        assert [attempt.exit_code for attempt in stopped.status.attempts] == [ExitCode.BAD_DATA], name
        assert stopped.status.data is not None, name
        assert stopped.status.data.leakage == 3
        assert {child.metadata.labels["finetune.dev/stage"] for child in jobs.children(stopped.uid)} == {"check"}
    for name, job in ended.items():
        assert job.status.evaluation is not None, name
        assert job.status.evaluation.tasks, name
        assert len(jobs.children(job.uid)) == len(job.status.attempts), name
    pods = {pod.metadata.uid: pod for job in ended.values() for pod in jobs.pods(job.uid)}
    assert [pods[uid].status.phase for uid in working] == ["Succeeded"] * len(working)


def at_work(jobs: Jobs) -> set[str]:
    """Return the UIDs of the pods that run."""
    pods = jobs.core.list_namespaced_pod(jobs.namespace, field_selector="status.phase=Running").items
    return {pod.metadata.uid for pod in pods}


def another_release(folder: Path) -> Path:
    """Return the chart as a later release has it."""
    chart = folder / "finetune-operator"
    shutil.copytree(CHART, chart)
    file = chart / "Chart.yaml"
    described = yaml.safe_load(file.read_text(encoding="utf-8"))
    file.write_text(yaml.safe_dump(described | {"version": "99.0.0"}), encoding="utf-8")
    return chart


def shortened(name: str, s3: ObjectStore) -> Document:
    folder, _, file = (FILES | STOPPED)[name].partition("/")
    cpu = NO_SHARE | {"gpusPerWorker": 0}
    checks = {} if name in CHECKED else UNCHECKED
    document = example(s3, name, folder, file, compute=cpu, runPolicy=checks)
    training = document["spec"]["training"]
    if "maxSteps" in training:
        training["maxSteps"] = 4
    if name in GO_ON_FROM:
        document["spec"]["model"]["startFrom"] = {"job": GO_ON_FROM[name]}
    return document
