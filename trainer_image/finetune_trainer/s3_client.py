"""One bucket, spoken to patiently: credentials from a mounted Secret, retries, errors that name the faulty setting."""

import logging
import os
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import boto3
import botocore.session
from boto3.exceptions import Boto3Error, RetriesExceededError
from botocore.config import Config
from botocore.credentials import CredentialProvider, CredentialResolver, Credentials, ReadOnlyCredentials
from botocore.exceptions import (
    BotoCoreError,
    ChecksumError,
    ClientError,
    ConnectionError,
    ConnectTimeoutError,
    CredentialRetrievalError,
    EndpointConnectionError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    SSLError,
)
from botocore.parsers import ResponseParserError

from finetune_trainer.errors import FineTuneError, SpecError, StorageError

logger = logging.getLogger(__name__)

T = TypeVar("T")

PATIENCE_SECONDS = 600.0
"""How long a store that does not answer is waited for: a restart of its server costs no result."""
_LONGEST_PAUSE_SECONDS = 30.0
_CONNECTIONS = 16

S3_ERRORS = (BotoCoreError, ClientError, Boto3Error, ResponseParserError)

_PASSING = (HTTPClientError, ConnectionError, ChecksumError, FlexibleChecksumError, IncompleteReadError, Boto3Error)
_REFUSED_KEYS = {
    *("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken", "ExpiredTokenException"),
    *("TokenRefreshRequired", "InvalidClientTokenId", "UnrecognizedClientException", "XAdminUserNotFound"),
}
_DENIED = {"AccessDenied", "AllAccessDisabled", "AccountProblem", "Forbidden", "UnauthorizedAccess", "403", "401"}
_BUSY = {"SlowDown", "RequestTimeout", "Throttling", "TooManyRequestsException", "RequestLimitExceeded", "429"}
_GARBLED = {"BadDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch", "IncompleteBody"}
"""The body did not arrive as it was sent."""
_FULL = {"QuotaExceeded", "XMinioStorageFull", "InsufficientStorage", "QuotaExceededException", "EntityTooLarge", "507"}
_SKEWED = {"RequestTimeTooSkewed", "RequestExpired"}
_ELSEWHERE = {
    *("PermanentRedirect", "TemporaryRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"),
    *("301", "307", "IncorrectEndpoint", "MethodNotAllowed", "405"),
}
_MISSING = {"NoSuchKey", "404", "NotFound"}


@dataclass(frozen=True, slots=True)
class S3Access:
    """How a bucket is reached, and which settings say so."""

    endpoint: str | None = None
    """Address of the server; absent: what the Secret or the environment says, else AWS."""
    secret: Path | None = None
    """Folder with the keys of a Secret. Absent: boto3's own chain, with profiles and workload identity."""
    uri_field: str = "spec.output.uri"
    secret_field: str = "spec.output.secretRef"


class S3Client:
    """Runs requests against one bucket.

    A server that does not answer is asked again, with growing pauses, until ``patience_seconds`` are over. Keys are
    read from the Secret's files at every request, so a rotated Secret is used at once.
    """

    def __init__(
        self,
        bucket: str,
        access: S3Access,
        patience_seconds: float = PATIENCE_SECONDS,
        *,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        self.bucket = bucket
        self._access = access
        self._patience_seconds = patience_seconds
        self._sleep = sleep
        self._clock = clock
        self._environment = environment
        self._connected: Any = None

    @property
    def field(self) -> str:
        """The setting that names the bucket."""
        return self._access.uri_field

    def call(self, action: str, place: str, request: Callable[[Any], T], patience_seconds: float | None = None) -> T:
        """Return what ``request`` returns for a boto3 client; it is run again when the server did not answer.

        Args:
            action: what is being done, for messages: ``read``, ``write to``.
            place: a URI, for messages.
            request: may be run several times.
            patience_seconds: where less than the client's own is due.

        Raises:
            StorageError: the server refuses, or has not answered for all that time.
            SpecError: the bucket's name is none.
        """
        most = self._patience_seconds
        deadline = self._clock() + (most if patience_seconds is None else min(most, patience_seconds))
        pause, renewed = 1.0, False
        while True:
            try:
                return request(self._client())
            except S3_ERRORS as error:
                cause = _cause(error)
                if _code(cause) in _REFUSED_KEYS and not renewed:
                    # The Secret may have been rotated between two of its files, or a token may have run out.
                    renewed, self._connected = True, None
                    continue
                wait = pause * random.uniform(0.5, 1.0)
                if not _is_passing(cause) or self._clock() + wait > deadline:
                    raise self._translate(cause, action, place) from error
                logger.warning("store did not answer, trying again in_seconds=%.1f reason=%s", wait, _short(cause))
            self._sleep(wait)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    def is_missing(self, error: Exception) -> bool:
        """Whether an error that a request raised says that there is no such object."""
        return _code(error) in _MISSING

    def _client(self) -> Any:
        if self._connected is None:
            self._connected = _connect(self._access, self._environment)
        return self._connected

    @property
    def _server(self) -> str:
        endpoint = _endpoint(self._access)
        return (
            endpoint
            or self._environment.get("AWS_ENDPOINT_URL_S3")
            or self._environment.get("AWS_ENDPOINT_URL")
            or "AWS"
        )

    def _translate(self, error: Exception, action: str, place: str) -> FineTuneError:
        code = _code(error)
        start = f"{self._access.uri_field}: cannot {action} {place}: "
        match error:
            case ParamValidationError():
                return SpecError(f"{start}{_short(error)}. Write s3://bucket/path with the name of a bucket.")
            case NoCredentialsError() | PartialCredentialsError() | CredentialRetrievalError():
                return StorageError(f"{start}there are no credentials for {self._server}. {self._mend_keys}")
            case SSLError():
                return StorageError(
                    f"{start}the certificate of {self._server} is not trusted ({_short(error)}). "
                    "Name the authority's file in AWS_CA_BUNDLE (in a cluster: the operator's CA bundle)."
                )
            case ResponseParserError():
                return StorageError(f"{start}{self._server} does not answer as an S3 store does. {self._mend_endpoint}")
            case EndpointConnectionError() | ConnectTimeoutError():
                return StorageError(
                    f"{start}{self._server} cannot be reached ({_short(error)}). {self._mend_endpoint} "
                    "If it is right, look at the network and at network policies; then try again."
                )
        if code == "NoSuchBucket":
            return StorageError(
                f"{start}{self._server} has no bucket {self.bucket!r}. Create it, or correct {self._access.uri_field}."
            )
        if code == "InvalidBucketName":
            return SpecError(f"{start}{self.bucket!r} is no name of a bucket. Correct {self._access.uri_field}.")
        if code in _REFUSED_KEYS:
            return StorageError(f"{start}{self._server} does not accept the credentials ({code}). {self._mend_keys}")
        if code in _DENIED:
            return StorageError(
                f"{start}access is denied ({code}). Allow it for these credentials on bucket {self.bucket!r}. "
                f"{self._mend_keys}"
            )
        if code in _SKEWED:
            return StorageError(f"{start}the clocks of this machine and of {self._server} differ. Set them right.")
        if code in _ELSEWHERE:
            return StorageError(
                f"{start}the bucket is in another region or at another address ({code}). {self._mend_endpoint}"
            )
        if code in _FULL:
            return StorageError(f"{start}the store takes no more ({code}). Free space there or raise the quota.")
        if code in _MISSING:
            return StorageError(f"{start}there is no such object. Check the path, and that it was published.")
        return StorageError(f"{start}{_short(error)}. Try again; if it stays, look at the log of {self._server}.")

    @property
    def _mend_keys(self) -> str:
        field, secret = self._access.secret_field, self._access.secret
        if secret is not None:
            return f"Check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in Secret {secret.name!r} ({field})."
        return (
            f"Name a Secret in {field}, or check what this process is given: AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, a profile, or the role of its service account."
        )

    @property
    def _mend_endpoint(self) -> str:
        if self._access.uri_field == "spec.output.uri":
            return "Check spec.output.endpoint, and AWS_REGION."
        return "Check AWS_ENDPOINT_URL and AWS_REGION in the Secret, or spec.output.endpoint."


# --- connecting


def _connect(access: S3Access, environment: Mapping[str, str]) -> Any:
    session = botocore.session.Session()
    if access.secret is not None:
        session.register_component("credential_provider", CredentialResolver([_FromSecret(access.secret)]))
    endpoint = _endpoint(access)
    region = read_key(access.secret, "AWS_REGION") or environment.get("AWS_REGION")
    config = Config(
        connect_timeout=10,
        read_timeout=60,
        retries={"mode": "standard", "max_attempts": 4},
        max_pool_connections=_CONNECTIONS,
        # http://minio:9000 has no host named after every bucket.
        s3={"addressing_style": "path" if endpoint or _endpoint_of(environment) else "auto"},
    )
    region = region or session.get_config_variable("region") or "us-east-1"
    return boto3.Session(botocore_session=session, region_name=region).client(
        "s3", endpoint_url=endpoint, config=config
    )


def _endpoint(access: S3Access) -> str | None:
    return access.endpoint or read_key(access.secret, "AWS_ENDPOINT_URL")


def _endpoint_of(environment: Mapping[str, str]) -> str | None:
    return environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL")


class _FromSecret(CredentialProvider):  # type: ignore[misc] # botocore is untyped
    """Gives botocore credentials that live in a Secret's files."""

    METHOD = "secret"

    def __init__(self, secret: Path) -> None:
        super().__init__()
        self._secret = secret

    def load(self) -> Credentials:
        return _SecretCredentials(self._secret)


class _SecretCredentials(Credentials):  # type: ignore[misc] # botocore is untyped
    """Reads the files for every request that is signed: what was rotated is used at once."""

    def __init__(self, secret: Path) -> None:
        self._secret = secret
        super().__init__(*_read_credentials(secret)[:3], method=_FromSecret.METHOD)

    def get_frozen_credentials(self) -> ReadOnlyCredentials:
        return _read_credentials(self._secret)


def _read_credentials(secret: Path) -> ReadOnlyCredentials:
    key_id, key = (_needed_key(secret, name) for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"))
    return ReadOnlyCredentials(key_id, key, read_key(secret, "AWS_SESSION_TOKEN"), None)


def _needed_key(secret: Path, name: str) -> str:
    value = read_key(secret, name)
    if value is None:
        found = sorted(path.name for path in secret.iterdir() if path.is_file()) if secret.is_dir() else []
        listed = ", ".join(found) or "none that is mounted here"
        raise StorageError(f"Secret {secret.name!r} has no key {name}; it has {listed}. Add it.")
    return value


def read_key(secret: Path | None, name: str) -> str | None:
    """Return a key's value without white space around it; absent when there is none."""
    if secret is None:
        return None
    try:
        return (secret / name).read_text(encoding="utf-8").strip() or None
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"cannot read key {name} of Secret {secret.name!r}: {type(error).__name__}.") from error


# --- understanding errors


def _cause(error: Exception) -> Exception:
    """Return what lies behind an error that only says that something failed several times."""
    cause: object = error.last_exception if isinstance(error, RetriesExceededError) else error
    return cause if isinstance(cause, (ClientError, BotoCoreError)) else error


def _code(error: Exception) -> str:
    if not isinstance(error, ClientError):
        return ""
    return str(error.response.get("Error", {}).get("Code", ""))


def _is_passing(error: Exception) -> bool:
    """Whether the same request may succeed a little later."""
    if isinstance(error, SSLError):
        return False
    if isinstance(error, ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if status == 501 or _code(error) in _FULL:
            return False
        if _code(error) == "NoSuchKey" and error.operation_name.startswith("List"):
            # No listing is of one object: a server that walks folders met one that was just taken away.
            return True
        return status >= 500 or _code(error) in _BUSY | _GARBLED
    return isinstance(error, _PASSING)


def _short(error: Exception) -> str:
    lines = str(error).splitlines()
    return (lines[0] if lines else type(error).__name__)[:200].rstrip(".")
