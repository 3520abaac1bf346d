"""Find out which attempt's pod is calling: its token is reviewed by the API server, its owners are looked up.

Neither the labels of a pod nor what a caller says about itself are believed.
"""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from finetune_api.report import Stage
from finetune_operator import naming
from finetune_operator.observed import ChildView, JobView, PodView

logger = logging.getLogger(__name__)

POD_UID_CLAIM = "authentication.kubernetes.io/pod-uid"
SECONDS_REMEMBERED = 60.0
"""How long a token that was good counts as good: a token that is taken back works so much longer."""
SECONDS_REFUSED = 10.0
"""How long a token that was not good is not reviewed again."""
MOST_REMEMBERED = 10_000


@dataclass(frozen=True, slots=True)
class Address:
    """Whom a request speaks for, by its path."""

    namespace: str
    job: str
    stage: Stage
    attempt: int


@dataclass(frozen=True, slots=True)
class TokenVerdict:
    """What the API server says about a token."""

    authenticated: bool = False
    audiences: tuple[str, ...] = ()
    """Those of the asked audiences that the token is for."""
    pod_uid: str | None = None
    """The pod that the token is bound to."""


class TokenReviewer(Protocol):
    """Asks the API server."""

    async def review_token(self, token: str, audiences: Sequence[str]) -> TokenVerdict:
        """Return the verdict of a TokenReview; see `verdict_of`.

        Raises:
            ReviewUnavailableError: no verdict was to be had.
        """


class Jobs(Protocol):
    """The watched objects, each as last seen."""

    def job(self, namespace: str, name: str) -> JobView | None:
        """Return the FineTuneJob of that name."""

    def children(self, job: JobView) -> Sequence[ChildView]:
        """Return the Jobs and RayJobs that the FineTuneJob controls, and the one that went last.

        Who stops a job deletes that one, and its pods save what they have and report after it has gone.
        """

    def pod(self, uid: str) -> PodView | None:
        """Return the pod with that UID."""


class ReviewUnavailableError(Exception):
    """The API server gave no verdict."""


class NotAuthenticatedError(Exception):
    """The token is missing, expired, forged or for somebody else."""


class NotAllowedError(Exception):
    """The token is good, but its pod does not belong to the attempt."""


@dataclass(frozen=True, slots=True)
class Caller:
    """A pod, and the job that it runs for."""

    job: JobView
    pod: PodView


def verdict_of(status: Mapping[str, Any]) -> TokenVerdict:
    """Return the verdict in ``status`` of a TokenReview, as JSON."""
    extra = (status.get("user") or {}).get("extra") or {}
    pod_uids: list[str] = list(extra.get(POD_UID_CLAIM) or ())
    return TokenVerdict(
        authenticated=bool(status.get("authenticated")),
        audiences=tuple(status.get("audiences") or ()),
        pod_uid=pod_uids[0] if len(pod_uids) == 1 else None,
    )


class Authenticator:
    """Answers who is calling, with few questions to the API server."""

    def __init__(self, reviewer: TokenReviewer, jobs: Jobs, clock: Callable[[], float]):
        """Ask ``reviewer`` about tokens and ``jobs`` about owners; ``clock`` counts seconds."""
        self._reviewer = reviewer
        self._jobs = jobs
        self._clock = clock
        self._remembered: dict[tuple[bytes, str], tuple[float, TokenVerdict]] = {}

    async def caller(self, token: str, address: Address) -> Caller:
        """Return the pod that calls.

        Raises:
            NotAuthenticatedError: the token is not good for this address.
            NotAllowedError: its pod does not belong to this attempt.
            ReviewUnavailableError: the API server gave no verdict.
        """
        job = self._jobs.job(address.namespace, address.job)
        if job is None:
            # The same answer as to a bad token: who has none learns nothing about which jobs there are.
            raise NotAuthenticatedError("the token is not valid for this address")
        audience = naming.audience(job.namespace, job.name, job.uid, address.stage, address.attempt)
        verdict = await self._verdict(token, audience)
        if not verdict.authenticated or audience not in verdict.audiences:
            raise NotAuthenticatedError("the token is not valid for this address")
        if verdict.pod_uid is None:
            raise NotAllowedError("the token is not bound to a pod; use the projected token of the trainer's pod")
        return Caller(job, self._pod_of_attempt(verdict.pod_uid, job, address))

    async def _verdict(self, token: str, audience: str) -> TokenVerdict:
        key = (hashlib.sha256(token.encode()).digest(), audience)
        now = self._clock()
        if (known := self._remembered.get(key)) and now < known[0]:
            return known[1]
        verdict = await self._reviewer.review_token(token, [audience])
        seconds = SECONDS_REMEMBERED if verdict.authenticated else SECONDS_REFUSED
        self._remembered.pop(key, None)
        while len(self._remembered) >= MOST_REMEMBERED:
            del self._remembered[next(iter(self._remembered))]
        self._remembered[key] = (now + seconds, verdict)
        return verdict

    def _pod_of_attempt(self, pod_uid: str, job: JobView, address: Address) -> PodView:
        pod = self._jobs.pod(pod_uid)
        # A name cannot be changed as a label can, so the child's name says which attempt it is.
        expected = naming.child_name(job.name, address.stage, address.attempt)
        children = [child for child in self._jobs.children(job) if child.name == expected]
        if pod is None or not any(child.owns(pod) for child in children):
            raise NotAllowedError(f"pod {pod_uid} is not known to belong to {expected}")
        if pod.is_over:
            raise NotAllowedError(f"pod {pod.name} has ended")
        return pod
