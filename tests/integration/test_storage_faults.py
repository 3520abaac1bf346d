"""Buckets behind a network that fails: whatever breaks at whichever byte, no torn or mixed tree looks whole.

A proxy of ours stands in front of a real server. Where a writer dies is tried request by request in test_s3_store; here
it lives on and must mend what happened, or say what a person has to.
"""

import contextlib
import functools
import gc
import itertools
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from botocore.retries.standard import ExponentialBackoff

from finetune_api.report import ExitCode
from finetune_trainer import s3_store
from finetune_trainer.checkpoint_upload import CheckpointUpload
from finetune_trainer.errors import DataError, Preempted, StorageError
from finetune_trainer.manifest import COMPLETE_NAME, MANIFEST_NAME, verify_manifest, write_manifest
from finetune_trainer.s3_client import S3Access, S3Client
from finetune_trainer.s3_store import S3Store
from finetune_trainer.shared_state import SharedState
from finetune_trainer.workspace import Workspace

from .fault_proxy import (
    Cut,
    CutAnswer,
    Delay,
    Fault,
    FaultProxy,
    FlipDownload,
    FlipUpload,
    LoseAnswer,
    NextPage,
    Overflow,
    Refuse,
    Request,
    serve_faults,
)
from .s3_server import S3Server
from .tree import files_of

PART = 5 << 20
"""The smallest part that S3 takes."""
PATIENCE = 60.0
"""Of a clock that only goes on when the client waits."""


@pytest.fixture(scope="module")
def network(server: S3Server) -> Iterator[FaultProxy]:
    with serve_faults(server.port) as proxy:
        yield proxy


@pytest.fixture(autouse=True)
def whole_network(network: FaultProxy) -> None:
    network.clear()


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """botocore waits up to seconds before it asks again, at which nothing is to be seen."""
    monkeypatch.setattr(ExponentialBackoff, "delay_amount", lambda self, context: 0)


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two trees that share all names but one and no byte; one file has two parts."""
    folder = tmp_path_factory.mktemp("trees")
    for version in ("one", "two"):
        tree = folder / version
        tree.mkdir()
        (tree / "weights").write_bytes(version[0].encode() * (PART + 17))
        (tree / "README.md").write_text(version)
        (tree / f"{version}.txt").write_text(version)
        write_manifest(tree)
    return {version: folder / version for version in ("one", "two")}


@dataclass(eq=False)
class Bucket:
    """A bucket, seen through the failing network and past it. Each test has a place of its own in it."""

    server: S3Server
    network: FaultProxy
    name: str
    secret: Path
    prefix: str = ""

    @functools.cache  # noqa: B019 - one bucket a module; to connect takes longer than a whole test
    def store(self, *, patient: bool = True, direct: bool = False, writer: int = 0) -> S3Store:
        waited = [0.0]

        def wait(seconds: float) -> None:
            waited[0] += seconds

        access = S3Access(self.server.url if direct else self.network.url, self.secret)
        client = S3Client(
            self.name, access, PATIENCE if patient else 0.0, sleep=wait, clock=lambda: waited[0], environment={}
        )
        return S3Store(client, "results", part_bytes=PART)

    def put(self, tree: Path) -> None:
        """Store a tree while nothing fails."""
        self.store(direct=True).put_tree(tree, self.prefix)

    def version(self, folder: Path) -> str | None:
        """Which version a reader gets, after its files were held against the manifest; None where there is none."""
        store = self.store(direct=True)
        if not store.exists(f"{self.prefix}/{COMPLETE_NAME}"):
            return None
        store.get_tree(self.prefix, folder)
        verify_manifest(folder)
        return (folder / "README.md").read_text()


@pytest.fixture(scope="module")
def shared_bucket(server: S3Server, network: FaultProxy, tmp_path_factory: pytest.TempPathFactory) -> Bucket:
    keys = server.write_secret(tmp_path_factory.mktemp("secrets") / "keys")
    return Bucket(server, network, server.make_bucket(), keys)


_NUMBERS = itertools.count()


@pytest.fixture
def bucket(shared_bucket: Bucket) -> Bucket:
    shared_bucket.prefix = f"team/job-{next(_NUMBERS)}/model"
    return shared_bucket


# --- uploads that are cut


@dataclass(frozen=True)
class Place:
    """A class of requests at which something may happen to an upload."""

    name: str
    matches: Callable[[Request], bool]
    has_body: bool = True


PLACES = (
    Place("the removal of the old marker", lambda one: one.method == "DELETE" and one.key.endswith("/COMPLETE"), False),
    Place("the removal of an old file", lambda one: one.method == "DELETE" and one.key.endswith("/weights"), False),
    Place("the first small file", lambda one: one.puts("README.md")),
    Place("the start of the parts", lambda one: one.method == "POST" and "uploads" in one.query, False),
    Place("the first part", lambda one: one.part == 1),
    Place("the last part", lambda one: one.part == 2),
    Place("the end of the parts", lambda one: one.completes_upload),
    Place("the manifest", lambda one: one.puts(MANIFEST_NAME)),
    Place("the marker", lambda one: one.puts(COMPLETE_NAME)),
)
CUTS = [
    pytest.param(place, cut, id=f"{place.name}, {where}")
    for place in PLACES
    for where, cut in (("before it", Cut()), ("inside it", Cut(0.5)), ("behind it", LoseAnswer()))
    if place.has_body or where != "inside it"
]


@pytest.mark.parametrize(("place", "cut"), CUTS)
def test_one_cut_costs_nothing(
    place: Place, cut: Fault, bucket: Bucket, network: FaultProxy, trees: dict[str, Path], tmp_path: Path
) -> None:
    bucket.put(trees["one"])
    network.once(place.matches, cut)
    bucket.store().put_tree(trees["two"], bucket.prefix)
    assert network.hits == 1, "the connection was really cut"
    assert bucket.version(tmp_path / "out") == "two"
    assert set(bucket.store(direct=True).list(bucket.prefix)) == {
        f"{bucket.prefix}/{name}" for name in files_of(trees["two"])
    }


@pytest.mark.parametrize(("place", "cut"), CUTS)
def test_a_link_that_stays_cut_leaves_a_whole_tree_or_none(
    place: Place, cut: Fault, bucket: Bucket, network: FaultProxy, trees: dict[str, Path], tmp_path: Path
) -> None:
    bucket.put(trees["one"])
    network.always(place.matches, cut)
    try:
        bucket.store(patient=False).put_tree(trees["two"], bucket.prefix)
    except StorageError as error:
        assert error.exit_code is ExitCode.STORAGE
        assert "spec.output.uri: cannot " in str(error)
    assert network.hits
    # Behind the marker all has been done, whatever the writer was told.
    done = place.name == "the marker" and isinstance(cut, LoseAnswer)
    before = place.name == "the removal of the old marker" and isinstance(cut, Cut)
    assert bucket.version(tmp_path / "out") == ("two" if done else "one" if before else None)
    network.clear()
    bucket.store(patient=False).put_tree(trees["two"], bucket.prefix)
    assert bucket.version(tmp_path / "again") == "two"


def test_a_server_that_is_away_for_one_part_gets_that_part_again_and_no_other(
    bucket: Bucket, network: FaultProxy, trees: dict[str, Path], tmp_path: Path
) -> None:
    # More often than botocore asks by itself.
    network.fault = lambda one: Cut() if one.part == 1 and network.hits < 10 else None
    bucket.store().put_tree(trees["one"], bucket.prefix)
    assert [one.part for one in network.requests if one.part].count(2) == 1
    assert sum(one.completes_upload for one in network.requests) == 1
    assert bucket.version(tmp_path / "out") == "one"


# --- what a server answers in bad times


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(Refuse(500, "InternalError"), id="500"),
        pytest.param(Refuse(503, "SlowDown"), id="503"),
        pytest.param(Refuse(503), id="503 of a load balancer"),
        pytest.param(Refuse(429, "TooManyRequests"), id="429"),
    ],
)
def test_a_passing_refusal_is_waited_out(
    fault: Fault, bucket: Bucket, network: FaultProxy, trees: dict[str, Path], tmp_path: Path
) -> None:
    network.fault = lambda one: fault if one.number % 2 == 0 and network.hits < 30 else None
    bucket.store().put_tree(trees["one"], bucket.prefix)
    network.fault = lambda one: fault if one.number % 2 == 0 and network.hits < 60 else None
    bucket.store().get_tree(bucket.prefix, tmp_path / "out")
    assert network.hits > 10
    assert files_of(tmp_path / "out") == files_of(trees["one"])


@pytest.mark.parametrize("code", ["RequestTimeout", "IncompleteBody"])
def test_an_upload_that_did_not_arrive_whole_or_in_time_is_sent_again(
    code: str, bucket: Bucket, network: FaultProxy, trees: dict[str, Path], tmp_path: Path
) -> None:
    refused: set[tuple[str, int]] = set()

    def refuse_each_once(one: Request) -> Fault | None:
        if one.method != "PUT" or (one.key, one.part) in refused:
            return None
        refused.add((one.key, one.part))
        return Refuse(400, code)

    network.fault = refuse_each_once
    bucket.store().put_tree(trees["one"], bucket.prefix)
    assert network.hits == 6, "two small files, two parts, manifest and marker"
    assert bucket.version(tmp_path / "out") == "one"


LASTING = [
    pytest.param(
        Refuse(507, "InsufficientStorage"), r"takes no more \(InsufficientStorage\).*raise the quota", id="507"
    ),
    pytest.param(Refuse(507), r"takes no more \(507\).*raise the quota", id="507 without words"),
    pytest.param(Refuse(403, "QuotaExceeded"), r"takes no more \(QuotaExceeded\).*raise the quota", id="quota"),
    pytest.param(Refuse(404, "NoSuchBucket"), r"has no bucket 'bucket-.*correct spec\.output\.uri", id="no bucket"),
    pytest.param(
        Refuse(403, "AccessDenied"), r"access is denied.*Secret 'keys' \(spec\.output\.secretRef\)", id="a policy"
    ),
    pytest.param(
        Refuse(400, "ExpiredToken"), r"credentials \(ExpiredToken\).*Secret 'keys'", id="credentials that ran out"
    ),
]


@pytest.mark.parametrize(("fault", "words"), LASTING)
@pytest.mark.parametrize("number", [3, 12])
def test_what_only_a_person_can_mend_ends_the_upload_at_once(
    number: int, fault: Fault, words: str, bucket: Bucket, network: FaultProxy, trees: dict[str, Path], tmp_path: Path
) -> None:
    bucket.put(trees["one"])
    network.always(lambda one: one.number >= number and one.method in ("PUT", "POST"), fault)
    with pytest.raises(StorageError, match=words) as caught:
        bucket.store().put_tree(trees["two"], bucket.prefix)
    assert bucket.server.key not in str(caught.value)
    assert network.hits < 10, "asking again changes nothing"
    assert bucket.version(tmp_path / "out") is None


def test_rotated_keys_end_the_trouble_in_the_middle_of_an_upload(
    bucket: Bucket, network: FaultProxy, trees: dict[str, Path], tmp_path: Path
) -> None:
    # The kubelet has mounted the new keys by the time that the old ones are refused for good.
    network.once(lambda one: one.part == 2, Refuse(400, "ExpiredToken"))
    bucket.store().put_tree(trees["one"], bucket.prefix)
    assert network.hits == 1
    assert bucket.version(tmp_path / "out") == "one"


def test_a_bucket_that_vanishes_is_not_taken_for_a_missing_object(server: S3Server, tmp_path: Path) -> None:
    name = server.make_bucket()
    access = S3Access(server.url, server.write_secret(tmp_path / "keys"))
    store = S3Store(S3Client(name, access, 0.0, environment={}), "results")
    assert not store.exists("team/nothing")
    server.client().delete_bucket(Bucket=name)
    for ask in (lambda: store.exists("team/nothing"), lambda: store.get_file("team/nothing", tmp_path)):
        with pytest.raises(StorageError, match="has no bucket"):
            ask()


def test_a_listing_that_met_what_was_just_taken_away_is_asked_for_again(bucket: Bucket, network: FaultProxy) -> None:
    store = bucket.store()
    for ask in (lambda: store.exists(f"{bucket.prefix}/nothing"), lambda: bool(store.list(bucket.prefix))):
        network.clear()
        network.once(lambda one: "list-type" in one.query, Refuse(404, "NoSuchKey"))
        assert not ask()
        assert network.hits == 1


# --- bytes that change on the way


def test_a_bit_that_flips_in_an_upload_is_noticed_and_sent_again(
    bucket: Bucket, network: FaultProxy, trees: dict[str, Path], tmp_path: Path
) -> None:
    for place in PLACES:
        if place.has_body and place.name != "the end of the parts":
            network.clear()
            network.once(place.matches, FlipUpload())
            bucket.store().put_tree(trees["one"], bucket.prefix)
            assert network.hits == 1
            assert bucket.version(tmp_path / place.name) == "one"


@pytest.mark.parametrize("name", ["weights", "README.md", MANIFEST_NAME, COMPLETE_NAME])
def test_a_bit_that_flips_in_a_download_is_noticed_and_fetched_again(
    name: str, bucket: Bucket, network: FaultProxy, trees: dict[str, Path], tmp_path: Path
) -> None:
    bucket.put(trees["one"])
    network.once(lambda one: one.method == "GET" and one.key.endswith(f"/{name}"), FlipDownload())
    bucket.store().get_tree(bucket.prefix, tmp_path / "out")
    assert network.hits == 1
    assert files_of(tmp_path / "out") == files_of(trees["one"])


def test_files_that_are_damaged_in_the_bucket_itself_are_a_fault_of_the_data(
    bucket: Bucket, trees: dict[str, Path], tmp_path: Path
) -> None:
    bucket.put(trees["one"])
    store = bucket.store(direct=True)
    store.put_bytes(f"{bucket.prefix}/README.md", b"eno")
    with pytest.raises(DataError, match=r"README\.md: sha256 .* instead of"):
        store.get_tree(bucket.prefix, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["weights", "README.md", ""])
def test_a_download_that_is_cut_goes_on(
    name: str, bucket: Bucket, network: FaultProxy, trees: dict[str, Path], tmp_path: Path
) -> None:
    """The empty name: a listing."""
    bucket.put(trees["one"])
    network.once(lambda one: one.method == "GET" and one.key.endswith(f"/{name}" if name else bucket.name), CutAnswer())
    bucket.store().get_tree(bucket.prefix, tmp_path / "out")
    assert network.hits == 1
    assert files_of(tmp_path / "out") == files_of(trees["one"])


# --- more than was announced


def overflow(network: FaultProxy, name: str) -> None:
    network.always(lambda one: one.method == "GET" and one.key.endswith(f"/{name}"), Overflow())


@pytest.fixture
def collected() -> Iterator[None]:
    """s3transfer leaves the connection of a download that ends badly to the garbage collector, which then warns."""
    yield
    gc.collect()


given_up = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@given_up
@pytest.mark.usefixtures("collected")
@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["weights", "README.md"])
def test_a_file_that_goes_on_is_written_no_further_than_its_manifest_says(
    name: str, bucket: Bucket, network: FaultProxy, trees: dict[str, Path], tmp_path: Path
) -> None:
    bucket.put(trees["one"])
    overflow(network, name)
    size = (trees["one"] / name).stat().st_size
    with pytest.raises(
        StorageError, match=rf"spec\.output\.uri: .* announces {size:,} bytes for '{name}' and sends more"
    ):
        bucket.store().get_tree(bucket.prefix, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@given_up
@pytest.mark.usefixtures("collected")
@pytest.mark.timeout(60)
def test_a_file_that_goes_on_is_written_no_further_than_the_listing_says(
    bucket: Bucket, network: FaultProxy, trees: dict[str, Path], tmp_path: Path
) -> None:
    bucket.put(trees["one"])
    overflow(network, "weights")
    size = (trees["one"] / "weights").stat().st_size
    for key in (f"{bucket.prefix}/weights", f"{bucket.prefix}/w*", bucket.prefix):
        with pytest.raises(StorageError, match=rf"announces {size:,} bytes for 'weights' and sends more; ended after"):
            bucket.store().get_matching(key, tmp_path, lambda names: [name for name in names if name == "weights"])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.timeout(60)
def test_a_file_that_is_read_into_memory_is_read_so_far_and_no_further(
    bucket: Bucket, network: FaultProxy, trees: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_store, "LARGEST_FILE_IN_MEMORY", 2 << 20)
    bucket.put(trees["one"])
    overflow(network, MANIFEST_NAME)
    with pytest.raises(StorageError, match=r"MANIFEST\.json has more than 2 MiB, which nothing has"):
        bucket.store().get_bytes(f"{bucket.prefix}/{MANIFEST_NAME}")


def test_nothing_is_fetched_of_what_the_disk_has_no_room_for(
    bucket: Bucket, trees: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.put(trees["one"])
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(1 << 23, 1 << 23, 1 << 20))
    with pytest.raises(StorageError, match=r"bytes for 'weights', and the disk of .* has room for [\d,]+\. Free space"):
        bucket.store().get_tree(bucket.prefix, tmp_path / "out")
    assert not [one for one in bucket.network.requests if one.method == "GET" and one.key.endswith("/weights")]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("objects", [0, 10])
def test_a_listing_without_end_is_ended(
    objects: int, bucket: Bucket, network: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_store, "MOST_OBJECTS", 100)
    monkeypatch.setattr(s3_store, "_MOST_PAGES", 20)
    network.always(lambda one: "list-type" in one.query, NextPage(objects))
    with pytest.raises(StorageError, match=r"more than 100 objects, or a listing without end\. Name a folder"):
        bucket.store().list(bucket.prefix)
    assert network.hits == (11 if objects else 21)


# --- two at once


def test_two_attempts_that_write_and_one_that_reads_never_see_a_mixture(
    bucket: Bucket, network: FaultProxy, trees: dict[str, Path], tmp_path: Path
) -> None:
    # Every answer comes a little later than asked, each time by another bit: the writers meet at many places.
    network.fault = lambda one: Delay(0.003 * (one.number * 7 % 11))
    stores, store, outcomes = [bucket.store(), bucket.store(writer=1)], bucket.store(direct=True), []

    def write(number: int) -> None:
        for _ in range(3):
            # One may give up; what counts is what a reader finds.
            with contextlib.suppress(StorageError):
                stores[number].put_tree(list(trees.values())[number], bucket.prefix)

    with ThreadPoolExecutor(2) as pool:
        writers = [pool.submit(write, number) for number in range(2)]
        while not all(writer.done() for writer in writers):
            outcomes.append(read_one(bucket, store, trees, tmp_path / f"out-{len(outcomes)}"))
    for writer in writers:
        writer.result()
    network.clear()
    bucket.put(trees["two"])
    assert bucket.version(tmp_path / "last") == "two"
    assert len({*outcomes}) > 1, "the tree was read in several states"


def read_one(bucket: Bucket, store: S3Store, trees: dict[str, Path], folder: Path) -> str:
    """Return what a reader meets: a version, or why there is none."""
    try:
        if not store.exists(f"{bucket.prefix}/{COMPLETE_NAME}"):
            return "nothing"
        store.get_tree(bucket.prefix, folder)
    except (DataError, StorageError) as error:
        # It went while it was read.
        return type(error).__name__
    if not (folder / COMPLETE_NAME).exists():
        return "unfinished"
    version = (folder / "README.md").read_text()
    assert files_of(folder) == files_of(trees[version])
    return version


# --- checkpoints


def make_checkpoint(folder: Path, step: int) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state").write_text(f"state of step {step}")
    write_manifest(checkpoint)
    return checkpoint


def test_checkpoints_that_cannot_be_stored_end_nothing_and_are_not_gone_on_from(
    bucket: Bucket, network: FaultProxy, tmp_path: Path
) -> None:
    state = SharedState(bucket.store(patient=False), bucket.prefix, Workspace(tmp_path / "run"))
    for step, fault in ((1, None), (2, Cut(0.5)), (3, Refuse(507)), (4, Refuse(400, "ExpiredToken"))):
        network.always(lambda one: one.method == "PUT" and "/checkpoints/" in one.key, fault)
        # Left by a stop request, it finishes what it was given.
        with (
            contextlib.suppress(Preempted),
            CheckpointUpload(tmp_path / "uploads", lambda at, step: state.push_checkpoint(at, step, keep=3)) as upload,
        ):
            upload.submit(make_checkpoint(tmp_path / "made", step))
            raise Preempted
    network.clear()
    assert state.complete_steps() == [1]
    later = SharedState(bucket.store(), bucket.prefix, Workspace(tmp_path / "later"))
    later.pull_checkpoint()
    assert (tmp_path / "later/checkpoints/checkpoint-1/state").read_text() == "state of step 1"
