"""An API server in memory, as far as the operator asks it: versions, UIDs, names that are taken, status patches."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

from finetune_operator.cluster import (
    AlreadyExistsError,
    ClusterError,
    ConflictError,
    Identity,
    NotFoundError,
    RefusedError,
)
from finetune_operator.naming import OPERATOR

Raw = Mapping[str, Any]
Place = tuple[str, str, str]
"""Kind, namespace, name."""


class FakeApiServer:
    """A `Cluster`. ``calls`` says what was asked; ``fails`` lets a call fail."""

    def __init__(self) -> None:
        self.objects: dict[Place, dict[str, Any]] = {}
        self.calls: list[tuple[str, str]] = []
        self.fails: Callable[[str, str], ClusterError | None] = lambda verb, kind: None
        self.told: dict[str, list[Raw]] = {}
        """Events by the UID of what they are about."""
        self.queued: dict[str, list[Raw]] = {}
        """Workloads by the UID of what is queued."""
        self.closed: set[str] = set()
        """Namespaces where nothing may be listed: their Role is gone."""
        self.gone: set[str] = set()
        """Those of them that are gone as well."""
        self.unknown: frozenset[str] = frozenset()
        """Fields that it does not know."""
        self._version = 100

    def put(self, kind: str, raw: Raw) -> dict[str, Any]:
        """Let an object be there."""
        stored = copy.deepcopy(dict(raw))
        metadata = stored["metadata"]
        metadata.setdefault("uid", f"uid-{self._next()}")
        metadata.setdefault("creationTimestamp", "2026-01-02T03:04:05Z")
        metadata["resourceVersion"] = self._next()
        self.objects[kind, metadata.get("namespace", ""), metadata["name"]] = stored
        return stored

    def _next(self) -> str:
        self._version += 1
        return str(self._version)

    def _call(self, verb: str, kind: str) -> None:
        self.calls.append((verb, kind))
        if error := self.fails(verb, kind):
            raise error

    async def get(self, kind: str, namespace: str, name: str) -> Raw | None:
        self._call("get", kind)
        return copy.deepcopy(self.objects.get((kind, namespace, name)))

    async def identities(self, kind: str, namespace: str | None, selector: str = "") -> list[Identity]:
        self._call("list", kind)
        self._check_open(kind, namespace)
        return [
            Identity(place[1], place[2], raw["metadata"]["uid"], raw["metadata"]["creationTimestamp"])
            for place, raw in self.objects.items()
            if place[0] == kind and namespace in (None, place[1])
        ]

    async def definition(self) -> str | None:
        self._call("list", "CustomResourceDefinition")
        return "the only one"

    async def has_namespace(self, name: str) -> bool:
        self._call("list", "Namespace")
        return name not in self.gone

    async def first(self, kind: str, namespace: str | None) -> None:
        self._call("first", kind)
        self._check_open(kind, namespace)

    async def create(self, manifest: Raw) -> Raw:
        kind, metadata = manifest["kind"], manifest["metadata"]
        self._call("create", kind)
        if (kind, metadata.get("namespace", ""), metadata["name"]) in self.objects:
            raise AlreadyExistsError(f"{kind} {metadata['name']} already exists")
        return copy.deepcopy(self.put(kind, manifest))

    async def unknown_fields(self, manifest: Raw) -> frozenset[str]:
        self._call("try", manifest["kind"])
        return self.unknown

    async def update(self, manifest: Raw) -> Raw:
        kind, metadata = manifest["kind"], manifest["metadata"]
        self._call("update", kind)
        stored = self._found(kind, metadata["namespace"], metadata["name"])
        _check_version(stored, metadata)
        identity = {name: stored["metadata"][name] for name in ("uid", "creationTimestamp")}
        return copy.deepcopy(self.put(kind, {**manifest, "metadata": {**metadata, **identity}}))

    async def patch(
        self, kind: str, namespace: str, name: str, patch: Raw, subresource: str = "", manager: str = OPERATOR
    ) -> Raw:
        self._call("patch", kind)
        stored = self._found(kind, namespace, name)
        _check_version(stored, patch.get("metadata", {}))
        metadata = {key: value for key, value in patch.get("metadata", {}).items() if key not in _PRECONDITIONS}
        merged = _merged(stored, {**patch, "metadata": metadata})
        return copy.deepcopy(self.put(kind, merged))

    async def delete(self, kind: str, namespace: str, name: str, uid: str) -> None:
        self._call("delete", kind)
        stored = self.objects.get((kind, namespace, name))
        if stored is not None and stored["metadata"]["uid"] == uid:
            del self.objects[kind, namespace, name]

    async def events(self, namespace: str, uid: str) -> list[Raw]:
        self._call("list", "Event")
        return self.told.get(uid, [])

    async def workloads(self, namespace: str, uid: str) -> list[Raw]:
        self._call("list", "Workload")
        return self.queued.get(uid, [])

    def _check_open(self, kind: str, namespace: str | None) -> None:
        if namespace in self.closed | self.gone:
            raise RefusedError(f"{kind} is forbidden in {namespace}")

    def _found(self, kind: str, namespace: str, name: str) -> dict[str, Any]:
        if (stored := self.objects.get((kind, namespace, name))) is None:
            raise NotFoundError(f"{kind} {name} not found")
        return stored


_PRECONDITIONS = ("uid", "resourceVersion")


def _check_version(stored: Raw, metadata: Raw) -> None:
    for name in _PRECONDITIONS:
        if metadata.get(name, stored["metadata"][name]) != stored["metadata"][name]:
            raise ConflictError(f"{name} is another one")


def _merged(before: Raw, patch: Raw) -> dict[str, Any]:
    """Return what RFC 7386 says."""
    merged = dict(before)
    for name, value in patch.items():
        if value is None:
            merged.pop(name, None)
        elif isinstance(value, Mapping):
            known = merged.get(name)
            merged[name] = _merged(known if isinstance(known, Mapping) else {}, value)
        else:
            merged[name] = value
    return merged
