"""The API server. The only module that knows the Kubernetes client; nothing here decides anything.

Objects are plain JSON both ways: the client's typed models cost ten times the memory and drop fields they do not know.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self
from urllib.parse import quote, urlencode

import aiohttp
from kubernetes.aio.client import ApiClient, Configuration
from kubernetes.aio.config import ConfigException, load_incluster_config, load_kube_config
from pydantic_core import from_json

from finetune_api.crd import GROUP, PLURAL, VERSION
from finetune_operator.naming import OPERATOR, QUEUED_UID_LABEL

Raw = Mapping[str, Any]

SECONDS_PER_REQUEST = 30.0
OBJECTS_PER_PAGE = 500
METADATA_ALONE = "application/json;as=PartialObjectMetadataList;v=v1;g=meta.k8s.io"
STRICT = {"fieldValidation": "Strict"}
UNHEARD_OF = "noFieldOfAnything"
_UNKNOWN_FIELD = re.compile(r'unknown field "([^"]+)"')

PROGRESS_MANAGER = f"{OPERATOR}-progress"
"""Field manager of the writer of progress."""


@dataclass(frozen=True, slots=True)
class Resource:
    """Where objects of one kind are."""

    api: str
    plural: str
    namespaced: bool = True

    def path(self, namespace: str | None = None, name: str | None = None, subresource: str = "") -> str:
        """Return the path of a list, or of one object."""
        place = f"/namespaces/{quote(namespace)}" if self.namespaced and namespace else ""
        return f"{self.api}{place}/{self.plural}" + (f"/{quote(name)}" if name else "") + subresource


RESOURCES: Mapping[str, Resource] = {
    "FineTuneJob": Resource(f"/apis/{GROUP}/{VERSION}", PLURAL),
    "Job": Resource("/apis/batch/v1", "jobs"),
    "RayJob": Resource("/apis/ray.io/v1", "rayjobs"),
    "Workload": Resource("/apis/kueue.x-k8s.io/v1beta2", "workloads"),
    "CustomResourceDefinition": Resource(
        "/apis/apiextensions.k8s.io/v1", "customresourcedefinitions", namespaced=False
    ),
    "Pod": Resource("/api/v1", "pods"),
    "ConfigMap": Resource("/api/v1", "configmaps"),
    "Secret": Resource("/api/v1", "secrets"),
    "Event": Resource("/api/v1", "events"),
    "Namespace": Resource("/api/v1", "namespaces", namespaced=False),
    "Lease": Resource("/apis/coordination.k8s.io/v1", "leases"),
    "TokenReview": Resource("/apis/authentication.k8s.io/v1", "tokenreviews", namespaced=False),
}
"""Every kind that is read or written."""

JOB_ACCESS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (GROUP, PLURAL, ("get", "list", "watch")),
    (GROUP, f"{PLURAL}/status", ("patch",)),
    ("batch", "jobs", ("get", "list", "watch", "create", "delete")),
    ("ray.io", "rayjobs", ("get", "list", "watch", "create", "patch", "delete")),
    ("kueue.x-k8s.io", "workloads", ("list",)),
    ("", "pods", ("list", "watch")),
    ("", "configmaps", ("get", "create", "update", "delete")),
    ("", "events", ("list", "create", "patch")),
)
"""What may be done where jobs are: API group, resource, verbs."""

CLUSTER_ACCESS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("authentication.k8s.io", "tokenreviews", ("create",)),
    ("apiextensions.k8s.io", "customresourcedefinitions", ("list", "watch")),
    # Only asked for where the settings name namespaces to watch: one may be created later.
    ("", "namespaces", ("list", "watch")),
)
"""What may be done to what has no namespace."""

OWN_ACCESS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("", "secrets", ("get", "update")),
    ("coordination.k8s.io", "leases", ("get", "update")),
)
"""What may be done in the operator's own namespace, to the Secret and the Lease that the settings name and the chart
creates: a right to create cannot be one for a single name."""


# --- what can go wrong: one class per reaction


class ClusterError(Exception):
    """The API server did not do what it was asked to."""


class UnavailableError(ClusterError):
    """It cannot be reached, is overloaded or does not know us at the moment. Try later."""


class RefusedError(ClusterError):
    """It will not: no permission, a quota, a webhook, a malformed object. The message is its own."""


class NotFoundError(ClusterError):
    """There is no such object."""


class AlreadyExistsError(ClusterError):
    """The name is taken."""


class ConflictError(ClusterError):
    """The object has changed since it was read, or is another one of that name."""


# --- the API server


@dataclass(frozen=True, slots=True)
class Identity:
    """An object of a list, with no more than what tells it from others."""

    namespace: str
    name: str
    uid: str
    created: str
    """RFC 3339."""


class Cluster(Protocol):
    """What the operator does to a cluster. Every method raises UnavailableError and RefusedError."""

    async def get(self, kind: str, namespace: str, name: str) -> Raw | None:
        """Return the object as it is now; None when there is none."""

    async def identities(self, kind: str, namespace: str | None, selector: str = "") -> list[Identity]:
        """Return all objects with the labels of ``selector``; in all namespaces when that is None."""

    async def definition(self) -> str | None:
        """Return the UID of the definition of FineTuneJob; None when there is none."""

    async def has_namespace(self, name: str) -> bool:
        """Return whether there is a namespace of that name."""

    async def first(self, kind: str, namespace: str | None) -> None:
        """Ask for one object, whichever; nothing comes of it but the answer that one may.

        Raises:
            NotFoundError: the API server knows no such kind.
        """

    async def create(self, manifest: Raw) -> Raw:
        """Create an object and return what is stored; one with a field that the API server does not know is refused.

        Raises:
            AlreadyExistsError: the name is taken.
        """

    async def unknown_fields(self, manifest: Raw) -> frozenset[str]:
        """Return the fields of ``manifest``, as ``spec.a.b``, that the API server does not know. Creates nothing.

        Raises:
            NotFoundError: the API server knows no such kind.
        """

    async def update(self, manifest: Raw) -> Raw:
        """Replace an object, and return what is stored; only that version of it that the manifest names.

        Raises:
            NotFoundError: there is none.
            ConflictError: it has changed since.
        """

    async def patch(
        self, kind: str, namespace: str, name: str, patch: Raw, subresource: str = "", manager: str = OPERATOR
    ) -> Raw:
        """Merge ``patch`` into an object or its ``subresource``, for the field manager ``manager``.

        Raises:
            NotFoundError: there is none.
            ConflictError: ``patch`` names a version and it has changed since.
        """

    async def delete(self, kind: str, namespace: str, name: str, uid: str) -> None:
        """Delete that one object and, in the background, its pods. Nothing happens when it is gone."""

    async def events(self, namespace: str, uid: str) -> list[Raw]:
        """Return the events about the object with that UID."""

    async def workloads(self, namespace: str, uid: str) -> list[Raw]:
        """Return what Kueue keeps of the Job or RayJob with that UID; nothing where Kueue is not there."""


class KubernetesCluster:
    """A `Cluster` that is real."""

    def __init__(self, client: ApiClient) -> None:
        self._client = client

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.close()

    async def get(self, kind: str, namespace: str, name: str) -> Raw | None:
        """See `Cluster`."""
        try:
            return await self._call("GET", RESOURCES[kind].path(namespace, name))
        except NotFoundError:
            return None

    async def identities(self, kind: str, namespace: str | None, selector: str = "") -> list[Identity]:
        """See `Cluster`."""
        # Names and UIDs alone, page by page: whole objects of a big cluster would fill the memory, and what is told of
        # them beside that would as well.
        pages = self._pages(RESOURCES[kind].path(namespace), {"labelSelector": selector}, accept=METADATA_ALONE)
        return [
            Identity(one["namespace"], one["name"], one["uid"], one["creationTimestamp"])
            async for page in pages
            for one in (item["metadata"] for item in page)
        ]

    async def definition(self) -> str | None:
        """See `Cluster`."""
        found = await self._named("CustomResourceDefinition", f"{PLURAL}.{GROUP}")
        return found[0]["metadata"]["uid"] if found else None

    async def has_namespace(self, name: str) -> bool:
        """See `Cluster`."""
        return bool(await self._named("Namespace", name))

    async def first(self, kind: str, namespace: str | None) -> None:
        """See `Cluster`."""
        await self._call("GET", RESOURCES[kind].path(namespace), {"limit": "1"})

    async def create(self, manifest: Raw) -> Raw:
        """See `Cluster`."""
        path = RESOURCES[manifest["kind"]].path(manifest["metadata"].get("namespace"))
        # Else what an older definition does not know is left out, and the rest is made without what it is to have.
        return await self._call("POST", path, {"fieldManager": OPERATOR, **STRICT}, manifest)

    async def unknown_fields(self, manifest: Raw) -> frozenset[str]:
        """See `Cluster`."""
        path = RESOURCES[manifest["kind"]].path(manifest["metadata"]["namespace"])
        try:
            # A field that nobody knows has it refused before any webhook is asked, whatever else is in it.
            await self._call("POST", path, {"dryRun": "All", **STRICT}, {**manifest, UNHEARD_OF: ""})
        except RefusedError as error:
            if not (unknown := frozenset(_UNKNOWN_FIELD.findall(str(error)))):
                raise
            return unknown - {UNHEARD_OF}
        return frozenset()

    async def update(self, manifest: Raw) -> Raw:
        """See `Cluster`."""
        metadata = manifest["metadata"]
        path = RESOURCES[manifest["kind"]].path(metadata["namespace"], metadata["name"])
        return await self._call("PUT", path, {"fieldManager": OPERATOR}, manifest)

    async def patch(
        self, kind: str, namespace: str, name: str, patch: Raw, subresource: str = "", manager: str = OPERATOR
    ) -> Raw:
        """See `Cluster`."""
        path = RESOURCES[kind].path(namespace, name, subresource)
        return await self._call("PATCH", path, {"fieldManager": manager}, patch, "application/merge-patch+json")

    async def delete(self, kind: str, namespace: str, name: str, uid: str) -> None:
        """See `Cluster`."""
        options = {"propagationPolicy": "Background", "preconditions": {"uid": uid}}
        try:
            await self._call("DELETE", RESOURCES[kind].path(namespace, name), body=options)
        # Conflict: another object has the name by now.
        except (NotFoundError, ConflictError):
            return

    async def events(self, namespace: str, uid: str) -> list[Raw]:
        """See `Cluster`."""
        return await self._list(RESOURCES["Event"].path(namespace), {"fieldSelector": f"involvedObject.uid={uid}"})

    async def workloads(self, namespace: str, uid: str) -> list[Raw]:
        """See `Cluster`."""
        selector = f"{QUEUED_UID_LABEL}={uid}"
        try:
            return await self._list(RESOURCES["Workload"].path(namespace), {"labelSelector": selector})
        except NotFoundError:
            return []

    async def _named(self, kind: str, name: str) -> list[Raw]:
        """Return the object of that name, of a kind that we may list and not get."""
        query = {"fieldSelector": f"metadata.name={name}"}
        return await self._list(RESOURCES[kind].path(), query, accept=METADATA_ALONE)

    async def _list(self, path: str, query: Mapping[str, str], accept: str = "application/json") -> list[Raw]:
        return [item async for page in self._pages(path, query, accept) for item in page]

    async def _pages(self, path: str, query: Mapping[str, str], accept: str) -> AsyncIterator[list[Raw]]:
        token = ""
        while True:
            page = await self._call(
                "GET", path, {**query, "limit": str(OBJECTS_PER_PAGE), "continue": token}, accept=accept
            )
            # An empty list of metadata alone comes as null.
            yield page["items"] or []
            token = page["metadata"].get("continue", "")
            if not token:
                return

    async def _call(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Raw | None = None,
        content_type: str = "application/json",
        accept: str = "application/json",
    ) -> Raw:
        text = urlencode({name: value for name, value in (query or {}).items() if value})
        _, url, headers, *_ = await self._client.param_serialize(
            method,
            f"{path}?{text}" if text else path,
            header_params={"Accept": accept, "Content-Type": content_type},
            auth_settings=["BearerToken"],
        )
        try:
            # The body is plain JSON already; the client would go through all of it to make sure.
            response = await self._client.call_api(method, url, headers, body, _request_timeout=SECONDS_PER_REQUEST)
            content = await response.read()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise UnavailableError(f"{method} {path}: {error or type(error).__name__}") from error
        if response.status >= 400:
            raise _error(f"{method} {path}", response.status, content)
        answer: Raw = from_json(content)
        return answer


_ERRORS: Mapping[int, type[ClusterError]] = {
    401: UnavailableError,
    404: NotFoundError,
    409: ConflictError,
    429: UnavailableError,
}


def _error(request: str, code: int, content: bytes) -> ClusterError:
    try:
        status = from_json(content)
    except ValueError:
        status = {}
    message = status.get("message") or content[:200].decode(errors="replace")
    if status.get("reason") == "AlreadyExists":
        return AlreadyExistsError(message)
    kind = _ERRORS.get(code, UnavailableError if code >= 500 else RefusedError)
    return kind(message if kind is RefusedError else f"{request}: HTTP {code}: {message}")


# --- connecting


class NoClusterError(Exception):
    """Nobody said where the API server is."""


@dataclass(frozen=True, slots=True)
class Login:
    """Where the API server is and who we are, for kopf's own client."""

    server: str
    ca_file: str | None
    verify: bool
    token: str | None
    certificate_file: str | None
    key_file: str | None


class Connection:
    """How to reach the API server; may be used by several clients, one after the other."""

    def __init__(self, configuration: Configuration) -> None:
        self._configuration = configuration

    def connect(self) -> KubernetesCluster:
        """Return a client. Wants a running event loop; nothing is sent yet."""
        asyncio.get_running_loop()
        client = ApiClient(self._configuration)
        client.user_agent = OPERATOR
        return KubernetesCluster(client)

    async def login(self) -> Login:
        """Return the credentials of this moment: a service account's token changes every hour."""
        configuration = self._configuration
        bearer = await configuration.get_api_key_with_prefix("BearerToken")
        return Login(
            server=configuration.host,
            ca_file=configuration.ssl_ca_cert,
            verify=configuration.verify_ssl,
            # "bearer abc", in either case.
            token=bearer.split(" ", 1)[1] if bearer else None,
            certificate_file=configuration.cert_file,
            key_file=configuration.key_file,
        )


async def load_connection(kubeconfig: Path | None, context: str | None = None) -> Connection:
    """Return how to reach the API server: by a kubeconfig, or from inside a pod when that is None.

    Raises:
        NoClusterError: neither is there.
    """
    configuration = Configuration()
    # The workers, the endpoint's reviews and the progress of hundreds of jobs share the connections.
    configuration.connection_pool_maxsize = 64
    # As kopf's client: else a thread looks for proxies and .netrc files at every request. A kubeconfig's proxy counts.
    configuration.client_session_kwargs = {"trust_env": False}
    try:
        if kubeconfig is None:
            load_incluster_config(configuration)
        else:
            await load_kube_config(str(kubeconfig), context, configuration, persist_config=False)
    except ConfigException as error:
        place = f"by {kubeconfig}" if kubeconfig else "from inside a pod; outside of one, name a --kubeconfig"
        raise NoClusterError(f"no way to reach an API server {place}: {error}") from error
    return Connection(configuration)
