"""The difference between two statuses as a JSON merge patch, without what the writer of progress owns. Pure."""

from collections.abc import Mapping
from typing import Any

from finetune_api.status import FineTuneJobStatus
from finetune_operator.view import PROGRESS_FIELDS, PROGRESS_SUMMARY_FIELDS, without_progress


def status_patch(old: FineTuneJobStatus, new: FineTuneJobStatus) -> dict[str, Any]:
    """Return what makes ``new`` of ``old``; None removes a field.

    Progress is left alone, whatever ``new`` says of it, until the job has ended: then it may be cleared.
    """
    before, after = _dumped(old), _dumped(new)
    patch = _difference(without_progress(before), without_progress(after))
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


def _clear(patch: dict[str, Any], before: Mapping[str, Any], after: Mapping[str, Any], names: tuple[str, ...]) -> None:
    patch.update({name: None for name in names if before.get(name) and not after.get(name)})
