"""The servers of the tests: they can be killed and stopped, and come back with what they had."""

import os
import urllib.error
import urllib.request

import pytest

from tests.esper.servers import create_database, listens, needs


def _tables(url: str) -> set[str]:
    import psycopg

    with psycopg.connect(url) as connection:
        rows = connection.execute(
            "SELECT tablename FROM pg_tables WHERE schemaname = current_schema()"
        )
        return {row[0] for row in rows}


def test_postgres_comes_back_with_what_was_committed(postgres_server):
    import psycopg

    url = create_database(postgres_server)
    for number, end in enumerate((postgres_server.kill, postgres_server.stop)):
        with psycopg.connect(url) as connection:
            connection.execute(f"CREATE TABLE t{number} (a int)")
        end()
        assert not postgres_server.running
        with pytest.raises(psycopg.OperationalError):
            psycopg.connect(url, connect_timeout=2)
        postgres_server.start()
        assert _tables(url) == {f"t{i}" for i in range(number + 1)}


def test_postgres_asks_for_the_password(postgres_url):
    import psycopg

    assert _tables(postgres_url) == set()
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(postgres_url.replace("password", "passwort"))


def test_rclone_checks_signatures(signed_s3_server, signed_s3_url):
    bucket = signed_s3_url.split("/")[2]
    with pytest.raises(urllib.error.HTTPError, match="40[03]"):
        urllib.request.urlopen(f"{signed_s3_server.url}/{bucket}", timeout=30)
    signed_s3_server.kill()
    assert not listens(int(signed_s3_server.url.rpartition(":")[2]))
    signed_s3_server.restart()
    assert (signed_s3_server.folder / bucket).is_dir()


def test_a_program_that_is_not_installed(monkeypatch):
    monkeypatch.setenv("CI", "")
    with pytest.raises(pytest.skip.Exception, match="no-such-program is not installed"):
        needs("no-such-program")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no-such-program is not installed, and this"):
        needs("no-such-program")
    assert os.access(needs("sh")[0], os.X_OK)
