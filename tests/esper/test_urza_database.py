"""Databases of libraries: older ones, newer ones, those of others, and those that cannot be had."""

import concurrent.futures
import contextlib
import json
import sqlite3
import subprocess
import sys

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext

import esper.urza._upgrade
from esper.contracts import KernelQuery, KernelState
from esper.errors import InputError, LibraryError, SchemaVersionError, ServiceUnavailableError
from esper.urza import Library
from esper.urza._connections import begun, parse_url, postgres_engine
from esper.urza._schema import METADATA, REVISIONS, VERSION_TABLE
from tests.esper.cache_kernels import variant
from tests.esper.servers import create_database, free_port
from tests.esper.test_library import nobody
from tests.esper.urza_kinds import blueprint_request, outcome

OLD = """
CREATE TABLE kernels (
    kernel_id VARCHAR(64) NOT NULL,
    recipe VARCHAR(64) NOT NULL,
    blueprint VARCHAR(64) NOT NULL,
    signature VARCHAR(200) NOT NULL,
    birth VARCHAR(8) NOT NULL,
    confidence FLOAT NOT NULL,
    init_seed INTEGER NOT NULL,
    parameter_count INTEGER NOT NULL,
    flops INTEGER NOT NULL,
    size_bytes INTEGER NOT NULL,
    PRIMARY KEY (kernel_id)
);
CREATE INDEX ix_kernels_recipe ON kernels (recipe);
CREATE INDEX ix_kernels_signature ON kernels (signature);
CREATE TABLE measurements (
    kernel_id VARCHAR(64) NOT NULL,
    backend VARCHAR(16) NOT NULL,
    device VARCHAR(100) NOT NULL,
    batch INTEGER NOT NULL,
    content JSON NOT NULL,
    PRIMARY KEY (kernel_id, backend, device, batch)
);
"""
"""What libraries were before they had a version."""


@pytest.fixture
def old(tmp_path, artifact):
    """The folder of a library that an older Esper made, with a kernel that was measured."""
    folder = tmp_path / "old"
    with contextlib.closing(Library(folder)) as library:
        library.put(artifact)
        (record,) = library.find()
    (folder / "library.sqlite").unlink()
    row = record.model_dump(
        include={
            *("kernel_id", "recipe", "blueprint", "signature", "birth", "confidence"),
            *("init_seed", "parameter_count", "flops", "size_bytes"),
        }
    )
    with contextlib.closing(sqlite3.connect(folder / "library.sqlite")) as database:
        database.executescript(OLD)
        database.execute("PRAGMA journal_mode=WAL")
        names = ", ".join(row)
        database.execute(
            f"INSERT INTO kernels ({names}) VALUES ({', '.join('?' * len(row))})",
            list(row.values()),
        )
        database.execute(
            "INSERT INTO measurements VALUES (?, 'jax', 'cpu', 1, ?)",
            [record.kernel_id, json.dumps({"us": 2.5})],
        )
        database.commit()
    return folder


def tables(path):
    with contextlib.closing(sqlite3.connect(path / "library.sqlite")) as database:
        query = "SELECT name FROM sqlite_master WHERE type = 'table'"
        return {name for (name,) in database.execute(query)}


def schema(engine):
    inspector = sa.inspect(engine)
    return {
        name: (
            [(c["name"], str(c["type"]), c["nullable"]) for c in inspector.get_columns(name)],
            inspector.get_pk_constraint(name)["constrained_columns"],
            sorted((i["name"], tuple(i["column_names"])) for i in inspector.get_indexes(name)),
        )
        for name in inspector.get_table_names()
    }


def migrated(engine, revision):
    with begun(engine, write=True) as connection:
        esper.urza._upgrade.upgrade(connection, revision, unversioned=False)


@pytest.fixture(params=["sqlite", "postgres"])
def engines(request, tmp_path):
    """Two empty databases of one kind, by a function that opens the n-th."""
    opened = []

    def engine(number):
        if request.param == "sqlite":
            found = sa.create_engine(f"sqlite:///{tmp_path}/{number}.sqlite")
        else:
            server = request.getfixturevalue("postgres_server")
            found = postgres_engine(parse_url(create_database(server)))
        opened.append(found)
        return found

    yield engine
    for found in opened:
        found.dispose()


def test_new_libraries_have_the_tables_that_migrations_leave(engines):
    made, moved = engines(0), engines(1)
    METADATA.create_all(made)
    migrated(moved, "head")
    with moved.connect() as connection:
        assert (
            compare_metadata(
                MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE}),
                METADATA,
            )
            == []
        )
    found = schema(moved)
    version = found.pop(VERSION_TABLE)
    assert found == schema(made)
    # And both know of the last revision in the same way.
    assert [name for name, _, _ in version[0]] == ["version_num"]


def test_migrations_go_back(engines):
    engine, first = engines(0), engines(1)
    migrated(first, "0001")
    migrated(engine, "head")
    config = Config()
    config.set_main_option("script_location", "esper/urza/migrations")
    with begun(engine, write=True) as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, "0001")
    assert schema(engine) == schema(first)
    migrated(engine, "head")
    with begun(engine, write=True) as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, "base")
    assert set(schema(engine)) == {VERSION_TABLE}


def test_the_revisions_are_those_of_the_migrations():
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", "esper/urza/migrations")
    found = [script.revision for script in ScriptDirectory.from_config(config).walk_revisions()]
    assert tuple(reversed(found)) == REVISIONS


def test_an_older_library_is_read_as_it_is(old, artifact):
    before = (old / "library.sqlite").read_bytes()
    library = Library(old, create=False)
    (record,) = library.find()
    assert record.kernel_id == artifact.kernel_id
    assert (record.state, record.tags, record.created) == (KernelState.TESTING, (), 0.0)
    assert library.search(KernelQuery()).items == (record,)
    assert library.record(record.kernel_id) == record
    assert library.full_id(record.kernel_id[:9]) == record.kernel_id
    assert library.get(record.kernel_id).data == artifact.data
    assert library.measurements(record.kernel_id) == [{"us": 2.5}]
    assert library.usage(record.kernel_id).outcomes == 0
    assert library.outcomes(record.kernel_id) == library.references(record.kernel_id) == []
    assert library.unlisted() == []
    library.close()
    assert (old / "library.sqlite").read_bytes() == before


def test_an_older_library_is_brought_up_to_date_by_the_first_write(old, artifact):
    reader, writer = Library(old, create=False), Library(old, create=False)
    assert len(reader.find()) == 1
    assert VERSION_TABLE not in tables(old)
    other = variant(artifact, 1)
    writer.put(other, tags=["new"])
    assert VERSION_TABLE in tables(old)
    # Whoever has it open sees what is new.
    for library in (writer, reader, Library(old, create=False), Library(old)):
        found = {record.kernel_id: record for record in library.find()}
        assert set(found) == {artifact.kernel_id, other.kernel_id}
        assert found[other.kernel_id].tags == ("new",)
        assert library.measurements(artifact.kernel_id) == [{"us": 2.5}]
    reader.put(artifact)
    assert reader.record(artifact.kernel_id).state is KernelState.VALIDATED
    reader.submit(blueprint_request())
    assert len(writer.claim("worker")) == 1


def test_an_older_library_is_brought_up_to_date_when_it_is_opened_to_be_written(old, artifact):
    with contextlib.closing(Library(old)) as library:
        library.record_outcomes([outcome(artifact.kernel_id, 2.0)])
        assert library.search(KernelQuery(min_gain=1.0)).items[0].kernel_id == artifact.kernel_id
    assert VERSION_TABLE in tables(old)


def test_an_older_library_that_can_only_be_read_is_not_written_to(old, artifact):
    # Where root may, nobody may not: a folder that everybody may enter.
    import shutil
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as name:
        folder = Path(shutil.copytree(old, Path(name) / "library"))
        with nobody(Path(name)):
            library = Library(folder, create=False)
            assert [r.kernel_id for r in library.find()] == [artifact.kernel_id]
            with pytest.raises(LibraryError, match="could not be kept in"):
                library.put(variant(artifact, 1))
            assert [r.kernel_id for r in library.find()] == [artifact.kernel_id]
        assert VERSION_TABLE not in tables(folder)


_OPEN = """
import sys
from esper.urza import Library
print("ready", flush=True)
sys.stdin.readline()
with_alembic = "alembic" in sys.modules
library = Library(sys.argv[1])
print(len(library.find()), with_alembic, "alembic" in sys.modules)
"""


def opened_by_processes(folder, count):
    started = [
        subprocess.Popen(
            [sys.executable, "-c", _OPEN, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(count)
    ]
    for process in started:
        assert process.stdout.readline() == "ready\n"
    for process in started:
        process.stdin.write("go\n")
        process.stdin.flush()
    return [process.communicate(timeout=120)[0].split() for process in started]


def test_several_processes_bring_a_library_up_to_date_at_once(old):
    assert [words[0] for words in opened_by_processes(old, 3)] == ["1"] * 3
    # Only then is alembic needed.
    assert opened_by_processes(old, 1) == [["1", "False", "False"]]


def set_revision(folder, revision):
    with contextlib.closing(sqlite3.connect(folder / "library.sqlite")) as database:
        database.execute(f"UPDATE {VERSION_TABLE} SET version_num = ?", [revision])
        database.commit()


def test_a_newer_library_is_refused(tmp_path, artifact):
    Library(tmp_path).close()
    set_revision(tmp_path, "0099")
    before = (tmp_path / "library.sqlite").read_bytes()
    for create in (True, False):
        with pytest.raises(
            SchemaVersionError,
            match="was written by a newer version of Esper: its schema is '0099', and this version"
            " knows '0001' to '0002'. Update Esper",
        ):
            Library(tmp_path, create=create)
    assert (tmp_path / "library.sqlite").read_bytes() == before


def test_a_newer_library_on_a_server_is_refused(postgres_url, tmp_path):
    Library.connect(postgres_url, tmp_path).close()
    engine = postgres_engine(parse_url(postgres_url))
    with engine.begin() as connection:
        connection.exec_driver_sql(f"UPDATE {VERSION_TABLE} SET version_num = '0099'")
    engine.dispose()
    with pytest.raises(SchemaVersionError, match="its schema is '0099'"):
        Library.connect(postgres_url, tmp_path)


def test_a_database_on_a_server_that_is_somebody_elses(postgres_url, tmp_path):
    engine = postgres_engine(parse_url(postgres_url))
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE customers (name TEXT)")
    for create in (True, False):
        with pytest.raises(InputError, match="is no library of Esper's: its table kernels lacks"):
            Library.connect(postgres_url, tmp_path, create=create)
    assert set(schema(engine)) == {"customers"}
    engine.dispose()


def test_a_library_on_a_server_is_not_made_by_reading(postgres_url, tmp_path):
    with pytest.raises(InputError, match="there is no library in .*: its tables are not there"):
        Library.connect(postgres_url, tmp_path, create=False)
    Library.connect(postgres_url, tmp_path).close()
    Library.connect(postgres_url, tmp_path, create=False).close()
    with pytest.raises(InputError, match="the file is not there"):
        Library.connect(f"sqlite:///{tmp_path}/none.sqlite", tmp_path, create=False)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "this is no URL of a database: expected sqlite:///FOLDER/library.sqlite or postg"),
        ("library", "this is no URL of a database"),
        ("mysql://me:hush@host/db", "cannot be kept in the database mysql://me@host/db: expected"),
        ("sqlite://", "cannot be kept in the database"),
        ("sqlite:///:memory:", "cannot be kept in the database"),
        ("postgresql://me:hush@host", "cannot be kept in the database postgresql://me@host: exp"),
        ("postgresql://me:hush@host:port/db", "this is no URL of a database"),
    ],
)
def test_urls_that_name_no_database(url, message, tmp_path):
    with pytest.raises(InputError, match=message) as caught:
        Library.connect(url, tmp_path)
    assert "hush" not in str(caught.value)


def test_a_password_is_shown_nowhere(postgres_url, tmp_path):
    secret = "test%27s%20own"
    assert "test's" in postgres_url or secret in postgres_url
    library = Library.connect(postgres_url, tmp_path)
    wrong = postgres_url.replace("own%20password", "wr0ng")
    with pytest.raises(InputError, match="authentication failed.*Check the name and the sec") as e:
        Library.connect(wrong, tmp_path)
    for text in (repr(library), library.where, str(e.value)):
        assert "password@" not in text
        assert "own%20" not in text
        assert "wr0ng" not in text
    library.close()


def test_a_server_that_is_not_there(tmp_path):
    url = f"postgresql://esper:hush@127.0.0.1:{free_port()}/esper"
    with pytest.raises(ServiceUnavailableError, match="database cannot be used.*Try again later"):
        Library.connect(url, tmp_path)


def test_a_library_goes_on_when_its_server_is_back(postgres_server, tmp_path, artifact):
    library = Library.connect(create_database(postgres_server), tmp_path)
    library.put(artifact)
    (record,) = library.find()
    postgres_server.kill()
    try:
        for ask in (library.find, library.check, lambda: library.put(artifact)):
            with pytest.raises(ServiceUnavailableError, match="Try again later"):
                ask()
        # Its files are another matter.
        assert library.get(record.kernel_id).data == artifact.data
    finally:
        postgres_server.start()
    assert library.find() == [record]
    library.check()
    library.close()


def test_runs_that_refer_and_runs_that_record_do_not_wait_for_each_other(
    postgres_url, tmp_path, artifact
):
    import psycopg

    library = Library.connect(postgres_url, tmp_path)
    first, last = sorted((variant(artifact, i) for i in range(2)), key=lambda a: a.kernel_id)
    # Their rows lie in the other order than their ids are in.
    library.put(last)
    library.put(first)
    told = [outcome(kernel.kernel_id) for kernel in (first, last)]
    works = (
        lambda: library.refer("run", [first.kernel_id, last.kernel_id]),
        lambda: library.record_outcomes(told),
    )
    with (
        concurrent.futures.ThreadPoolExecutor() as threads,
        psycopg.connect(postgres_url) as holder,
        psycopg.connect(postgres_url, autocommit=True) as watcher,
    ):
        holder.execute("SELECT 1 FROM kernels WHERE kernel_id = %s FOR UPDATE", [last.kernel_id])
        asked = []
        for work in works:
            asked.append(threads.submit(work))
            while _waiting(watcher) < len(asked):
                assert not asked[-1].done()
        holder.rollback()
        for each in asked:
            each.result()
    assert library.references(last.kernel_id) == ["run"]
    assert library.outcomes(last.kernel_id)
    library.close()


def _waiting(connection):
    """How many sessions wait for a lock that another has."""
    query = (
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'esper' AND"
        " cardinality(pg_blocking_pids(pid)) > 0"
    )
    return connection.execute(query).fetchone()[0]


def test_what_only_some_libraries_need_is_imported_by_them_alone(tmp_path):
    script = (
        "import sys; from esper.urza import Library\n"
        f"Library({str(tmp_path)!r}).close(); Library({str(tmp_path)!r}, create=False).close()\n"
        "print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    heavy = {"alembic", "psycopg", "httpx", "fastapi", "torch", "esper.tezzeret", "scipy"}
    assert not heavy & set(done.stdout.split())
