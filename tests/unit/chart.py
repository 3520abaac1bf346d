"""The chart as Helm renders it, for a cluster that is not there."""

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from ..cluster.folder import BIN

CHART = Path(__file__).resolve().parents[2] / "charts" / "finetune-operator"
EVERYTHING = CHART / "ci" / "everything-values.yaml"
RELEASE = "finetune-operator"
NAMESPACE = "finetune-system"

Manifest = dict[str, Any]


_FAULTLESS = 10
"""The highest of kube-score's grades; warnings have 5."""


class HelmError(Exception):
    """What Helm says when it refuses."""


def helm(*arguments: str | Path, values: Manifest | None = None) -> str:
    """Run ``helm ARGUMENTS``, with ``values`` as a further values file, and return what it printed."""
    command = [_program("helm"), *arguments, *(() if values is None else ("--values=-",))]
    given = None if values is None else yaml.safe_dump(values)
    done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise HelmError(done.stderr)
    return done.stdout


def faults(manifests: Sequence[Manifest], *flags: str) -> dict[str, list[str]]:
    """Return what kube-score finds: of each of its checks, as it calls it, the words for each object."""
    command = [_program("kube-score"), "score", "--output-format=json", "--kubernetes-version=v1.34", *flags, "-"]
    given = yaml.dump_all(manifests, Dumper=yaml.CSafeDumper)
    done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=60)
    found: dict[str, list[str]] = {}
    for judged in json.loads(done.stdout):
        for check in judged["checks"]:
            if not check["skipped"] and check["grade"] < _FAULTLESS:
                words = [f"{judged['object_name']}: {comment['summary']}" for comment in check["comments"]]
                found.setdefault(check["check"]["id"], []).extend(words)
    return found


def _program(name: str) -> Path:
    program = BIN / name
    if not program.is_file():
        message = f"{program} is not there; `make programs` builds it"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    return program


def render(values: Manifest | None = None, files: Sequence[Path] = (), release: str = RELEASE) -> list[Manifest]:
    """Return the objects that an installation would create."""
    text = helm(
        *("template", release, CHART, f"--namespace={NAMESPACE}", "--kube-version=1.34.0"),
        *(f"--values={file}" for file in files),
        values=values or {},
    )
    # The definition is long; libyaml reads it ten times as fast.
    return [manifest for manifest in yaml.load_all(text, Loader=yaml.CSafeLoader) if manifest]


def only(manifests: Sequence[Manifest], kind: str, name: str = "") -> Manifest:
    """Return the one object of ``kind``, or the one called ``name``."""
    found = [one for one in manifests if one["kind"] == kind and name in ("", one["metadata"]["name"])]
    assert len(found) == 1, [(one["kind"], one["metadata"]["name"]) for one in found]
    return found[0]
