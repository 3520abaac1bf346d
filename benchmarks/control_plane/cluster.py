"""A control plane of processes on this machine: nodes and kubelets are kwok's fakes, everything else is real."""

import json
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.cluster.folder import BIN
from tests.integration.operator.api_server import ApiServer

HERE = Path(__file__).parent
NODES = 10
PROGRAMS = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kwok")

# The limits of the others must not be what is measured.
UNLIMITED = ("--kube-api-qps=2000", "--kube-api-burst=4000")
FLAGS = (
    "--max-requests-inflight=2000",
    "--max-mutating-requests-inflight=1000",
    # Nobody would take the taint of a new node away.
    "--disable-admission-plugins=TaintNodesByCondition",
)


@dataclass
class Program:
    """One process, with its log beside it."""

    name: str
    arguments: tuple[str, ...]
    folder: Path
    environment: Mapping[str, str] | None = None
    _process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it."""
        with (self.folder / f"{self.name}.log").open("ab") as log:
            self._process = subprocess.Popen(
                [BIN / self.name, *self.arguments], stdout=log, stderr=log, env=self.environment
            )

    def kill(self) -> None:
        """End it, if it runs."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(30)
            self._process = None

    @property
    def pid(self) -> int:
        """Of the running process."""
        assert self._process is not None and self._process.poll() is None, f"{self.name} has ended; see {self.folder}"
        return self._process.pid


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process has taken so far."""

    cpu_seconds: float
    memory_bytes: int
    """Now."""
    most_memory_bytes: int
    """Ever."""


def usage(pid: int) -> Usage:
    """Return what process ``pid`` has taken."""
    ticks = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[11:13]
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    sizes = {
        name: int(value.split()[0]) * 1024
        for name, _, value in (line.partition(":") for line in lines)
        if name[:2] == "Vm"
    }
    return Usage(sum(map(int, ticks)) / 100, sizes["VmRSS"], sizes["VmHWM"])


@dataclass(frozen=True, slots=True)
class Cpu:
    """Seconds of processor time: what is left of a latency when the machine has other things to do."""

    controller: float
    server: float

    def since(self, before: "Cpu", jobs: int) -> "Cpu":
        """Return what has been taken since ``before``, for each of ``jobs``."""
        return Cpu((self.controller - before.controller) / jobs, (self.server - before.server) / jobs)


def cpu(controller: int, plane: "ControlPlane") -> Cpu:
    """Return what the process ``controller`` and the API server have taken so far."""
    return Cpu(usage(controller).cpu_seconds, usage(plane.server.pid).cpu_seconds)


@dataclass
class ControlPlane:
    """Fresh etcd and API server, and what makes Jobs into pods that run and end."""

    folder: Path
    server: ApiServer = field(init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True)
        # Begun anew at 100 MB it would lack the requests of the first of 5,000 jobs.
        audit = (
            f"--audit-policy-file={HERE / 'audit.yaml'}",
            f"--audit-log-path={self._audit_log}",
            "--audit-log-maxsize=10000",
        )
        self.server = ApiServer(BIN, self.folder / "server", flags=(*audit, *FLAGS))
        self._programs: list[Program] = []

    @property
    def _audit_log(self) -> Path:
        return self.folder / "audit.log"

    def start(self) -> None:
        """Start etcd and the API server."""
        self.server.start()

    def start_nodes(self, stages: str) -> None:
        """Let Jobs have pods and pods be played by kwok as ``stages`` say; those of before are played no longer."""
        if not self._programs:
            self._start_controllers()
            for number in range(NODES):
                self.server.request("POST", "/api/v1/nodes", _node(f"node-{number}"))
        else:
            self._programs.pop().kill()
        configuration = self.folder / "kwok.yaml"
        configuration.write_text(stages, encoding="utf-8")
        arguments = (f"--kubeconfig={self.server.kubeconfig}", f"--config={configuration}", "--manage-all-nodes=true")
        self._run("kwok", *arguments)

    def _start_controllers(self) -> None:
        login = f"--kubeconfig={self.server.kubeconfig}"
        common = (login, "--leader-elect=false", "--secure-port=0", *UNLIMITED)
        self._run("kube-controller-manager", *common, "--controllers=job-controller", "--concurrent-job-syncs=20")
        self._run("kube-scheduler", *common)

    def _run(self, name: str, *arguments: str) -> None:
        program = Program(name, arguments, self.folder)
        program.start()
        self._programs.append(program)

    def requests(self) -> Iterator[dict[str, Any]]:
        """Yield what service accounts have asked of the API server, oldest first."""
        with self._audit_log.open(encoding="utf-8") as log:
            for line in log:
                # The last one may still be being written.
                if line.endswith("\n"):
                    yield json.loads(line)

    def stop(self) -> None:
        """End everything."""
        for program in reversed(self._programs):
            program.kill()
        self.server.stop()


def _node(name: str) -> dict[str, Any]:
    size = {"cpu": "10k", "memory": "100Ti", "pods": "100k", "nvidia.com/gpu": "10k", "ephemeral-storage": "100Ti"}
    ready = {"type": "Ready", "status": "True", "reason": "Fake", "message": ""}
    return {"metadata": {"name": name}, "status": {"allocatable": size, "capacity": size, "conditions": [ready]}}
