"""Jinja that ends: a template reaches nothing of Python's, and what one rendering does is counted and bounded.

Whatever makes or reads a text or list costs by its size: calls, filters, tests, operators, slices, literals and blocks
that are kept. What takes one time whatever it is given costs by the nodes of the loop or macro it stands in. What makes
much of little (padding, bytes, HTML) is left out, and so are lots.
"""

import datetime
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from decimal import Decimal
from functools import wraps
from html import unescape
from itertools import chain, islice
from typing import Any

from jinja2 import StrictUndefined, TemplateSyntaxError, nodes, pass_context
from jinja2 import Template as CompiledTemplate
from jinja2.exceptions import SecurityError
from jinja2.filters import FILTERS, ignore_case, make_attrgetter
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.tests import TESTS
from jinja2.utils import Namespace, _PassArg
from jinja2.visitor import NodeTransformer

MAX_OUTPUT_CHARACTERS = 1 << 20
"""Longest prompt or completion of one row, and longest text within: far beyond any model's context."""
MAX_PARTS = 1 << 16
"""Most parts of a list that an expression makes or reads, parts of parts and long texts in it counted as more."""
MAX_RANGE = 25_000
"""Numbers that all ``range()`` calls of one rendering may give together."""
MAX_DEPTH = 50
"""Expressions and blocks within one another: of some more, Python takes minutes to find that it cannot compile them."""
MAX_STEPS = 50_000
"""Rounds of loops, calls and KiB of text that one rendering may take together."""

# In bytes, about: what a step, a part of a list and a node of a template may take of memory.
_STEP = 1024
_PART = 64
_NODE = 64
_MOST = MAX_PARTS * _PART

# Each takes one time whatever it is given, and so does a template's compiler where it folds them.
_FREE_FILTERS = ("count", "d", "default", "first", "last", "length")
_FREE_TESTS = (
    *("boolean", "callable", "defined", "false", "filter", "float", "integer", "iterable", "mapping", "none"),
    *("number", "sameas", "sequence", "string", "test", "true", "undefined"),
)
_FILTERS = (
    *("abs", "capitalize", "dictsort", "float", "int", "items", "lower", "map", "max", "min", "reject", "rejectattr"),
    *("reverse", "select", "selectattr", "string", "title", "trim", "truncate", "upper", "wordcount"),
)
_TESTS = (
    *("!=", "<", "<=", "==", ">", ">=", "eq", "equalto", "ge", "greaterthan", "gt", "in", "le", "lessthan", "lower"),
    *("lt", "ne", "upper"),
)

_REFUSED: dict[str, type] = {
    **dict.fromkeys(("center", "ljust", "rjust", "zfill", "expandtabs", "format", "format_map"), str),
    **dict.fromkeys(("encode", "translate", "maketrans"), str),
    **dict.fromkeys(("to_bytes", "from_bytes"), int),
    **dict.fromkeys(("now", "today", "utcnow"), datetime.date),
    "fromkeys": dict,
}
_CLOSED = (bytes, bytearray, memoryview, Decimal)
"""Of these, methods make what no argument's size tells."""
# For each character, Python looks at all characters of what is searched for.
_PRODUCT_METHODS = frozenset({"rfind", "rindex", "rsplit", "rpartition", "strip", "lstrip", "rstrip"})
# Most that strftime makes of one character.
_MOMENT_GROWTH = 256


class Steps:
    """What one rendering may still do: loops and recursion that a slip makes endless end here."""

    __slots__ = ("_left", "_numbers")

    def __init__(self) -> None:
        self._left = MAX_STEPS * _STEP
        self._numbers = MAX_RANGE

    def spend(self, size: int = 0) -> None:
        """Spend a step, and what ``size`` bytes cost."""
        self._left -= _STEP + size
        if self._left < 0:
            raise OverflowError(f"loops and calls take more than {MAX_STEPS:,} steps")

    def take(self, value: object) -> None:
        """Spend what it costs to make or read ``value``."""
        if type(value) is not str:
            self.grow(_size(value))
            return
        # Most values are texts, and there are millions of rows: no calls.
        size = len(value)
        if size > MAX_OUTPUT_CHARACTERS:
            raise _too_large()
        self._left -= _STEP + (size if value.isascii() else 4 * size)
        if self._left < 0:
            self.spend()

    def grow(self, size: int) -> None:
        """Spend what it costs to make a text or list of ``size`` bytes."""
        if size > _MOST:
            raise _too_large()
        self.spend(size)

    def range(self, *arguments: int) -> range:
        """Return numbers as Python does, as long as there are not too many."""
        numbers = range(*arguments)
        try:
            self._numbers -= len(numbers)
        except OverflowError:
            self._numbers = -1
        if self._numbers < 0:
            raise OverflowError(f"range() gives more than {MAX_RANGE:,} numbers")
        return numbers


class MeteredSandbox(ImmutableSandboxedEnvironment):
    """Renders whatever templates users write."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "**", "%"})

    def __init__(self, **settings: Any) -> None:
        # Folding computes while it compiles, where nothing counts.
        super().__init__(undefined=StrictUndefined, keep_trailing_newline=True, optimized=False, **settings)
        self.context_class = _CountingContext
        self.filters = {name: FILTERS[name] for name in _FREE_FILTERS} | _METERED_FILTERS
        self.tests = {name: TESTS[name] for name in _FREE_TESTS} | _METERED_TESTS
        self.globals = {"range": _range, "namespace": _Namespace}

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:
        """Return ``pieces`` in one: what a macro, a block or a whole template gives."""
        kept = []
        length = 0
        for piece in pieces:
            kept.append(piece)
            length += len(piece)
            if length > MAX_OUTPUT_CHARACTERS:
                raise _too_large()
        return "".join(kept)

    def text(self, value: object) -> str:
        """Return ``value`` as it is printed, or joined to others."""
        return str(value)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 - as jinja names them
        """Call ``__obj`` for a step, and for what goes in and comes out."""
        steps = __context.steps
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str) and __obj.__name__ in _MEASURED_METHODS:
            # ``separator.join(parts)``, but ``parts | join(separator)``.
            subject, *others = (args[0], owner) if __obj.__name__ == "join" and args else (owner, *args)
            return _METERED_FILTERS[__obj.__name__](__context, subject, *others)
        if isinstance(__obj, Macro):
            steps.spend(_PART * len(args))
        else:
            steps.grow(_cost_of_call(__obj, owner, args, kwargs))
        found = super().call(__context, __obj, *args, **kwargs)
        steps.take(found)
        return found

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Return what an operator makes of numbers that are not too large, and of texts and lists at their cost."""
        if operator in {"*", "**", "%"} or (operator == "+" and isinstance(left, int | float)):
            if not (_is_small_number(left) and _is_small_number(right)) or (operator == "**" and abs(right) > 64):
                raise SecurityError(
                    f"{operator!r} works on numbers up to a billion only (powers to 64), and not on text"
                )
        elif operator == "+":
            context.steps.grow(_size(left) + _size(right))
        else:
            # Division of long numbers takes each of their digits by each.
            context.steps.grow(_size(left) * _size(right))
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> None:
        """Give way to `is_safe_attribute`: the sandbox's own str.format pads to any width."""

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Return whether a template may have what ``obj`` calls ``attr``."""
        if attr in _REFUSED and isinstance(obj, _REFUSED[attr]):
            return False
        if isinstance(obj, _CLOSED):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        if _is_deep(tree):
            raise RecursionError(f"more than {MAX_DEPTH} expressions and blocks within one another")
        return tree

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        return super()._generate(_Meter().visit(source), *args, **kwargs)


def start(template: CompiledTemplate, values: dict[str, object]) -> Iterator[str]:
    """Yield the pieces of ``template`` as they are rendered; like ``generate``, but errors come as they are."""
    return template.root_render_func(template.new_context(values))


class _CountingContext(Context):
    """Variables of one rendering; ``steps`` is out of the template's reach, as no name leads there."""

    def __init__(self, environment: Any, parent: Any, name: Any, blocks: Any, globals: Any = None) -> None:
        super().__init__(environment, parent, name, blocks, globals)
        self.steps = Steps()

    def derived(self, locals: dict[str, Any] | None = None) -> Any:
        context: Any = super().derived(locals)
        context.steps = self.steps
        return context


class _Namespace(Namespace):
    """Shows nothing of what it holds: it may hold itself."""

    def __repr__(self) -> str:
        return "<namespace>"


def _too_large() -> OverflowError:
    return OverflowError(
        f"joined text or lists have more than {MAX_OUTPUT_CHARACTERS:,} characters or {MAX_PARTS:,} parts"
    )


def _is_small_number(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) <= 1e9


def _size(value: object) -> int:
    """Return about how many bytes ``value`` takes beyond a number's; parts count each time that they are met."""
    total = 0
    stack = [value]
    while stack and total <= _MOST:
        item = stack.pop()
        if isinstance(item, str):
            total += len(item) if item.isascii() else 4 * len(item)
        elif isinstance(item, list | tuple):
            total += _PART * len(item)
            stack += item
        elif isinstance(item, int):
            total += item.bit_length() >> 3
        elif item is None or isinstance(item, float | range):
            pass
        elif isinstance(item, Decimal):
            total += abs(item.adjusted())
        elif isinstance(item, bytes | bytearray | memoryview):
            total += len(item)
        elif isinstance(item, Mapping):
            total += 2 * _PART * len(item)
            stack += item.keys()
            stack += item.values()
        elif isinstance(item, Collection):
            total += _PART * len(item)
            stack += item
    return total


def _cost_of_call(function: Any, owner: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    taken = _size(args) if args else 0
    if kwargs:
        # Jinja adds the variables of the loop that a call stands in.
        taken += sum(_size(value) for name, value in kwargs.items() if name not in {"_loop_vars", "_block_vars"})
    if isinstance(owner, str):
        read = _size(owner)
        return read + taken + (read * taken if taken and function.__name__ in _PRODUCT_METHODS else 0)
    if isinstance(owner, datetime.date | datetime.time | type):
        return taken * _MOMENT_GROWTH
    return taken + (_size(owner) if isinstance(owner, Collection) else 0)


# --- filters and tests


def metered(function: Any) -> Callable[..., Any]:
    """Return ``function``, a filter or test, at the cost of what goes in and comes out."""
    passed = _PassArg.from_obj(function)

    # With the context, which no compiler has: nothing is folded.
    @pass_context
    def at_cost(context: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        steps = context.steps
        if type(value) is not str:
            value = _held(value)
        steps.take(value)
        if args or kwargs:
            steps.spend(sum(_cost_of_argument(value, one) for one in (*args, *kwargs.values())))
        if passed is None:
            found = function(value, *args, **kwargs)
        else:
            found = function(_PASSED[passed](context), value, *args, **kwargs)
        if type(found) is str:
            steps.take(found)
            return found
        held = _held(found)
        steps.take(held)
        return found if held is found else iter(held)

    return at_cost


def _cost_of_argument(value: object, argument: object) -> int:
    """Return what it costs to hold each part of ``value`` against ``argument``, or to follow it as a path."""
    if not isinstance(value, Collection):
        return _size(argument)
    is_path = isinstance(argument, str) and not isinstance(value, str)
    return len(value) * (_size(argument) + (_STEP * argument.count(".") if is_path else 0))  # type: ignore[attr-defined]


_PASSED: dict[Any, Callable[[Any], Any]] = {
    _PassArg.context: lambda context: context,
    _PassArg.eval_context: lambda context: context.eval_ctx,
    _PassArg.environment: lambda context: context.environment,
}


def _held(value: Any) -> Any:
    """Return what an iterator would give, or ``value``; iterators within iterators would nest without a bound."""
    return _list(value) if isinstance(value, Iterator) else value


def _list(value: Any) -> list[Any]:
    """Return the parts of ``value``; of too many so many that they are found to be."""
    return list(islice(value, MAX_PARTS + 1))


def _listed(function: Any) -> Callable[..., Any]:
    """Return ``function`` on a list instead of on the characters of a text, which take up to 80 bytes each."""
    return wraps(function)(
        lambda passed, value, *args, **kwargs: function(
            passed, _list(value) if isinstance(value, str) else value, *args, **kwargs
        )
    )


def _on_numbers(function: Any) -> Callable[..., Any]:
    """Return ``function``, which multiplies and divides, for what is multiplied and divided as a number is."""

    @wraps(function)
    def on_numbers(value: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(value, str | bytes | list | tuple):
            raise TypeError(f"a number is expected, not a {type(value).__name__}")
        return function(value, *args, **kwargs)

    return on_numbers


@_on_numbers
def _round(value: Any, precision: int = 0, method: Any = "common") -> Any:
    if abs(precision) > 20:
        raise OverflowError(f"round() takes up to 20 digits, not {precision}")
    return FILTERS["round"](value, precision, method)


def _parts(context: Any, value: Any, attribute: str | int | None) -> list[Any]:
    return _list(value if attribute is None else map(make_attrgetter(context.environment, attribute), value))


@pass_context
def _sum(context: Any, value: Any, attribute: str | int | None = None, start: Any = 0) -> Any:
    parts = _parts(context, value, attribute)
    if isinstance(start, list) and all(isinstance(part, list) for part in parts):
        # Added one by one, each sum would be a copy.
        return _list(chain(start, *parts))
    return _on_numbers(lambda start: sum(parts, start))(start)


@pass_context
def _unique(
    context: Any, value: Any, case_sensitive: bool = False, attribute: str | int | None = None
) -> Iterator[Any]:
    key_of = make_attrgetter(context.environment, attribute, postprocess=None if case_sensitive else ignore_case)
    met: dict[int, list[Any]] = {}
    for part in _list(value):
        key = key_of(part)
        # Numbers can be chosen so that all have one hash.
        alike = met.setdefault(hash(key), [])
        context.steps.spend(_PART * len(alike))
        if key not in alike:
            alike.append(key)
            yield part


@pass_context
def _join(context: Any, value: Any, separator: Any = "", attribute: str | int | None = None) -> str:
    parts = _parts(context, value, attribute)
    context.steps.take(parts)
    texts = list(map(context.environment.text, parts))
    between = str(separator)
    length = sum(map(len, texts)) + len(between) * len(texts)
    if length > MAX_OUTPUT_CHARACTERS:
        raise _too_large()
    context.steps.spend(length)
    return between.join(texts)


@pass_context
def _replace(context: Any, value: Any, old: Any, new: Any, count: int | None = None) -> str:
    text, old, new = str(value), str(old), str(new)
    times = text.count(old) if count is None or count < 0 else min(count, text.count(old))
    length = len(text) + times * max(0, len(new) - len(old))
    if length > MAX_OUTPUT_CHARACTERS:
        raise _too_large()
    context.steps.spend(length)
    return text.replace(old, new, times)


def _strip_tags(value: Any) -> str:
    """Return ``value`` as markupsafe does, but in one pass: it begins anew behind every tag."""
    text = _without(_without(str(value), "<!--", "-->"), "<", ">")
    return unescape(" ".join(text.split()))


def _without(text: str, begin: str, end: str) -> str:
    kept = []
    place = 0
    while (first := text.find(begin, place)) >= 0 and (last := text.find(end, first)) >= 0:
        kept.append(text[place:first])
        place = last + len(end)
    return "".join((*kept, text[place:]))


def _to_json(value: Any, indent: int | None = None) -> str:
    if indent is not None and not 0 <= int(indent) <= 8:
        raise OverflowError(f"tojson() indents by up to 8, not {indent}")
    # Prompts are read by models, not by browsers: nothing is escaped for HTML.
    encoder = json.JSONEncoder(ensure_ascii=False, sort_keys=True, indent=None if indent is None else int(indent))
    return MeteredSandbox.concat(encoder.iterencode(value))


@pass_context
def _range(context: Any, *arguments: int) -> range:
    return context.steps.range(*arguments)  # type: ignore[no-any-return]


@pass_context
def _rounds(context: Any, items: Any, cost: int) -> Iterator[Any]:
    """Yield ``items``, each for a step and what a round costs; stands around what every loop goes over."""
    steps = context.steps
    for item in items:
        steps.spend(cost)
        yield item


@pass_context
def _work(context: Any, cost: int) -> None:
    context.steps.spend(cost)


@pass_context
def counted(context: Any, value: Any) -> Any:
    """Return ``value`` at the cost of its size."""
    context.steps.take(value)
    return value


# No template can write these names.
_ROUNDS, _WORK, _COUNTED = "rounds of", "work of", "counted as"
_MEASURED_METHODS = frozenset({"join", "replace"})

_METERED_FILTERS: dict[str, Callable[..., Any]] = {
    **{name: metered(FILTERS[name]) for name in _FILTERS},
    **{name: metered(_listed(FILTERS[name])) for name in ("groupby", "sort")},
    "join": _join,
    "list": metered(_list),
    "replace": metered(_replace),
    "round": metered(_round),
    "striptags": metered(_strip_tags),
    "sum": metered(_sum),
    "tojson": metered(_to_json),
    "unique": metered(_unique),
    _ROUNDS: _rounds,
    _WORK: _work,
    _COUNTED: counted,
}
_METERED_TESTS: dict[str, Callable[..., Any]] = {
    **{name: metered(TESTS[name]) for name in _TESTS},
    **{name: metered(_on_numbers(TESTS[name])) for name in ("divisibleby", "even", "odd")},
}


# --- what is put into a template before it is compiled


class _Meter(NodeTransformer):
    """Puts a count around whatever can be repeated, or makes or reads a text or list without being called."""

    # Jinja looks the methods up by these names.

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        if node.recursive:
            raise TemplateSyntaxError("recursive loops are not available in templates; write them out", node.lineno)
        cost = nodes.Const(_cost_of(node))
        self.generic_visit(node)
        node.iter = _filter(node.iter, _ROUNDS, cost)
        return node

    def visit_Macro(self, node: Any) -> nodes.Node:  # noqa: N802
        cost = nodes.Const(_cost_of(node))
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_filter(cost, _WORK), lineno=node.lineno))
        return node  # type: ignore[no-any-return]

    visit_CallBlock = visit_Block = visit_Macro  # noqa: N815

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.filter = _filter(node.filter, _COUNTED, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes, lineno=node.lineno), "join")

    def visit_List(self, node: Any) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        is_target = getattr(node, "ctx", "load") != "load"
        return node if is_target or _is_constant(node) else _filter(node, _COUNTED)

    visit_Tuple = visit_Dict = visit_List  # noqa: N815

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            return _filter(node, _COUNTED)
        if not _is_constant(node.arg):
            node.arg = _filter(node.arg, _COUNTED)
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if not _is_short(node):
            node.expr = _filter(node.expr, _COUNTED)
            for operand in node.ops:
                operand.expr = _filter(operand.expr, _COUNTED)
        return node


def _is_short(node: nodes.Compare) -> bool:
    """Return whether it takes no longer to compare than what stands in the template is long."""
    last = node.ops[-1]
    is_search = last.op in {"in", "notin"}
    return len(node.ops) == 1 and (_is_constant(last.expr) or (not is_search and _is_constant(node.expr)))


def _is_deep(tree: nodes.Node) -> bool:
    level: list[nodes.Node] = [tree]
    depth = 0
    while level and depth <= MAX_DEPTH:
        level = [child for node in level for child in node.iter_child_nodes()]
        depth += 1
    return bool(level)


def _is_constant(node: nodes.Node) -> bool:
    if isinstance(node, nodes.List | nodes.Tuple):
        return all(map(_is_constant, node.items))
    return isinstance(node, nodes.Const)


def _cost_of(node: nodes.Node) -> int:
    """Return what it costs to go through ``node`` once; a macro in it is made anew each time."""
    return sum(_STEP if isinstance(one, nodes.Macro | nodes.CallBlock) else _NODE for one in node.find_all(nodes.Node))


def _filter(node: Any, name: str, *args: nodes.Expr, lineno: int | None = None) -> nodes.Filter:
    return nodes.Filter(node, name, list(args), [], None, None, lineno=lineno or node.lineno)
