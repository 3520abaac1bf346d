"""A bounded share of the fuzzing: some hundred cases a target, the same ones every time. `make soak` runs the rest."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None, reason="atheris has wheels for Linux on x86-64 alone"
)

ROOT = Path(__file__).resolve().parents[2]
CASES = 200
NAMES = ("manifest", "spec", "template", "rows", "progress", "status", "report", "uri", "secret", "hub")


@pytest.mark.parametrize("name", NAMES)
def test_no_input_crashes_hangs_or_escapes(name: str) -> None:
    command = [sys.executable, "-m", "tests.fuzz", name, str(CASES)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"{name}: {CASES} cases" in done.stdout


def test_a_crash_is_noticed(tmp_path: Path) -> None:
    script = (
        "import sys, tests.fuzz.target as target\n"
        "def crash(data):\n    raise KeyError('found')\n"
        "target.TARGETS['uri'] = crash\n"
        "sys.argv = ['fuzz', 'uri', '5']\n"
        "import tests.fuzz.__main__\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode != 0
    assert "uri was crashed by" in done.stderr


@pytest.mark.parametrize(
    "action",
    [
        "open('/etc/hostname')",
        "subprocess.Popen(['true'])",
        "os.system('true')",
        "socket.create_connection(('::1', 9))",
    ],
)
def test_an_escape_is_noticed(action: str) -> None:
    script = f"import os, socket, subprocess\nfrom tests.fuzz.target import watched\nwith watched():\n    {action}\n"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert "EscapeError" in done.stderr


def test_every_target_is_run() -> None:
    done = subprocess.run([sys.executable, "-m", "tests.fuzz"], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert tuple(done.stdout.split()) == NAMES
