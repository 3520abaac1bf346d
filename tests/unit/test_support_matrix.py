"""The table of what is tested with what names the very versions, and tests that exist."""

import re
from pathlib import Path

import pytest

from finetune_operator.ray_job import KUBERAY_NEEDED

from ..cluster.binary import MODULES

ROOT = Path(__file__).resolve().parents[2]
ROWS = re.findall(
    r"^\| ([\w-]+)[^|]*\| [^|]*\| ([\d.]+) \| (.+) \|$", (ROOT / "docs/support.md").read_text(), re.MULTILINE
)
MODULE_OF = {
    "Kubernetes": "k8s.io/kubernetes",
    "Helm": "helm.sh/helm/v3",
    "KubeRay": "github.com/ray-project/kuberay/ray-operator",
    "Kueue": "sigs.k8s.io/kueue",
    "versitygw": "github.com/versity/versitygw",
}


def pinned_version(program: str) -> str:
    if program == "Python":
        (version,) = re.findall(r'^requires-python = ">=([\d.]+),', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
        return version
    if program in MODULE_OF:
        return next(one.version.removeprefix("v") for one in MODULES if one.path == MODULE_OF[program])
    pins = "".join((ROOT / "requirements" / f"{name}.txt").read_text() for name in ("dev", "gpu"))
    (version,) = re.findall(rf"^{re.escape(program)}==([\w.]+)", pins, re.MULTILINE)
    return version


@pytest.mark.parametrize(("program", "version", "by"), ROWS, ids=[program for program, *_ in ROWS])
def test_a_version_is_the_one_that_tests_run(program: str, version: str, by: str) -> None:
    assert version == pinned_version(program)
    assert all((ROOT / path).exists() for path in re.findall(r"`(tests/[\w./]+)`", by))


def test_the_table_is_read_whole() -> None:
    assert {program for program, *_ in ROWS} >= {*MODULE_OF, "Python", "torch", "bitsandbytes"}
    assert len(ROWS) == (ROOT / "docs/support.md").read_text().count("\n| ") - 1


def test_the_chart_asks_for_the_kubernetes_that_the_table_names() -> None:
    chart = (ROOT / "charts/finetune-operator/Chart.yaml").read_text()
    (needed,) = re.findall(r'^kubeVersion: ">=(\d+\.\d+)', chart, re.MULTILINE)
    assert f"| Kubernetes | {needed} or newer |" in (ROOT / "docs/support.md").read_text()


def test_the_operator_asks_for_the_kuberay_that_the_table_names() -> None:
    assert f"| KubeRay | for several workers; {KUBERAY_NEEDED} or newer" in (ROOT / "docs/support.md").read_text()
