"""Another release of the chart comes while a job trains: the job does not notice, and ends once."""

import shutil
from pathlib import Path

import pytest
import yaml

from finetune_api.report import Stage
from finetune_api.status import Phase

from ..cluster.object_store import ObjectStore
from .object import Jobs
from .release import CHART, OperatorRelease
from .sample import UNCHECKED, example, is_training


@pytest.mark.alone
@pytest.mark.timeout(500)
def test_an_upgrade_leaves_a_running_job_alone(
    jobs: Jobs, s3: ObjectStore, operator: OperatorRelease, tmp_path: Path
) -> None:
    jobs.apply(example(s3, training={"maxSteps": 200, "evalEverySteps": 200}, runPolicy=UNCHECKED))
    job = jobs.wait("reviews-lora", "training", is_training(1), seconds=200)
    [pod], operators = jobs.pods(job.uid), operator.pods()

    operator.install("--set=settings.backoffSeconds=11", chart=another_release(tmp_path))
    try:
        assert set(operator.pods()).isdisjoint(operators)
        job = jobs.wait_phase("reviews-lora", Phase.SUCCEEDED, seconds=300)
    finally:
        operator.install()
    assert [(one.stage, one.number) for one in job.status.attempts] == [(Stage.TRAIN, 1), (Stage.EVALUATE, 1)]
    assert len(jobs.children(job.uid)) == 2
    assert pod.metadata.uid in {one.metadata.uid for one in jobs.pods(job.uid)}
    ends = [phase for phase in jobs.seen[job.uid] if phase.is_terminal]
    assert ends == [Phase.SUCCEEDED]


def another_release(folder: Path) -> Path:
    """Return the chart as a later release has it."""
    chart = folder / "finetune-operator"
    shutil.copytree(CHART, chart)
    file = chart / "Chart.yaml"
    described = yaml.safe_load(file.read_text(encoding="utf-8"))
    file.write_text(yaml.safe_dump(described | {"version": "99.0.0"}), encoding="utf-8")
    return chart
