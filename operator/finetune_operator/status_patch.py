"""The difference between two statuses as a JSON merge patch, without what the writer of progress owns. Pure."""

from collections.abc import Iterable, Mapping
from typing import Any

from finetune_api.status import FineTuneJobStatus
from finetune_operator.view import PROGRESS_FIELDS, PROGRESS_SUMMARY_FIELDS, Raw, without_progress

_KEYS = {"conditions": "type", "stages": "stage"}
"""Lists of which the API server knows items again, and takes those back that its definition does not know any more."""


def status_patch(stored: Raw, old: FineTuneJobStatus, new: FineTuneJobStatus) -> dict[str, Any]:
    """Return what makes ``new`` of ``old``, which was read from ``stored``; None removes a field.

    Progress is left alone, whatever ``new`` says of it, until the job has ended: then it may be cleared.
    """
    before, after = _dumped(old), _dumped(new)
    patch = _difference(without_progress(before), without_progress(after))
    for name, key in _KEYS.items():
        if patch.get(name):
            patch[name] = _items(stored.get(name, ()), before.get(name, ()), after.get(name, ()), key)
    if new.phase is not None and new.phase.is_terminal:
        _clear(patch, before, after, PROGRESS_FIELDS)
        if "summary" in before and "summary" in after:
            summary = patch.get("summary", {})
            _clear(summary, before["summary"], after["summary"], PROGRESS_SUMMARY_FIELDS)
            if summary:
                patch["summary"] = summary
    return patch


def _dumped(status: FineTuneJobStatus) -> dict[str, Any]:
    return status.model_dump(mode="json", by_alias=True, exclude_none=True)


def _difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    patch: dict[str, Any] = {name: None for name in before if name not in after}
    for name, value in after.items():
        known = before.get(name)
        if isinstance(value, dict) and isinstance(known, dict):
            if inner := _difference(known, value):
                patch[name] = inner
        elif name not in before or value != known:
            patch[name] = value
    return patch


def _items(stored: Iterable[Raw], before: Iterable[Raw], after: Iterable[Raw], key: str) -> list[Raw]:
    """Return ``after`` for a list that is written whole: with what is as it was, or could not be read, as it is stored.

    A later release finds again what it had to say.
    """
    known, written = ({item[key]: item for item in items} for items in (before, after))
    for item in stored:
        if written.get(item[key]) == known.get(item[key]):
            written[item[key]] = item
    return list(written.values())


def _clear(patch: dict[str, Any], before: Mapping[str, Any], after: Mapping[str, Any], names: tuple[str, ...]) -> None:
    patch.update({name: None for name in names if before.get(name) and not after.get(name)})
