"""FineTuneJobs in the cluster, as a user sees them: apply one, await what its status says, look at its children."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kubernetes import client, config, watch

from finetune_api.crd import GROUP, PLURAL, VERSION
from finetune_api.report import Stage
from finetune_api.status import Attempt, Condition, ConditionStatus, ConditionType, FineTuneJobStatus, Phase

JOB_UID_LABEL = "finetune.dev/job-uid"

Document = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One look at an object."""

    document: Document

    @property
    def uid(self) -> str:
        return str(self.document["metadata"]["uid"])

    @property
    def status(self) -> FineTuneJobStatus:
        return FineTuneJobStatus.model_validate(self.document.get("status") or {}, by_alias=True)

    @property
    def phase(self) -> Phase | None:
        return self.status.phase

    @property
    def trainings(self) -> list[Attempt]:
        """The attempts at training that the status knows, oldest first."""
        return [one for one in self.status.attempts if one.stage is Stage.TRAIN]

    def condition(self, kind: ConditionType) -> Condition | None:
        return next((one for one in self.status.conditions if one.type is kind), None)

    def holds(self, kind: ConditionType) -> bool:
        condition = self.condition(kind)
        return condition is not None and condition.status is ConditionStatus.TRUE


class Jobs:
    """The FineTuneJobs of one namespace."""

    def __init__(self, kubeconfig: Path, namespace: str) -> None:
        self.namespace = namespace
        self.api_client = config.new_client_from_config(str(kubeconfig))
        self.objects = client.CustomObjectsApi(self.api_client)
        self.batch = client.BatchV1Api(self.api_client)
        self.core = client.CoreV1Api(self.api_client)
        self.seen: dict[str, list[Phase]] = {}

    def apply(self, document: Document) -> Job:
        return Job(
            self.objects.create_namespaced_custom_object(
                GROUP, VERSION, self.namespace, PLURAL, document, field_validation="Strict"
            )
        )

    def get(self, name: str) -> Job:
        return Job(self.objects.get_namespaced_custom_object(GROUP, VERSION, self.namespace, PLURAL, name))

    def patch(self, name: str, spec: Document) -> None:
        self.objects.patch_namespaced_custom_object(GROUP, VERSION, self.namespace, PLURAL, name, {"spec": spec})

    def delete(self, name: str) -> None:
        self.objects.delete_namespaced_custom_object(GROUP, VERSION, self.namespace, PLURAL, name)

    def wait(self, name: str, what: str, reached: Callable[[Job], bool], seconds: float = 240) -> Job:
        """Return the job once ``reached``; everything that is known is said when it takes too long."""
        deadline = time.monotonic() + seconds
        last: Job | None = None
        for last in self._changes(name, deadline):
            phases = self.seen.setdefault(last.uid, [])
            if last.phase is not None and (not phases or phases[-1] is not last.phase):
                phases.append(last.phase)
            if reached(last):
                return last
        raise AssertionError(f"{name}: no {what} within {seconds:.0f} s; {self.describe(name, last)}")

    def wait_phase(self, name: str, phase: Phase, seconds: float = 240) -> Job:
        def arrived(job: Job) -> bool:
            if job.phase is not None and job.phase.is_terminal and job.phase is not phase:
                raise AssertionError(f"{name} ended {job.phase.value}, not {phase.value}; {self.describe(name, job)}")
            return job.phase is phase

        return self.wait(name, f"phase {phase.value}", arrived, seconds)

    def _changes(self, name: str, deadline: float) -> Iterator[Job]:
        while (left := deadline - time.monotonic()) > 0:
            stream = watch.Watch()
            try:
                for event in stream.stream(
                    self.objects.list_namespaced_custom_object,
                    GROUP,
                    VERSION,
                    self.namespace,
                    PLURAL,
                    field_selector=f"metadata.name={name}",
                    timeout_seconds=max(1, int(left)),
                    _request_timeout=left + 5,
                ):
                    yield Job(event["object"])
            except client.ApiException as error:
                if error.status != 410:
                    raise
            finally:
                stream.stop()

    def children(self, uid: str) -> list[Any]:
        return list(self.batch.list_namespaced_job(self.namespace, label_selector=f"{JOB_UID_LABEL}={uid}").items)

    def pods(self, uid: str) -> list[Any]:
        return list(self.core.list_namespaced_pod(self.namespace, label_selector=f"{JOB_UID_LABEL}={uid}").items)

    def logs(self, pod: str, lines: int = 40) -> str:
        return str(self.core.read_namespaced_pod_log(pod, self.namespace, tail_lines=lines))

    def describe(self, name: str, job: Job | None) -> str:
        """Return all that helps to see why a job did not get on."""
        if job is None:
            return "the object was never seen"
        lines = [json.dumps(job.document.get("status"), indent=1)]
        for pod in self.pods(job.uid):
            lines.append(f"--- {pod.metadata.name}: {pod.status.phase} {pod.status.container_statuses}")
            try:
                lines.append(self.logs(pod.metadata.name))
            except client.ApiException as error:
                lines.append(f"no log: {error.reason}")
        return "\n".join(lines)
