"""Whose pod is calling, by what the cache knows; who is refused is tested at the endpoint itself."""

import asyncio
from collections.abc import Sequence

import pytest

from finetune_api.report import Stage
from finetune_operator.authentication import Address, Authenticator, NotAllowedError, TokenVerdict
from finetune_operator.cache import Cache, Indices, uid_key
from finetune_operator.observed import ChildView
from finetune_operator.view import child_view, packed_job, pod_view

from .objects import NAME, NAMESPACE
from .raw_objects import raw_child, raw_job, raw_pod

KEY = (NAMESPACE, NAME)
RAY_CLUSTER = {"apiVersion": "ray.io/v1", "kind": "RayCluster", "name": "ray", "uid": "cluster", "controller": True}
POD = raw_pod(metadata={"ownerReferences": [RAY_CLUSTER]}, status={"phase": "Running"})


class Reviewer:
    async def review_token(self, token: str, audiences: Sequence[str]) -> TokenVerdict:
        return TokenVerdict(authenticated=True, audiences=tuple(audiences), pod_uid=POD["metadata"]["uid"])


def ray_job() -> ChildView:
    view = child_view(raw_child(kind="RayJob", status={"rayClusterName": "ray"}))
    assert view is not None
    return view


def caller(cache: Cache) -> str:
    authenticator = Authenticator(Reviewer(), cache, lambda: 0.0)
    return asyncio.run(authenticator.caller("token", Address(*KEY, Stage.TRAIN, 1))).pod.name


def make_cache() -> Cache:
    """Return what is known of a job whose child has gone, and whose pod has not."""
    cache = Cache()
    cache.indices = Indices({KEY: [packed_job(raw_job())]}, {}, {uid_key("pod"): [pod_view(POD)]})  # type: ignore[dict-item]
    return cache


def test_a_pod_may_tell_what_it_has_saved_after_its_ray_job_was_deleted() -> None:
    cache = make_cache()
    cache.saw_child(KEY, ray_job(), is_gone=True)
    assert caller(cache) == POD["metadata"]["name"]


def test_a_pod_whose_ray_job_nobody_has_seen_may_not() -> None:
    with pytest.raises(NotAllowedError, match="reviews-train-a1"):
        caller(make_cache())
