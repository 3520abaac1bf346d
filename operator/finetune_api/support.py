"""What the contract has words for but this version cannot do yet. A job that uses it is refused, never half obeyed.

Apart from validity, so that what is written today stays valid; the tables shrink as features arrive, nothing else has
to change then. Works on the manifest as written: a default is never refused.
"""

from collections.abc import Iterable, Iterator
from enum import StrEnum
from typing import Any

from finetune_api.problem import Path

ONLY: dict[str, tuple[object, ...]] = {
    "compute.deepspeed.offload": ("none", "cpu"),
    "evaluation.baselines.zeroShot": (True,),
}
"""Fields of which some values work."""

SCHEMES: dict[str, tuple[str, ...]] = {
    "model.source": ("file", "hf", "s3", "pvc"),
    "model.startFrom.source": ("file", "s3", "pvc"),
    "data.tasks[].source": ("file", "hf", "s3", "pvc", "configMap"),
    "data.tasks[].validationSource": ("file", "hf", "s3", "pvc", "configMap"),
    "data.tasks[].testSource": ("file", "hf", "s3", "pvc", "configMap"),
    "data.replay.source": ("file", "hf", "s3", "pvc", "configMap"),
    "evaluation.forgetting.sources[]": ("file", "s3", "pvc", "configMap"),
    "evaluation.benchmarks[].suite": ("file", "s3", "pvc", "configMap"),
    "output.uri": ("file", "s3", "pvc"),
}
"""Schemes of URIs that work."""


class Place(StrEnum):
    """Where a job runs."""

    LOCAL = "local"
    CLUSTER = "cluster"


Refusal = tuple[Path, object, str, str]
"""Path, value, problem, remedy."""


def unsupported_fields(spec: object) -> Iterator[Refusal]:
    """Yield everything in ``spec``, a manifest's spec as plain and perhaps faulty values, that does not work yet."""
    for path, name, value in _walk(spec):
        place = ("spec", *path)
        # An empty block is not nothing: it asks for a feature with all its defaults.
        if value in (None, []):
            continue
        if name in ONLY and value not in ONLY[name]:
            yield place, value, "is not supported yet.", f"Use {_listed(ONLY[name])}."
        elif name in SCHEMES:
            scheme, separator, _ = str(value).partition("://")
            if separator and scheme not in SCHEMES[name]:
                problem = f"is not supported yet: nothing here reads {scheme}://."
                yield place, value, problem, f"Use {' or '.join(f'{one}://' for one in SCHEMES[name])}."


def working_values(path: Path, values: Iterable[str]) -> list[str]:
    """Return those of ``values`` that work in the field at ``path``: advice must not name what is refused then."""
    name = "".join("[]" if isinstance(part, int) else f".{part}" for part in path[1:]).removeprefix(".")
    return [value for value in values if name not in ONLY or value in ONLY[name]]


def unreachable_fields(spec: object, where: Place) -> Iterator[Refusal]:
    """Yield everything in ``spec`` that cannot be reached from ``where``: a cluster's pods share no folder with you."""
    schemes, problem, remedy = _UNREACHABLE[where]
    for path, _, value in _walk(spec):
        if isinstance(value, str) and value.startswith(schemes) and _names_a_place(path):
            yield ("spec", *path), value, problem, remedy


def _names_a_place(path: Path) -> bool:
    return path[-1] in ("source", "validationSource", "testSource", "suite", "uri") or path[-2:-1] == ("sources",)


_UNREACHABLE = {
    Place.LOCAL: (
        ("pvc://", "configMap://"),
        "is mounted into pods of a cluster, not on this machine.",
        "Use file:///path or s3://bucket/path.",
    ),
    Place.CLUSTER: (
        ("file://",),
        "is a folder of one machine, which pods of a cluster do not see.",
        "Use s3://bucket/path or pvc://claim/path.",
    ),
}


def _listed(values: tuple[object, ...]) -> str:
    return " or ".join(str(value).lower() if isinstance(value, bool) else str(value) for value in values)


def _walk(value: Any, path: Path = (), name: str = "") -> Iterator[tuple[Path, str, Any]]:
    """Yield every value with its path and the path's name in the tables, outer before inner."""
    if path:
        yield path, name, value
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _walk(item, (*path, str(key)), f"{name}.{key}".removeprefix("."))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _walk(item, (*path, index), f"{name}[]")
