"""Turn a row into a prompt and a completion. Pure: same template, same row, same text; no files, clock or randomness.

Templates are Jinja in its immutable sandbox. What a template prints must exist: an undefined name, ``null`` and NaN are
errors, not the words "None" and "nan". The sandbox keeps templates from Python's internals; work and output are
bounded where Jinja lets us, so that a slip (a loop over a huge range) ends in a message and not in a dead machine.
"""

import datetime
import decimal
import json
import math
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, meta, nodes, pass_context
from jinja2 import Template as CompiledTemplate
from jinja2.exceptions import SecurityError
from jinja2.filters import FILTERS, make_attrgetter
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from finetune_trainer.errors import DataError, SpecError

MAX_OUTPUT_CHARACTERS = 1 << 20
"""Longest prompt or completion of one row: far beyond any model's context."""
MAX_RANGE = 25_000
"""Numbers that all ``range()`` calls of one rendering may give together."""
MAX_STEPS = 50_000
"""Rounds of loops, calls and KiB of joined text that one rendering may take together."""

_SHOWN_CHARACTERS = 80

# As jinja has them; those that make text longer are below. Left out: what multiplies text by a number (center, indent,
# format, batch, slice), HTML, and random.
_FILTERS = (
    "abs",
    "capitalize",
    "count",
    "d",
    "default",
    "dictsort",
    "first",
    "float",
    "groupby",
    "int",
    "items",
    "last",
    "length",
    "list",
    "lower",
    "map",
    "max",
    "min",
    "reject",
    "rejectattr",
    "reverse",
    "round",
    "select",
    "selectattr",
    "sort",
    "striptags",
    "sum",
    "title",
    "trim",
    "truncate",
    "unique",
    "upper",
    "wordcount",
)
_PADDING_METHODS = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs", "format", "format_map"})

# What an expression on a row's values can raise; jinja lets Python's own errors through.
_RENDER_ERRORS = (
    TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a text is no template."""

    line: int | None
    """Line of the text, from 1, where it is known."""
    problem: str
    remedy: str


def find_fault(text: str) -> Fault | None:
    """Return why ``text`` is no template that could be rendered; nothing when it is one."""
    compiled = _compile(_Environment(), text)
    return compiled if isinstance(compiled, Fault) else None


class Template:
    """One phrasing of a task; ``field`` is its path in the spec, for messages."""

    def __init__(self, prompt: str, completion: str, field: str) -> None:
        self.field = field
        environment = _Environment()
        self._prompt, self.prompt_columns, tested = _compiled(environment, prompt, f"{field}.prompt")
        self._completion, self.completion_columns, also_tested = _compiled(
            environment, completion, f"{field}.completion"
        )
        self.optional_columns = (tested | also_tested) & self.columns
        """Those that the template asks for before it uses them: ``{% if input is defined %}``."""

    @property
    def columns(self) -> frozenset[str]:
        """The columns a row must have."""
        return self.prompt_columns | self.completion_columns

    def render(self, row: Mapping[str, object], number: int) -> tuple[str, str]:
        """Return (prompt, completion) of ``row``, the ``number``-th of its source counted from 0.

        Raises:
            DataError: the row lacks a value the template prints, or the completion is blank.
        """
        prompt = self.render_prompt(row, number)
        completion = _render(self._completion, self.completion_columns, row, number, f"{self.field}.completion")
        if not completion.strip():
            raise DataError(
                f"{self.field}.completion is blank for {_row(row, self.completion_columns, number)}: there is nothing "
                f"to learn. Fill the value in or drop the row."
            )
        return prompt, completion

    def render_prompt(self, row: Mapping[str, object], number: int = 0) -> str:
        """Return the prompt of a row that may have no completion.

        Raises:
            DataError: the row lacks a value that the prompt prints.
        """
        return _render(self._prompt, self.prompt_columns, row, number, f"{self.field}.prompt")


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            undefined=StrictUndefined,
            autoescape=False,
            finalize=_refuse_unprintable,
            keep_trailing_newline=True,
        )
        self.filters = {name: FILTERS[name] for name in _FILTERS} | _METERED_FILTERS
        self.globals = {"range": range, "namespace": Namespace}

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 - as jinja names them
        """Call ``__obj``; calls are counted, and methods that multiply text are bounded as the filters are."""
        _steps(__context).spend()
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str) and __obj.__name__ in _METERED_FILTERS:
            # ``separator.join(parts)``, but ``parts | join(separator)``.
            subject, *others = (args[0], owner) if __obj.__name__ == "join" and args else (owner, *args)
            return _METERED_FILTERS[__obj.__name__](__context, subject, *others)
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and not isinstance(left, int | float):
            _steps(context).grow(_size(left) + _size(right))
            return super().call_binop(context, operator, left, right)
        if not (_is_small_number(left) and _is_small_number(right)) or (operator == "**" and abs(right) > 64):
            raise SecurityError(f"{operator!r} works on numbers up to a billion only (powers to 64), and not on text")
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> None:
        """Give way to `is_safe_attribute`: the sandbox's own str.format pads to any width."""

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr in _PADDING_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)


def _is_small_number(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) <= 1e9


def _refuse_unprintable(value: object) -> object:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise ValueError("a printed value is missing (null or NaN)")
    if isinstance(value, list | tuple | dict | set):
        raise TypeError(f"a printed value is a {type(value).__name__}; print its parts, or use join or tojson")
    if not isinstance(value, _PRINTABLE):
        raise TypeError(f"a printed value is no text but {type(value).__name__}")
    return value


_PRINTABLE = (
    str,
    int,
    float,
    decimal.Decimal,
    datetime.date,
    datetime.time,
    datetime.timedelta,
    uuid.UUID,
    StrictUndefined,  # raises by itself, with its name
)


class _Steps:
    """What one rendering may still do: loops and recursion that a slip makes endless end here."""

    def __init__(self) -> None:
        self._left = MAX_STEPS
        self._numbers = MAX_RANGE

    def spend(self, steps: int = 1) -> None:
        self._left -= steps
        if self._left < 0:
            raise OverflowError(f"loops and calls take more than {MAX_STEPS:,} steps")

    def grow(self, size: int) -> None:
        """Spend what it takes to make a text or list of ``size``."""
        if size > MAX_OUTPUT_CHARACTERS:
            raise OverflowError(f"joined text or lists have more than {MAX_OUTPUT_CHARACTERS:,} characters or parts")
        self.spend(1 + size // 1024)

    def range(self, *arguments: int) -> range:
        numbers = range(*arguments)
        try:
            self._numbers -= len(numbers)
        except OverflowError:
            self._numbers = -1
        if self._numbers < 0:
            raise OverflowError(f"range() gives more than {MAX_RANGE:,} numbers")
        return numbers


_STEPS = "__steps"
"""What the counter is called among the variables of a rendering."""


def _steps(context: Any) -> _Steps:
    steps: _Steps = context[_STEPS]
    return steps


def _size(value: object) -> int:
    """Return about how long ``value`` is as text; parts of parts count each time that they would be written."""
    total = 0
    stack = [value]
    while stack and total <= MAX_OUTPUT_CHARACTERS:
        item = stack.pop()
        if isinstance(item, dict):
            stack += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple | set):
            stack += item
        total += len(item) if isinstance(item, str) else 1
    return total


@pass_context
def _rounds(context: Any, items: Any) -> Iterator[Any]:
    """Yield ``items``, each for a step; stands around what every loop goes over."""
    steps = _steps(context)
    for item in items:
        steps.spend()
        yield item


@pass_context
def _join(context: Any, value: Any, separator: str = "", attribute: str | int | None = None) -> str:
    items = list(value if attribute is None else map(make_attrgetter(context.environment, attribute), value))
    _steps(context).grow(_size(items) + _size(separator) * len(items))
    return str(separator).join(map(_as_text, items))


@pass_context
def _replace(context: Any, value: Any, old: str, new: str, count: int = -1) -> str:
    text = str(value)
    times = text.count(old) if count is None or count < 0 else min(count, text.count(old))
    _steps(context).grow(len(text) + times * max(0, len(new) - len(old)))
    return text.replace(old, new, times)


@pass_context
def _string(context: Any, value: Any) -> str:
    _steps(context).grow(_size(value))
    return str(value)


@pass_context
def _to_json(context: Any, value: Any, indent: int | None = None) -> str:
    _steps(context).grow(_size(value))
    # Prompts are read by models, not by browsers: nothing is escaped for HTML.
    return json.dumps(value, ensure_ascii=False, sort_keys=True, indent=indent)


def _as_text(value: object) -> str:
    return str(_refuse_unprintable(value))


_METERED_FILTERS: dict[str, Callable[..., Any]] = {
    "__rounds": _rounds,
    "join": _join,
    "replace": _replace,
    "string": _string,
    "tojson": _to_json,
}


def _metered(tree: nodes.Template) -> nodes.Template:
    """Return ``tree`` with every loop and every ``~`` counted."""
    for loop in tree.find_all(nodes.For):
        loop.iter = _filter(loop.iter, "__rounds")
    return _JoinConcatenations().visit(tree)  # type: ignore[no-any-return]


class _JoinConcatenations(NodeTransformer):
    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802 - jinja looks it up by this name
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes, lineno=node.lineno), "join")


def _filter(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


_Compiled = tuple[CompiledTemplate, frozenset[str], frozenset[str]]
"""A template, the names it uses, and those among them that it tests with ``is defined``."""


def _compiled(environment: _Environment, text: str, field: str) -> _Compiled:
    compiled = _compile(environment, text)
    if isinstance(compiled, Fault):
        place = field if compiled.line is None else f"{field}, line {compiled.line}"
        raise SpecError(f"{place}: {compiled.problem}. {compiled.remedy}")
    return compiled


def _compile(environment: _Environment, text: str) -> _Compiled | Fault:
    try:
        tree = environment.parse(text)
        for loop in tree.find_all(nodes.For):
            if loop.recursive:
                return Fault(loop.lineno, "recursive loops are not available in templates", "Write the loops out.")
        loading = next(tree.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)), None)
        if loading is not None:
            name = type(loading).__name__.lower()
            return Fault(loading.lineno, f"{name} is not available in templates", "Write the text out.")
        columns = frozenset(meta.find_undeclared_variables(tree) - environment.globals.keys())
        tests = (node for node in tree.find_all(nodes.Test) if node.name == "defined")
        tested = frozenset(node.node.name for node in tests if isinstance(node.node, nodes.Name))
        return environment.from_string(_metered(tree)), columns, tested
    except TemplateSyntaxError as error:
        shown = text.splitlines()[error.lineno - 1 : error.lineno]
        return Fault(
            error.lineno,
            f"{error.message}: {_shown(shown[0] if shown else text)}",
            "See https://jinja.palletsprojects.com/templates/ for the syntax.",
        )
    except (RecursionError, SyntaxError, MemoryError) as error:
        return Fault(None, f"nested too deeply ({type(error).__name__})", "Simplify the template.")


def _render(
    template: CompiledTemplate, columns: frozenset[str], row: Mapping[str, object], number: int, field: str
) -> str:
    steps = _Steps()
    context = {name: row[name] for name in columns if name in row} | {"range": steps.range, _STEPS: steps}
    pieces: list[str] = []
    length = 0
    try:
        for piece in template.generate(context):
            pieces.append(piece)
            length += len(piece)
            if length > MAX_OUTPUT_CHARACTERS:
                raise DataError(
                    f"{field} gives more than {MAX_OUTPUT_CHARACTERS:,} characters for {_row(row, columns, number)}; "
                    f"shorten the template or the row."
                )
    except _RENDER_ERRORS as error:
        raise DataError(
            f"{field} does not render for {_row(row, columns, number)}: {_shown(str(error) or type(error).__name__)}. "
            f"Correct the template, or fill the value in or drop the row."
        ) from error
    return "".join(pieces)


def _row(row: Mapping[str, object], columns: frozenset[str], number: int) -> str:
    values = ", ".join(f"{name}={_shown(row[name])}" if name in row else f"no {name}" for name in sorted(columns)[:8])
    return f"row {number} (counted from 0; {values})"


def _shown(value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    if len(text) > _SHOWN_CHARACTERS:
        text = text[:_SHOWN_CHARACTERS] + "…"
    return repr(text) if isinstance(value, str) else text
