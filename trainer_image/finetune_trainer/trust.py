"""Trust an administrator's certificate authorities besides the public ones, in every library of this process."""

import os
import tempfile
from collections.abc import MutableMapping
from pathlib import Path

import certifi

from finetune_trainer.errors import StorageError

VARIABLE = "FINETUNE_CA_BUNDLE"
"""File with private authorities, PEM; the operator sets it where ``settings.pod.caBundle`` is given."""
READ_BY_LIBRARIES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "AWS_CA_BUNDLE")
"""Each names the one file that OpenSSL and httpx, requests, or boto3 trusts: it replaces what they trust otherwise."""


def add_private_authorities(environment: MutableMapping[str, str] = os.environ) -> None:
    """Point the libraries at public and private authorities together; do nothing where no private ones are given.

    Must come before the first connection. A variable that the user has set stays.

    Raises:
        StorageError: the private authorities cannot be read, or there is no room for the whole.
    """
    private = environment.get(VARIABLE)
    if not private:
        return
    try:
        whole = Path(certifi.where()).read_text(encoding="ascii") + "\n" + Path(private).read_text(encoding="utf-8")
        descriptor, file = tempfile.mkstemp(prefix="finetune-ca-", suffix=".pem")
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(whole)
    except OSError as error:
        raise StorageError(
            f"cannot add the certificate authorities in {private} to the public ones: {error.strerror}; "
            f"{VARIABLE} must name a file that can be read, and {tempfile.gettempdir()} must have room."
        ) from error
    for name in READ_BY_LIBRARIES:
        environment.setdefault(name, file)
