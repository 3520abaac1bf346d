"""Read a status as it is stored. Another release may have written it: a later one, before ``helm rollback``. Pure."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from finetune_api.status import FineTuneJobStatus, Reason

_Path = tuple[str | int, ...]

_LEFT_OUT = object()


def read_status(stored: Mapping[str, Any]) -> FineTuneJobStatus:
    """Return what this release understands of ``stored``; just what it does not know is left out.

    A reason that it does not know becomes `Reason.UNKNOWN`: what a condition or an attempt says otherwise still holds.
    """
    known: Any = stored
    while True:
        try:
            return FineTuneJobStatus.model_validate(known, by_alias=True, by_name=False)
        except ValidationError as error:
            # Each of them takes something away, so that this ends; what then lacks a field goes in the next round.
            repairs = dict(map(_repair, error.errors(include_url=False)))
        if () in repairs:
            return FineTuneJobStatus()
        known = _repaired(known, (), repairs)


def _repair(error: ErrorDetails) -> tuple[_Path, Any]:
    """Return the path of what is to be replaced, and by what."""
    path = error["loc"]
    match error["type"]:
        case "enum" if path[-1] == "reason":
            return path, Reason.UNKNOWN.value
        case "too_long":
            # What has an order has the newest last.
            return path, error["input"][-error["ctx"]["max_length"] :]
        case "enum" | "missing" if len(path) > 1:
            # A word tells what the rest is about: an attempt at an unknown stage is none at training, the default.
            return path[:-1], _LEFT_OUT
        case _:
            return path, _LEFT_OUT


def _repaired(value: Any, path: _Path, repairs: Mapping[_Path, Any]) -> Any:
    if path in repairs:
        return repairs[path]
    if isinstance(value, Mapping):
        fields = ((name, _repaired(inner, (*path, name), repairs)) for name, inner in value.items())
        return {name: inner for name, inner in fields if inner is not _LEFT_OUT}
    if isinstance(value, list):
        items = (_repaired(inner, (*path, index), repairs) for index, inner in enumerate(value))
        return [inner for inner in items if inner is not _LEFT_OUT]
    return value
