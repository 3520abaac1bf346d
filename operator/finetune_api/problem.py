"""One thing that is wrong with a job, in words a user can act on."""

from collections.abc import Iterable
from dataclasses import dataclass

_SHOWN = 120


@dataclass(frozen=True, slots=True)
class FieldError:
    """Where, which value, what is wrong with it and what to do."""

    path: str
    """As in the YAML: ``spec.data.tasks[0].source``."""
    value: str
    """The offending value, cut to a readable length; empty when the field is absent."""
    problem: str
    remedy: str

    def __str__(self) -> str:
        shown = f" ({self.value})" if self.value else ""
        return f"{self.path}{shown}: {self.problem} {self.remedy}"


class InvalidJobError(Exception):
    """A job that cannot be accepted, with everything that is wrong with it."""

    def __init__(self, source: str, errors: Iterable[FieldError]) -> None:
        self.source = source
        self.errors = tuple(errors)
        super().__init__(source, self.errors)

    def __str__(self) -> str:
        return "\n".join(f"{self.source}: {error}" for error in self.errors)


def shown(value: object) -> str:
    """Return ``value`` as it stands in a message: quoted, at most 120 characters."""
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
