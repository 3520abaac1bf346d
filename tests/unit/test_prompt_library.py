"""The template library: every file is sound, says what it needs, and puts the same question in several ways."""

import hashlib
import json
from pathlib import Path

import pytest

from finetune_api import prompt_library
from finetune_api.library import entry_with, library_entry
from finetune_api.prompt_library import library_names
from finetune_api.resolve import resolve
from finetune_trainer.template import Template

from ..conftest import Golden
from .builders import ABSENT, make_job

VERSIONS = Path(__file__).parent / "golden" / "prompt-library.json"
"""Of every entry the sha256 of its phrasings, by name and version."""


def test_library_covers_the_usual_tasks() -> None:
    assert library_names() == (
        "alpaca",
        "chain-of-thought",
        "code",
        "data-to-text",
        "ner",
        "nli",
        "paraphrase",
        "qa",
        "sentiment",
        "summarize",
        "summarize-dialogue",
        "topic",
        "translate",
    )


@pytest.mark.parametrize("name", library_names())
def test_entry_is_sound(name: str) -> None:
    entry = library_entry(name)
    assert entry.name == name
    assert len(entry.templates) >= 3
    assert len({template.prompt for template in entry.templates}) == len(entry.templates)
    asked: set[str] = set()
    answered: set[str] = set()
    optional: set[str] = set()
    for template in entry.templates:
        compiled = Template(template.prompt, template.completion, name)
        assert compiled.columns == set(entry.columns), f"{template.prompt!r} leaves a column out"
        assert not compiled.prompt_columns & compiled.completion_columns, f"{template.prompt!r} gives the answer away"
        # The boundary is white space of one side alone: a doubled space is another token than the model would write.
        assert template.prompt[-1].isspace() != template.completion[0].isspace() or template.prompt.endswith("\n")
        asked |= compiled.prompt_columns
        answered |= compiled.completion_columns
        optional |= compiled.optional_columns
    assert not asked & answered
    assert set(entry.example) == set(entry.columns)
    assert not entry.labels or entry.example["label"] in entry.labels
    row = {column: f"the {column}" for column in entry.columns}
    for template in entry.templates:
        prompt, completion = Template(template.prompt, template.completion, name).render(row, 0)
        assert all(f"the {column}" in prompt + completion for column in entry.columns)
        bare = {column: value for column, value in row.items() if column not in optional}
        assert "the" in Template(template.prompt, template.completion, name).render(bare, 0)[0]


def test_a_resolved_job_holds_the_phrasings_themselves() -> None:
    task = {"spec.data.tasks[0].templates": ABSENT, "spec.data.tasks[0].library": "sentiment"}
    (resolved,) = resolve(make_job(task)).spec.data.tasks
    assert resolved.library is None
    assert resolved.templates == library_entry("sentiment").templates


def test_an_entry_is_known_again_by_all_of_its_phrasings() -> None:
    templates = library_entry("sentiment").templates
    assert entry_with(templates) is library_entry("sentiment")
    assert entry_with(templates[1:]) is None
    assert entry_with(()) is None


def test_every_file_belongs_to_the_library() -> None:
    folder = Path(str(prompt_library.__file__)).parent
    assert {file.stem for file in folder.glob("*.yaml")} == set(library_names())
    assert {library_entry(name).name for name in library_names()} == set(library_names())


def phrasings_hash(name: str) -> str:
    phrasings = [(template.prompt, template.completion) for template in library_entry(name).templates]
    return hashlib.sha256(json.dumps(phrasings).encode()).hexdigest()


def test_other_phrasings_have_another_version(golden: Golden) -> None:
    now = {f"{name} {library_entry(name).version}": phrasings_hash(name) for name in library_names()}
    recorded = json.loads(VERSIONS.read_text(encoding="utf-8"))
    # Before anything is written: what was published under a version cannot be accepted as something else.
    changed = [entry for entry, found in now.items() if recorded.get(entry, found) != found]
    assert not changed, f"phrasings of {', '.join(changed)} changed: raise version in its file, then --update-golden"
    golden(VERSIONS.name, json.dumps(recorded | now, indent=2, sort_keys=True) + "\n")
