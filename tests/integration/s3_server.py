"""A real S3 server for tests: versitygw over a folder, on a free local port."""

import os
import secrets
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config

from ..cluster.folder import BIN
from .ports import free_port

START_SECONDS = 30


@dataclass
class S3Server:
    """A server that a test may stop and start again; what is stored stays."""

    folder: Path
    port: int
    key_id: str = "tests"
    key: str = field(default_factory=lambda: secrets.token_hex(16))
    _process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def keys(self) -> dict[str, str]:
        """What a Secret for this server holds."""
        return {"AWS_ACCESS_KEY_ID": self.key_id, "AWS_SECRET_ACCESS_KEY": self.key, "AWS_REGION": "us-east-1"}

    def start(self) -> None:
        data, sidecar = self.folder / "data", self.folder / "sidecar"
        data.mkdir(parents=True, exist_ok=True)
        sidecar.mkdir(exist_ok=True)
        self._process = subprocess.Popen(
            [BIN / "versitygw", "--quiet", "--port", f"127.0.0.1:{self.port}", "posix", "--sidecar", sidecar, data],
            env={"ROOT_ACCESS_KEY": self.key_id, "ROOT_SECRET_KEY": self.key, "PATH": os.environ["PATH"]},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + START_SECONDS
        while not listens(self.port):
            assert self._process.poll() is None, "versitygw ended at once"
            assert time.monotonic() < deadline, f"versitygw does not listen on {self.port}"

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def make_bucket(self) -> str:
        name = f"bucket-{secrets.token_hex(6)}"
        self.client().create_bucket(Bucket=name)
        return name

    def client(self) -> Any:
        return boto3.client(
            "s3",
            endpoint_url=self.url,
            aws_access_key_id=self.key_id,
            aws_secret_access_key=self.key,
            region_name="us-east-1",
            config=Config(s3={"addressing_style": "path"}),
        )

    def write_secret(self, folder: Path, **changes: str) -> Path:
        """Write a Secret as it is mounted; ``changes`` replace its values."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in (self.keys | changes).items():
            # Trailing line ends are what `kubectl create secret --from-file` usually brings.
            (folder / name).write_text(f"{value}\n")
        return folder


@contextmanager
def serve_s3(folder: Path) -> Iterator[S3Server]:
    """Run a server until the block ends; without its program the test is skipped, on CI it fails."""
    if not (BIN / "versitygw").is_file():
        reason = f"{BIN / 'versitygw'} is not there; `python -m tests.cluster` builds it"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    server = S3Server(folder, free_port())
    server.start()
    try:
        yield server
    finally:
        server.stop()


def listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.05)
        return probe.connect_ex(("127.0.0.1", port)) == 0
