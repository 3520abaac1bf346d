"""Objects that an earlier version stored: valid, read whole, resolved to the same and carried to their end, for ever.

Each file below ``stored`` holds a FineTuneJob as the API server returns it, its status included, and the content of the
ConfigMap that it pins. None is ever edited; a new version of the definition gets a folder of its own beside them.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft4Validator

from finetune_api.crd import crd
from finetune_api.job import FineTuneJob
from finetune_api.report import Stage
from finetune_api.status import Phase
from finetune_operator import naming
from finetune_operator.acceptance import Accepted, judge
from finetune_operator.observed import ChildKind, ChildView, JobView
from finetune_operator.planner import plan
from finetune_operator.view import job_view, packed_job

from .fake_cluster import FakeCluster, Life, Operator
from .objects import make_settings

FILES = sorted((Path(__file__).parents[1] / "stored").glob("*/*.yaml"))
CASES = [pytest.param(yaml.safe_load(file.read_text(encoding="utf-8")), id=file.stem) for file in FILES]
SETTINGS = make_settings()
ENDS = {
    "new": Phase.SUCCEEDED,
    "checking": Phase.SUCCEEDED,
    "training": Phase.SUCCEEDED,
    "training-on-workers": Phase.SUCCEEDED,
    "soft-prompt": Phase.SUCCEEDED,
    "published": Phase.SUCCEEDED,
    "kept-back": Phase.SUCCEEDED,
    "suspended": Phase.SUSPENDED,
    "failed": Phase.FAILED,
}


def view_of(stored: dict[str, Any]) -> JobView:
    return job_view(packed_job(stored["job"]))


def test_every_kind_of_object_is_kept() -> None:
    assert {file.stem for file in FILES} == set(ENDS)


@pytest.mark.parametrize("stored", CASES)
def test_a_stored_object_fits_todays_definition(stored: dict[str, Any]) -> None:
    job = stored["job"]
    (version,) = [one for one in crd()["spec"]["versions"] if f"finetune.dev/{one['name']}" == job["apiVersion"]]
    assert version["served"], "clients of this version are still answered"
    schema = version["schema"]["openAPIV3Schema"]
    # What OpenAPI 3.0 has, and with it Kubernetes, is draft 4.
    assert [error.message for error in Draft4Validator(schema).iter_errors(job)] == []
    FineTuneJob.model_validate(job, by_alias=True, by_name=False)


@pytest.mark.parametrize("stored", CASES)
def test_a_stored_status_is_read_whole(stored: dict[str, Any]) -> None:
    status = view_of(stored).status.model_dump(mode="json", by_alias=True, exclude_none=True)
    assert covers(status, stored["job"].get("status", {})) == []


@pytest.mark.parametrize("stored", [case for case in CASES if case.id != "new"])
def test_a_stored_job_resolves_to_what_was_pinned(stored: dict[str, Any]) -> None:
    verdict = judge(view_of(stored), SETTINGS)
    assert isinstance(verdict, Accepted)
    pinned = json.loads(stored["pinned"])["spec"]
    # May be changed while the job exists.
    del pinned["runPolicy"]["suspend"]
    # A later version may add fields, with defaults that change nothing.
    assert covers(verdict.job.spec.model_dump(mode="json", by_alias=True, exclude_none=True), pinned) == []


@pytest.mark.parametrize(
    ("stored", "end"), [pytest.param(*case.values, ENDS[str(case.id)], id=case.id) for case in CASES]
)
def test_a_stored_job_goes_on_where_it_was(stored: dict[str, Any], end: Phase) -> None:
    cluster = cluster_of(stored)
    before = cluster.job.status
    running = {one.child for one in before.attempts if one.end_time is None}
    Operator(cluster, lambda job, observed, now: plan(job, observed, SETTINGS, now)).run()
    assert cluster.phase is end
    after = {(one.stage, one.number): one for one in cluster.job.status.attempts}
    assert not [name for name in running if f"create {name}" in cluster.log], "what runs is left alone"
    assert all(after[one.stage, one.number] == one for one in before.attempts if one.end_time is not None)
    if before.phase and before.phase.is_terminal:
        assert cluster.log == [], "what has ended stays so"
    elif before.attempts:
        assert {one.number for one in after.values() if one.stage is before.attempts[-1].stage} == {
            one.number for one in before.attempts if one.stage is before.attempts[-1].stage
        }, "nothing is done twice"


def cluster_of(stored: dict[str, Any]) -> FakeCluster:
    """Return the cluster around a stored job: its ConfigMap, and the Job of its open attempt, whose pod is to start."""
    lives = {(stage, number): Life() for stage in Stage for number in (1, 2)}
    cluster = FakeCluster(lives=lives)
    cluster.job = view_of(stored)
    if resolved := cluster.job.status.resolved:
        assert resolved.config_map == naming.spec_config_map_name(cluster.job.name, resolved.spec_hash or "")
        cluster.config_maps[resolved.config_map] = {"data": {"job.json": stored["pinned"]}}
    for one in cluster.job.status.attempts:
        if one.end_time is None:
            is_ray = cluster.job.spec.get("compute", {}).get("workers", 1) > 1 and one.stage is Stage.TRAIN
            cluster.adopt(
                ChildView(
                    kind=ChildKind.RAY_JOB if is_ray else ChildKind.JOB,
                    name=one.child,
                    ray_cluster=f"{one.child}-abcde" if is_ray else "",
                    uid="from-before",
                    owner_uid=cluster.job.uid,
                    stage=one.stage,
                    attempt=one.number,
                    created=cluster.now,
                    admitted=cluster.now,
                )
            )
    return cluster


def covers(now: Any, then: Any, path: str = "") -> list[str]:
    """Return where ``now`` says something else than ``then``, or nothing; what it says besides is no difference."""
    if isinstance(then, dict) and isinstance(now, dict):
        return [found for key, value in then.items() for found in covers(now.get(key), value, f"{path}.{key}")]
    if isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        return [found for i, value in enumerate(then) for found in covers(now[i], value, f"{path}[{i}]")]
    return [] if now == then else [f"{path}: {now!r} instead of {then!r}"]
