"""What is wrong with a job, in words a user can act on."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from finetune_api.report import ExitCode

SHOWN_CHARACTERS = 80
"""A value longer than this is shown by its beginning: a template may be 16 KiB."""

_CREDENTIALS = re.compile(r"://[^/@\s]+@")

Path = tuple[str | int, ...]
"""A place in a manifest: ``("spec", "data", "tasks", 0, "name")``."""


@dataclass(frozen=True, slots=True)
class FieldError:
    """One mistake in one field."""

    path: str
    """As in the YAML: ``spec.data.tasks[0].source``; empty for the manifest as a whole."""
    value: str
    """What stands there, as JSON, cut to a readable length; empty when nothing does."""
    problem: str
    """Predicate with a full stop: ``is no whole number.``"""
    remedy: str
    """What to do, as a sentence."""
    line: int | None = None
    """Line of the manifest, from 1, where it is known."""

    def __str__(self) -> str:
        value = f"({self.value})" if self.value and self.path else self.value
        subject = " ".join(part for part in (self.path, value) if part)
        return f"{subject}: {self.problem} {self.remedy}"


class InvalidJobError(Exception):
    """A job that cannot be accepted, with everything that is wrong with it."""

    exit_code: ClassVar[ExitCode] = ExitCode.BAD_SPEC

    def __init__(self, source: str, errors: Iterable[FieldError]) -> None:
        self.source = source
        self.errors = tuple(errors)
        super().__init__(source, self.errors)

    def __str__(self) -> str:
        places = (self.source if error.line is None else f"{self.source}:{error.line}" for error in self.errors)
        return "\n".join(f"{place}: {error}" for place, error in zip(places, self.errors, strict=True))


def shown(value: object) -> str:
    """Return ``value`` as JSON of bounded length; of maps the names alone, because what is in them may be secret."""
    match value:
        case None:
            return ""
        case dict():
            text = f"{{{', '.join(map(str, value))}}}"
        case list() | tuple() if any(isinstance(item, dict | list) for item in value):
            return f"{len(value)} {'entry' if len(value) == 1 else 'entries'}"
        case _:
            text = json.dumps(value, ensure_ascii=False, default=str)
    text = _CREDENTIALS.sub("://…@", text)
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…"


def written(path: Path) -> str:
    """Return ``spec.data.tasks[0].name`` for its parts."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return "".join(parts).removeprefix(".")
