"""The template library: named tasks, several phrasings each, for ``data.tasks[].library``.

A task that names an entry is trained on all of its phrasings. What the rows call the columns is the task's ``columns``.
"""

from functools import cache
from typing import Annotated

import yaml
from pydantic import Field

from finetune_api.model import ApiModel
from finetune_api.prompt_library import library_names, library_text
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
    example: Annotated[dict[str, str], Field(min_length=1)]
    """A row to show the phrasings on; never trained on."""
    labels: tuple[str, ...] = ()
    """Answers that are usual; a job names its own."""
    templates: Annotated[tuple[TemplateSpec, ...], Field(min_length=2)]
    """The phrasings."""


@cache
def library_entry(name: str) -> LibraryEntry:
    """Return the entry called ``name``, which is one of `finetune_api.prompt_library.library_names`."""
    return LibraryEntry.model_validate(yaml.safe_load(library_text(name)))


def entry_with(templates: tuple[TemplateSpec, ...]) -> LibraryEntry | None:
    """Return the entry whose phrasings ``templates`` are, all of them: a resolved job holds no name of it any more."""
    entries = map(library_entry, library_names())
    return next((entry for entry in entries if entry.templates == templates), None)


def library_table() -> str:
    """Return docs/templates.md: every entry with the columns that it needs."""
    entries = [library_entry(name) for name in library_names()]
    rows = [
        f"| `{entry.name}` | {entry.purpose} | {', '.join(f'`{column}`' for column in entry.columns)} "
        f"| {', '.join(entry.labels)} | {len(entry.templates)} |"
        for entry in entries
    ]
    return "\n".join([_INTRODUCTION, *rows, ""])


_INTRODUCTION = """\
# The template library

Generated from the library's files: `make generate`. A task names an entry instead of writing templates of its own:

```
tasks:
- name: reviews
  source: file://./reviews.jsonl
  library: sentiment
  columns: {text: review_body}      # what the rows call it, where that differs
  labels: [negative, positive]
```

Each row is trained with one of the entry's phrasings, chosen by the seed; the base model is measured with the phrasing
that suits it best on the validation rows. When a job is accepted the phrasings themselves are recorded, so a later
version of the library does not change it; report and model card name the entry and its version.

```
finetune templates                            # this list
finetune templates nli                        # every phrasing on an example
finetune templates nli --file job.yaml        # on the first rows of the job's own sources
```

| entry | for | columns | usual labels | phrasings |
|---|---|---|---|---|"""


def written_out(task: TaskSpec) -> TaskSpec:
    """Return ``task`` with the templates of the library's entry that it names, in place of the name."""
    if task.library is None:
        return task
    return task.model_copy(update={"library": None, "templates": library_entry(task.library).templates})
