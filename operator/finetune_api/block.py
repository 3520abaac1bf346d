"""A block of the spec: an `ApiModel` with rules between its fields, all of whose errors are found at once.

A rule is a function that names the fields it looks at as its parameters and yields a `Problem` for every breach. It
runs whenever these fields are valid, whatever is wrong with the others, so one bad number hides no other mistake.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, get_args

from pydantic import ModelWrapValidatorHandler, TypeAdapter, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from finetune_api.model import ApiModel

BROKEN_RULE = "broken_rule"
"""Type of the errors that rules report; problem and remedy are in their context."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One breach of one rule."""

    path: tuple[str | int, ...]
    """Place inside the block, as written in YAML: ``("lora", "targetNames", 0)``."""
    value: object
    """What stands there; None when it is absent."""
    problem: str
    """What is wrong, without the value: ``is not the name of a task``."""
    remedy: str
    """What to do, as a sentence."""


Rule = Callable[..., Iterator[Problem]]


class Block(ApiModel):
    """A part of the spec with its rules."""

    rules: ClassVar[tuple[Rule, ...]] = ()

    @model_validator(mode="wrap")
    @classmethod
    def _apply_rules(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            block = handler(value)
        except ValidationError as error:
            if not isinstance(value, Mapping):
                raise
            known = _valid_fields(cls, value, error)
            details = [_as_details(found) for found in _first_causes(error.errors(include_url=False))]
            raise _collected(cls, details + _breaches(cls.rules, known, salvaged=True)) from None
        breaches = _breaches(cls.rules, {name: getattr(block, name) for name in cls.model_fields}, salvaged=False)
        if breaches:
            raise _collected(cls, breaches)
        return block


def _first_causes(errors: list[Any]) -> list[Any]:
    """Leave out what only follows from another error: a default not computed, a list short of its faulty entries."""
    places = [error["loc"] for error in errors]
    return [
        error
        for error in errors
        if error["type"] != "default_factory_not_called"
        and not (error["type"] == "too_short" and any(_is_inside(place, error["loc"]) for place in places))
    ]


def _is_inside(place: tuple[int | str, ...], outer: tuple[int | str, ...]) -> bool:
    return len(place) > len(outer) and place[: len(outer)] == outer


def _collected(cls: type[Block], details: list[InitErrorDetails]) -> ValidationError:
    return ValidationError.from_exception_data(cls.__name__, details)


def _as_details(found: Any) -> InitErrorDetails:
    kind = found["type"]
    if kind == BROKEN_RULE:
        kind = PydanticCustomError(BROKEN_RULE, "{problem}", found["ctx"])
    return InitErrorDetails(type=kind, loc=found["loc"], input=found["input"], ctx=found.get("ctx", {}))


def _valid_fields(cls: type[Block], given: Mapping[str, Any], error: ValidationError) -> dict[str, Any]:
    """Return the values of the fields that ``error`` does not concern, and the sound parts of the others."""
    faulty = {found["loc"][0] for found in error.errors(include_url=False) if found["loc"]}
    valid = {}
    for name, field in cls.model_fields.items():
        key = next((key for key in (field.alias, name) if key in given), None)
        if key is not None:
            with contextlib.suppress(_UnusableError):
                valid[name] = _salvage(_adapter(cls, name), _block_in(field.annotation), given[key])
        elif not faulty & {name, field.alias} and field.default_factory is None:
            valid[name] = field.default
    return valid


class _UnusableError(Exception):
    """Nothing of a value is sound."""


@functools.cache
def _adapter(cls: type[Block], name: str) -> TypeAdapter[Any]:
    return TypeAdapter(cls.model_fields[name].rebuild_annotation())


def _salvage(adapter: TypeAdapter[Any], block: type[Block] | None, value: Any) -> Any:
    """Return ``value`` as its type; where it holds ``block``, those without the attributes that are faulty."""
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        if block is not None and isinstance(value, Mapping):
            return _partial(block, value, error)
        if block is not None and isinstance(value, list):
            return tuple(_salvage(_whole(block), block, item) for item in value)
        raise _UnusableError from None


@functools.cache
def _whole(block: type[Block]) -> TypeAdapter[Any]:
    return TypeAdapter(block)


def _partial(block: type[Block], given: Mapping[str, Any], error: ValidationError) -> Block:
    valid = _valid_fields(block, given, error)
    partial = block.model_construct(set(valid), **valid)
    for name in block.model_fields.keys() - valid.keys():
        partial.__dict__.pop(name, None)
    return partial


def _block_in(annotation: Any) -> type[Block] | None:
    """Return the block in ``X``, ``X | None`` or ``tuple[X, ...]``."""
    if isinstance(annotation, type):
        return annotation if issubclass(annotation, Block) else None
    return next((found for part in get_args(annotation) if (found := _block_in(part))), None)


def _breaches(rules: tuple[Rule, ...], fields: Mapping[str, Any], salvaged: bool) -> list[InitErrorDetails]:
    found: list[Problem] = []
    for rule in rules:
        wanted = _wanted(rule)
        if wanted <= fields.keys():
            # A salvaged block lacks its faulty attributes; a rule that asks for one cannot be judged.
            with contextlib.suppress(AttributeError) if salvaged else contextlib.nullcontext():
                found += list(rule(**{name: fields[name] for name in wanted}))
    return [
        InitErrorDetails(
            type=PydanticCustomError(BROKEN_RULE, "{problem}", {"problem": one.problem, "remedy": one.remedy}),
            loc=one.path,
            input=one.value,
        )
        for one in found
    ]


@functools.cache
def _wanted(rule: Rule) -> frozenset[str]:
    """Return the attributes that ``rule`` asks for."""
    return frozenset(inspect.signature(rule).parameters)
