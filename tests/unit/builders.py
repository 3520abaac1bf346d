"""Jobs for tests: a small valid one, changed where the test needs it."""

import copy
from typing import Any

from finetune_api.job import FineTuneJob

MINIMAL: dict[str, Any] = {
    "apiVersion": "finetune.dev/v1alpha1",
    "kind": "FineTuneJob",
    "metadata": {"name": "reviews"},
    "spec": {
        "model": {"source": "hf://acme/tiny"},
        "data": {
            "tasks": [
                {
                    "name": "sentiment",
                    "source": "file:///data/reviews.jsonl",
                    "templates": [{"prompt": "Review: {{ text }}\nSentiment:", "completion": " {{ label }}"}],
                    "labels": ["negative", "positive"],
                }
            ]
        },
        "method": {"type": "lora"},
        "output": {"uri": "file:///models"},
    },
}
"""The least that a user writes."""

ABSENT = object()
"""Put in place of a value to remove the field."""


def make_manifest(overrides: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the minimal manifest with ``overrides`` put in by path: ``{"spec.method.type": "full"}``."""
    manifest = copy.deepcopy(MINIMAL)
    for path, value in (overrides or {}).items():
        own = value if value is ABSENT else copy.deepcopy(value)
        _put(manifest, path.replace("[", ".").replace("]", "").split("."), own)
    return manifest


def make_job(overrides: dict[str, Any] | None = None) -> FineTuneJob:
    """Return the valid job of `make_manifest`; supported or not."""
    return FineTuneJob.model_validate(make_manifest(overrides), by_alias=True, by_name=False)


def _put(target: Any, parts: list[str], value: object) -> None:
    head, *rest = parts
    key: str | int = int(head) if isinstance(target, list) else head
    if rest:
        if isinstance(key, int):
            target.extend(copy.deepcopy(target[0]) for _ in range(key + 1 - len(target)))
        elif key not in target:
            target[key] = [] if rest[0].isdigit() else {}
        _put(target[key], rest, value)
    elif value is ABSENT:
        del target[key]
    elif isinstance(key, int) and key >= len(target):
        target.append(value)
    else:
        target[key] = value
