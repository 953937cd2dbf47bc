"""A Redis server for tests, that keeps what it has said yes to across SIGKILL."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.esper.servers._process import Server, free_port, needs


def start_redis(folder: Path, *, fsync: str = "always") -> Server:
    """Start a server with its files in a folder; whoever starts it stops it.

    Args:
        fsync: when it writes to the disk: `always` before it answers, or `everysec`.
    """
    import redis

    (program,) = needs("redis-server")
    port = free_port()
    command = [
        program, "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder),
        "--appendonly", "yes", "--appendfsync", fsync, "--save", "", "--daemonize", "no",
        "--unixsocket", str(folder / "redis.sock"),
    ]  # fmt: skip

    def ready() -> bool:
        with redis.Redis(port=port, socket_timeout=1.0) as client:
            try:
                return bool(client.ping())
            except redis.RedisError:
                return False

    url = f"redis://127.0.0.1:{port}/0"
    server = Server("redis", command, url, ready=ready, log=folder / "redis.log")
    server.start()
    return server


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests of a worker, that none of them stops for good."""
    server = start_redis(tmp_path_factory.mktemp("redis"), fsync="everysec")
    yield server
    server.stop()


@pytest.fixture
def redis_url(redis_server: Server) -> str:
    """A database of it that holds nothing."""
    import redis

    with redis.Redis.from_url(redis_server.url) as client:
        client.flushdb()
    return redis_server.url
