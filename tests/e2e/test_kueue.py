"""FineTuneJobs in a queue: the real Kueue holds them back, lets them go and takes their place away again.

Inputs: as tests/e2e/test_jobs.py, and Kueue and KubeRay built from their Go modules.
"""

from collections.abc import Iterator

import pytest

from finetune_api.status import ConditionStatus, ConditionType, Phase, Reason

from ..cluster.cluster import Cluster, await_condition
from ..cluster.command import CommandError
from ..cluster.kuberay import KubeRay
from ..cluster.kueue import install_kueue, uninstall_kueue
from ..cluster.object_store import ObjectStore
from .object import Document, Job, Jobs
from .sample import CPUS, LONG, ONE_CPU, UNCHECKED, example, has_checkpoint, is_training

pytestmark = pytest.mark.alone

QUEUES = """
apiVersion: kueue.x-k8s.io/v1beta1
kind: ResourceFlavor
metadata: {name: any}
---
apiVersion: kueue.x-k8s.io/v1beta1
kind: WorkloadPriorityClass
metadata: {name: urgent}
value: 1000
---
apiVersion: kueue.x-k8s.io/v1beta1
kind: ClusterQueue
metadata: {name: one-at-a-time}
spec:
  namespaceSelector: {}
  preemption: {withinClusterQueue: LowerPriority}
  resourceGroups:
  - coveredResources: [cpu, memory]
    flavors:
    - name: any
      resources:
      - {name: cpu, nominalQuota: "1"}
      - {name: memory, nominalQuota: 16Gi}
"""

NO_CPU = QUEUES.replace('nominalQuota: "1"', 'nominalQuota: "0"')

LOCAL_QUEUE = """
apiVersion: kueue.x-k8s.io/v1beta1
kind: LocalQueue
metadata: {name: team}
spec: {clusterQueue: one-at-a-time}
"""

KUEUE_SAYS = "couldn't assign flavors to pod set main: insufficient unused quota for cpu in flavor any"


@pytest.fixture(scope="module")
def queues(cluster: Cluster, kuberay: KubeRay) -> Iterator[None]:
    """Let Kueue hold one CPU for whoever queues, Ray clusters as well, which it must know when it starts."""
    install_kueue(cluster)
    await_condition(lambda: applied(cluster), "Kueue's webhooks", 120)
    yield
    uninstall_kueue(cluster)


def applied(cluster: Cluster) -> bool:
    try:
        cluster.apply(QUEUES)
    except CommandError:
        return False
    return True


def queued(document: Document, priority: str | None = None) -> Document:
    """Return the job with Kueue's labels."""
    labels = {"kueue.x-k8s.io/queue-name": "team"}
    document["metadata"]["labels"] = labels | ({"kueue.x-k8s.io/priority-class": priority} if priority else {})
    return document


def is_held_back(job: Job) -> bool:
    admitted = job.condition(ConditionType.ADMITTED)
    return admitted is not None and (admitted.status, admitted.reason) == (ConditionStatus.FALSE, Reason.IN_QUEUE)


def headline(job: Job) -> str:
    return job.status.summary.message if job.status.summary else ""


def test_a_job_waits_for_quota_and_makes_room_for_a_more_urgent_one(
    jobs: Jobs, s3: ObjectStore, queues: None, cluster: Cluster
) -> None:
    cluster.apply(LOCAL_QUEUE, jobs.namespace)
    training = LONG["training"] | {"maxSteps": 600, "evalEverySteps": 300}
    jobs.apply(queued(example(s3, "patient", **LONG | {"training": training}, compute=ONE_CPU)))
    jobs.wait("patient", "a checkpoint", has_checkpoint(s3), seconds=240)

    jobs.apply(queued(example(s3, "waiting", compute=ONE_CPU, runPolicy=UNCHECKED)))
    waiting = jobs.wait("waiting", "what its queue says", lambda job: KUEUE_SAYS in headline(job), seconds=90)
    assert is_held_back(waiting) and waiting.phase is Phase.QUEUED
    assert "Job waiting-train-a1 is held back by its queue" in headline(waiting)

    jobs.apply(queued(example(s3, "urgent", compute=ONE_CPU, runPolicy=UNCHECKED), "urgent"))
    jobs.wait("patient", "the loss of its place", is_held_back, seconds=180)
    jobs.wait_phase("urgent", Phase.SUCCEEDED, seconds=400)
    jobs.delete("waiting")

    patient = jobs.wait_phase("patient", Phase.SUCCEEDED, seconds=500)
    trained = patient.trainings[-1]
    assert trained.resumed_from_step, patient.status.attempts
    assert trained.failures == 0


def is_admitted(job: Job) -> bool:
    return job.holds(ConditionType.ADMITTED)


@pytest.mark.timeout(2400)
def test_a_ray_cluster_waits_for_quota_makes_room_for_a_more_urgent_job_and_goes_on(
    jobs: Jobs, s3: ObjectStore, queues: None, cluster: Cluster
) -> None:
    cluster.apply(NO_CPU)
    cluster.apply(LOCAL_QUEUE, jobs.namespace)
    training, checkpoint = {"maxSteps": 400, "evalEverySteps": 400}, {"everySteps": 1000}
    jobs.apply(
        queued(
            example(
                s3, of="05-multi-gpu-lora", training=training, checkpoint=checkpoint, compute=CPUS, runPolicy=UNCHECKED
            )
        )
    )
    job = jobs.wait("reviews-lora", "what its queue says", lambda job: "quota for cpu" in headline(job), seconds=90)
    assert is_held_back(job) and job.phase is Phase.QUEUED
    assert "RayJob reviews-lora-train-a1 is held back by its queue" in headline(job)
    assert jobs.pods(job.uid) == []
    assert cluster.list("rayclusters.ray.io", jobs.namespace) == []

    cluster.apply(QUEUES)
    jobs.wait("reviews-lora", "its place", is_admitted, seconds=120)
    jobs.wait("reviews-lora", "training", is_training(5), seconds=720)

    jobs.apply(queued(example(s3, "urgent", compute=ONE_CPU, runPolicy=UNCHECKED), "urgent"))
    jobs.wait("reviews-lora", "the loss of its place", is_held_back, seconds=360)
    jobs.wait_phase("urgent", Phase.SUCCEEDED, seconds=600)

    job = jobs.wait_phase("reviews-lora", Phase.SUCCEEDED, seconds=800)
    trained = job.trainings[-1]
    assert trained.resumed_from_step, job.status.attempts
    assert trained.failures == 0
