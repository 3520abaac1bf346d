"""The reference of the spec: every field is there, links lead to sections, and what does not work yet says so."""

import re

import pytest

from finetune_api.crd import structural_schema
from finetune_api.reference import spec_reference
from finetune_api.spec import FineTuneJobSpec

TEXT = spec_reference()
SECTIONS = {
    heading: body for heading, body in re.findall(r"^## (spec\S*)\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL)
}


def row(section: str, field: str) -> list[str]:
    [line] = [line for line in SECTIONS[section].splitlines() if line.startswith(f"| `{field}` |")]
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_all_blocks_of_the_spec_have_a_section() -> None:
    blocks = structural_schema(FineTuneJobSpec, "spec")["properties"]
    assert {f"spec.{name}" for name in blocks} <= SECTIONS.keys()
    for name, block in blocks.items():
        for field in block["properties"]:
            assert row(f"spec.{name}", field)


def test_a_block_that_stands_in_several_places_is_explained_once() -> None:
    assert "spec.model.secretRef" in SECTIONS
    assert "spec.output.secretRef" not in SECTIONS
    assert "](#specmodelsecretref)" in SECTIONS["spec.output"]


def test_links_lead_to_sections() -> None:
    anchors = {re.sub("[^a-z0-9]", "", heading.lower()) for heading in SECTIONS}
    links = set(re.findall(r"\]\(#(\w+)\)", TEXT))
    assert len(links) > 30
    assert links <= anchors


def test_every_row_has_four_cells() -> None:
    rows = [line for line in TEXT.splitlines() if line.startswith("| `") and "](" not in line]
    assert len(rows) > 100
    assert {len(re.split(r"(?<!\\)\|", line)) for line in rows} == {5, 6}, "field tables and the learning rates' table"


@pytest.mark.parametrize(
    ("section", "field", "type_", "default"),
    [
        ("spec.model", "source", "text of up to 1024", "**required**"),
        ("spec.method.lora", "rank", "whole number from 1 to 1024", "16"),
        ("spec.method.lora", "alpha", "whole number from 1 to 4096", "computed"),
        ("spec.method.lora", "dropout", "number from 0 below 1", "0.05"),
        ("spec.method.lora", "useDora", "true or false", "false"),
        ("spec.training", "schedule", "`cosine` or `linear` or `constant`", "cosine"),
        ("spec.data", "tasks", "list of 1 to 32: [block](#specdatatasks)", "**required**"),
        ("spec.training", "maxSteps", "whole number from 1 to 10000000", ""),
    ],
)
def test_type_and_default_are_in_words(section: str, field: str, type_: str, default: str) -> None:
    assert row(section, field)[1:3] == [type_, default]


def test_what_works_in_part_says_which() -> None:
    assert "*So far: none, cpu.*" in row("spec.compute.deepspeed", "offload")[3]
    assert "*So far: file://, s3://, pvc://.*" in row("spec.output", "uri")[3]


def test_angle_brackets_are_shown() -> None:
    assert "&lt;task>" in row("spec.evaluation.gates[]", "metric")[3]
