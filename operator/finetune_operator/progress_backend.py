"""What the progress endpoint needs from the API server: reviews of tokens, writes of progress, one Secret."""

import base64
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from finetune_operator.authentication import ReviewUnavailableError, TokenVerdict, verdict_of
from finetune_operator.certificate import SecretUnavailableError, StoredSecret
from finetune_operator.cluster import (
    PROGRESS_MANAGER,
    Cluster,
    ClusterError,
    ConflictError,
    NotFoundError,
    Raw,
    UnavailableError,
)

logger = logging.getLogger(__name__)


class ClusterReviewer:
    """A `TokenReviewer`."""

    def __init__(self, cluster: Cluster):
        self._cluster = cluster

    async def review_token(self, token: str, audiences: Sequence[str]) -> TokenVerdict:
        """See `TokenReviewer`."""
        review = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenReview",
            "metadata": {},
            "spec": {"token": token, "audiences": list(audiences)},
        }
        try:
            answer = await self._cluster.create(review)
        except ClusterError as error:
            raise ReviewUnavailableError(f"no review of a token: {error}") from error
        return verdict_of(answer.get("status") or {})


class ClusterPatcher:
    """A `StatusPatcher`."""

    def __init__(self, cluster: Cluster):
        self._cluster = cluster

    async def patch_progress(self, key: tuple[str, str], patch: Mapping[str, Any]) -> bool:
        """See `StatusPatcher`."""
        try:
            await self._cluster.patch("FineTuneJob", *key, patch, "/status", PROGRESS_MANAGER)
        except (ConflictError, NotFoundError, UnavailableError):
            return False
        except ClusterError as error:
            # The same would be refused again.
            logger.warning("progress refused namespace=%s job=%s error=%s", *key, error)
        return True


class ClusterSecret:
    """A `SecretStore`."""

    def __init__(self, cluster: Cluster, namespace: str, name: str):
        self._cluster = cluster
        self._namespace = namespace
        self._name = name

    async def read(self) -> StoredSecret | None:
        """See `SecretStore`."""
        secret = await self._read()
        return None if secret is None else _stored(secret)

    async def write(self, data: Mapping[str, bytes], resource_version: str) -> StoredSecret | None:
        """See `SecretStore`."""
        # Labels, annotations and the type are the chart's.
        secret = await self._read()
        if secret is None:
            return None
        metadata = {**secret["metadata"], "resourceVersion": resource_version}
        encoded = {name: base64.b64encode(value).decode() for name, value in data.items()}
        manifest = {"apiVersion": "v1", "kind": "Secret", **secret, "metadata": metadata, "data": encoded}
        try:
            return _stored(await self._cluster.update(manifest))
        except (ConflictError, NotFoundError):
            return None
        except ClusterError as error:
            raise SecretUnavailableError(f"cannot write Secret {self._namespace}/{self._name}: {error}") from error

    async def _read(self) -> Raw | None:
        try:
            return await self._cluster.get("Secret", self._namespace, self._name)
        except ClusterError as error:
            raise SecretUnavailableError(f"cannot read Secret {self._namespace}/{self._name}: {error}") from error


def _stored(secret: Raw) -> StoredSecret:
    data = {name: base64.b64decode(value) for name, value in (secret.get("data") or {}).items()}
    return StoredSecret(data, secret["metadata"]["resourceVersion"])
