"""The files by which a service speaks HTTPS."""

import os
import ssl
from pathlib import Path

from esper.errors import InputError


def check_certificate(certificate: Path, key: Path) -> None:
    """Refuse files for HTTPS by which nothing could be served.

    Args:
        certificate: a PEM file of a certificate, and of those that it goes back to.
        key: a PEM file of its private key, without a password.

    Raises:
        InputError: naming the file that is none, or both where they do not go together.
    """
    for what, file in (("certificate", certificate), ("private key", key)):
        if not os.access(file, os.R_OK):
            raise InputError(
                f"the file {file} cannot be read: expected a PEM file of a {what}; name one that is"
                " there and that this user may read"
            )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_verify_locations(certificate)
    except OSError as error:
        raise InputError(
            f"the file {certificate} holds no certificate: expected a PEM file, which has a line"
            " -----BEGIN CERTIFICATE-----"
        ) from error

    # Without this OpenSSL would ask the terminal, and wait.
    def password() -> str:
        raise InputError(
            f"the private key {key} has a password, which a service has nobody to ask for: give it"
            " one without (`openssl pkey -in KEY -out NEW`), which nobody else may read"
        )

    try:
        context.load_cert_chain(certificate, key, password)
    except OSError as error:
        # OpenSSL gives a reason for what it could read and does not take.
        if isinstance(error, ssl.SSLError) and error.reason:
            raise InputError(
                f"the certificate {certificate} and the key {key} cannot be used together:"
                f" {error.reason.lower().replace('_', ' ')}; give the key of that certificate"
            ) from error
        raise InputError(
            f"the file {key} holds no private key: expected a PEM file, which has a line such as"
            " -----BEGIN PRIVATE KEY-----"
        ) from error
