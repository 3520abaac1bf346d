"""Buckets in bad times: a server that goes away, keys that are wrong or change, writers that die or meet."""

import contextlib
import itertools
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from botocore.client import BaseClient
from botocore.exceptions import ConnectionClosedError, EndpointConnectionError

from finetune_trainer.errors import DataError, SpecError, StorageError
from finetune_trainer.manifest import verify_manifest, write_manifest
from finetune_trainer.s3_client import S3Access, S3Client
from finetune_trainer.s3_store import S3Store

from .s3_server import S3Server, serve_s3

PREFIX = "team/job-1a2b3c4d/model"
PART = 5 << 20
"""The smallest part that S3 takes."""
SIZE = 2 * PART + 17


@pytest.fixture
def secret(server: S3Server, tmp_path: Path) -> Path:
    return server.write_secret(tmp_path / "keys")


@pytest.fixture
def bucket(server: S3Server) -> str:
    return server.make_bucket()


@pytest.fixture
def store(server: S3Server, secret: Path, bucket: str) -> S3Store:
    return open_store(server, secret, bucket)


def open_store(server: S3Server, secret: Path | None, bucket: str, patience_seconds: float = 0.0) -> S3Store:
    client = S3Client(bucket, S3Access(server.url, secret), patience_seconds, environment={})
    return S3Store(client, "results", part_bytes=PART)


def make_tree(folder: Path, version: str) -> Path:
    """A tree with a file of several parts; versions differ in all bytes and in one name."""
    (folder / version).mkdir(parents=True)
    (folder / "weights").write_bytes(version[0].encode() * SIZE)
    (folder / "README.md").write_text(version)
    (folder / version / "own").write_text(version)
    write_manifest(folder)
    return folder


# --- what is wrong is told, with the setting that mends it


def test_file_of_many_parts_comes_back_whole(store: S3Store, tmp_path: Path):
    tree = make_tree(tmp_path / "tree", "one")
    store.put_tree(tree, PREFIX)
    store.get_tree(PREFIX, tmp_path / "out")
    assert verify_manifest(tmp_path / "out") == verify_manifest(tree)


@contextlib.contextmanager
def identity_agent(keys: dict[str, str]) -> Iterator[tuple[str, list[str]]]:
    """Serve credentials as a cloud's agent on the node does; yield its address and the tokens that it was shown."""
    shown: list[str] = []

    class Agent(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            shown.append(self.headers["Authorization"])
            body = json.dumps(
                {
                    "AccessKeyId": keys["AWS_ACCESS_KEY_ID"],
                    "SecretAccessKey": keys["AWS_SECRET_ACCESS_KEY"],
                    "Token": "",
                    "Expiration": "2100-01-01T00:00:00Z",
                }
            ).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Agent) as agent:
        thread = threading.Thread(target=agent.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{agent.server_port}/credentials", shown
        agent.shutdown()
        thread.join()


def test_without_a_secret_the_pods_own_identity_opens_the_bucket(
    server: S3Server, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    token = tmp_path / "token"
    token.write_text("from-the-kubelet")
    with identity_agent(server.keys) as (address, shown):
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", address)
        monkeypatch.setenv("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", str(token))
        monkeypatch.setenv("AWS_REGION", "us-east-1")
        store = open_store(server, None, bucket)
        store.put_bytes("answer", b"42")
        assert store.get_bytes("answer") == b"42"
    assert {*shown} == {"from-the-kubelet"}


def wrong_key(server: S3Server, secret: Path, bucket: str) -> S3Store:
    (secret / "AWS_SECRET_ACCESS_KEY").write_text("not-the-key")
    return open_store(server, secret, bucket)


def unknown_id(server: S3Server, secret: Path, bucket: str) -> S3Store:
    (secret / "AWS_ACCESS_KEY_ID").write_text("nobody")
    return open_store(server, secret, bucket)


def key_is_missing(server: S3Server, secret: Path, bucket: str) -> S3Store:
    (secret / "AWS_SECRET_ACCESS_KEY").unlink()
    return open_store(server, secret, bucket)


def no_bucket(server: S3Server, secret: Path, bucket: str) -> S3Store:
    return open_store(server, secret, "no-such-bucket")


def nobody_listens(server: S3Server, secret: Path, bucket: str) -> S3Store:
    return S3Store(S3Client(bucket, S3Access("http://127.0.0.1:9", secret), 0.0), "")


WRONG = [
    pytest.param(
        wrong_key, r"does not accept the credentials \(SignatureDoesNotMatch\).*Secret 'keys'", id="a wrong key"
    ),
    pytest.param(
        unknown_id,
        r"does not accept the credentials \(XAdminUserNotFound\).*spec\.output\.secretRef",
        id="a wrong key id",
    ),
    pytest.param(
        key_is_missing,
        r"Secret 'keys' has no key AWS_SECRET_ACCESS_KEY; it has AWS_ACCESS_KEY_ID, AWS_REGION",
        id="a Secret without a key",
    ),
    pytest.param(
        no_bucket, r"has no bucket 'no-such-bucket'\. Create it, or correct spec\.output\.uri", id="no bucket"
    ),
    pytest.param(
        nobody_listens, r"127\.0\.0\.1:9 cannot be reached.*Check spec\.output\.endpoint", id="nobody listens"
    ),
]


@pytest.mark.parametrize(("spoil", "words"), WRONG)
def test_what_is_wrong_names_the_setting(
    spoil: Callable[[S3Server, Path, str], S3Store],
    words: str,
    server: S3Server,
    secret: Path,
    bucket: str,
):
    with pytest.raises(StorageError, match=words) as caught:
        spoil(server, secret, bucket).check_writable()
    assert str(caught.value).startswith(("spec.output.uri: cannot write to s3://", "Secret 'keys'"))
    assert server.key not in str(caught.value)


def test_without_any_keys_it_is_said_where_they_come_from(
    server: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with pytest.raises(StorageError, match=r"there are no credentials.*Name a Secret in spec\.output\.secretRef"):
        open_store(server, None, bucket).check_writable()


def test_bucket_with_an_impossible_name_is_a_mistake_in_the_spec(server: S3Server, secret: Path):
    with pytest.raises(SpecError, match=r"spec\.output\.uri.*Write s3://bucket"):
        open_store(server, secret, "no bucket!").check_writable()


# --- keys that are replaced


def test_rotated_keys_are_used_without_a_new_start(server: S3Server, secret: Path, bucket: str):
    store = open_store(server, secret, bucket)
    right = (secret / "AWS_SECRET_ACCESS_KEY").read_text()
    (secret / "AWS_SECRET_ACCESS_KEY").write_text("old")
    with pytest.raises(StorageError, match="does not accept"):
        store.put_bytes("a", b"x")
    (secret / "AWS_SECRET_ACCESS_KEY").write_text(right)
    store.put_bytes("a", b"x")
    assert store.get_bytes("a") == b"x"


def test_keys_that_are_replaced_during_a_request_are_read_once_more(
    server: S3Server, secret: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
):
    right = (secret / "AWS_SECRET_ACCESS_KEY").read_text()
    (secret / "AWS_SECRET_ACCESS_KEY").write_text("old")
    calls = intercept(
        monkeypatch, lambda name, number: (secret / "AWS_SECRET_ACCESS_KEY").write_text(right), after=True
    )
    open_store(server, secret, bucket).put_bytes("a", b"x")
    assert calls == ["PutObject", "PutObject"]


# --- a server that goes away


def test_server_that_is_away_for_some_seconds_costs_nothing(tmp_path: Path):
    with serve_s3(tmp_path / "s3") as server:
        bucket = server.make_bucket()
        store = open_store(server, server.write_secret(tmp_path / "keys"), bucket, patience_seconds=60)
        store.put_bytes("before", b"x")
        server.stop()
        restart = threading.Timer(6, server.start)
        restart.start()
        try:
            store.put_tree(make_tree(tmp_path / "tree", "one"), PREFIX)
        finally:
            restart.join()
        assert store.get_bytes("before") == b"x"
        store.get_tree(PREFIX, tmp_path / "out")
        verify_manifest(tmp_path / "out")


def test_server_that_stays_away_is_given_up_after_the_patience(tmp_path: Path):
    waited: list[float] = []
    client = S3Client(
        "bucket",
        S3Access("http://127.0.0.1:9", None),
        100.0,
        sleep=waited.append,
        clock=lambda: sum(waited),
        environment={"AWS_REGION": "us-east-1"},
    )
    with pytest.raises(StorageError, match="cannot be reached"):
        client.call("read", "s3://bucket/x", refuse)
    assert 60 < sum(waited) <= 100
    assert all(later > earlier / 2 for earlier, later in itertools.pairwise(waited)), "pauses grow"


def refuse(client: Any) -> None:
    raise EndpointConnectionError(endpoint_url="http://127.0.0.1:9")


# --- writers that die or meet


class Killed(BaseException):
    """Stands for SIGKILL."""


def intercept(
    monkeypatch: pytest.MonkeyPatch, action: Callable[[str, int], object], *, after: bool = False
) -> list[str]:
    """Call ``action`` with name and number of every request, before or after it; return the names so far."""
    real, names = BaseClient._make_api_call, []
    lock = threading.Lock()

    def call(self: Any, name: str, options: Any) -> Any:
        with lock:
            names.append(name)
            number = len(names)
        if not after:
            action(name, number)
        try:
            return real(self, name, options)
        finally:
            if after:
                action(name, number)

    monkeypatch.setattr(BaseClient, "_make_api_call", call)
    return names


def test_writer_killed_at_any_request_leaves_a_whole_tree_or_none(
    store: S3Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    old, new = make_tree(tmp_path / "old", "one"), make_tree(tmp_path / "new", "two")
    outcomes = []
    for step in range(1, 100):
        prefix = f"{PREFIX}-{step}"
        store.put_tree(old, prefix)
        with monkeypatch.context() as patch:
            killed = False

            def kill(name: str, number: int, step: int = step) -> None:
                nonlocal killed
                if number >= step:
                    killed = True
                    raise Killed

            intercept(patch, kill)
            with contextlib.suppress(Killed):
                store.put_tree(new, prefix)
        if store.exists(f"{prefix}/COMPLETE"):
            store.get_tree(prefix, tmp_path / f"out-{step}")
            outcomes.append((tmp_path / f"out-{step}" / "README.md").read_text())
        else:
            outcomes.append("none")
        store.put_tree(new, prefix)
        store.get_tree(prefix, tmp_path / f"again-{step}")
        if not killed:
            break
    assert set(outcomes) == {"one", "none", "two"}
    assert len(outcomes) > 10, "the requests were really interrupted"


def test_parts_of_a_dead_writer_are_removed_by_the_next(
    store: S3Store, server: S3Server, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tree = make_tree(tmp_path / "tree", "one")

    def kill(name: str, number: int) -> None:
        if name in ("CompleteMultipartUpload", "AbortMultipartUpload"):
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        intercept(patch, kill)
        store.put_tree(tree, PREFIX)
    assert server.client().list_multipart_uploads(Bucket=bucket).get("Uploads")
    store.put_tree(tree, PREFIX)
    assert not server.client().list_multipart_uploads(Bucket=bucket).get("Uploads")


def test_second_writer_at_any_request_of_the_first_never_makes_a_mixture(
    store: S3Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    first, second = make_tree(tmp_path / "first", "one"), make_tree(tmp_path / "second", "two")
    winners = set()
    for step in range(1, 100):
        prefix = f"{PREFIX}-{step}"
        with monkeypatch.context() as patch:
            is_over = False

            def interfere(name: str, number: int, step: int = step, prefix: str = prefix) -> None:
                nonlocal is_over
                if number == step:
                    is_over = True
                    store.put_tree(second, prefix)

            intercept(patch, interfere)
            store.put_tree(first, prefix)
        store.get_tree(prefix, tmp_path / f"out-{step}")
        winner = (tmp_path / f"out-{step}" / "README.md").read_text()
        tree = first if winner == "one" else second
        assert verify_manifest(tmp_path / f"out-{step}") == verify_manifest(tree)
        assert set(store.list(prefix)) == {
            f"{prefix}/{path.relative_to(tree)}" for path in tree.rglob("*") if path.is_file()
        }
        winners.add(winner)
        if not is_over:
            break
    assert "one" in winners


def test_late_request_of_a_writer_thought_dead_changes_nothing(
    store: S3Store, tmp_path: Path, bucket: str, server: S3Server
):
    store.put_tree(make_tree(tmp_path / "tree", "one"), PREFIX)
    with pytest.raises(Exception, match="PreconditionFailed"):
        server.client().put_object(Bucket=bucket, Key=f"results/{PREFIX}/README.md", Body=b"late", IfNoneMatch="*")
    (tmp_path / "late").write_bytes(b"late")
    server.client().upload_file(str(tmp_path / "late"), bucket, f"results/{PREFIX}/left-over")
    store.get_tree(PREFIX, tmp_path / "out")
    assert not (tmp_path / "out" / "left-over").exists(), "what the manifest does not list is not taken"


def test_upload_whose_answer_was_lost_is_not_taken_for_another_writers(
    store: S3Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    client = store._client
    client._patience_seconds = 30
    lost: list[str] = []

    def lose(name: str, number: int) -> None:
        if name in ("PutObject", "CompleteMultipartUpload") and name not in lost:
            lost.append(name)
            raise ConnectionClosedError(endpoint_url="http://store")

    with monkeypatch.context() as patch:
        intercept(patch, lose, after=True)
        store.put_tree(make_tree(tmp_path / "tree", "one"), PREFIX)
    assert sorted(lost) == ["CompleteMultipartUpload", "PutObject"]
    store.get_tree(PREFIX, tmp_path / "out")


# --- models in buckets


def test_model_is_copied_once_and_again_when_it_changes(
    store: S3Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    store.put_bytes("config.json", b"{}")
    store.put_bytes("onnx/model.onnx", b"never fetched")
    seen: list[set[str]] = []
    folder = store.cached_folder(tmp_path / "cache", lambda names: seen.append(set(names)))
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    with monkeypatch.context() as patch:
        names = intercept(patch, lambda name, number: None)
        assert store.cached_folder(tmp_path / "cache", lambda names: None) == folder
        assert "GetObject" not in names
    store.put_bytes("config.json", b'{"changed": 1}')
    assert store.cached_folder(tmp_path / "cache", lambda names: None) != folder
    assert seen == [{"config.json"}]


def test_model_that_is_not_there_is_named(store: S3Store, tmp_path: Path):
    with pytest.raises(DataError, match=r"there is nothing at s3://.*/results"):
        store.cached_folder(tmp_path / "cache", lambda names: None)
