"""The reference of ``spec`` for people, generated from the models: every field, its type, default and meaning."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from finetune_api.crd import CHANGEABLE, structural_schema
from finetune_api.model import ApiModel
from finetune_api.resolve import (
    BIAS_LEARNING_RATE,
    LEARNING_RATES,
)
from finetune_api.spec import FineTuneJobSpec
from finetune_api.support import ONLY, SCHEMES

_INTRODUCTION = """\
# The spec of a FineTuneJob

Written by `make generate` from the docstrings in `operator/finetune_api/spec`; change them there.

You must write what is **required** and may leave out the rest. An empty default means that the field is absent. Text is
counted in characters, sizes of lists and maps in entries. `[]` stands for the entries of a list. Where the meaning ends
in *so far*, a job that asks for another value is refused for now.
"""


def spec_reference() -> str:
    """Return docs/spec.md."""
    tables = (_table(section) for section in _sections(FineTuneJobSpec, structural_schema(FineTuneJobSpec, "spec")))
    return "\n".join([_INTRODUCTION, *tables, _learning_rates(), _changeable()])


@dataclass(frozen=True, slots=True)
class _Section:
    """One block: its place below spec, what it is for, and its fields."""

    name: str
    description: str
    rows: tuple[tuple[str, ...], ...]


def _sections(model: type[ApiModel], schema: dict[str, Any]) -> Iterator[_Section]:
    """Yield every block once, outer before inner; one that stands in several places, at the first of them."""
    places: dict[type[ApiModel], list[str]] = {}
    found = list(_blocks(model, schema, "", places))
    for block, part, place in found:
        if places[block][0] == place:
            rows = tuple(
                _field_row(alias, field, part["properties"][alias], f"{place}.{alias}".removeprefix("."), places)
                for alias, field in _fields(block)
            )
            description = _without_html(" ".join((block.__doc__ or "").split()))
            yield _Section(place, description, rows)


def _blocks(
    model: type[ApiModel], schema: dict[str, Any], place: str, places: dict[type[ApiModel], list[str]]
) -> Iterator[tuple[type[ApiModel], dict[str, Any], str]]:
    places.setdefault(model, []).append(place)
    yield model, schema, place
    for alias, field in _fields(model):
        block = _block_in(field.annotation)
        if block is not None:
            part = schema["properties"][alias]
            inner = f"{place}.{alias}".removeprefix(".")
            is_list = part["type"] == "array"
            yield from _blocks(block, part["items"] if is_list else part, f"{inner}[]" if is_list else inner, places)


def _fields(model: type[ApiModel]) -> Iterator[tuple[str, FieldInfo]]:
    return ((field.alias or name, field) for name, field in model.model_fields.items())


def _field_row(
    alias: str, field: FieldInfo, part: dict[str, Any], place: str, places: dict[type[ApiModel], list[str]]
) -> tuple[str, ...]:
    block = _block_in(field.annotation)
    target = places[block][0] if block is not None else None
    return alias, _type(part, target), _default(field), _meaning(part, place)


def _block_in(annotation: Any) -> type[ApiModel] | None:
    """Return the block in ``X``, ``X | None`` or ``tuple[X, ...]``."""
    if isinstance(annotation, type) and issubclass(annotation, ApiModel):
        return annotation
    return next((block for argument in get_args(annotation) if (block := _block_in(argument))), None)


# --- words


def _type(part: dict[str, Any], target: str | None) -> str:
    """Return the words for a type; ``target`` is the place of the block that it is made of."""
    if part["type"] == "array":
        least = f"{part['minItems']} to " if part.get("minItems") else "up to "
        return f"list of {least}{part['maxItems']}: {_type(part['items'], target)}"
    if target is not None:
        return f"[block](#{_anchor(target)})"
    if "enum" in part:
        return " or ".join(f"`{value}`" for value in part["enum"])
    match part["type"]:
        case "object":
            return f"map of up to {part['maxProperties']}: {_type(part['additionalProperties'], None)}"
        case "string":
            return f"text of up to {part['maxLength']}"
        case "boolean":
            return "true or false"
        case kind:
            return " ".join(["whole number" if kind == "integer" else "number", *_bounds(part)])


def _bounds(part: dict[str, Any]) -> Iterator[str]:
    if "minimum" in part:
        yield f"{'above' if part.get('exclusiveMinimum') else 'from'} {part['minimum']}"
    if "maximum" in part:
        yield f"{'below' if part.get('exclusiveMaximum') else 'to'} {part['maximum']}"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    default = field.default
    if field.default_factory is not None:
        return "computed"
    if default in (None, ()) or isinstance(default, BaseModel):
        return ""
    if isinstance(default, bool):
        return "true" if default else "false"
    return str(default.value if isinstance(default, Enum) else default)


def _meaning(part: dict[str, Any], place: str) -> str:
    text = _without_html(" ".join(str(part.get("description", "")).split()))
    limits = ONLY.get(place) or ONLY.get(f"{place}[]") or ()
    values = [*map(str, limits), *(f"{scheme}://" for scheme in SCHEMES.get(place, ()))]
    return f"{text} *So far: {', '.join(values)}.*" if values else text


def _without_html(text: str) -> str:
    """Return ``text`` with its angle brackets shown, except in code, where Markdown shows them anyway."""
    return "".join(
        part if part.startswith("`") else part.replace("<", "&lt;") for part in re.split("(`+[^`]*`+)", text)
    )


def _anchor(place: str) -> str:
    """Return what a heading's link is on GitHub: letters and digits, lower case."""
    return "".join(character for character in f"spec.{place}" if character.isalnum()).lower()


def _table(section: _Section) -> str:
    lines = [f"## {f'spec.{section.name}' if section.name else 'spec'}", "", section.description, ""]
    lines += ["| field | type | default | meaning |", "|---|---|---|---|"]
    lines += [_row(f"`{name}`", *cells) for name, *cells in section.rows]
    return "\n".join([*lines, ""])


_ESCAPED_BAR = r"\|"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', _ESCAPED_BAR) for cell in cells)} |"


def _learning_rates() -> str:
    lines = ["## Learning rates", ""]
    lines += [
        "Peak learning rate where `training.learningRate` is absent, from literature and experience; not measured here."
    ]
    lines += ["", "| method | learning rate | source |", "|---|---|---|"]
    rates = {f"`{method.value}`": rate for method, rate in LEARNING_RATES.items()}
    rates["`selective` with `train: bias`"] = BIAS_LEARNING_RATE
    lines += [_row(what, f"{rate:g}", source) for what, (rate, source) in rates.items()] + [""]
    return "\n".join(lines)


def _changeable() -> str:
    names = "\n".join(f"- `spec.{name}`" for name in CHANGEABLE)
    return f"## What may change\n\nIn a cluster a job's spec is frozen when it is created, except for\n\n{names}\n"
