"""Say in words what pydantic found wrong with a manifest: path, value, problem, remedy, line."""

import difflib
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from finetune_api.block import BROKEN_RULE
from finetune_api.problem import FieldError, Path, shown, written
from finetune_api.spec.field import PATTERN_MEANINGS
from finetune_api.support import working_values


def field_errors(model: type[BaseModel], error: ValidationError, lines: Mapping[Path, int]) -> tuple[FieldError, ...]:
    """Translate what pydantic found wrong with a ``model``, in the order of the manifest's lines.

    Args:
        model: the model that was validated; where its fields are, suggestions come from.
        error: what was found.
        lines: lines of the manifest by path; a path without a line takes that of what contains it.
    """
    errors = []
    for found in error.errors(include_url=False):
        path = tuple(part for part in found["loc"] if part != "[key]")
        problem, remedy = _explain(model, found, path)
        value = _shown_input(found, path)
        errors.append(FieldError(written(path), value, f"{problem}.", remedy, line_of(path, lines)))
    return tuple(errors)


def _shown_input(found: ErrorDetails, path: Path) -> str:
    if found["type"] == "missing":
        return ""
    # Who writes a key where the name of its Secret belongs must not find it in a log.
    return "(not shown)" if "secretRef" in path else shown(found["input"])


def line_of(path: Path, lines: Mapping[Path, int]) -> int | None:
    """Return the line of ``path``, or of what contains it when it is absent."""
    while path and path not in lines:
        path = path[:-1]
    return lines.get(path)


_TYPES = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dict_type": "a map",
    "model_type": "a map",
    "model_attributes_type": "a map",
}

_LIMITS: dict[str, Callable[[Mapping[str, Any]], tuple[str, str]]] = {
    "greater_than": lambda ctx: (f"must be above {ctx['gt']}", "Raise it."),
    "greater_than_equal": lambda ctx: (f"must be at least {ctx['ge']}", f"Set it to {ctx['ge']} or more."),
    "less_than": lambda ctx: (f"must be below {ctx['lt']}", "Lower it."),
    "less_than_equal": lambda ctx: (f"must be at most {ctx['le']}", f"Set it to {ctx['le']} or less."),
    "string_too_short": lambda ctx: ("is empty", "Write it, or leave the field out if it may be absent."),
    "string_too_long": lambda ctx: (f"is longer than {ctx['max_length']} characters", "Shorten it."),
    "too_short": lambda ctx: (f"has fewer than {ctx['min_length']} entries", f"Give at least {ctx['min_length']}."),
    "too_long": lambda ctx: (f"has more than {ctx['max_length']} entries", f"Keep {ctx['max_length']} at most."),
    "string_pattern_mismatch": lambda ctx: (
        "is not well formed",
        f"Write {PATTERN_MEANINGS.get(ctx['pattern'], 'what matches ' + ctx['pattern'])}.",
    ),
    "finite_number": lambda ctx: ("is not a finite number", "Write a number."),
    "literal_error": lambda ctx: ("is another kind of object", f"Write {ctx['expected']}."),
}


def _explain(model: type[BaseModel], found: Any, path: Path) -> tuple[str, str]:
    kind, ctx = found["type"], found.get("ctx", {})
    if kind == BROKEN_RULE:
        return ctx["problem"], ctx["remedy"]
    if kind == "missing":
        return "is missing", _say_what_belongs(model, path)
    if kind == "extra_forbidden":
        return "is no field here", _suggest_field(model, path)
    if kind == "enum":
        return "is none of the choices", _suggest_choice(ctx["expected"], found["input"], path)
    if kind in _TYPES:
        return f"is not {_TYPES[kind]}", _say_how_to_write(kind, found["input"])
    if kind in _LIMITS:
        return _LIMITS[kind](ctx)
    return found["msg"].lower(), "Correct it; docs/spec.md describes every field."


def _say_how_to_write(kind: str, value: object) -> str:
    if kind == "string_type" and isinstance(value, bool):
        return "Put it in quotes: to YAML, bare yes, no, on, off, true and false are no text."
    if kind == "string_type" and isinstance(value, int | float):
        return f'Put it in quotes: "{value}".'
    if isinstance(value, str) and kind in ("int_type", "float_type", "bool_type"):
        return f"Write {_TYPES[kind]}, without quotes."
    if value is None:
        return f"Write {_TYPES[kind]}, or remove the line."
    return f"Write {_TYPES[kind]}."


def _suggest_choice(expected: str, value: object, path: Path) -> str:
    choices = working_values(path, [choice.strip("'") for choice in expected.replace(" or ", ", ").split(", ")])
    near = difflib.get_close_matches(str(value), choices, n=1)
    return (f"Did you mean {near[0]}? " if near else "") + f"Choose one of {', '.join(choices)}."


def _suggest_field(model: type[BaseModel], path: Path) -> str:
    parent = model_at(model, path[:-1])
    known = [field.alias or name for name, field in parent.model_fields.items()] if parent else []
    wanted = str(path[-1])
    near = difflib.get_close_matches(wanted.replace("_", "").lower(), [name.lower() for name in known], n=1)
    if near:
        return f"Did you mean {next(name for name in known if name.lower() == near[0])}?"
    elsewhere = _places_of(model, wanted)
    if elsewhere:
        return f"Move it: {wanted} is a field of {elsewhere[0]}."
    return f"Remove it; fields here are {', '.join(known)}."


def _say_what_belongs(model: type[BaseModel], path: Path) -> str:
    parent = model_at(model, path[:-1])
    field = _field(parent, path[-1]) if parent else None
    if field is None or not field.description:
        return "Add it."
    return f"Add it: {' '.join(field.description.split()).partition('. ')[0].removesuffix('.')}."


def _field(model: type[BaseModel], key: str | int) -> FieldInfo | None:
    return next((field for name, field in model.model_fields.items() if key in (name, field.alias)), None)


def model_at(model: type[BaseModel], path: Path) -> type[BaseModel] | None:
    """Return the model whose fields stand at ``path``; None inside maps and lists of plain values."""
    for part in path:
        if isinstance(part, int):
            continue
        field = _field(model, part)
        inner = _inner_model(field.annotation) if field else None
        if inner is None:
            return None
        model = inner
    return model


def _inner_model(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return None
    return next((found for part in get_args(annotation) if (found := _inner_model(part))), None)


def _places_of(model: type[BaseModel], wanted: str, prefix: str = "", depth: int = 4) -> list[str]:
    """Return the paths of blocks below ``model`` that have a field called ``wanted``."""
    places = [prefix] if prefix and _field(model, wanted) else []
    for name, field in model.model_fields.items():
        inner = _inner_model(field.annotation)
        if inner is not None and depth:
            places += _places_of(inner, wanted, f"{prefix}.{field.alias or name}".removeprefix("."), depth - 1)
    return sorted(places, key=lambda place: place.count("."))
