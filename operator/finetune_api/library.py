"""The template library: named tasks, several phrasings each, for ``data.tasks[].library``.

A task that names an entry is trained on all of its phrasings. What the rows call the columns is the task's ``columns``.
"""

from functools import cache
from typing import Annotated

import yaml
from pydantic import Field

from finetune_api.model import ApiModel
from finetune_api.prompt_library import library_text
from finetune_api.spec.data import TaskSpec, TemplateSpec
from finetune_api.spec.field import Name, Prose


class LibraryEntry(ApiModel):
    """One task and the ways to put it."""

    name: Name
    """What ``data.tasks[].library`` says."""
    version: Annotated[int, Field(ge=1)]
    """Raised when a phrasing changes."""
    purpose: Prose
    """What the task is, in a sentence."""
    columns: Annotated[dict[str, str], Field(min_length=1)]
    """Columns that the rows must have, and what is in them."""
    labels: tuple[str, ...] = ()
    """Answers that are usual; a job names its own."""
    templates: Annotated[tuple[TemplateSpec, ...], Field(min_length=2)]
    """The phrasings."""


@cache
def library_entry(name: str) -> LibraryEntry:
    """Return the entry called ``name``, which is one of `finetune_api.prompt_library.library_names`."""
    return LibraryEntry.model_validate(yaml.safe_load(library_text(name)))


def written_out(task: TaskSpec) -> TaskSpec:
    """Return ``task`` with the templates of the library's entry that it names, in place of the name."""
    if task.library is None:
        return task
    return task.model_copy(update={"library": None, "templates": library_entry(task.library).templates})
