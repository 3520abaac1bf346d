"""What the documents say must be so: jobs validate, links lead somewhere, commands exist."""

import json
import re
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft7Validator

from finetune_api.job import load_job

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*/*.md")])
EXAMPLES = sorted(file for file in ROOT.glob("examples/*/*.yaml") if "kind: FineTuneJob" in file.read_text("utf-8"))


VALUES = ROOT / "charts" / "finetune-operator" / "values.schema.json"


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(document: Path, language: str) -> list[str]:
    """Return the fenced blocks of ``language``; "" is a block without one, which holds commands or a drawing."""
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(document: Path) -> list[str]:
    return [line for block in blocks(document, "") for line in block.splitlines()]


def test_there_are_documents_and_examples() -> None:
    assert len(DOCUMENTS) >= 12
    assert len(EXAMPLES) >= 3


@pytest.mark.parametrize("file", EXAMPLES, ids=name_of)
def test_an_example_validates(file: Path) -> None:
    job = load_job(file.read_text(encoding="utf-8"), str(file))
    # On a laptop beside the example, wherever the checkout is; in a cluster in a bucket.
    assert job.spec.output.uri == f"file://{file.parent}/output" or job.spec.output.uri.startswith("s3://")
    assert (file.parent / "README.md").is_file()


def test_every_example_is_applied_to_a_cluster() -> None:
    text = "".join(file.read_text(encoding="utf-8") for file in ROOT.glob("tests/e2e/*.py"))
    applied = set(re.findall(r'"(\d\d-[a-z-]+/[a-z0-9-]+\.yaml)"', text))
    applied |= {f"{folder}/finetunejob.yaml" for folder in re.findall(r'\bof(?:: str)? ?= ?"(\d\d-[a-z-]+)"', text)}
    assert applied == {str(file.relative_to(ROOT / "examples")) for file in EXAMPLES}
    assert {file.parent for file in EXAMPLES} == set(ROOT.glob("examples/[0-9]*"))


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_jobs_in_a_document_validate(document: Path) -> None:
    for block in blocks(document, "yaml"):
        load_job(block, str(document))


def test_values_of_the_chart_in_documents_validate() -> None:
    schema = Draft7Validator(json.loads(VALUES.read_text(encoding="utf-8")))
    shown = [yaml.safe_load(block) for document in DOCUMENTS for block in blocks(document, "values")]
    assert len(shown) >= 2
    assert [error.message for values in shown for error in schema.iter_errors(values)] == []


def test_the_readme_shows_a_job() -> None:
    assert [block for block in blocks(ROOT / "README.md", "yaml") if "kind: FineTuneJob" in block]


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    assert not [target for target in targets if target and not (document.parent / target).exists()]


def test_tests_that_the_makefile_names_exist() -> None:
    # pytest runs nothing at all where it does not know one of them.
    named = re.findall(r"(tests/\S+\.py)::(\w+)", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert named
    for file, test in named:
        assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{test}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_make_targets_exist(document: Path) -> None:
    known = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    text = document.read_text(encoding="utf-8")
    quoted = re.findall(r"`make ([a-z-]+)`", text)
    shown = [found[1] for line in commands(document) if (found := re.match(r"make ([a-z-]+)", line))]
    assert {*quoted, *shown} <= known


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_files_in_commands_exist(document: Path) -> None:
    shown = " ".join(line for line in commands(document) if line.startswith(".venv/bin/"))
    files = re.findall(r"(?<= )[\w./-]+\.(?:py|yaml)\b", shown)
    assert not [file for file in files if not (ROOT / file).exists()]
