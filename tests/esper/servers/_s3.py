"""S3: moto, which takes any secret, and rclone, which checks signatures and keeps its files."""

import itertools
import os
import shutil
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.esper.servers._process import Server, free_port, listens, needs

_NUMBERS = itertools.count()
_LOOKS_SECONDS = 0.01
"""After which rclone looks into a folder again."""


@pytest.fixture(scope="session")
def s3_server() -> Iterator[Server]:
    """moto's S3 on a free port. It keeps all in memory: what is killed has lost it."""
    pytest.importorskip("moto.server")
    port = free_port()
    place = Path(tempfile.mkdtemp(prefix="esper-moto-"))
    try:
        command = [sys.executable, "-W", "ignore", "-m", "moto.server"]
        command += ["-H", "127.0.0.1", "-p", str(port)]
        url = f"http://127.0.0.1:{port}"
        server = Server("moto", command, url, ready=lambda: listens(port), log=place / "log")
        server.start()
        yield server
        server.kill()
    finally:
        shutil.rmtree(place, ignore_errors=True)


@pytest.fixture(scope="session")
def s3_options(s3_server: Server) -> dict[str, str]:
    """How moto is reached, as keyword arguments of `S3Access`."""
    return {
        "endpoint": s3_server.url,
        "access_key_id": "test",
        "secret_access_key": "secret of the tests",
        "region": "us-east-1",
    }


@pytest.fixture
def s3_url(s3_server: Server) -> str:
    """A new bucket for each test, and a folder in it: `s3://BUCKET/lab/esper`."""
    bucket = f"esper-{os.getpid()}-{next(_NUMBERS)}"
    request = urllib.request.Request(f"{s3_server.url}/{bucket}", method="PUT")
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert answer.status == 200
    return f"s3://{bucket}/lab/esper"


class SignedS3(Server):
    """A server of S3 that knows one key, and refuses what is not signed with its secret."""

    folder: Path
    """What it serves: a folder for each bucket."""

    KEY = "the-key"
    SECRET = "the-secret-of-the-key"

    @property
    def options(self) -> dict[str, str]:
        """How it is reached, as keyword arguments of `S3Access`."""
        return {
            "endpoint": self.url,
            "access_key_id": self.KEY,
            "secret_access_key": self.SECRET,
            "region": "us-east-1",
        }


@pytest.fixture(scope="session")
def signed_s3_server() -> Iterator[SignedS3]:
    """rclone's S3 on a free port, over a folder: what is killed has it still.

    It checks signatures. It ignores the condition of a put, and answers no ranges.
    """
    (program,) = needs("rclone", among=[Path(sys.executable).parent])
    port = free_port()
    place = Path(tempfile.mkdtemp(prefix="esper-rclone-"))
    (place / "buckets").mkdir()
    try:
        command = [program, "serve", "s3", "--config", "/dev/null", "--addr", f"127.0.0.1:{port}"]
        # Buckets are made past it. With "0s" it looks without end and answers nobody any more.
        command += ["--dir-cache-time", f"{_LOOKS_SECONDS * 1e3:g}ms"]
        command += ["--auth-key", f"{SignedS3.KEY},{SignedS3.SECRET}", str(place / "buckets")]
        url = f"http://127.0.0.1:{port}"
        server = SignedS3("rclone", command, url, ready=lambda: listens(port), log=place / "log")
        server.folder = place / "buckets"
        server.start()
        yield server
        server.kill()
    finally:
        shutil.rmtree(place, ignore_errors=True)


@pytest.fixture
def signed_s3_url(signed_s3_server: SignedS3) -> str:
    """A new bucket for each test, and a folder in it."""
    bucket = f"esper-{next(_NUMBERS)}"
    (signed_s3_server.folder / bucket).mkdir()
    time.sleep(3 * _LOOKS_SECONDS)
    return f"s3://{bucket}/lab/esper"
