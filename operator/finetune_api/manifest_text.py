"""Read a manifest's YAML or JSON as the API server would, with the line of every field; refuses what it would misread.

Nothing is executed, sizes are bounded before anything is built, and a key that stands twice is an error.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from finetune_api.problem import SHOWN_CHARACTERS, FieldError, InvalidJobError, Path, written

MAX_CHARACTERS = 2_000_000
"""Above what etcd stores (1.5 MiB), so nothing that a cluster would take is refused here."""

MAX_NODES = 100_000
"""Values of a manifest with its aliases written out."""

MAX_DEPTH = 40


@dataclass(frozen=True, slots=True)
class Document:
    """One parsed manifest."""

    content: Any
    lines: Mapping[Path, int]
    """Line of every value, from 1."""


class _Loader(yaml.SafeLoader):
    """YAML as Kubernetes reads it: 1e-3 is a number, a date is text, 1:30 is not 90."""


_PLAIN_VALUES = {
    "bool": (r"yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF", "yYnNtTfFoO"),
    "null": (r"~|null|Null|NULL|", ("~", "n", "N", "")),
    "int": (r"[-+]?(?:0|[1-9][0-9]*|0x[0-9a-fA-F]+)", "-+0123456789"),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
    "merge": (r"<<", "<"),
}
_Loader.yaml_implicit_resolvers = {}
for _tag, (_pattern, _first) in _PLAIN_VALUES.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


def read_manifest(text: str, source: str) -> Document:
    """Return the one document in ``text``.

    Args:
        text: YAML or JSON.
        source: where it comes from, for messages.

    Raises:
        InvalidJobError: it is neither, too large, or holds no or several documents; says line and column.
    """
    if len(text) > MAX_CHARACTERS:
        raise _invalid(
            source, f"has {len(text)} characters, more than {MAX_CHARACTERS}", "Keep rows in files of their own."
        )
    root = _compose(text, source)
    _bound_aliases(root, source)
    lines: dict[Path, int] = {}
    repeated = list(_walk(root, (), lines))
    if repeated:
        raise InvalidJobError(source, repeated)
    try:
        # The loader is a SafeLoader: plain values, lists and maps only.
        return Document(_Loader("").construct_document(root), lines)
    except yaml.MarkedYAMLError as error:
        raise _malformed(error, source) from error
    except ValueError as error:
        raise _invalid(source, f"holds a value that cannot be read ({error})", "Correct it.") from error


def _compose(text: str, source: str) -> yaml.Node:
    try:
        _bound_depth(text, source)
        documents = [node for node in yaml.compose_all(text, _Loader) if not _is_empty(node)]
    except yaml.MarkedYAMLError as error:
        raise _malformed(error, source) from error
    except yaml.reader.ReaderError as error:
        raise _invalid(
            source, f"holds the character U+{_code_point(error):04X}, which YAML does not allow", "Remove it."
        ) from error
    if not documents:
        raise _invalid(source, "is empty", "`finetune init` writes a manifest to start from.")
    if len(documents) > 1:
        raise _invalid(
            source,
            f"holds {len(documents)} documents",
            "Keep one FineTuneJob a file, and remove what follows the line '---'.",
            line=documents[1].start_mark.line + 1,
        )
    return documents[0]


def _code_point(error: yaml.reader.ReaderError) -> int:
    """Return the character that is refused; PyYAML gives it as a number, its type stubs say text."""
    character: object = error.character
    return character if isinstance(character, int) else ord(str(character))


def _is_empty(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null"


def _bound_depth(text: str, source: str) -> None:
    depth = 0
    for event in yaml.parse(text, _Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise _invalid(
                source,
                f"nests more than {MAX_DEPTH} deep",
                "Write it flatter; no job is that deep.",
                event.start_mark.line + 1 if event.start_mark else None,
            )


def _bound_aliases(root: yaml.Node, source: str) -> None:
    """Refuse documents that are small only because aliases repeat their parts, or that contain themselves."""
    sizes: dict[int, int | None] = {}

    def size(node: yaml.Node) -> int:
        if id(node) in sizes:
            known = sizes[id(node)]
            if known is None:
                raise _invalid(
                    source, "has an alias to what contains it", "Write it out.", line=node.start_mark.line + 1
                )
            return known
        sizes[id(node)] = None
        total = 1 + sum(size(child) for child in _children(node))
        if total > MAX_NODES:
            raise _invalid(
                source,
                f"has more than {MAX_NODES} values once its aliases are written out",
                "Use fewer aliases.",
                line=node.start_mark.line + 1,
            )
        sizes[id(node)] = total
        return total

    size(root)


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


_KEY_TAGS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")
_SURROGATE = re.compile("[\ud800-\udfff]")
"""Half of a character, which no file and no terminal can hold."""


def _walk(node: yaml.Node, path: Path, lines: dict[Path, int]) -> Iterator[FieldError]:
    """Fill ``lines`` and yield an error for every key that stands twice in its map."""
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.ScalarNode) and _SURROGATE.search(node.value):
        problem = "holds half a character (U+D800 to U+DFFF)."
        yield FieldError(written(path), "", problem, "Write the character itself.", node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            yield from _walk(child, (*path, index), lines)
    if isinstance(node, yaml.MappingNode):
        first: dict[str, int] = {}
        for key, child in node.value:
            line = key.start_mark.line + 1
            if key.tag not in _KEY_TAGS or _SURROGATE.search(key.value):
                name = key.value if isinstance(key, yaml.ScalarNode) else "a list or map"
                problem = f"has a key that is not text: {ascii(name)[:SHOWN_CHARACTERS]}."
                yield FieldError(
                    written(path) or "the manifest", "", problem, "Put the key in quotes, or remove it.", line
                )
                continue
            inner = (*path, str(key.value))
            if key.value in first and key.tag != "tag:yaml.org,2002:merge":
                yield FieldError(
                    written(inner),
                    "",
                    f"stands twice, first in line {first[str(key.value)]}.",
                    "Keep one of them.",
                    line,
                )
            elif isinstance(key.value, str):
                first[key.value] = line
                lines[inner] = line
                yield from _walk(child, inner, lines)


def _malformed(error: yaml.MarkedYAMLError, source: str) -> InvalidJobError:
    mark = error.problem_mark or error.context_mark
    place = f" at column {mark.column + 1}" if mark else ""
    problem = f"is no valid YAML{place}: {error.problem or error.context}"
    remedy = "Correct the line; indent with spaces only, and quote text that holds ': ' or begins with '{' or '%'."
    return _invalid(source, problem, remedy, mark.line + 1 if mark else None)


def _invalid(source: str, problem: str, remedy: str, line: int | None = None) -> InvalidJobError:
    return InvalidJobError(source, [FieldError("", "the manifest", f"{problem}.", remedy, line)])
