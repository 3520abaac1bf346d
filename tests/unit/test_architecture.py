"""The rules of the tree that no linter knows: where files may be and what they may not say."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

import finetune_api

ROOT = Path(__file__).resolve().parents[2]
SOURCE_ROOTS = (ROOT / "operator", ROOT / "trainer_image")
NAMELESS = {"utils", "util", "helpers", "helper", "common", "misc", "tools"}
"""If a module has no name of its own, what it is for is not understood yet."""

KNOWN_HOSTS = {
    "api.forge.coreweave.com",
    "arxiv.org",
    "docs.vllm.ai",
    "huggingface.co",
    "jinja.palletsprojects.com",
    "www.apache.org",
    "www.w3.org",
    "json-schema.org",
    "127.0.0.1",
}
"""Hosts that a tracked file may name. Registries are not among them: they belong to the machine's configuration."""


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    files = [ROOT / name for name in listed.split("\0") if name]
    assert len(files) > 20
    return [file for file in files if file.is_file()]


def tracked_texts() -> list[tuple[Path, str]]:
    texts = []
    for file in tracked_files():
        content = file.read_bytes()
        if b"\0" not in content:
            texts.append((file, content.decode("utf-8")))
    return texts


@pytest.mark.parametrize("root", SOURCE_ROOTS, ids=lambda root: root.name)
def test_a_source_root_is_no_package(root: Path) -> None:
    # operator/__init__.py would shadow the standard library's operator.
    assert not (root / "__init__.py").exists()
    assert list(root.glob("*/__init__.py")), f"{root} holds no package"


@pytest.mark.parametrize("root", SOURCE_ROOTS, ids=lambda root: root.name)
def test_every_package_is_typed(root: Path) -> None:
    for package in root.glob("*/__init__.py"):
        assert package.with_name("py.typed").is_file(), f"{package.parent.name} has no py.typed"


def test_every_module_has_a_name() -> None:
    modules = [file for file in tracked_files() if file.suffix == ".py"]
    assert not [file for file in modules if {file.stem, *file.parent.relative_to(ROOT).parts} & NAMELESS]


def test_no_file_names_a_host_that_is_not_known() -> None:
    found = {
        (str(file.relative_to(ROOT)), host)
        for file, text in tracked_texts()
        for host in re.findall(r"https?://([\w-]+(?:\.[\w-]+)+)", text)
    }
    # A host that ends in .svc is a Service of whatever cluster this runs in.
    harmless = {host for _, host in found if "example" in host or host.endswith(".svc")}
    unknown = {(file, host) for file, host in found if host not in KNOWN_HOSTS | harmless}
    assert not unknown, "name no registry; add any other host to KNOWN_HOSTS"


def test_no_file_names_a_folder_of_one_machine() -> None:
    this = Path(__file__).resolve()
    machine_path = re.compile(r"(?<![\w.$}/])/(?:root|work|home/\w+|Users/\w+)/")
    found = [file for file, text in tracked_texts() if file != this and machine_path.search(text)]
    assert not found


def test_the_map_names_every_module_of_the_trainer() -> None:
    modules = {file.stem for file in (ROOT / "trainer_image" / "finetune_trainer").glob("[a-z]*.py")}
    named = set(re.findall(r"`(\w+)`", (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")))
    assert modules <= named, "add them to the table in docs/architecture.md"


def test_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    chart = yaml.safe_load((ROOT / "charts/finetune-operator/Chart.yaml").read_text())
    assert project["version"] == chart["appVersion"] == finetune_api.__version__
