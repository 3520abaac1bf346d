"""FineTuneJobs in the API server, and what kubelet and Job controller would do to their children."""

import time
import urllib.error
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from finetune_api.report import ExitCode, Stage
from finetune_api.stage_result import StageResult, bounded
from finetune_api.status import ConditionType, FineTuneJobStatus, Phase

from ...unit.builders import make_manifest
from .api_server import ApiServer

MERGE = "application/merge-patch+json"
CLUSTER_SPEC = {"spec.data.tasks[0].source": "s3://bucket/reviews.jsonl", "spec.output.uri": "s3://bucket/models"}

Document = dict[str, Any]


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Workload:
    """The objects of one namespace."""

    def __init__(self, server: ApiServer, namespace: str) -> None:
        self.server = server
        self.namespace = namespace

    # --- as a user

    def apply(self, name: str = "reviews", **overrides: Any) -> Document:
        """Create a FineTuneJob; ``overrides`` by path, with ``__`` for dots."""
        by_path = {path.replace("__", "."): value for path, value in overrides.items()}
        manifest = make_manifest({**CLUSTER_SPEC, **by_path})
        manifest["metadata"]["name"] = name
        return dict(self.server.request("POST", self.path("finetunejobs"), manifest))

    def patch_spec(self, name: str, patch: Document) -> None:
        self.server.request("PATCH", self.path("finetunejobs", name), {"spec": patch}, MERGE)

    def delete(self, name: str) -> None:
        self.server.request("DELETE", self.path("finetunejobs", name))

    def get(self, name: str = "reviews") -> Document:
        return dict(self.server.request("GET", self.path("finetunejobs", name)))

    def status(self, name: str = "reviews") -> FineTuneJobStatus:
        return FineTuneJobStatus.model_validate(self.get(name).get("status") or {}, by_alias=True)

    def reason(self, kind: ConditionType, name: str = "reviews") -> str:
        return next((one.reason.value for one in self.status(name).conditions if one.type is kind), "")

    def message(self, kind: ConditionType, name: str = "reviews") -> str:
        return next((one.message for one in self.status(name).conditions if one.type is kind), "")

    def wait(
        self, holds: Callable[[FineTuneJobStatus], object], what: str, name: str = "reviews", seconds: float = 30
    ) -> FineTuneJobStatus:
        """Wait until the status is such, and return it."""
        deadline = time.monotonic() + seconds
        while not holds(status := self.status(name)):
            assert time.monotonic() < deadline, f"not so within {seconds:.0f} s: {what}; but {status!r}"
            time.sleep(0.02)
        return status

    def wait_phase(self, phase: Phase, name: str = "reviews", seconds: float = 30) -> FineTuneJobStatus:
        return self.wait(lambda status: status.phase is phase, f"phase {phase.value}", name, seconds)

    # --- as the control plane

    def children(self, job: str = "reviews") -> list[str]:
        found = self.server.request("GET", f"{self.path('jobs')}?labelSelector=finetune.dev/job={job}")
        return sorted(one["metadata"]["name"] for one in found["items"])

    def wait_child(self, stage: Stage, attempt: int = 1, job: str = "reviews", seconds: float = 30) -> Document:
        """Wait for the Job of an attempt, and return it."""
        name = f"{job}-{stage.value}-a{attempt}"
        deadline = time.monotonic() + seconds
        while True:
            try:
                return dict(self.server.request("GET", self.path("jobs", name)))
            except urllib.error.HTTPError as refusal:
                if refusal.code != 404:
                    raise
            assert time.monotonic() < deadline, f"no Job {name} within {seconds:.0f} s; status {self.status(job)!r}"
            time.sleep(0.02)

    def start_pod(self, child: Document, running: bool = True, number: int = 0) -> str:
        """Create the pod of a Job, as the Job controller does, and run it; return its name."""
        name = f"{child['metadata']['name']}-{number}"
        template = child["spec"]["template"]
        owner = {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "name": child["metadata"]["name"],
            "uid": child["metadata"]["uid"],
            "controller": True,
        }
        metadata = {**template["metadata"], "name": name, "ownerReferences": [owner]}
        spec = {"serviceAccountName": "default", **template["spec"], "nodeName": "node-1"}
        # Admission wants the class's values, which are the cluster's.
        spec.pop("priorityClassName", None)
        self.server.request("POST", self.path("pods"), {"metadata": metadata, "spec": spec})
        if running:
            self.run_pod(name)
        return name

    def run_pod(self, name: str) -> None:
        self.set_pod(name, "Running", {"running": {"startedAt": _now()}})

    def set_pod(self, name: str, phase: str, state: Document, **status: Any) -> None:
        container = {
            "name": "trainer",
            "image": "trainer",
            "imageID": "",
            "ready": False,
            "restartCount": 0,
            "state": state,
        }
        content = {"status": {"phase": phase, "containerStatuses": [container], **status}}
        self.server.request("PATCH", f"{self.path('pods', name)}/status", content, MERGE)

    def end_pod(self, name: str, result: StageResult, **ended: Any) -> None:
        """Let a pod end as its trainer says."""
        code = result.exit_code.value
        terminated = {
            "exitCode": code,
            "startedAt": _now(),
            "finishedAt": _now(),
            "reason": "Error" if code else "Completed",
            "message": bounded(result).decode(),
            **ended,
        }
        self.set_pod(name, "Failed" if code else "Succeeded", {"terminated": terminated})

    def end_child(self, child: Document, *, well: bool) -> None:
        """Say what the Job controller says of a Job whose pod has ended."""
        now, name = _now(), child["metadata"]["name"]
        first, last = ("SuccessCriteriaMet", "Complete") if well else ("FailureTarget", "Failed")
        conditions = [
            {"type": kind, "status": "True", "reason": "Test", "lastTransitionTime": now, "lastProbeTime": now}
            for kind in (first, last)
        ]
        begun = {"startTime": now, "succeeded" if well else "failed": 1}
        ended = {"completionTime": now} if well else {}
        for status in ({**begun, "conditions": conditions[:1]}, {**begun, **ended, "conditions": conditions}):
            self.server.request("PATCH", f"{self.path('jobs', name)}/status", {"status": status}, MERGE)

    def result(self, stage: Stage, **fields: Any) -> StageResult:
        """Return what a trainer says at its end."""
        return StageResult(stage=stage, exit_code=ExitCode.OK).model_copy(update=fields)

    def play(self, stage: Stage, attempt: int = 1, job: str = "reviews", **result: Any) -> None:
        """Let an attempt run and end."""
        child = self.wait_child(stage, attempt, job)
        pod = self.start_pod(child)
        said = self.result(stage, **result)
        self.end_pod(pod, said)
        self.end_child(child, well=said.exit_code is ExitCode.OK)

    def delete_pod(self, name: str) -> None:
        self.server.request("DELETE", self.path("pods", name), {"gracePeriodSeconds": 0})

    def delete_child(self, name: str) -> None:
        self.server.request("DELETE", f"{self.path('jobs', name)}?propagationPolicy=Background")

    def add_event(self, kind: str, uid: str, reason: str, message: str) -> None:
        """Write an event as kubelet and controllers do."""
        event = {
            "metadata": {"generateName": "test-", "namespace": self.namespace},
            "involvedObject": {"kind": kind, "namespace": self.namespace, "uid": uid, "name": "any"},
            "type": "Warning",
            "reason": reason,
            "message": message,
            "firstTimestamp": _now(),
            "lastTimestamp": _now(),
            "count": 1,
        }
        self.server.request("POST", self.path("events"), event)

    def events(self, job: str = "reviews") -> list[Document]:
        uid = self.get(job)["metadata"]["uid"]
        found = self.server.request("GET", f"{self.path('events')}?fieldSelector=involvedObject.uid={uid}")
        return list(found["items"])

    def path(self, plural: str, name: str = "") -> str:
        roots = {"finetunejobs": "/apis/finetune.dev/v1alpha1", "jobs": "/apis/batch/v1"}
        path = f"{roots.get(plural, '/api/v1')}/namespaces/{self.namespace}/{plural}"
        return f"{path}/{name}" if name else path
