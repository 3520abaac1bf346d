"""The prompt template library: named tasks, several phrasings each, as data files beside this module.

A task of a job that names an entry by ``library`` is trained on all of its phrasings. Placeholders are plain columns,
``{{ text }}``, so that ``columns`` can give them the names that the user's rows have.
"""

import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Annotated

import yaml
from pydantic import Field

from finetune_api.model import ApiModel
from finetune_api.spec.data import TemplateSpec
from finetune_api.spec.field import Name, Prose

_PLACEHOLDER = re.compile(r"\{\{ (\w+) \}\}")


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

    def templates_for(self, columns: Mapping[str, str]) -> tuple[TemplateSpec, ...]:
        """Return the phrasings for rows whose columns are called as ``columns`` says: ``{"text": "review_body"}``."""

        def renamed(text: str) -> str:
            return _PLACEHOLDER.sub(lambda found: "{{ " + columns.get(found[1], found[1]) + " }}", text)

        return tuple(
            TemplateSpec(prompt=renamed(template.prompt), completion=renamed(template.completion))
            for template in self.templates
        )


@cache
def library_names() -> tuple[str, ...]:
    """Return the names of all entries, sorted."""
    return tuple(sorted(file.name.removesuffix(".yaml") for file in files(__name__).iterdir() if _is_entry(file.name)))


@cache
def library_entry(name: str) -> LibraryEntry:
    """Return the entry called ``name``.

    Raises:
        LookupError: there is none.
    """
    if name not in library_names():
        raise LookupError(f"{name!r} is not in the template library; it has {', '.join(library_names())}.")
    return LibraryEntry.model_validate(yaml.safe_load(files(__name__).joinpath(f"{name}.yaml").read_text("utf-8")))


def _is_entry(file: str) -> bool:
    return file.endswith(".yaml")
