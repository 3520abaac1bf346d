"""Read a FineTuneJob from YAML or JSON and accept it or say everything that is wrong with it."""

import difflib
import hashlib
import json
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from finetune_api.model import ApiModel
from finetune_api.problem import FieldError, InvalidJobError, shown
from finetune_api.rules import broken_rules
from finetune_api.spec import FineTuneJobSpec, Labels
from finetune_api.support import unsupported_fields

API_VERSION = "finetune.dev/v1alpha1"
KIND = "FineTuneJob"

_LARGEST = 1_048_576
"""Bytes of a manifest; etcd takes no larger object either."""

JobName = Annotated[str, Field(min_length=1, max_length=40, pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$")]


class ObjectMeta(ApiModel):
    """What a run needs of Kubernetes' metadata; the rest is passed over."""

    model_config = ConfigDict(extra="ignore")

    name: JobName
    """At most 40 characters, because names of pods and labels are built from it."""
    namespace: Annotated[str, Field(min_length=1, max_length=63, pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")] = (
        "default"
    )
    uid: Annotated[str, Field(max_length=64)] | None = None
    labels: Labels = {}


class FineTuneJob(ApiModel):
    """The object as a user writes it."""

    api_version: Literal["finetune.dev/v1alpha1"]
    kind: Literal["FineTuneJob"]
    metadata: ObjectMeta
    spec: FineTuneJobSpec


def load_job(text: str, source: str) -> FineTuneJob:
    """Return the job in ``text``; relative ``file://./`` paths in it start from the folder of ``source``.

    Args:
        text: one YAML or JSON document.
        source: the file it comes from, for messages and relative paths.

    Raises:
        InvalidJobError: with all errors that can be found at once.
    """
    document = _parse(text, source)
    document.pop("status", None)
    absolute = _with_absolute_paths(document, Path(source).resolve().parent)
    job, errors = _validate(absolute)
    if job is not None:
        errors += broken_rules(job.spec) + unsupported_fields(job.spec)
    if errors:
        raise InvalidJobError(source, sorted(set(errors), key=lambda error: error.path))
    assert job is not None  # noqa: S101 - no errors means a job
    return job


def spec_hash(spec: FineTuneJobSpec) -> str:
    """Return the sha256, in hex, of the spec's canonical JSON: equal specs, equal hash, whatever their layout."""
    document = spec.model_dump(mode="json", by_alias=True, exclude_none=True)
    return hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


# --- YAML


class _StrictLoader(yaml.SafeLoader):
    """Refuses repeated keys, of which YAML would silently take the last, and aliases, which can grow without bound."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(
                None, None, "aliases (*name) are not accepted; write the value out", self.peek_event().start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.MarkedYAMLError(None, None, "a key must be plain text", key_node.start_mark)
            if key in seen:
                raise yaml.MarkedYAMLError(None, None, f"key {key!r} appears twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _parse(text: str, source: str) -> dict[str, Any]:
    if len(text.encode()) > _LARGEST:
        raise _refused(source, "the file is larger than 1 MiB", "Keep data in files of its own.")
    try:
        documents = [document for document in yaml.load_all(text, _StrictLoader) if document is not None]
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise _refused(source, f"not valid YAML{where}: {error.problem}.", "Mend it there.") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise _refused(source, f"not valid YAML: {type(error).__name__}.", "Write plain, shallow YAML.") from error
    if len(documents) != 1:
        raise _refused(source, f"{len(documents)} documents in one file.", "Write one FineTuneJob a file.")
    if not isinstance(documents[0], dict):
        raise _refused(source, f"a {type(documents[0]).__name__}, not a mapping.", "Start with apiVersion and kind.")
    return documents[0]


def _refused(source: str, problem: str, remedy: str) -> InvalidJobError:
    return InvalidJobError(source, [FieldError("(file)", "", problem, remedy)])


def _with_absolute_paths(value: Any, folder: Path, key: str = "") -> Any:
    if isinstance(value, dict):
        return {name: _with_absolute_paths(item, folder, str(name)) for name, item in value.items()}
    if isinstance(value, list):
        return [_with_absolute_paths(item, folder, key) for item in value]
    if key in ("source", "uri") and isinstance(value, str) and value.startswith(("file://./", "file://../")):
        return f"file://{(folder / value.removeprefix('file://')).resolve()}"
    return value


# --- validation


def _validate(document: dict[str, Any]) -> tuple[FineTuneJob | None, list[FieldError]]:
    """Return the job and its errors; broken fields are left out of it, so that rules can still look at the rest."""
    errors: list[FieldError] = []
    for _ in range(8):  # leaving out a field can bring up its parent's own errors
        try:
            return FineTuneJob.model_validate(document), errors
        except ValidationError as error:
            found = _innermost(error.errors(include_url=False))
            known = [item.path for item in errors]
            errors += [new for new in map(_translate, found) if not any(path.startswith(new.path) for path in known)]
            if not any([_neutralise(document, item["loc"]) for item in found]):
                return None, errors
    return None, errors


def _innermost(found: list[ErrorDetails]) -> list[ErrorDetails]:
    """Leave out errors of a list or block that only say that its entries are wrong."""
    places = [error["loc"] for error in found]
    return [
        error
        for error in found
        if not any(len(place) > len(error["loc"]) and place[: len(error["loc"])] == error["loc"] for place in places)
    ]


_NEUTRAL = {
    "apiVersion": API_VERSION,
    "kind": KIND,
    "name": "unknown",
    "source": "file:///unknown",
    "uri": "file:///unknown",
    "prompt": "unknown",
    "completion": "unknown",
}
"""Stand-ins for broken fields that cannot be left out."""


def _neutralise(document: Any, location: tuple[int | str, ...]) -> bool:
    """Take the value at ``location`` out of the way; false when that cannot be done."""
    for step in location[:-1]:
        try:
            document = document[step]
        except (KeyError, IndexError, TypeError):
            return False
    if not location or not isinstance(document, dict):
        return False
    name = location[-1]
    if name in _NEUTRAL and document.get(name) != _NEUTRAL[name]:
        document[name] = _NEUTRAL[name]
        return True
    return document.pop(name, None) is not None


_PLAIN = {
    "missing": ("is missing.", "Add it."),
    "model_type": ("must be a block of fields.", "Write its fields below it, indented."),
    "model_attributes_type": ("must be a block of fields.", "Write its fields below it, indented."),
    "dict_type": ("must be a block of names and values.", "Write them below it, indented."),
    "tuple_type": ("must be a list.", "Begin each entry with a dash."),
    "string_type": ("must be text.", "Put it in quotes."),
    "bool_type": ("must be true or false.", "Write true or false."),
    "bool_parsing": ("must be true or false.", "Write true or false."),
    "int_type": ("must be a whole number.", "Write it without quotes and fraction."),
    "int_parsing": ("must be a whole number.", "Write it without quotes and fraction."),
    "int_from_float": ("must be a whole number.", "Write it without fraction."),
    "float_type": ("must be a number.", "Write it without quotes; 1e-3 needs a point in YAML: 1.0e-3."),
    "float_parsing": ("must be a number.", "Write it without quotes; 1e-3 needs a point in YAML: 1.0e-3."),
    "finite_number": ("must be a finite number.", "Write an ordinary number."),
}

_BOUNDS = {
    "greater_than": ("must be greater than", "gt"),
    "greater_than_equal": ("must be at least", "ge"),
    "less_than": ("must be less than", "lt"),
    "less_than_equal": ("must be at most", "le"),
}


def _translate(error: ErrorDetails) -> FieldError:
    path = _path(error["loc"])
    kind = error["type"]
    context = error.get("ctx", {})
    value = "" if kind == "missing" else shown(error["input"])
    if kind == "extra_forbidden":
        return FieldError(path, value, "is not a field of this object.", _suggestion(error["loc"]))
    if kind in _PLAIN:
        return FieldError(path, value, *_PLAIN[kind])
    if kind in _BOUNDS:
        words, name = _BOUNDS[kind]
        return FieldError(
            path, value, f"{words} {context[name]}.", f"Choose a value that is {words[8:]} {context[name]}."
        )
    if kind in ("enum", "literal_error"):
        return FieldError(path, value, "is not one of the possible values.", f"Use {context['expected']}.")
    if kind == "string_pattern_mismatch":
        return FieldError(path, value, "has the wrong form.", f"It must match {context['pattern']}")
    if kind in ("string_too_long", "too_long"):
        return FieldError(path, value, f"is longer than {context['max_length']}.", "Shorten it.")
    if kind in ("string_too_short", "too_short"):
        return FieldError(path, value, f"needs at least {context['min_length']}.", "Fill it in.")
    return FieldError(path, value, f"{error['msg']}.", "See docs/spec.md.")


def _path(location: tuple[int | str, ...]) -> str:
    path = ""
    for step in location:
        path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else step
    return path


def _suggestion(location: tuple[int | str, ...]) -> str:
    known = list(_known_fields(FineTuneJob, location[:-1]))
    close = difflib.get_close_matches(str(location[-1]), known, n=1)
    if close:
        return f"Did you mean {close[0]}?"
    return f"Known here: {', '.join(known)}." if known else "Remove it."


def _known_fields(model: type[BaseModel], location: tuple[int | str, ...]) -> Iterator[str]:
    for step in location:
        if isinstance(step, int):
            continue
        field = next((info for info in model.model_fields.values() if info.alias == step), None)
        inner = _model_in(field.annotation) if field else None
        if inner is None:
            return
        model = inner
    yield from (info.alias or name for name, info in model.model_fields.items())


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """Return the model inside ``X``, ``X | None`` or ``tuple[X, ...]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, UnionType, tuple, Annotated):
        return next((model for argument in get_args(annotation) if (model := _model_in(argument))), None)
    return None


def as_document(job: FineTuneJob) -> Mapping[str, Any]:
    """Return the job as it stands in YAML, without absent fields."""
    return job.model_dump(mode="json", by_alias=True, exclude_none=True)
