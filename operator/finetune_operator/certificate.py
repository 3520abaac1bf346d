"""The progress endpoint's own certificate authority and certificate: made, kept in one Secret, renewed in time.

A new authority is trusted for a while before it signs, and an old one until all that it signed has expired, so that no
pod ever meets a certificate which it does not trust yet or any more.
"""

import asyncio
import ipaddress
import logging
import ssl
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Protocol

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

logger = logging.getLogger(__name__)

AUTHORITIES = "ca.crt"
"""PEM of all authorities that pods trust, oldest first."""
AUTHORITY_KEYS = "ca.key"
"""Their keys, in the same order."""
CERTIFICATE = "tls.crt"
CERTIFICATE_KEY = "tls.key"

_TRIES = 5
"""Writes that may be refused because the Secret has changed meanwhile."""
_SKEW = timedelta(minutes=5)
"""Certificates are valid from a little before they are made: clocks differ."""


class SecretUnavailableError(Exception):
    """The Secret that the chart creates is not there, or the API server did not let it be read or written."""


@dataclass(frozen=True, slots=True)
class StoredSecret:
    """What a Secret holds."""

    data: Mapping[str, bytes]
    resource_version: str


class SecretStore(Protocol):
    """The one Secret that the operator reads and writes."""

    async def read(self) -> StoredSecret | None:
        """Return its content; None when there is no such Secret.

        Raises:
            SecretUnavailableError: the API server did not answer or refused.
        """

    async def write(self, data: Mapping[str, bytes], resource_version: str) -> StoredSecret | None:
        """Replace its data and return what is stored; None when it has changed since that version.

        Raises:
            SecretUnavailableError: the API server did not answer or refused.
        """


@dataclass(frozen=True, slots=True)
class Lifetimes:
    """How long certificates are good."""

    authority: timedelta = timedelta(days=730)
    """The next authority is made when half of it is over."""
    serving: timedelta = timedelta(days=60)
    """Of the endpoint's certificate; renewed when two thirds of it are over."""
    spreading: timedelta = timedelta(days=30)
    """How long a new authority is trusted before it signs. A callback of Transformers reads the authorities once."""

    def __post_init__(self) -> None:
        if self.authority < 2 * (self.serving + self.spreading):
            raise ValueError(f"{self.authority} is too short for an authority: it must outlive what it signs")


@dataclass(frozen=True, slots=True)
class Pair:
    """A certificate and its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def made(self) -> datetime:
        """When it was issued."""
        return self.certificate.not_valid_before_utc + _SKEW

    @property
    def ends(self) -> datetime:
        """When it expires."""
        return self.certificate.not_valid_after_utc


@dataclass(frozen=True, slots=True)
class Kept:
    """The content of the Secret."""

    authorities: tuple[Pair, ...]
    """Oldest first."""
    serving: Pair

    @property
    def bundle(self) -> str:
        """PEM of the authorities, for pods."""
        return "".join(_pem(pair.certificate) for pair in self.authorities)


def renewed(kept: Kept | None, names: Sequence[str], lifetimes: Lifetimes, now: datetime) -> Kept:
    """Return what is to be kept from now on: ``kept`` itself while nothing is due."""
    authorities = _authorities(kept.authorities if kept else (), lifetimes, now)
    signing = _signing(authorities, lifetimes, now)
    serving = kept.serving if kept else None
    if serving is None or not _is_good(serving, authorities, names, now):
        serving = _serving_pair(signing, names, now, min(now + lifetimes.serving, signing.ends))
    if kept and kept.authorities == authorities and kept.serving == serving:
        return kept
    return Kept(authorities, serving)


def _authorities(known: tuple[Pair, ...], lifetimes: Lifetimes, now: datetime) -> tuple[Pair, ...]:
    living = tuple(pair for pair in known if pair.ends > now)
    if not living or now >= living[-1].made + lifetimes.authority / 2:
        living = (*living, _authority_pair(now, lifetimes.authority))
    # What an authority signed has expired one serving lifetime after the next one began to sign.
    needed = (
        pair
        for pair, following in zip(living, (*living[1:], None), strict=True)
        if following is None or now < following.made + lifetimes.spreading + lifetimes.serving
    )
    return tuple(needed)


def _signing(authorities: tuple[Pair, ...], lifetimes: Lifetimes, now: datetime) -> Pair:
    spread = [pair for pair in authorities if pair.made + lifetimes.spreading <= now]
    return spread[-1] if spread else authorities[0]


def _is_good(serving: Pair, authorities: Sequence[Pair], names: Sequence[str], now: datetime) -> bool:
    return (
        now < serving.made + (serving.ends - serving.made) * 2 / 3
        and _names_in(serving.certificate) == set(names)
        and any(_is_signed_by(serving.certificate, authority.certificate) for authority in authorities)
    )


def _is_signed_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _names_in(certificate: x509.Certificate) -> set[str]:
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return {str(name.value) for name in names}


# --- issuing


def _authority_pair(now: datetime, lifetime: timedelta) -> Pair:
    key = ec.generate_private_key(ec.SECP256R1())
    # Two authorities must not share a name: a verifier would try the wrong key.
    name = _name(f"finetune progress authority {x509.random_serial_number() % 10**12}")
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    certificate = (
        _builder(name, name, key, now, now + lifetime)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
        .sign(key, hashes.SHA256())
    )
    return Pair(certificate, key)


def _serving_pair(authority: Pair, names: Sequence[str], now: datetime, ends: datetime) -> Pair:
    key = ec.generate_private_key(ec.SECP256R1())
    identifier = authority.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    certificate = (
        _builder(_name("finetune progress"), authority.certificate.subject, key, now, ends)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_general_name(name) for name in names]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
        .sign(authority.key, hashes.SHA256())
    )
    return Pair(certificate, key)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, now: datetime, ends: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(ends)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _key_usage(signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


# --- the Secret's content


def to_data(kept: Kept) -> dict[str, bytes]:
    """Return the Secret's data."""
    return {
        AUTHORITIES: kept.bundle.encode(),
        AUTHORITY_KEYS: "".join(_key_pem(pair.key) for pair in kept.authorities).encode(),
        CERTIFICATE: _pem(kept.serving.certificate).encode(),
        CERTIFICATE_KEY: _key_pem(kept.serving.key).encode(),
    }


def from_data(data: Mapping[str, bytes]) -> Kept | None:
    """Return what the Secret's data say; None when they are empty or of no use, so that all is made anew."""
    try:
        certificates = x509.load_pem_x509_certificates(data.get(AUTHORITIES, b""))
        keys = [_load_key(part) for part in _split_keys(data.get(AUTHORITY_KEYS, b""))]
        authorities = tuple(Pair(certificate, key) for certificate, key in zip(certificates, keys, strict=True))
        serving = Pair(
            x509.load_pem_x509_certificate(data.get(CERTIFICATE, b"")), _load_key(data.get(CERTIFICATE_KEY, b""))
        )
    except ValueError:
        return None
    pairs = (*authorities, serving)
    return Kept(authorities, serving) if all(_belong_together(pair) for pair in pairs) else None


def _belong_together(pair: Pair) -> bool:
    return pair.certificate.public_key() == pair.key.public_key()


def _split_keys(text: bytes) -> list[bytes]:
    end = b"-----END PRIVATE KEY-----\n"
    return [part + end for part in text.split(end) if part.strip()]


def _load_key(text: bytes) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key(text, password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError("not a key of this operator")
    return key


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def _key_pem(key: ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()


# --- in use


class CertificateHolder:
    """The certificate in use. Several operators may share the Secret: the first to write wins, the others follow."""

    def __init__(
        self,
        store: SecretStore,
        names: Sequence[str],
        now: Callable[[], datetime],
        lifetimes: Lifetimes | None = None,
        on_change: Callable[[], None] = lambda: None,
    ):
        """Hold a certificate for ``names``, hosts or addresses; call ``on_change`` when `ca_bundle` changes."""
        self._store = store
        self._names = tuple(names)
        self._now = now
        self._lifetimes = lifetimes or Lifetimes()
        self._on_change = on_change
        self._kept: Kept | None = None
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.minimum_version = ssl.TLSVersion.TLSv1_2

    @property
    def ca_bundle(self) -> str:
        """PEM of the authorities that pods are to trust; empty before the first `refresh`."""
        return self._kept.bundle if self._kept else ""

    @property
    def ssl_context(self) -> ssl.SSLContext:
        """The same object for ever: new connections get the newest certificate."""
        return self._context

    async def refresh(self) -> None:
        """Take over what the Secret holds, renewed where that is due.

        Raises:
            SecretUnavailableError: it could not be read or written.
        """
        for _ in range(_TRIES):
            stored = await self._store.read()
            if stored is None:
                raise SecretUnavailableError("the Secret of the progress endpoint is missing; the chart creates it")
            known = from_data(stored.data)
            kept = renewed(known, self._names, self._lifetimes, self._now())
            if kept is known:
                return self._use(kept)
            # Refused when another operator was faster: then its certificate is as good.
            if await self._store.write({**stored.data, **to_data(kept)}, stored.resource_version):
                logger.info("renewed certificate expires=%s authorities=%d", kept.serving.ends, len(kept.authorities))
                return self._use(kept)
        raise SecretUnavailableError("the Secret of the progress endpoint changes faster than it can be written")

    async def keep_fresh(self, seconds: float = 60.0) -> None:
        """Refresh for ever. Also finds what another operator has renewed."""
        while True:
            await asyncio.sleep(seconds)
            try:
                await self.refresh()
            except SecretUnavailableError as error:
                logger.warning("cannot look after the certificate error=%s", error)

    def _use(self, kept: Kept) -> None:
        before = self._kept
        if before is not None and to_data(before) == to_data(kept):
            return
        with tempfile.TemporaryDirectory(prefix="finetune-tls-") as folder:
            # The ssl module reads keys from files alone.
            chain = Path(folder, "chain.pem")
            chain.touch(mode=0o600)
            chain.write_text(_key_pem(kept.serving.key) + _pem(kept.serving.certificate), encoding="ascii")
            self._context.load_cert_chain(chain)
        self._kept = kept
        if before is None or before.bundle != kept.bundle:
            self._on_change()
