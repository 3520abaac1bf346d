"""End to end: a real cluster, a real S3 server, the images as they are shipped.

Inputs: what `make cluster` left running, else a machine on which `tests/cluster` can make one. Outputs: none; a cluster
that the session started is removed after it, one that was there stays and keeps the operator. Without a cluster these
tests fail in CI and are skipped, with the reason, elsewhere.

Such a test waits for pods half of the time, so `make e2e` runs them two at a time. Those that take away what others
use, or promise seconds, are marked `alone` and follow.
"""

import fcntl
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from ..cluster.cluster import Cluster, find_cluster, lend_cluster
from ..cluster.command import ClusterUnavailableError
from ..cluster.kuberay import KubeRay, install_kuberay
from ..cluster.object_store import ObjectStore, start_object_store
from ..cluster.project_image import OPERATOR, TRAINER, ProjectImage, provide
from .object import Jobs
from .pod import restricted_namespace
from .release import OperatorRelease
from .sample import BUCKET, add_secret, fill_bucket

TEST_SECONDS = 1800
"""Against hanging alone: more than the waits of nearly every test together."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put what needs the trainer's image behind all else: it is built meanwhile.

    The time limit of a test here, its own one as well, begins after its fixtures: the first of them may have a cluster
    to make.
    """
    for item in items:
        if Path(__file__).parent in item.path.parents:
            own = item.get_closest_marker("timeout")
            seconds = own.args[0] if own else TEST_SECONDS
            item.add_marker(pytest.mark.timeout(seconds, func_only=True), append=False)
    items.sort(key=needs_trainer)


def needs_trainer(item: pytest.Item) -> bool:
    return "images" in getattr(item, "fixturenames", ())


Turn = Callable[[str], AbstractContextManager[bool]]
"""Lets one process of a run after another do what has that name; tells whether it is the first."""


@pytest.fixture(scope="session")
def turn(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Turn:
    """For what must be made once, however many processes need it."""
    own = tmp_path_factory.getbasetemp()
    folder = own if worker_id == "master" else own.parent

    @contextmanager
    def take(name: str) -> Iterator[bool]:
        with (folder / name).open("a", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield lock.tell() == 0
            lock.write("done")

    return take


@dataclass(frozen=True, slots=True)
class Images:
    """Names of the project's images; pods use them with imagePullPolicy IfNotPresent or Never."""

    operator: str
    trainer: str


@pytest.fixture(scope="session")
def cluster(worker_id: str) -> Iterator[Cluster]:
    """Yield the cluster that runs, else one for this session, which leaves nothing behind."""
    try:
        if worker_id != "master" and find_cluster() is None:
            raise ClusterUnavailableError("side by side, tests need one that is there before and after each of them")
        with lend_cluster() as cluster:
            yield cluster
    except ClusterUnavailableError as error:
        if os.environ.get("CI"):
            pytest.fail(f"CI needs a cluster: {error}")
        pytest.skip(f"no cluster: {error}")


@pytest.fixture
def namespace(cluster: Cluster) -> Iterator[str]:
    """Yield the name of a namespace that only this test uses; no pod comes into it that is not restricted."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    cluster.apply(restricted_namespace(name))
    yield name
    cluster.kubectl("delete", "namespace", name, "--wait=false")


@pytest.fixture(scope="session")
def s3(cluster: Cluster) -> ObjectStore:
    """Return the S3 server in the cluster."""
    return start_object_store(cluster)


@pytest.fixture(scope="session")
def builds(
    cluster: Cluster, turn: Turn, request: pytest.FixtureRequest
) -> Iterator[Mapping[ProjectImage, Future[str]]]:
    """Yield the names of this checkout's images, built and loaded one after the other; the trainer's takes minutes."""
    wanted = [OPERATOR, *([TRAINER] if any(map(needs_trainer, request.session.items)) else [])]

    def build(image: ProjectImage) -> str:
        with turn(image.name) as is_first:
            return provide(image, cluster) if is_first else image.name

    with ThreadPoolExecutor(1, "images") as pool:
        yield {image: pool.submit(build, image) for image in wanted}


@pytest.fixture(scope="session")
def operator_image(builds: Mapping[ProjectImage, Future[str]]) -> str:
    """Return the operator's image: also the small Python image for test pods."""
    return builds[OPERATOR].result()


@pytest.fixture(scope="session")
def images(builds: Mapping[ProjectImage, Future[str]]) -> Images:
    """Return both images of the project."""
    return Images(builds[OPERATOR].result(), builds[TRAINER].result())


@pytest.fixture(scope="session")
def operator(cluster: Cluster, operator_image: str, turn: Turn) -> OperatorRelease:
    """Return the operator, installed by its chart from this checkout. Jobs need the fixture `images` as well."""
    release = OperatorRelease(cluster, operator_image, TRAINER.name)
    with turn("operator") as is_first:
        if is_first:
            was_there = release.is_installed
            release.install()
            if was_there:
                release.restart()
    return release


@pytest.fixture(scope="module")
def kuberay(cluster: Cluster) -> KubeRay:
    """Return the real KubeRay, in the cluster; it stays there until the cluster goes, or a test takes it away."""
    return install_kuberay(cluster)


@pytest.fixture(scope="session")
def demo_bucket(s3: ObjectStore, turn: Turn, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The bucket that example 06 names, with a model and rows in it."""
    with turn("bucket") as is_first:
        if is_first:
            fill_bucket(s3, tmp_path_factory.mktemp("content"))
    return BUCKET


@pytest.fixture
def jobs(
    cluster: Cluster, namespace: str, s3: ObjectStore, images: Images, operator: OperatorRelease, demo_bucket: str
) -> Jobs:
    """A namespace in which example 06 can be applied."""
    here = Jobs(cluster.kubeconfig, namespace)
    add_secret(here, s3)
    return here
