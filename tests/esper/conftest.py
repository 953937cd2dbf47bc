"""Real kernels, compiled once for the session of a worker."""

import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from esper.artifacts import Artifact
from esper.contracts import KernelSignature
from esper.tezzeret import compile_blueprint, load_blueprint
from esper.urza import Library
from tests.esper.servers import (
    postgres_server,
    postgres_url,
    s3_options,
    s3_server,
    s3_url,
    signed_s3_server,
    signed_s3_url,
)
from tests.esper.servers._redis import redis_server, redis_url

__all__ = [
    "postgres_server",
    "postgres_url",
    "redis_server",
    "redis_url",
    "s3_options",
    "s3_server",
    "s3_url",
    "signed_s3_server",
    "signed_s3_url",
]

SIGNATURE = KernelSignature(input_shape=(2,), output_shape=(8,))


@pytest.fixture(scope="session")
def artifact() -> Artifact:
    return compile_blueprint(load_blueprint("residual_mlp"), SIGNATURE, sizes={"width": 8})


@pytest.fixture
def library(tmp_path: Path, artifact: Artifact) -> Library:
    store = Library(tmp_path / "library")
    store.put(artifact)
    return store


@pytest.fixture
def small_disk() -> Iterator[Callable[[int], Path]]:
    """A function that mounts a file system of so many KiB; skips where that is not allowed."""
    mounted: list[Path] = []

    def mount(kib: int) -> Path:
        # A server may be another user, who cannot enter pytest's own folders.
        place = Path(tempfile.mkdtemp(prefix="esper-disk-"))
        place.chmod(0o711)
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(place)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            place.rmdir()
            pytest.skip(f"cannot mount a small file system: {done.stderr.strip()}")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", "-l", str(place)], check=True)
        place.rmdir()
