"""The proxy of the chaos run before a real S3 server: true when it behaves, outlasted by our store when not."""

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.manifest import verify_manifest, write_manifest
from finetune_trainer.s3_client import S3Access, S3Client
from finetune_trainer.s3_store import S3Store

from ..cluster.cluster import await_condition
from ..e2e import faulty_proxy
from ..e2e.faulty_proxy import Behaviour
from .ports import free_port
from .s3_server import S3Server, listens

PREFIX = "team/job-1a2b3c4d/model"


@dataclass(frozen=True)
class Faulty:
    """A proxy that runs."""

    url: str

    def control(self, method: str, path: str) -> Any:
        request = urllib.request.Request(f"{self.url}/-/{path}", method=method)
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)


@pytest.fixture
def faulty(server: S3Server) -> Iterator[Faulty]:
    port = free_port()
    environment = {**os.environ, "UPSTREAM": f"127.0.0.1:{server.port}", "PORT": str(port)}
    with subprocess.Popen([sys.executable, faulty_proxy.__file__], env=environment) as process:
        await_condition(lambda: listens(port), "a port that listens", 30)
        yield Faulty(f"http://127.0.0.1:{port}")
        process.terminate()


# Slow is what the cluster is for.
@pytest.mark.parametrize("how", [Behaviour.WELL, Behaviour.REFUSES, Behaviour.CUTS], ids=str)
def test_a_tree_is_published_whole_and_once_through_a_faulty_store(
    server: S3Server, faulty: Faulty, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: Behaviour
):
    # Between its own tries boto3 pauses for up to a minute.
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.0)
    keys = server.write_secret(tmp_path / "keys")
    client = S3Client(server.make_bucket(), S3Access(faulty.url, keys), sleep=lambda _: None, environment={})
    store = S3Store(client, "results")
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "weights").write_bytes(bytes(range(256)) * 4096)
    write_manifest(tree)

    faulty.control("PUT", f"behaviour/{how.value}")
    store.put_tree(tree, PREFIX)
    store.get_tree(PREFIX, tmp_path / "out")
    assert verify_manifest(tmp_path / "out") == verify_manifest(tree)

    journal = faulty.control("GET", "journal")
    marker = f"/{client.bucket}/results/{PREFIX}/COMPLETE"
    ends = [status for _, method, path, status in journal["writes"] if (method, path) == ("PUT", marker)]
    assert [status for status in ends if status < 300] == [200]
    assert bool(journal["harm"]) is (how is not Behaviour.WELL)
