"""The pins: complete, hashed, the same in every set, and free of any index."""

import re
from pathlib import Path

import pytest

REQUIREMENTS = Path(__file__).resolve().parents[2] / "requirements"
SETS = sorted(REQUIREMENTS.glob("*.in"))


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(name: str) -> dict[str, str]:
    text = (REQUIREMENTS / f"{name}.txt").read_text(encoding="utf-8")
    found = re.findall(r"^([\w.-]+)(?:\[[\w,-]+\])?==(\S+)", text, re.MULTILINE)
    assert found
    return dict(found)


def wanted(file: Path) -> set[str]:
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    return {canonical(re.split(r"[\[=;< >]", line)[0]) for line in lines}


@pytest.mark.parametrize("file", SETS, ids=lambda file: file.stem)
def test_everything_asked_for_is_pinned(file: Path) -> None:
    assert wanted(file) <= set(pins(file.stem)), "run `make requirements`"


@pytest.mark.parametrize("file", SETS, ids=lambda file: file.stem)
def test_pins_hold_names_versions_and_hashes_alone(file: Path) -> None:
    lines = file.with_suffix(".txt").read_text(encoding="utf-8").splitlines()
    entry = re.compile(r"[\w.-]+==[\w.+]+( ; [^\\]+)? \\|    --hash=sha256:[0-9a-f]{64}( \\)?|#.*")
    assert not [line for line in lines if not entry.fullmatch(line)]
    assert "://" not in "".join(lines)


@pytest.mark.parametrize("name", ["operator", "trainer"])
def test_images_run_the_versions_that_tests_ran_with(name: str) -> None:
    tested = pins("dev")
    assert {package: tested.get(package) for package in pins(name)} == pins(name)


def test_the_operator_needs_no_torch() -> None:
    assert not {"torch", "ray", "transformers"} & set(pins("operator"))
