"""The Docker daemon: the one that runs, or one that the harness starts and later removes with all its traces."""

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .command import ClusterUnavailableError, read, run
from .folder import BIN, WORK

logger = logging.getLogger(__name__)

START_SECONDS = 60
STOP_SECONDS = 120
CAP_SYS_RESOURCE = 1 << 24

PID_FILE = WORK / "dockerd.pid"
FIREWALL = WORK / "firewall-before"
DATA = WORK / "data"
RUN = Path("/run/finetune-docker")
"""Sockets: short, for a socket's path ends after 107 characters."""
WRAPPER = Path(__file__).with_name("runtime_wrapper.py")

SHARED_FOLDERS = tuple(map(Path, ("/run/docker/plugins", "/run/docker", "/run/containerd/s", "/run/containerd")))
"""What dockerd makes outside of its own folders; another containerd of this machine may use them too."""

CHILDREN: list[subprocess.Popen[bytes]] = []
"""Daemons that this process started: it must reap them, and Python warns when one that runs is forgotten."""

BUILT_IN_CHAIN = re.compile(r":(\w+) ([A-Z]+)")
"""A chain of the kernel and its policy, as `iptables-save` prints them; other chains have `-` for a policy."""


@dataclass(frozen=True, slots=True)
class Docker:
    """A client that speaks to a running daemon."""

    client: Path

    @property
    def environment(self) -> dict[str, str]:
        """Our programs and this client first on PATH: kind calls `docker` by its name."""
        path = f"{BIN}{os.pathsep}{self.client.parent}{os.pathsep}{os.environ['PATH']}"
        return {"PATH": path} if self._has_buildx() else {"PATH": path, "DOCKER_BUILDKIT": "0"}

    def __call__(self, *arguments: str | Path, stdin: str | bytes | None = None, timeout: float = 300) -> str:
        """Run ``docker ARGUMENTS`` and return what it printed."""
        return run([self.client, *arguments], timeout=timeout, stdin=stdin, environment=self.environment)

    def read(self, *arguments: str | Path, timeout: float = 300) -> bytes:
        """Run ``docker ARGUMENTS`` and return the bytes that it wrote."""
        return read([self.client, *arguments], timeout=timeout, environment=self.environment)

    def has_image(self, name: str) -> bool:
        """Return whether the daemon holds the image ``name``."""
        return bool(self("images", "--quiet", name).strip())

    def _has_buildx(self) -> bool:
        plugin = subprocess.run([self.client, "buildx", "version"], capture_output=True, timeout=60, check=False)
        return plugin.returncode == 0


def find_docker() -> Docker | None:
    """Return a client whose daemon answers, or None."""
    clients = _clients()
    daemon = shutil.which("dockerd")
    if daemon is not None:
        # Debian's daemon is older than clients that machines bring along; its own client is beside it.
        version = _version(Path(daemon))
        clients.sort(key=lambda client: _version(client) != version)
    for client in clients:
        answer = subprocess.run([client, "version"], capture_output=True, timeout=60, check=False)
        if answer.returncode == 0:
            return Docker(client)
    return None


def ensure_docker() -> Docker:
    """Return a client of a running daemon; start the daemon when none runs.

    Raises:
        ClusterUnavailableError: None runs and this machine or this user cannot start one.
    """
    if running := find_docker():
        return running
    daemon = shutil.which("dockerd")
    if daemon is None or not _clients():
        raise ClusterUnavailableError("no Docker daemon answers and `dockerd` is not installed: install docker.io")
    if os.geteuid() != 0:
        raise ClusterUnavailableError("no Docker daemon answers and only root may start one: start it, or run as root")
    logger.info("starting dockerd")
    _start(daemon)
    docker = find_docker()
    assert docker is not None
    return docker


def stop_docker(docker: Docker, *, keep_images: bool) -> None:
    """Stop the daemon if the harness started it and nothing else runs in it; leave no trace on the machine."""
    pid = _our_pid()
    if pid is None:
        return
    if docker("ps", "--quiet").strip():
        logger.info("dockerd stays: other containers run in it")
        return
    logger.info("stopping dockerd")
    docker("network", "prune", "--force")
    os.kill(pid, signal.SIGTERM)
    _await(lambda: not _runs(pid), STOP_SECONDS, "dockerd does not stop")
    subprocess.run(["ip", "link", "delete", "docker0"], capture_output=True, timeout=60, check=False)
    rules = run(["iptables-save"], timeout=60)
    run(["iptables-restore"], timeout=60, stdin=rules_without_docker(rules, FIREWALL.read_text(encoding="utf-8")))
    shutil.rmtree(RUN, ignore_errors=True)
    for folder in SHARED_FOLDERS:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    for leftover in WORK.iterdir():
        if leftover == DATA and keep_images:
            continue
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    if not keep_images:
        WORK.rmdir()


def _clients() -> list[Path]:
    folders = [Path(folder) for folder in os.environ["PATH"].split(os.pathsep) if folder]
    return list(dict.fromkeys(folder / "docker" for folder in folders if os.access(folder / "docker", os.X_OK)))


def _version(program: Path) -> str:
    return " ".join(run([program, "--version"], timeout=60).split()[:3])


def _start(daemon: str) -> None:
    DATA.mkdir(parents=True, exist_ok=True)
    FIREWALL.write_text(run(["iptables-save"], timeout=60), encoding="utf-8")
    settings: dict[str, object] = {
        "data-root": str(DATA),
        "exec-root": str(RUN),
        "pidfile": str(PID_FILE),
        "storage-driver": "overlay2",
        # Image layers are unpacked by one process at a time anyway; more of them only fight for the disk.
        "max-concurrent-downloads": 2,
    }
    if not _may_raise_limits():
        # /usr/bin/env would find a version manager's shim, which costs 0.1 s at every `docker exec`.
        wrapper = WORK / "runtime"
        wrapper.write_text(f"#!{sys.executable} -IS\n{WRAPPER.read_text(encoding='utf-8')}", encoding="utf-8")
        wrapper.chmod(0o755)
        settings |= {"runtimes": {"without-limits": {"path": str(wrapper)}}, "default-runtime": "without-limits"}
    configuration = WORK / "daemon.json"
    configuration.write_text(json.dumps(settings, indent=1), encoding="utf-8")
    log = WORK / "dockerd.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [daemon, "--config-file", configuration],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    CHILDREN.append(process)

    def answers() -> bool:
        if process.poll() is not None:
            said = log.read_text(encoding="utf-8", errors="replace")[-2000:]
            raise ClusterUnavailableError(f"dockerd ended with code {process.returncode}:\n{said}")
        return find_docker() is not None

    _await(answers, START_SECONDS, f"dockerd does not answer; see {log}")


def _may_raise_limits() -> bool:
    bounding = re.search(r"^CapBnd:\s*(\w+)", Path("/proc/self/status").read_text(encoding="utf-8"), re.MULTILINE)
    return bounding is not None and bool(int(bounding[1], 16) & CAP_SYS_RESOURCE)


def _our_pid() -> int | None:
    if not PID_FILE.is_file():
        return None
    pid = int(PID_FILE.read_text(encoding="utf-8"))
    program = Path(f"/proc/{pid}/comm")
    return pid if program.is_file() and program.read_text(encoding="utf-8").strip() == "dockerd" else None


def _runs(pid: int) -> bool:
    for child in CHILDREN:
        child.poll()
    return Path(f"/proc/{pid}").exists()


def rules_without_docker(rules: str, before: str) -> str:
    """Take out of ``rules`` what dockerd put in, and only that: somebody else may have added rules since ``before``.

    Both are what `iptables-save` prints; so is the result. Chains of the kernel get the policy back that they had; one
    that ``before`` does not list let everything pass.
    """
    policies = {(table, chain): policy for table, chain, policy in _chains(before)}
    kept, table = [], ""
    for line in rules.splitlines():
        if line.startswith("*"):
            table = line
        if "docker" in line.lower() or " br-" in line:
            continue
        if chain := BUILT_IN_CHAIN.match(line):
            line = f":{chain[1]} {policies.get((table, chain[1]), 'ACCEPT')} [0:0]"
        kept.append(line)
    return "\n".join([*kept, ""])


def _chains(rules: str) -> Iterator[tuple[str, str, str]]:
    table = ""
    for line in rules.splitlines():
        if line.startswith("*"):
            table = line
        if chain := BUILT_IN_CHAIN.match(line):
            yield table, chain[1], chain[2]


def _await(condition: Callable[[], bool], seconds: float, otherwise: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise ClusterUnavailableError(f"{otherwise} ({seconds:.0f} s)")
        time.sleep(0.1)
