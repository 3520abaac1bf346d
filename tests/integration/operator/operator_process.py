"""The operator as a process of its own, with the rights that it asks for and no others."""

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from finetune_operator import cluster

from ..ports import free_port
from .api_server import ApiServer

START_SECONDS = 180
STOP_SECONDS = 30
SECRET = "finetune-operator-tls"
LEASE = "finetune-operator"


def _rules(access: Sequence[tuple[str, str, tuple[str, ...]]]) -> list[dict[str, Any]]:
    return [{"apiGroups": [group], "resources": [resource], "verbs": list(verbs)} for group, resource, verbs in access]


class Home:
    """The operator's own namespace: service account, roles, Secret and Lease, as the chart would make them."""

    def __init__(self, server: ApiServer, namespace: str) -> None:
        self.server = server
        self.namespace = namespace
        self._create("", "v1", "serviceaccounts", {"metadata": {"name": "operator"}})
        self._create("", "v1", "secrets", {"metadata": {"name": SECRET}})
        self._create("coordination.k8s.io", "v1", "leases", {"metadata": {"name": LEASE}})
        own = [{**rule, "resourceNames": [SECRET, LEASE]} for rule in _rules(cluster.OWN_ACCESS)]
        self._grant("roles", "rolebindings", own)
        self._grant("clusterroles", "clusterrolebindings", _rules((*cluster.JOB_ACCESS, *cluster.CLUSTER_ACCESS)))
        self.kubeconfig = server.write_kubeconfig(namespace, self._token())

    def set_rules(self, access: Sequence[tuple[str, str, tuple[str, ...]]]) -> None:
        """Change what the operator may do everywhere."""
        path = f"/apis/rbac.authorization.k8s.io/v1/clusterroles/{self.namespace}"
        self.server.request("PATCH", path, {"rules": _rules(access)}, "application/merge-patch+json")

    def _grant(self, roles: str, bindings: str, rules: list[dict[str, Any]]) -> None:
        group, name = "rbac.authorization.k8s.io", {"name": self.namespace}
        self._create(group, "v1", roles, {"metadata": name, "rules": rules})
        kind = "ClusterRole" if roles == "clusterroles" else "Role"
        subject = {"kind": "ServiceAccount", "name": "operator", "namespace": self.namespace}
        reference = {"apiGroup": group, "kind": kind, "name": self.namespace}
        self._create(group, "v1", bindings, {"metadata": name, "roleRef": reference, "subjects": [subject]})

    def _create(self, group: str, version: str, plural: str, manifest: dict[str, Any]) -> None:
        root = f"/apis/{group}/{version}" if group else f"/api/{version}"
        place = "" if plural.startswith("cluster") else f"/namespaces/{self.namespace}"
        self.server.request("POST", f"{root}{place}/{plural}", manifest)

    def _token(self) -> str:
        path = f"/api/v1/namespaces/{self.namespace}/serviceaccounts/operator/token"
        token: str = self.server.request("POST", path, {"spec": {"expirationSeconds": 36000}})["status"]["token"]
        return token


class OperatorProcess:
    """One replica."""

    def __init__(self, home: Home, folder: Path, name: str = "operator-0", **settings: Any) -> None:
        self.home = home
        self.name = name
        self.http_port, self.progress_port = free_port(), free_port()
        content = {
            "namespace": home.namespace,
            "image": {"name": "trainer.example/trainer:1"},
            "progress": {"url": f"https://localhost:{self.progress_port}", "port": self.progress_port},
            "httpPort": self.http_port,
            "backoffSeconds": 0.1,
            **settings,
        }
        self.settings_file = folder / f"{name}.yaml"
        self.settings_file.write_text(yaml.safe_dump(content), encoding="utf-8")
        self.log_file = folder / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self, wait: bool = True) -> None:
        arguments = ["--settings", self.settings_file, "--kubeconfig", self.home.kubeconfig]
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-W", "error", "-m", "finetune_operator", *arguments],
                stdout=log,
                stderr=log,
                env={**os.environ, "POD_NAME": self.name, "PYTHONUNBUFFERED": "1"},
            )
        if wait:
            await_until(self.is_ready, f"{self.name} is ready; see {self.log_file}", START_SECONDS)

    def is_ready(self) -> bool:
        assert self._process is not None and self._process.poll() is None, f"it has ended:\n{self.log()[-3000:]}"
        try:
            self.get("/readyz")
        except (urllib.error.HTTPError, urllib.error.URLError, OSError):
            return False
        return True

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://localhost:{self.http_port}{path}", timeout=10) as answer:
            text: str = answer.read().decode()
        return text

    def metric(self, name: str, **labels: str) -> float:
        """Return the sum of a metric over what has these labels."""
        lines = [line for line in self.get("/metrics").splitlines() if line.startswith((f"{name} ", f"{name}{{"))]
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        return sum(float(line.rpartition(" ")[2]) for line in lines if all(one in line for one in wanted))

    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def memory_bytes(self) -> int:
        """Return what of it is in memory."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def pause(self) -> None:
        """Freeze it; see `go_on`."""
        os.kill(self.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        """End it as the kernel would, without a chance to say goodbye."""
        self._end(signal.SIGKILL)

    def stop(self) -> int | None:
        """Ask it to end; return its exit code."""
        return self._end(signal.SIGTERM)

    def _end(self, number: signal.Signals) -> int | None:
        if self._process is None:
            return None
        process, self._process = self._process, None
        process.send_signal(number)
        try:
            return process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(STOP_SECONDS)
            raise


def await_until(holds: Callable[[], object], what: str, seconds: float = 30.0, pause: float = 0.02) -> None:
    """Wait until ``holds()`` is true; ask again after a ``pause`` of seconds."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not so within {seconds:.0f} s: {what}"
        time.sleep(pause)
