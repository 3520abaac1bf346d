import asyncio
import ssl
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from finetune_operator.certificate import (
    CertificateHolder,
    Kept,
    Lifetimes,
    SecretUnavailableError,
    from_data,
    renewed,
    to_data,
)

from ...unit.operator.trainers import MemorySecret

NAME = "finetune-operator.finetune-system.svc"
START = datetime(2026, 1, 1, tzinfo=UTC)
DAY = timedelta(days=1)
LIFETIMES = Lifetimes(authority=100 * DAY, serving=20 * DAY, spreading=10 * DAY)


def is_trusted(kept: Kept, bundle: str, now: datetime) -> bool:
    authorities = x509.load_pem_x509_certificates(bundle.encode())
    verifier = PolicyBuilder().store(Store(authorities)).time(now).build_server_verifier(x509.DNSName(NAME))
    try:
        verifier.verify(kept.serving.certificate, [])
    except VerificationError:
        return False
    return True


def after(days: float, kept: Kept | None = None) -> Kept:
    return renewed(kept, [NAME], LIFETIMES, START + days * DAY)


def test_the_first_certificate_is_trusted_at_once() -> None:
    kept = after(0)
    assert len(kept.authorities) == 1
    assert is_trusted(kept, kept.bundle, START)


def test_a_certificate_is_trusted_for_its_name_alone() -> None:
    kept = renewed(None, ["somebody.else.svc"], LIFETIMES, START)
    assert not is_trusted(kept, kept.bundle, START)


def test_nothing_is_renewed_before_it_is_due() -> None:
    kept = after(0)
    assert after(13, kept) is kept


def test_a_certificate_is_renewed_when_two_thirds_of_its_life_are_over() -> None:
    kept = after(0)
    later = after(14, kept)
    assert later.serving != kept.serving
    assert later.authorities == kept.authorities


def test_a_certificate_for_other_names_is_renewed() -> None:
    kept = renewed(None, ["old.svc", "127.0.0.1"], LIFETIMES, START)
    assert renewed(kept, ["127.0.0.1", "old.svc"], LIFETIMES, START) is kept
    assert renewed(kept, [NAME], LIFETIMES, START).serving != kept.serving


def test_a_certificate_of_an_authority_that_nobody_trusts_is_renewed() -> None:
    kept = after(0)
    mixed = Kept(kept.authorities, after(0).serving)
    assert is_trusted(after(0, mixed), kept.bundle, START)


def test_a_pod_trusts_whoever_serves_while_its_authorities_are_at_most_ten_days_old() -> None:
    kept = after(0)
    bundles: list[tuple[float, str]] = []
    most = 0
    for day in range(1000):
        kept = after(day, kept)
        most = max(most, len(kept.authorities))
        bundles = [(since, bundle) for since, bundle in bundles if since >= day - 10]
        bundles.append((day, kept.bundle))
        assert all(is_trusted(kept, bundle, START + day * DAY) for _, bundle in bundles), f"day {day}"
    assert most == 2, "an old authority is let go, a new one is there before it is needed"


def test_after_a_long_pause_everything_is_made_anew() -> None:
    kept = after(500, after(0))
    assert len(kept.authorities) == 1
    assert is_trusted(kept, kept.bundle, START + 500 * DAY)


def test_no_certificate_outlives_the_authority_that_signed_it() -> None:
    late = after(95, after(0))
    assert late.serving.ends <= late.authorities[0].ends
    assert is_trusted(late, late.bundle, START + 95 * DAY)
    again = after(99, late)
    assert again.serving != late.serving


def test_an_authority_must_outlive_what_it_signs() -> None:
    with pytest.raises(ValueError, match="too short for an authority"):
        Lifetimes(authority=10 * DAY, serving=5 * DAY, spreading=1 * DAY)


def test_the_secret_holds_everything() -> None:
    kept = after(60, after(0))
    assert len(kept.authorities) == 2
    again = from_data(to_data(kept))
    assert again is not None
    assert to_data(again) == to_data(kept)
    assert after(60, again) is again


@pytest.mark.parametrize(
    "data",
    [
        pytest.param({}, id="an empty Secret"),
        pytest.param({"tls.crt": b"", "tls.key": b""}, id="a Secret with empty values"),
        pytest.param({**to_data(after(0)), "tls.key": b"nonsense"}, id="a broken key"),
        pytest.param(
            {**to_data(after(0)), "tls.key": to_data(after(0))["tls.key"]}, id="the key of another certificate"
        ),
        pytest.param({**to_data(after(0)), "ca.key": b""}, id="no key of the authority"),
    ],
)
def test_a_secret_of_no_use_is_filled_anew(data: dict[str, bytes]) -> None:
    secret = MemorySecret(data)
    holder = CertificateHolder(secret, [NAME], now=lambda: START)
    asyncio.run(holder.refresh())
    assert secret.data is not None
    stored = from_data(secret.data)
    assert stored is not None
    assert stored.bundle == holder.ca_bundle


def test_a_missing_secret_is_named() -> None:
    secret = MemorySecret()
    secret.data = None
    with pytest.raises(SecretUnavailableError, match="the chart creates it"):
        asyncio.run(CertificateHolder(secret, [NAME], now=lambda: START).refresh())


def test_operators_that_start_together_agree_on_one_authority() -> None:
    secret = MemorySecret()
    holders = [CertificateHolder(secret, [NAME], now=lambda: START) for _ in range(5)]

    async def start() -> None:
        await asyncio.gather(*(holder.refresh() for holder in holders))

    asyncio.run(start())
    assert secret.writes == 1
    assert len({holder.ca_bundle for holder in holders}) == 1
    assert holders[0].ca_bundle.count("BEGIN CERTIFICATE") == 1


def test_a_change_of_the_authorities_is_told_once() -> None:
    secret, now, changes = MemorySecret(), [START], []
    holder = CertificateHolder(
        secret, [NAME], now=lambda: now[0], lifetimes=LIFETIMES, on_change=lambda: changes.append(now[0])
    )
    for day in (0, 1, 15, 51, 52):
        now[0] = START + day * DAY
        asyncio.run(holder.refresh())
    assert changes == [START, START + 51 * DAY]


def test_a_renewed_certificate_is_served_without_a_restart() -> None:
    secret, now = MemorySecret(), [datetime.now(UTC) - 15 * DAY]
    holder = CertificateHolder(secret, ["localhost"], now=lambda: now[0], lifetimes=LIFETIMES)

    async def served() -> bytes:
        await holder.refresh()
        server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0, ssl=holder.ssl_context)
        trust = ssl.create_default_context(cadata=holder.ca_bundle)
        trust.verify_flags |= ssl.VERIFY_X509_STRICT
        port = server.sockets[0].getsockname()[1]
        async with server:
            first = await certificate_of(port, trust)
            now[0] = datetime.now(UTC)
            await holder.refresh()
            second = await certificate_of(port, trust)
        assert first != second
        return second

    assert secret.data is not None
    second = asyncio.run(served())
    stored = from_data(secret.data)
    assert stored is not None
    assert x509.load_der_x509_certificate(second) == stored.serving.certificate


async def certificate_of(port: int, trust: ssl.SSLContext) -> bytes:
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trust, server_hostname="localhost")
    certificate: bytes | None = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    await writer.wait_closed()
    assert certificate is not None
    return certificate
