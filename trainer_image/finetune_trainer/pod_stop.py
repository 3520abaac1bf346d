"""How a pod of a Ray cluster goes: what works in it saves and ends first.

``ray start`` takes the pod's SIGTERM, ends everything there at once and passes nothing on. So Kubernetes runs
``python -m finetune_trainer.pod_stop WORKSPACE`` before (preStop): it asks who works in the pod to save and end, and
holds the pod until they have. They hold locks, which go with a process however that ends: nobody is waited for in vain.
Standard library only, for a pod that is to go has little time.
"""

import argparse
import contextlib
import fcntl
import os
import select
import signal
from collections.abc import Iterator
from pathlib import Path

PROGRAM_LOCK = "lock"
"""Held by the one process that has claimed the workspace, with its number inside. It hears signals."""
_WORKERS_LOCK = "workers"
"""Shared by the processes that train, whose signals are Ray's."""
_REQUEST = "stop"


class PodStop:
    """Whether the pod with this workspace is to go."""

    def __init__(self, workspace: Path) -> None:
        self._request = workspace / _REQUEST

    def is_set(self) -> bool:
        """Whether it has been asked for."""
        return self._request.exists()


@contextlib.contextmanager
def pod_held(workspace: Path) -> Iterator[None]:
    """Within the block, this process is one that trains: it looks at `PodStop`, and its pod does not go before."""
    with (workspace / _WORKERS_LOCK).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield


def stop(workspace: Path) -> None:
    """Ask everybody in the pod to save and end; return when they have."""
    (workspace / _REQUEST).touch()
    _end_program(workspace / PROGRAM_LOCK)
    with (workspace / _WORKERS_LOCK).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)


def _end_program(lock: Path) -> None:
    if not lock.exists():
        return
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            program = os.pidfd_open(int(file.read()))
        else:
            return
    signal.pidfd_send_signal(program, signal.SIGTERM)
    # Not for its lock: it has still to say how it ended.
    select.select([program], [], [])
    os.close(program)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="finetune_trainer.pod_stop", description=__doc__)
    parser.add_argument("workspace", type=Path)
    stop(parser.parse_args().workspace)
