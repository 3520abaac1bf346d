"""A FineTuneJob as a whole: read from a manifest, with every mistake reported at once; told from others by a hash."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import unquote

from pydantic import ConfigDict, Field, ValidationError

from finetune_api.block import Block, Problem
from finetune_api.explanation import field_errors, line_of
from finetune_api.manifest_text import Document, read_manifest
from finetune_api.problem import FieldError, InvalidJobError, shown, written
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.field import DNS_LABEL, Annotations, Labels
from finetune_api.status import FineTuneJobStatus
from finetune_api.support import unsupported_fields

__all__ = [
    "API_VERSION",
    "KIND",
    "MAX_NAME",
    "NO_PART_OF_THE_RESULT",
    "FieldError",
    "FineTuneJob",
    "InvalidJobError",
    "Metadata",
    "content_hash",
    "load_job",
    "spec_hash",
]

API_VERSION = "finetune.dev/v1alpha1"
KIND = "FineTuneJob"
NAMESPACE = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
"""A DNS-1123 label."""

MAX_NAME = 40
"""Children's names and labels (63 characters) need the rest."""


def _name_is_short(name: str) -> Iterator[Problem]:
    if len(name) > MAX_NAME or not re.fullmatch(DNS_LABEL, name):
        yield Problem(
            ("name",),
            name,
            f"must be {MAX_NAME} lower-case letters, digits and '-' at most, beginning with a letter and not ending "
            "in '-'",
            "Shorten or correct it: reviews-lora.",
        )


def _namespace_is_a_label(namespace: str) -> Iterator[Problem]:
    if not re.fullmatch(NAMESPACE, namespace):
        yield Problem(
            ("namespace",),
            namespace,
            "must be 63 lower-case letters, digits and '-' at most, beginning and ending with a letter or digit",
            "Correct it: team-a.",
        )


class Metadata(Block):
    """Name and labels of a job; what else the API server keeps here is ignored."""

    model_config = ConfigDict(extra="ignore")
    rules = (_name_is_short, _namespace_is_a_label)

    name: Annotated[str, Field(min_length=1, max_length=253)]
    """At most 40 characters, DNS-1035."""
    namespace: Annotated[str, Field(max_length=253)] = "default"
    """Namespace; part of the output's path. At most 63 characters, DNS-1123."""
    uid: Annotated[str, Field(max_length=64)] = ""
    """Set by the API server; empty without a cluster."""
    labels: Labels = Field(default_factory=dict)
    """Copied to every child."""
    annotations: Annotations = Field(default_factory=dict)
    """Not copied."""


class FineTuneJob(Block):
    """Tune, evaluate and publish one model."""

    api_version: Literal["finetune.dev/v1alpha1"]
    """Version of this contract."""
    kind: Literal["FineTuneJob"]
    """Always FineTuneJob."""
    metadata: Metadata
    """Name and labels."""
    spec: FineTuneJobSpec
    """What is asked for."""
    status: FineTuneJobStatus | None = None
    """What is known; written by the operator alone."""


def load_job(
    text: str, source: str, find_more: Callable[[Document], Iterable[FieldError]] = lambda document: ()
) -> FineTuneJob:
    """Return the job in ``text``, whose features this version all has.

    Args:
        text: YAML or JSON with one FineTuneJob.
        source: path of the manifest: ``file://./rows.jsonl`` is relative to its folder. Also used in messages.
        find_more: finds errors that take more than the contract to see; all are reported together.

    Raises:
        InvalidJobError: all that is wrong with it.
    """
    document = read_manifest(text, source)
    job, errors = _validate(document, source)
    # What is not supported is looked up in the text as well: an error elsewhere does not hide it.
    errors += [
        FieldError(written(path), shown(value), problem, remedy, line_of(path, document.lines))
        for path, value, problem, remedy in unsupported_fields(document.content.get("spec"))
        if written(path) not in {error.path for error in errors}
    ]
    errors += find_more(document)
    if errors or job is None:
        raise InvalidJobError(source, sorted(errors, key=lambda error: error.line or 0))
    return job


def _validate(document: Document, source: str) -> tuple[FineTuneJob | None, list[FieldError]]:
    content = document.content
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise InvalidJobError(source, [_another_kind(content)])
    try:
        absolute = _with_absolute_paths(content, Path(source).parent)
        return FineTuneJob.model_validate(absolute, by_alias=True, by_name=False), []
    except ValidationError as error:
        return None, list(field_errors(FineTuneJob, error, document.lines))


def _another_kind(content: object) -> FieldError:
    remedy = f"Write apiVersion: {API_VERSION} and kind: {KIND}; `finetune init` writes a manifest to start from."
    if not isinstance(content, dict):
        return FieldError("", shown(content), "is no manifest but a bare value.", remedy)
    problem = f"is no {KIND}." if content.get("kind") else f"is missing, so this is no {KIND}."
    return FieldError("kind", shown(content.get("kind")), problem, remedy)


# --- relative paths

_PATHS = (
    ("model", "source"),
    ("model", "startFrom", "source"),
    ("data", "tasks", "*", "source"),
    ("data", "tasks", "*", "validationSource"),
    ("data", "tasks", "*", "testSource"),
    ("data", "replay", "source"),
    ("evaluation", "forgetting", "sources", "*"),
    ("evaluation", "benchmarks", "*", "suite"),
    ("output", "uri"),
)
"""Fields below spec that may hold ``file://./…``."""


def _with_absolute_paths(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    spec = content.get("spec")
    for path in _PATHS:
        spec = _replaced(spec, path, folder)
    return {**content, "spec": spec} if "spec" in content else content


def _replaced(value: Any, path: tuple[str, ...], folder: Path) -> Any:
    if not path:
        return _absolute(value, folder) if isinstance(value, str) else value
    if path[0] == "*" and isinstance(value, list):
        return [_replaced(item, path[1:], folder) for item in value]
    if isinstance(value, dict) and path[0] in value:
        return {**value, path[0]: _replaced(value[path[0]], path[1:], folder)}
    return value


def _absolute(uri: str, folder: Path) -> str:
    rest = uri.removeprefix("file://")
    if rest == uri or not rest.startswith(("./", "../")) or "\0" in rest:
        return uri
    return Path(os.path.normpath(folder.absolute() / unquote(rest))).as_uri()


# --- identity

NO_PART_OF_THE_RESULT = {
    "run_policy": {"suspend", "active_deadline_seconds", "child_ttl_seconds"},
    "compute": {"gpu_memory"},
}
"""What may change, in the object or in its profile, so that it stays the same job."""


def spec_hash(spec: FineTuneJobSpec) -> str:
    """Return the sha256 of ``spec`` as canonical JSON: equal jobs, equal hash. Wants a resolved spec."""
    return content_hash(spec.model_dump(mode="json", by_alias=True, exclude_none=True, exclude=NO_PART_OF_THE_RESULT))


def content_hash(content: dict[str, Any]) -> str:
    """Return the sha256 of ``content`` as canonical JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
