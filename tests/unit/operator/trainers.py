"""What the progress endpoint meets: jobs with a running pod, tokens, an API server that keeps what is written to it."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from finetune_api.report import Stage
from finetune_api.status import Attempt, FineTuneJobStatus, Phase
from finetune_operator import naming
from finetune_operator.authentication import ReviewUnavailableError, TokenVerdict
from finetune_operator.certificate import StoredSecret
from finetune_operator.observed import ChildKind, ChildView, JobView, PodPhase, PodView

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


class MemorySecret:
    """A Secret with optimistic locking."""

    def __init__(self, data: Mapping[str, bytes] | None = None):
        self.data: Mapping[str, bytes] | None = {} if data is None else data
        self.version = 1
        self.writes = 0

    async def read(self) -> StoredSecret | None:
        read = None if self.data is None else StoredSecret(self.data, str(self.version))
        await asyncio.sleep(0)
        return read

    async def write(self, data: Mapping[str, bytes], resource_version: str) -> StoredSecret | None:
        if resource_version != str(self.version):
            return None
        self.data, self.version, self.writes = data, self.version + 1, self.writes + 1
        return StoredSecret(data, str(self.version))


class Tokens:
    """A `TokenReviewer`: a token is good for one audience and bound to one pod."""

    def __init__(self) -> None:
        self.issued: dict[str, tuple[str, str | None]] = {}
        self.reviews = 0
        self.is_away = False

    def issue(self, audience: str, pod_uid: str | None) -> str:
        token = f"token-{len(self.issued)}"
        self.issued[token] = (audience, pod_uid)
        return token

    def expire(self, token: str) -> None:
        del self.issued[token]

    async def review_token(self, token: str, audiences: Sequence[str]) -> TokenVerdict:
        self.reviews += 1
        if self.is_away:
            raise ReviewUnavailableError("away")
        audience, pod_uid = self.issued.get(token, ("", None))
        if audience not in audiences:
            return TokenVerdict()
        return TokenVerdict(authenticated=True, audiences=(audience,), pod_uid=pod_uid)


@dataclass
class Jobs:
    """`authentication.Jobs` and `progress_writer.StatusPatcher`: the watched objects, and what is written to them."""

    by_name: dict[tuple[str, str], JobView] = field(default_factory=dict)
    children_by_uid: dict[str, ChildView] = field(default_factory=dict)
    pods: dict[str, PodView] = field(default_factory=dict)
    patches: list[tuple[tuple[str, str], Mapping[str, Any]]] = field(default_factory=list)
    refusals: int = 0
    """Writes still to be refused."""
    written: asyncio.Event = field(default_factory=asyncio.Event)

    def job(self, namespace: str, name: str) -> JobView | None:
        return self.by_name.get((namespace, name))

    def children(self, job: JobView) -> Sequence[ChildView]:
        return [child for child in self.children_by_uid.values() if child.owner_uid == job.uid]

    def pod(self, uid: str) -> PodView | None:
        return self.pods.get(uid)

    async def patch_progress(self, key: tuple[str, str], patch: Mapping[str, Any]) -> bool:
        if self.refusals:
            self.refusals -= 1
            return False
        self.patches.append((key, patch))
        self.written.set()
        return True

    def status(self, name: str = "reviews", namespace: str = "team") -> Mapping[str, Any]:
        """What was last written of a job's progress."""
        patch = next(patch for key, patch in reversed(self.patches) if key == (namespace, name))
        return dict(patch["status"])

    def put(self, job: JobView) -> None:
        self.by_name[job.key] = job

    def start(self, job: JobView, stage: Stage, attempt: int) -> PodView:
        """Let an attempt's Job and pod be there, and the job's status know of it."""
        name = naming.child_name(job.name, stage, attempt)
        child = ChildView(
            kind=ChildKind.JOB,
            name=name,
            uid=f"{job.uid}-{name}",
            owner_uid=job.uid,
            stage=stage,
            attempt=attempt,
            created=NOW,
        )
        pod = PodView(
            name=f"{name}-x",
            uid=f"{child.uid}-pod",
            child=name,
            child_uid=child.uid,
            job_uid=job.uid,
            stage=stage,
            attempt=attempt,
            phase=PodPhase.RUNNING,
            created=NOW,
        )
        self.children_by_uid[child.uid], self.pods[pod.uid] = child, pod
        known = self.by_name.get(job.key, job)
        attempts = (*known.status.attempts, Attempt(stage=stage, number=attempt, child=name))
        self.put(replace(known, status=known.status.model_copy(update={"attempts": attempts})))
        return pod


def make_job(name: str = "reviews", namespace: str = "team", phase: Phase = Phase.TRAINING) -> JobView:
    return JobView(
        namespace=namespace,
        name=name,
        uid=f"uid-{name}",
        generation=1,
        resource_version="7",
        created=NOW,
        deleting=False,
        labels={},
        annotations={},
        spec={},
        status=FineTuneJobStatus(phase=phase),
    )
