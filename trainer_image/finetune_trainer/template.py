"""Turn a row into a prompt and a completion. Pure: same template, same row, same text; no files, clock or randomness.

Templates are Jinja in a sandbox that bounds work and output, so that a slip (a loop over a huge range) ends in words
and not in a dead machine. What a template prints must exist: an undefined name, ``null`` and NaN are errors, not the
words "None" and "nan".
"""

import datetime
import decimal
import math
import uuid
from collections.abc import Mapping
from dataclasses import dataclass

from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, meta, nodes
from jinja2 import Template as CompiledTemplate

from finetune_trainer.errors import DataError, SpecError
from finetune_trainer.excerpt import excerpt
from finetune_trainer.sandbox import MAX_OUTPUT_CHARACTERS, MeteredSandbox, start

# What an expression on a row's values can raise; jinja lets Python's own errors through.
_RENDER_ERRORS = (
    TemplateError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
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


class _Environment(MeteredSandbox):
    def __init__(self) -> None:
        super().__init__(finalize=_refuse_unprintable)

    def text(self, value: object) -> str:
        return str(_refuse_unprintable(value))


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
        loading = next(tree.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)), None)
        if loading is not None:
            name = type(loading).__name__.lower()
            return Fault(loading.lineno, f"{name} is not available in templates", "Write the text out.")
        columns = frozenset(meta.find_undeclared_variables(tree) - environment.globals.keys())
        tests = (node for node in tree.find_all(nodes.Test) if node.name == "defined")
        tested = frozenset(node.node.name for node in tests if isinstance(node.node, nodes.Name))
        return environment.from_string(tree), columns, tested
    except TemplateSyntaxError as error:
        shown = text.splitlines()[error.lineno - 1 : error.lineno]
        return Fault(
            error.lineno,
            f"{error.message}: {excerpt(shown[0] if shown else text)}",
            "See https://jinja.palletsprojects.com/templates/ for the syntax.",
        )
    except ValueError:
        # Python's limit; what else is no number is no template.
        return Fault(None, "a number has thousands of digits", "Shorten it.")
    except (RecursionError, SyntaxError, MemoryError) as error:
        return Fault(None, f"nested too deeply ({type(error).__name__})", "Simplify the template.")


def _render(
    template: CompiledTemplate, columns: frozenset[str], row: Mapping[str, object], number: int, field: str
) -> str:
    values = {name: row[name] for name in columns if name in row}
    pieces: list[str] = []
    length = 0
    try:
        for piece in start(template, values):
            pieces.append(piece)
            length += len(piece)
            if length > MAX_OUTPUT_CHARACTERS:
                raise DataError(
                    f"{field} gives more than {MAX_OUTPUT_CHARACTERS:,} characters for {_row(row, columns, number)}; "
                    f"shorten the template or the row."
                )
    except _RENDER_ERRORS as error:
        raise DataError(
            f"{field} does not render for {_row(row, columns, number)}: {excerpt(str(error) or type(error).__name__)}. "
            f"Correct the template, or fill the value in or drop the row."
        ) from error
    return "".join(pieces)


def _row(row: Mapping[str, object], columns: frozenset[str], number: int) -> str:
    values = ", ".join(f"{name}={excerpt(row[name])}" if name in row else f"no {name}" for name in sorted(columns)[:8])
    return f"row {number} (counted from 0; {values})"
