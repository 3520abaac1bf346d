"""The template library: every file is sound, says what it needs, and puts the same question in several ways."""

import re
from pathlib import Path

import pytest

from finetune_api.prompt_library import library_entry, library_names

PLACEHOLDER = re.compile(r"\{\{ (\w+) \}\}")


def test_library_covers_the_usual_tasks() -> None:
    assert library_names() == (
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
    asked, answered = set(), set()
    for template in entry.templates:
        in_prompt, in_completion = (set(PLACEHOLDER.findall(text)) for text in (template.prompt, template.completion))
        assert in_prompt | in_completion == set(entry.columns), f"{template.prompt!r} leaves a column out"
        assert not in_prompt & in_completion, f"{template.prompt!r} gives the answer away"
        assert template.prompt.count("{{") == len(PLACEHOLDER.findall(template.prompt)), "only plain placeholders"
        # The boundary is white space of one side alone: a doubled space is another token than the model would write.
        assert template.prompt[-1].isspace() != template.completion[0].isspace() or template.prompt.endswith("\n")
        asked |= in_prompt
        answered |= in_completion
    assert not asked & answered


def test_columns_can_have_other_names() -> None:
    templates = library_entry("sentiment").templates_for({"text": "review_body"})
    assert all("{{ review_body }}" in template.prompt and "{{ text }}" not in template.prompt for template in templates)
    assert all(template.completion == " {{ label }}" for template in templates)


def test_unknown_entry_is_told_with_those_there_are() -> None:
    with pytest.raises(LookupError, match=r"'poems' is not in the template library; it has chain-of-thought, code"):
        library_entry("poems")


def test_every_file_belongs_to_the_library() -> None:
    folder = Path(library_entry.__wrapped__.__code__.co_filename).parent
    assert {file.stem for file in folder.glob("*.yaml")} == set(library_names())
