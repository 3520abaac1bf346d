"""`make sbom` lists what is shipped: every pinned package, with the version and the hashes of its pin."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ..unit.test_requirements import REQUIREMENTS, canonical, pins

ROOT = REQUIREMENTS.parent


@pytest.fixture(scope="module")
def lists(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sbom")
    made = ["make", "-s", "sbom", f"AUDIT={folder / 'audit'}", f"SBOM={folder}"]
    subprocess.run(made, cwd=ROOT, check=True, timeout=300)
    return folder


@pytest.mark.parametrize("name", ["operator", "trainer", "cli"])
def test_the_list_has_every_pin_with_its_hashes_and_nothing_else(lists: Path, name: str) -> None:
    listed = json.loads((lists / f"{name}.cdx.json").read_text(encoding="utf-8"))
    assert (listed["bomFormat"], listed["specVersion"]) == ("CycloneDX", "1.6")
    found = {canonical(one["name"]): (one["version"], hashes_of(one)) for one in listed["components"]}
    hashes = pinned_hashes(name)
    assert found == {canonical(one): (version, hashes[one]) for one, version in pins(name).items()}


def hashes_of(component: dict[str, Any]) -> set[str]:
    return {one["content"] for place in component["externalReferences"] for one in place["hashes"]}


def pinned_hashes(name: str) -> dict[str, set[str]]:
    text = (REQUIREMENTS / f"{name}.txt").read_text(encoding="utf-8")
    entries = re.findall(r"^([\w.-]+)==.*\n((?: .*\n)+)", text, re.MULTILINE)
    return {package: set(re.findall("sha256:([0-9a-f]{64})", lines)) for package, lines in entries}
