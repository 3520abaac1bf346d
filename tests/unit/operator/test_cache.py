"""The cache: what the watches told, what was written since, and what is gone without their knowing."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from finetune_api.report import Stage
from finetune_operator import naming
from finetune_operator.cache import OVERLAY_SECONDS, Cache, Indices, namespace_key, uid_key
from finetune_operator.observed import ChildView, PodView
from finetune_operator.view import PackedJob, child_view, job_view, packed_job, pod_view

from .objects import NAME, NAMESPACE
from .raw_objects import CREATED, container, raw_child, raw_job, raw_pod

KEY = (NAMESPACE, NAME)


@dataclass
class Watched:
    """A cache, and what the watches put into it."""

    jobs: dict[Any, Any] = field(default_factory=dict)
    children: dict[Any, Any] = field(default_factory=dict)
    pods: dict[Any, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.cache = Cache(lambda: self.seconds)
        self.cache.indices = Indices(self.jobs, self.children, self.pods)

    def tell_job(self, **metadata: Any) -> PackedJob:
        job = packed_job(raw_job(**metadata))
        for key in (KEY, namespace_key(NAMESPACE)):
            self.jobs.setdefault(key, []).append(job)
        return job

    def tell_child(self, child: ChildView) -> None:
        _tell(self.children, child)

    def tell_pod(self, pod: PodView) -> None:
        _tell(self.pods, pod)


def _tell(index: dict[Any, Any], view: ChildView | PodView) -> None:
    for key in (KEY, uid_key(view.uid), namespace_key(NAMESPACE)):
        index.setdefault(key, []).append(view)


def make_child(uid: str = "child", attempt: int = 1, **parts: Any) -> ChildView:
    child = child_view(raw_child(Stage.TRAIN, attempt, uid, **parts))
    assert child is not None
    return child


def make_pod(**parts: Any) -> PodView:
    pod = pod_view(raw_pod(**parts))
    assert pod is not None
    return pod


def test_what_was_written_counts_until_the_watch_has_caught_up() -> None:
    watched = Watched()
    watched.tell_job(resourceVersion="7")
    written = packed_job(raw_job(resourceVersion="9"))
    watched.cache.wrote_job(written)
    assert watched.cache.packed(KEY) is written
    watched.jobs[KEY] = [newest := packed_job(raw_job(resourceVersion="10"))]
    assert watched.cache.packed(KEY) is newest


def test_versions_are_compared_as_numbers() -> None:
    watched = Watched()
    watched.tell_job(resourceVersion="9")
    watched.cache.wrote_job(written := packed_job(raw_job(resourceVersion="10")))
    assert watched.cache.packed(KEY) is written


def test_what_was_written_of_a_namesake_counts_no_more() -> None:
    watched = Watched()
    watched.cache.wrote_job(packed_job(raw_job(resourceVersion="9", uid="old")))
    new = watched.tell_job(resourceVersion="7", uid="new")
    assert watched.cache.packed(KEY) is new


def test_ghost_is_left_out_and_its_namesake_is_not() -> None:
    watched = Watched()
    watched.tell_job(uid="ghost", resourceVersion="99")
    new = watched.tell_job(uid="new", resourceVersion="7")
    watched.cache.mark_ghost("ghost")
    assert watched.cache.packed(KEY) is new
    for namespace, uids in ((None, {"new"}), (NAMESPACE, {"new"}), ("elsewhere", set())):
        assert watched.cache.uids("FineTuneJob", namespace) == uids


def test_created_child_is_there_until_the_watch_tells_that_it_is_gone() -> None:
    watched = Watched()
    job = watched.tell_job()
    child = make_child()
    watched.cache.wrote_child(KEY, child)
    assert watched.cache.children_of(job) == (child,)
    assert watched.cache.child("child") == child
    watched.tell_child(child)
    watched.cache.saw_child(KEY, child, is_gone=False)
    assert watched.cache.children_of(job) == (child,)
    watched.children.clear()
    assert watched.cache.children_of(job) == ()


def test_created_child_that_no_watch_ever_tells_of_is_doubted_after_a_while() -> None:
    watched = Watched()
    job = watched.tell_job()
    watched.cache.wrote_child(KEY, make_child())
    watched.seconds = OVERLAY_SECONDS + 1
    assert watched.cache.children_of(job) == ()


def test_deleted_child_counts_as_being_deleted_while_the_watch_still_tells_of_it() -> None:
    watched = Watched()
    job = watched.tell_job()
    watched.tell_child(child := make_child())
    watched.cache.deleted_child(KEY, child)
    watched.cache.saw_child(KEY, child, is_gone=False)
    assert [one.deleting for one in watched.cache.children_of(job)] == [True]
    watched.children.clear()
    watched.cache.saw_child(KEY, child, is_gone=True)
    assert watched.cache.children_of(job) == ()


def test_child_that_went_last_is_known_to_those_who_ask_whose_a_pod_is_and_to_nobody_else() -> None:
    watched = Watched()
    job = watched.tell_job()
    watched.cache.saw_child(KEY, child := make_child(), is_gone=True)
    assert watched.cache.children(job_view(job)) == (child,)
    assert watched.cache.children_of(job) == ()
    assert watched.cache.uids_with_work(NAMESPACE) == set()
    watched.cache.forget_job(KEY)
    assert watched.cache.children(job_view(job)) == ()


def test_child_of_a_namesake_is_not_taken_for_one_that_went() -> None:
    watched = Watched()
    watched.cache.saw_child(KEY, make_child(), is_gone=True)
    job = watched.tell_job(uid="another")
    assert watched.cache.children(job_view(job)) == ()


def test_pods_of_children_that_are_gone_count_while_they_may_run() -> None:
    watched = Watched()
    job = watched.tell_job()
    watched.tell_pod(make_pod(status={"phase": "Running"}))
    assert len(watched.cache.pods_of(job)) == 1
    watched.pods.clear()
    watched.tell_pod(make_pod(status={"phase": "Failed"}))
    assert watched.cache.pods_of(job) == ()
    watched.tell_child(make_child())
    assert len(watched.cache.pods_of(job)) == 1


HAS_FAILED = {"conditions": [{"type": "Failed", "status": "True", "lastTransitionTime": CREATED}]}


OOM_KILLED = {"reason": "OOMKilled", "exitCode": 137, "startedAt": CREATED, "finishedAt": CREATED}
EVICTED = {
    "reason": "Evicted",
    "message": "Pod ephemeral local storage usage exceeds the total limit of containers 1Gi.",
}


def killed_pod(phase: str = "Failed", **parts: Any) -> PodView:
    return make_pod(status={"phase": phase, **container(terminated=OOM_KILLED)}, **parts)


@pytest.mark.parametrize(
    "pod",
    [
        pytest.param(killed_pod("Running"), id="killed, and its pod not told of"),
        pytest.param(killed_pod(), id="killed"),
        pytest.param(make_pod(status={"phase": "Failed", **EVICTED}), id="evicted for what it stored"),
    ],
)
def test_pod_that_was_ended_at_a_limit_of_its_own_is_known_when_somebody_has_deleted_it(pod: PodView) -> None:
    watched = Watched()
    job = watched.tell_job()
    watched.tell_child(make_child(status=HAS_FAILED))
    watched.tell_pod(pod)
    watched.cache.saw_pod(KEY, pod)
    assert watched.cache.pods_of(job) == (pod,)
    watched.pods.clear()
    watched.cache.saw_pod(KEY, pod)
    [known] = watched.cache.pods_of(job)
    assert (known.uid, known.is_over, known.out_of_memory, known.over_limit) == (
        pod.uid,
        True,
        pod.out_of_memory,
        pod.over_limit,
    )
    watched.cache.forget_job(KEY)
    assert watched.cache.pods_of(job) == ()


def test_pod_that_was_killed_and_replaced_is_nothing_to_a_job_that_goes_on() -> None:
    watched = Watched()
    job = watched.tell_job()
    watched.tell_child(make_child())
    watched.cache.saw_pod(KEY, killed_pod())
    assert watched.cache.pods_of(job) == ()


def test_pod_that_was_killed_counts_for_the_job_alone_whose_child_it_was() -> None:
    watched = Watched()
    watched.cache.saw_pod(KEY, killed_pod())
    job = watched.tell_job()
    watched.tell_child(make_child(status=HAS_FAILED))
    assert watched.cache.pods_of(job) == (), "nobody forgets what is kept for a job that does not exist"
    watched.cache.saw_pod(KEY, killed_pod(metadata={"labels": naming.child_labels(NAME, "another", Stage.TRAIN, 1)}))
    assert watched.cache.pods_of(job) == ()
    watched.cache.saw_pod(KEY, killed_pod())
    watched.children.clear()
    assert watched.cache.pods_of(job) == ()


def test_work_of_a_namespace_is_what_runs_or_may_start() -> None:
    watched = Watched()
    job = watched.tell_job()
    assert watched.cache.uids_with_work(NAMESPACE) == set()
    watched.cache.wrote_child(KEY, make_child())
    assert watched.cache.uids_with_work(NAMESPACE) == {job.uid}
    watched.cache.forget_job(KEY)
    watched.tell_child(make_child(spec={"suspend": True}))
    assert watched.cache.uids_with_work(NAMESPACE) == set()
    with watched.cache.beginning(job):
        assert watched.cache.uids_with_work(NAMESPACE) == {job.uid}
    assert watched.cache.uids_with_work(NAMESPACE) == set()
    watched.tell_pod(make_pod(status={"phase": "Running"}))
    assert watched.cache.uids_with_work(NAMESPACE) == {job.uid}


def test_stranger_is_known_and_nobodys_child() -> None:
    watched = Watched()
    watched.cache.note_stranger("Job", NAMESPACE, "stranger")
    assert watched.cache.uids("Job", None) == watched.cache.uids("Job", NAMESPACE) == {"stranger"}
    assert watched.cache.uids("Job", "elsewhere") == watched.cache.uids("Pod", None) == set()
    watched.cache.forget_stranger("stranger")
    assert watched.cache.uids("Job", None) == set()
