"""The S3 server behind a proxy that misbehaves on request and knows what the server has done."""

import json
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from ..cluster.cluster import Cluster, await_condition
from ..cluster.object_store import NAMESPACE, ObjectStore
from .faulty_proxy import CONTROL, Behaviour
from .pod import pod_manifest

NAME = "faulty-s3"
PORT = 7080
READY_SECONDS = 60
SCRIPT = Path(__file__).with_name("faulty_proxy.py")


@dataclass(frozen=True, slots=True)
class Write:
    """Something that a client wanted to change, and what the server said."""

    at: float
    method: str
    key: str
    """Without the bucket."""
    status: int

    @property
    def is_done(self) -> bool:
        return self.status < 300


@dataclass(frozen=True, slots=True)
class FaultyStore:
    """A proxy that runs."""

    endpoint_in_cluster: str
    endpoint_local: str

    def behave(self, how: Behaviour) -> None:
        self._ask("PUT", f"behaviour/{how.value}")

    def writes(self) -> tuple[Write, ...]:
        """Return what the server was asked to change, in its order."""
        listed = self._ask("GET", "journal")["writes"]
        return tuple(Write(at, method, _key(path), status) for at, method, path, status in listed)

    def harm(self) -> dict[str, int]:
        """Return how many requests were harmed, by the way."""
        return dict(self._ask("GET", "journal")["harm"])

    def answers(self) -> bool:
        try:
            self._ask("GET", "journal")
        except OSError:
            return False
        return True

    def _ask(self, method: str, path: str) -> Any:
        request = urllib.request.Request(f"{self.endpoint_local}{CONTROL}{path}", method=method)
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)


def _key(path: str) -> str:
    return unquote(urlsplit(path).path).lstrip("/").partition("/")[2]


@contextmanager
def faulty_store(cluster: Cluster, s3: ObjectStore, image: str) -> Iterator[FaultyStore]:
    """Run the proxy until the block ends."""
    upstream = urlsplit(s3.endpoint_in_cluster).netloc
    environment = [{"name": "UPSTREAM", "value": upstream}, {"name": "PORT", "value": str(PORT)}]
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": NAME},
        "spec": {"type": "NodePort", "selector": {"app": NAME}, "ports": [{"port": PORT}]},
    }
    cluster.apply(pod_manifest(NAME, image, SCRIPT.read_text(encoding="utf-8"), environment=environment), NAMESPACE)
    cluster.apply(service, NAMESPACE)
    try:
        node_port = cluster.get("service", NAME, NAMESPACE)["spec"]["ports"][0]["nodePort"]
        host = urlsplit(s3.endpoint_local).hostname
        store = FaultyStore(f"http://{NAME}.{NAMESPACE}.svc:{PORT}", f"http://{host}:{node_port}")
        await_condition(store.answers, "an answer of the proxy", READY_SECONDS)
        yield store
    finally:
        cluster.kubectl("delete", f"pod/{NAME}", f"service/{NAME}", f"--namespace={NAMESPACE}", "--wait=false")
