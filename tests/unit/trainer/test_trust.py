"""Which certificate authorities the trainer's libraries trust."""

import datetime
import ssl
from pathlib import Path

import certifi
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from finetune_trainer.errors import StorageError
from finetune_trainer.trust import READ_BY_LIBRARIES, add_private_authorities


@pytest.fixture
def private(tmp_path: Path) -> Path:
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name.from_rfc4514_string("CN=private")
    since = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, since, since + datetime.timedelta(days=36500))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    file = tmp_path / "private.crt"
    file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return file


def authorities(file: str) -> set[bytes]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(file)
    return set(context.get_ca_certs(binary_form=True))


def test_private_authorities_are_added_to_the_public_ones(
    private: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    environment = {"FINETUNE_CA_BUNDLE": str(private)}
    add_private_authorities(environment)
    [file] = {environment[name] for name in READ_BY_LIBRARIES}
    assert authorities(file) == authorities(certifi.where()) | authorities(str(private))


def test_a_users_own_choice_stays(private: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    environment = {"FINETUNE_CA_BUNDLE": str(private), "AWS_CA_BUNDLE": "/own.pem"}
    add_private_authorities(environment)
    assert environment["AWS_CA_BUNDLE"] == "/own.pem"
    assert environment["SSL_CERT_FILE"] != "/own.pem"


def test_without_private_authorities_nothing_changes():
    environment: dict[str, str] = {}
    add_private_authorities(environment)
    assert environment == {}


def test_authorities_that_cannot_be_read_are_named(tmp_path: Path):
    with pytest.raises(StorageError, match=r"absent\.crt.*No such file"):
        add_private_authorities({"FINETUNE_CA_BUNDLE": str(tmp_path / "absent.crt")})
