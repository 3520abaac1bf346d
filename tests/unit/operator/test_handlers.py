"""What is registered with kopf, and which changes wake a job."""

import asyncio
import itertools
import warnings
from typing import Any

import kopf
import pytest

from finetune_operator.cache import Cache, Indices, keys_of, namespace_key
from finetune_operator.cluster import Login
from finetune_operator.handlers import CHILD_LABELS, EndlessBackoffs, Events, kopf_settings, registry
from finetune_operator.observed import ChildKind
from finetune_operator.view import child_view, packed_job, pod_view

from .objects import NAME, NAMESPACE
from .raw_objects import raw_child, raw_job, raw_pod

KEY = (NAMESPACE, NAME)


async def nobody() -> Login:
    raise AssertionError("nobody logs in")


def make_events(has_cap: bool = False) -> tuple[Events, Cache, list[tuple[str, str]]]:
    cache, woken = Cache(), list[tuple[str, str]]()
    return Events(cache, woken.append, has_cap), cache, woken


def test_kopf_writes_to_no_object() -> None:
    handlers = registry(Cache(), lambda key: None, nobody, has_cap=False, kinds=ChildKind)
    assert not handlers._changing.get_all_handlers()
    assert not handlers._spawning.get_all_handlers()
    assert not handlers._webhooks.get_all_handlers()
    assert len(handlers._watching.get_all_handlers()) == len(handlers._indexing.get_all_handlers()) == 4


@pytest.mark.parametrize(
    ("index", "event", "raw"),
    [("jobs", "job_changed", raw_job()), ("children", "Job_changed", raw_child()), ("pods", "pod_changed", raw_pod())],
    ids=["FineTuneJob", "Job", "Pod"],
)
def test_what_is_in_an_index_is_kept_nowhere_else_and_wakes_its_job(
    index: str, event: str, raw: dict[str, Any]
) -> None:
    cache, woken = Cache(), list[tuple[str, str]]()
    handlers = registry(cache, woken.append, nobody, has_cap=False, kinds=[ChildKind.JOB])
    [take_in] = [one.fn for one in handlers._indexing.get_all_handlers() if one.id == index]
    [tell] = [one.fn for one in handlers._watching.get_all_handlers() if one.id.endswith(event)]
    raw["metadata"]["managedFields"] = [{"manager": "kubectl"}]
    body = kopf.Body(raw)

    async def scenario() -> None:
        found = await take_in(body=body)  # type: ignore[call-arg, misc]
        cache.indices = Indices(**{index: {key: [view] for key, view in found.items()}})
        assert "managedFields" not in raw["metadata"] and not raw["spec"] and not raw.get("status")
        await tell(body=body, type=None)  # type: ignore[call-arg, misc]
        assert woken == [KEY]
        await tell(body=body, type=None)  # type: ignore[call-arg, misc]
        assert woken == [KEY], "it is what it was"

    asyncio.run(scenario())


def test_kopf_keeps_to_itself() -> None:
    with warnings.catch_warnings(action="error"):
        settings = kopf_settings()
    assert not settings.posting.enabled
    assert settings.peering.standalone
    assert settings.persistence.finalizer != "kopf.zalando.org/KopfFinalizerMarker"
    assert settings.process.ultimate_exiting_timeout is None


def test_kopf_copies_no_object() -> None:
    persistence = kopf_settings().persistence
    body = kopf.Body(raw_job())
    essence = persistence.diffbase_storage.build(body=body)
    assert persistence.progress_storage.clear(essence=essence) == {}
    assert persistence.diffbase_storage.fetch(body=body) is None


def test_children_are_selected_on_the_server() -> None:
    assert CHILD_LABELS == "app.kubernetes.io/managed-by=finetune-operator,finetune.dev/job-uid"


def test_requests_are_tried_again_for_ever_and_soon() -> None:
    pauses = list(itertools.islice(EndlessBackoffs(), 1000))
    assert len(pauses) == 1000 and max(pauses) <= 5 and pauses[0] < 1


def test_job_wakes_when_it_comes_changes_and_goes_but_not_for_its_progress() -> None:
    events, _, woken = make_events()
    events.job_changed(raw_job(), is_gone=False)
    events.job_changed(raw_job(resourceVersion="8"), is_gone=False)
    progress = {"stage": "train", "step": 1}
    events.job_changed(raw_job(status={"progress": progress}, resourceVersion="9"), is_gone=False)
    assert woken == [KEY]
    events.job_changed(raw_job(generation=2), is_gone=False)
    events.job_changed(raw_job(generation=2), is_gone=True)
    assert woken == [KEY] * 3


def test_echo_of_an_answer_wakes_nobody_and_whatever_is_newer_does() -> None:
    events, cache, woken = make_events()
    cache.wrote_job(packed_job(raw_job(status={"phase": "Queued"}, resourceVersion="8")))
    events.job_changed(raw_job(resourceVersion="7"), is_gone=False)
    events.job_changed(raw_job(status={"phase": "Queued"}, resourceVersion="8"), is_gone=False)
    assert woken == []
    events.job_changed(raw_job(status={"phase": "Queued"}, generation=2, resourceVersion="9"), is_gone=False)
    assert woken == [KEY]
    # Back to what was written, by somebody else.
    events.job_changed(raw_job(status={"phase": "Queued"}, resourceVersion="10"), is_gone=False)
    assert woken == [KEY] * 2
    events.job_changed(raw_job(status={"phase": "Queued"}, resourceVersion="8"), is_gone=True)
    assert woken == [KEY] * 3


def test_answer_about_a_namesake_that_is_gone_keeps_no_job_asleep() -> None:
    events, cache, woken = make_events()
    cache.wrote_job(packed_job(raw_job(uid="old", resourceVersion="99")))
    events.job_changed(raw_job(uid="new", resourceVersion="7"), is_gone=False)
    assert woken == [KEY]


def test_child_wakes_its_job_when_it_is_other_than_it_was_created() -> None:
    events, cache, woken = make_events()
    raw, later = raw_child(), raw_child(spec={"suspend": True})
    created = child_view(raw)
    assert created is not None
    cache.wrote_child(KEY, created)
    events.part_changed(raw, created, is_gone=False)
    assert woken == []
    events.part_changed(later, child_view(later), is_gone=False)
    assert woken == [KEY]


def test_child_that_was_changed_before_the_watch_told_of_it_wakes_its_job() -> None:
    events, cache, woken = make_events()
    created, later = child_view(raw_child()), raw_child(spec={"suspend": True})
    assert created is not None
    cache.wrote_child(KEY, created)
    events.part_changed(later, child_view(later), is_gone=False)
    assert woken == [KEY]


@pytest.mark.parametrize(
    ("raw", "later"),
    [
        pytest.param(raw_child(), raw_child(spec={"suspend": True}), id="Job"),
        pytest.param(raw_pod(), raw_pod(status={"phase": "Running"}), id="pod"),
    ],
)
def test_part_wakes_its_job_when_it_says_something_new(raw: dict[str, Any], later: dict[str, Any]) -> None:
    events, _, woken = make_events()
    see = child_view if raw.get("kind") == "Job" else pod_view
    events.part_changed(raw, see(raw), is_gone=False)
    raw["metadata"]["annotations"] = {"kubelet": "heartbeat"}
    events.part_changed(raw, see(raw), is_gone=False)
    assert woken == [KEY]
    events.part_changed(later, see(later), is_gone=False)
    events.part_changed(later, see(later), is_gone=True)
    assert woken == [KEY] * 3


def test_stranger_wakes_nobody() -> None:
    events, _, woken = make_events()
    raw = raw_child(metadata={"ownerReferences": []})
    events.part_changed(raw, child_view(raw), is_gone=False)
    assert woken == []


def test_jobs_that_wait_for_their_turn_are_woken_when_another_one_ends() -> None:
    events, cache, woken = make_events(has_cap=True)
    held_back = [
        {"type": "Accepted", "status": "True"},
        {"type": "Admitted", "status": "False", "reason": "QuotaExceeded"},
    ]
    waiting = packed_job(raw_job(status={"conditions": held_back}, name="waiting", uid="waiting"))
    cache.indices = Indices({waiting.key: [waiting], namespace_key(NAMESPACE): [waiting]})
    pod = raw_pod(status={"phase": "Running"})
    events.part_changed(pod, pod_view(pod), is_gone=False)
    assert woken == [KEY]
    ended = raw_pod(status={"phase": "Succeeded"})
    events.part_changed(ended, pod_view(ended), is_gone=False)
    assert woken == [KEY, KEY, waiting.key]
    woken.clear()
    events.job_changed(raw_job(status={"phase": "Failed"}), is_gone=False)
    assert woken == [KEY, waiting.key]


def test_a_job_that_waits_for_another_to_publish_is_woken_when_that_ones_phase_changes() -> None:
    events, cache, woken = make_events()
    goes_on = {"spec.model.startFrom": {"job": NAME}}
    for_another = {"spec.model.startFrom": {"job": "another"}}
    accepted = {"conditions": [{"type": "Accepted", "status": "True"}]}
    unknown = {"conditions": [{"type": "Accepted", "status": "Unknown", "reason": "WaitingForJob"}]}
    jobs = [
        packed_job(raw_job(goes_on, unknown, name="waiting", uid="1")),
        packed_job(raw_job(goes_on, name="new", uid="2")),
        packed_job(raw_job(goes_on, accepted, name="pinned", uid="3")),
        packed_job(raw_job(goes_on, {"phase": "Failed"}, name="over", uid="4")),
        packed_job(raw_job(for_another, unknown, name="of-another", uid="5")),
        packed_job(raw_job(goes_on, unknown, name="elsewhere", uid="6", namespace="elsewhere")),
    ]
    index: dict[Any, list[Any]] = {}
    for job in jobs:
        for key in keys_of(job):
            index.setdefault(key, []).append(job)
    cache.indices = Indices(index)
    waiting = [(NAMESPACE, "waiting"), (NAMESPACE, "new")]
    events.job_changed(raw_job(status={"phase": "Training"}), is_gone=False)
    assert woken == [KEY, *waiting]
    events.job_changed(raw_job(status={"phase": "Training", "attempts": [{"number": 1}]}), is_gone=False)
    assert woken == [KEY, *waiting, KEY], "its phase is the same"
    woken.clear()
    events.job_changed(raw_job(status={"phase": "Succeeded"}), is_gone=False)
    assert woken == [KEY, *waiting]
    woken.clear()
    events.job_changed(raw_job(status={"phase": "Succeeded"}), is_gone=True)
    assert woken == [KEY, *waiting]
