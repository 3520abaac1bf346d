"""How tests get a cluster: what can be said without one."""

import json
import re
from pathlib import Path

import pytest

from ..cluster.binary import MODULES, NODE, PAUSE, TOOLS
from ..cluster.daemon import rules_without_docker
from ..cluster.folder import ROOT, digest
from ..cluster.project_image import OPERATOR, SOURCES, TRAINER, ProjectImage
from ..cluster.runtime_wrapper import without_limits

IMAGES = pytest.mark.parametrize("image", [OPERATOR, TRAINER], ids=lambda image: image.name)

BEFORE = """\
*filter
:INPUT ACCEPT [5:300]
:FORWARD ACCEPT [0:0]
COMMIT
"""
DURING = """\
*filter
:INPUT ACCEPT [9:900]
:FORWARD DROP [0:0]
:DOCKER - [0:0]
:MINE - [0:0]
-A INPUT -p tcp --dport 22 -j MINE
-A FORWARD -i docker0 -j ACCEPT
-A FORWARD -i br-0123 ! -o br-0123 -j ACCEPT
COMMIT
*nat
:POSTROUTING ACCEPT [1:60]
-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
COMMIT
"""
AFTER = """\
*filter
:INPUT ACCEPT [0:0]
:FORWARD ACCEPT [0:0]
:MINE - [0:0]
-A INPUT -p tcp --dport 22 -j MINE
COMMIT
*nat
:POSTROUTING ACCEPT [0:0]
COMMIT
"""


def instructions(image: ProjectImage) -> list[tuple[str, str]]:
    text = (ROOT / image.dockerfile).read_text(encoding="utf-8").replace("\\\n", " ")
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in text.splitlines()) if word.isupper()]


def last_stage(image: ProjectImage) -> list[tuple[str, str]]:
    found = instructions(image)
    starts = [number for number, (word, _) in enumerate(found) if word == "FROM"]
    return found[starts[-1] + 1 :]


def test_a_stopped_daemon_leaves_the_firewall_as_it_was_and_keeps_rules_of_others() -> None:
    assert rules_without_docker(DURING, BEFORE) == AFTER


@pytest.mark.parametrize("is_bundle", [True, False], ids=["container", "further process"])
def test_a_container_asks_for_nothing_that_needs_the_right_to_raise_limits(tmp_path: Path, is_bundle: bool) -> None:
    process = {
        "args": ["sleep"],
        "capabilities": {"bounding": ["CAP_KILL", "CAP_SYS_RESOURCE"], "ambient": None},
        "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 2**20, "soft": 2**20}],
        "oomScoreAdj": -999,
    }
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"process": process} if is_bundle else process), encoding="utf-8")
    without_limits(file, is_bundle=is_bundle)
    left = json.loads(file.read_text(encoding="utf-8"))
    wanted = {"args": ["sleep"], "capabilities": {"bounding": ["CAP_KILL"], "ambient": None}}
    assert left == ({"process": wanted} if is_bundle else wanted)


def test_every_program_of_a_cluster_is_pinned_once() -> None:
    given = [PAUSE, *(name for module in MODULES for name in module.packages)]
    assert set(NODE) | set(TOOLS) <= set(given)
    assert len(given) == len(set(given))
    assert all(re.fullmatch(r"v\d+\.\d+\.\d+", module.version) for module in MODULES)


@IMAGES
def test_the_last_stage_adds_sources_and_settings_alone(image: ProjectImage) -> None:
    # An edited source reaches the node as one layer that holds this folder; anything else would stay behind.
    stage = last_stage(image)
    assert {word for word, _ in stage} <= {"ARG", "COPY", "ENTRYPOINT", "ENV", "LABEL", "RUN", "USER", "WORKDIR"}
    assert [rest.split()[-1] for word, rest in stage if word == "RUN"] == [SOURCES]
    copied = [rest.split()[-1] for word, rest in stage if word == "COPY"]
    assert copied
    assert all(Path(SOURCES) in Path(target).parents for target in copied)


@IMAGES
def test_an_image_has_pins_labels_and_a_user_that_is_a_number(image: ProjectImage) -> None:
    found = instructions(image)
    assert any(word == "COPY" and image.pins in rest for word, rest in found)
    assert ("ARG", "BASE_IMAGE=python:3.11-slim") in found
    assert ("USER", "65532:65532") in found
    labels = " ".join(rest for word, rest in found if word == "LABEL")
    assert set(re.findall(r"org\.opencontainers\.image\.(\w+)", labels)) >= {
        "title",
        "description",
        "licenses",
        "version",
    }


def test_a_digest_changes_with_a_file_its_name_and_its_folder(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "file"
    file.parent.mkdir()
    seen = set()
    for content, name in (("a", "file"), ("b", "file"), ("b", "other")):
        file.unlink(missing_ok=True)
        file = file.with_name(name)
        file.write_text(content, encoding="utf-8")
        seen.add(digest([tmp_path]))
    assert len(seen) == 3
    assert digest(["ab", "c"]) != digest(["a", "bc"])
