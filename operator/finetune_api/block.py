"""A block of the spec: an `ApiModel` with rules between its fields, all of whose errors are found at once.

A rule is a function that names the fields it looks at as its parameters and yields a `Problem` for every breach. It
runs whenever these fields are valid, whatever is wrong with the others, so one bad number hides no other mistake.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

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
            details = [_as_details(found) for found in error.errors(include_url=False)]
            raise _collected(cls, details + _breaches(cls.rules, known)) from None
        breaches = _breaches(cls.rules, {name: getattr(block, name) for name in cls.model_fields})
        if breaches:
            raise _collected(cls, breaches)
        return block


def _collected(cls: type[Block], details: list[InitErrorDetails]) -> ValidationError:
    return ValidationError.from_exception_data(cls.__name__, details)


def _as_details(found: Any) -> InitErrorDetails:
    kind = found["type"]
    if kind == BROKEN_RULE:
        kind = PydanticCustomError(BROKEN_RULE, "{problem}", found["ctx"])
    return InitErrorDetails(type=kind, loc=found["loc"], input=found["input"], ctx=found.get("ctx", {}))


def _valid_fields(cls: type[Block], given: Mapping[str, Any], error: ValidationError) -> dict[str, Any]:
    """Return the values of the fields that ``error`` does not concern."""
    faulty = {found["loc"][0] for found in error.errors(include_url=False) if found["loc"]}
    valid = {}
    for name, field in cls.model_fields.items():
        key = next((key for key in (field.alias, name) if key in given), None)
        if faulty & {name, field.alias}:
            continue
        if key is not None:
            valid[name] = TypeAdapter(field.rebuild_annotation()).validate_python(given[key])
        elif field.default_factory is None:
            valid[name] = field.default
    return valid


def _breaches(rules: tuple[Rule, ...], fields: Mapping[str, Any]) -> list[InitErrorDetails]:
    details = []
    for rule in rules:
        wanted = inspect.signature(rule).parameters
        if wanted.keys() <= fields.keys():
            details += [
                InitErrorDetails(
                    type=PydanticCustomError(BROKEN_RULE, "{problem}", {"problem": one.problem, "remedy": one.remedy}),
                    loc=one.path,
                    input=one.value,
                )
                for one in rule(**{name: fields[name] for name in wanted})
            ]
    return details
