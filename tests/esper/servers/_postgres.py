"""PostgreSQL: a cluster of its own for each worker of the tests, a schema for each test."""

import contextlib
import itertools
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.esper.servers._process import Server, free_port, needs

_PASSWORD = "a test's own password"
_NUMBERS = itertools.count()


def _places() -> list[Path]:
    found = Path("/usr/lib/postgresql").glob("*/bin")
    return sorted(found, key=lambda place: int(place.parent.name), reverse=True)


def _other_user() -> tuple[int, int] | None:
    """Ids of a user that is not root; None where the tests are not run by root."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            return entry.pw_uid, entry.pw_gid
    raise RuntimeError("PostgreSQL does not run as root, and there is no user postgres or nobody")


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Server]:
    """PostgreSQL on a free port; its `url` names the database `postgres`, with the password."""
    pytest.importorskip("psycopg")
    initdb, program = needs("initdb", "postgres", among=_places())
    user = _other_user()
    # pytest's own folders can be entered by their owner alone.
    place = Path(tempfile.mkdtemp(prefix="esper-postgres-"))
    try:
        password = place / "password"
        password.write_text(_PASSWORD)
        if user is not None:
            for path in (place, password):
                os.chown(path, *user)
        command = [initdb, "-D", str(place / "data"), "-U", "esper", "-A", "scram-sha-256"]
        command += ["-E", "UTF8", "--locale=C", "--no-sync", f"--pwfile={password}"]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            user=None if user is None else user[0],
            group=None if user is None else user[1],
            extra_groups=None if user is None else [],
        )
        assert done.returncode == 0, done.stderr
        port = free_port()
        url = f"postgresql://esper:{_PASSWORD.replace(' ', '%20')}@127.0.0.1:{port}/postgres"
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": port,
            "unix_socket_directories": "",
            "max_connections": 200,
            # A process that is killed loses nothing by these; a machine would.
            "fsync": "off",
            "full_page_writes": "off",
        }
        command = [program, "-D", str(place / "data")]
        for name, value in settings.items():
            command += ["-c", f"{name}={value}"]
        server = Server(
            "PostgreSQL", command, url, ready=lambda: _answers(url), log=place / "log", user=user
        )
        server.start()
        yield server
        server.kill()
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _answers(url: str) -> bool:
    import psycopg

    try:
        psycopg.connect(url, connect_timeout=5).close()
    except psycopg.OperationalError:
        return False
    return True


def create_database(server: Server) -> str:
    """What is a new, empty database to whoever opens its url.

    It is a schema of one database: a thousand files fewer to make and to remove.
    """
    import psycopg
    from psycopg import sql

    name = f"library_{os.getpid()}_{next(_NUMBERS)}"
    with contextlib.closing(psycopg.connect(server.url, autocommit=True)) as connection:
        connection.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(name)))
    return f"{server.url}?options=-csearch_path%3D{name}"


@pytest.fixture
def postgres_url(postgres_server: Server) -> str:
    """What is a new, empty database for each test; it goes with the server."""
    return create_database(postgres_server)
