"""How a pod of a Ray cluster goes: who is asked, and how long the pod is held for them."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from finetune_trainer.pod_stop import PodStop, pod_held, stop
from finetune_trainer.process_group import ProcessGroup
from finetune_trainer.worker import AgreedStop
from finetune_trainer.workspace import Workspace

pytestmark = pytest.mark.timeout(60)

PROGRAM = """
import sys, time
from pathlib import Path
from finetune_trainer.interrupt import StopFlag
from finetune_trainer.workspace import Workspace
with StopFlag() as flag:
    with Workspace(Path(sys.argv[1])).claim("hash"):
        print("claimed", flush=True)
        flag.event.wait()
    print("tells how it ended", flush=True)
    sys.stdin.read()
"""


def test_a_pod_in_which_nobody_works_goes_at_once(tmp_path: Path):
    with Workspace(tmp_path).claim("hash"), pod_held(tmp_path):
        pass
    stop(tmp_path)


def test_a_pod_is_held_until_all_that_train_in_it_have_ended(tmp_path: Path):
    request = PodStop(tmp_path)
    assert not request.is_set()
    hook = threading.Thread(target=stop, args=(tmp_path,))
    with pod_held(tmp_path):
        with pod_held(tmp_path):
            hook.start()
            while not request.is_set():
                hook.join(0.01)
        hook.join(0.2)
        assert hook.is_alive()
    hook.join()


def test_a_program_hears_sigterm_and_is_waited_for_until_its_process_has_ended(tmp_path: Path):
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as program:
        assert program.stdin is not None and program.stdout is not None
        assert program.stdout.readline() == b"claimed\n"
        hook = threading.Thread(target=stop, args=(tmp_path,))
        hook.start()
        assert program.stdout.readline() == b"tells how it ended\n"
        hook.join(0.2)
        assert hook.is_alive()
        program.stdin.close()
        hook.join()
    assert program.returncode == 0


def test_one_pod_that_is_to_go_stops_a_worker_that_hears_nothing_else(tmp_path: Path):
    other = ProcessGroup(rank=1)
    flag = AgreedStop(other, desk=None, pod=PodStop(tmp_path))
    assert not flag.is_set()
    stop(tmp_path)
    assert flag.is_set()
