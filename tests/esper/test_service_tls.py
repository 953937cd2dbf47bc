"""`esper serve` over HTTPS, with a certificate of an authority of one's own."""

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from esper.artifacts import Artifact, rewrite_artifact
from esper.errors import InputError, ServiceUnavailableError
from esper.recovery import RetryPolicy
from esper.urza import open_library
from esper.urza.client import AsyncLibraryClient, LibraryClient
from esper.urza.service import Scope, TokenFile
from tests.esper.service_process import Proxy

OPENSSL = shutil.which("openssl")
pytestmark = pytest.mark.skipif(OPENSSL is None, reason="makes certificates by the program openssl")

QUICK = RetryPolicy(attempts=5, base_delay=0.05, jitter=0.0)


class Authority(NamedTuple):
    """Who signs certificates: its own, and its key."""

    certificate: Path
    key: Path


def _openssl(*arguments: str | Path) -> None:
    assert OPENSSL is not None
    done = subprocess.run([OPENSSL, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _made(
    folder: Path, name: str, extensions: list[str], signed_by: Authority | None = None
) -> Authority:
    made = Authority(folder / f"{name}.pem", folder / f"{name}.key")
    _openssl(
        "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
        "-days", "2", "-subj", f"/CN={name}", "-out", made.certificate, "-keyout", made.key,
        *(part for extension in extensions for part in ("-addext", extension)),
        *(() if signed_by is None else ("-CA", signed_by.certificate, "-CAkey", signed_by.key)),
    )  # fmt: skip
    return made


_SIGNS = ["basicConstraints=critical,CA:TRUE", "keyUsage=critical,keyCertSign"]


class Secured(NamedTuple):
    """A service over HTTPS."""

    port: int
    token: str
    authority: Path
    other: Path
    """An authority that has signed nothing."""
    certificate: Path
    key: Path

    @property
    def url(self) -> str:
        return f"https://localhost:{self.port}"


@pytest.fixture(scope="module")
def secured(tmp_path_factory) -> Iterator[Secured]:
    folder = tmp_path_factory.mktemp("tls")
    authority = _made(folder, "authority", _SIGNS)
    other = _made(folder, "other", _SIGNS)
    certificate, key = _made(
        folder,
        "service",
        ["subjectAltName=DNS:localhost", "basicConstraints=critical,CA:FALSE"],
        authority,
    )
    token, _ = TokenFile(folder / "tokens.json").make("tests", Scope.ADMIN)
    errors = folder / "errors.txt"
    with errors.open("w") as file:
        process = subprocess.Popen(
            [
                sys.executable, "-m", "esper.cli", "serve", "--library", folder / "library",
                "--port", "0", "--host", "localhost", "--token-file", folder / "tokens.json",
                "--certificate", certificate, "--key", key,
            ],
            stdout=subprocess.PIPE, stderr=file, text=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1", "COLUMNS": "200"},
        )  # fmt: skip
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        found = re.search(r"https://\S+?:(\d+)", said)
        assert found is not None, said + errors.read_text()
        port = int(found[1])
        yield Secured(port, token, authority.certificate, other.certificate, certificate, key)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert "Traceback" not in errors.read_text()
    finally:
        process.kill()
        process.wait(30)
        if process.stdout is not None:
            process.stdout.close()


def _client(secured: Secured, url: str, authority: Path) -> LibraryClient:
    return LibraryClient(url, secured.token, verify=str(authority), retry=QUICK, timeout=10.0)


def test_kernels_come_and_go_in_whole_and_in_parts_and_go_on_where_they_were_cut(secured, artifact):
    large = rewrite_artifact(artifact, blueprint_name="large", torchscript=os.urandom(1 << 20))
    carrying = Proxy(secured.port)
    try:
        with _client(secured, f"https://localhost:{carrying.port}", secured.authority) as client:
            assert client.put(large) == large.kernel_id
            assert client.get(large.kernel_id).data == large.data
            assert (
                b"".join(client.iter_bytes(large.kernel_id, start=700_000))
                == (large.data[700_000:])
            )
            carrying.cut_after, carrying.cuts = 300_000, 2
            carrying.drop()
            assert client.read_bytes(large.kernel_id) == large.data
            assert carrying.cuts == 0
    finally:
        carrying.close()


def test_the_asynchronous_client_speaks_it_too(secured, artifact: Artifact):
    async def both() -> tuple[str, str]:
        good = AsyncLibraryClient(secured.url, secured.token, verify=str(secured.authority))
        wrong = AsyncLibraryClient(secured.url, secured.token, verify=str(secured.other))
        async with good, wrong:
            kernel_id = await good.put(artifact)
            with pytest.raises(InputError, match="shows a certificate that is not believed"):
                await wrong.read_bytes(kernel_id)
            return kernel_id, (await good.about()).token

    assert asyncio.run(both()) == (artifact.kernel_id, "tests")


@pytest.mark.parametrize(
    ("host", "which", "reason"),
    [
        ("localhost", "other", "unable to get local issuer certificate"),
        ("127.0.0.1", "authority", "IP address mismatch"),
    ],
)
def test_a_certificate_that_is_not_believed_is_refused_once_with_what_to_do(
    secured, host, which, reason
):
    carrying = Proxy(secured.port)
    url = f"https://{host}:{carrying.port}"
    try:
        with _client(secured, url, getattr(secured, which)) as client:
            for ask in (client.about, lambda: client.read_bytes("0" * 64)):
                asked = carrying.connections
                with pytest.raises(InputError, match=f"(?s)library at {url} shows.*{reason}") as no:
                    ask()
                assert "the client's `verify` or in the variable SSL_CERT_FILE" in str(no.value)
                assert secured.token not in str(no.value)
                assert carrying.connections == asked + 1
    finally:
        carrying.close()


def test_an_authority_of_the_system_is_believed_without_being_named(secured, tmp_path, monkeypatch):
    monkeypatch.delenv("SSL_CERT_DIR", raising=False)
    monkeypatch.setenv("SSL_CERT_FILE", str(secured.authority))
    with open_library(secured.url, token=secured.token) as library:  # pyright: ignore
        assert isinstance(library.find(), list)
    # The system has a file and a folder; httpx alone looks into the first of both.
    shutil.copy(secured.authority, tmp_path)
    _openssl("rehash", tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(secured.other))
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))
    with LibraryClient(secured.url, secured.token, retry=QUICK) as client:
        assert client.about().token == "tests"


def test_who_speaks_http_where_https_is_spoken_is_told_to_check_the_address(secured):
    with (
        LibraryClient(f"http://localhost:{secured.port}", retry=QUICK) as client,
        pytest.raises(ServiceUnavailableError, match="Check its address"),
    ):
        client.about()


def test_certificates_that_are_none_are_refused_by_the_client(tmp_path):
    (tmp_path / "none.pem").write_text("nothing")
    for name in ("none.pem", "missing.pem"):
        with pytest.raises(InputError, match=rf"{name} cannot be read.*in PEM format"):
            LibraryClient("https://lab", verify=str(tmp_path / name))
