"""PostgreSQL: made once, and a database of a role that owns nothing else."""

import shutil
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esper.lab._asked import HOST
from esper.lab._errors import LabError, LabInputError
from esper.lab._folder import LabFolder, write_whole
from esper.lab._programs import Programs
from esper.lab._secrets import LabSecrets
from esper.lab._server import NotReady, Runner, Server
from esper.lab._user import User, server_user

if TYPE_CHECKING:
    import psycopg

DATABASE = "esper"
ROLE = "esper"
_SUPERUSER = "postgres"


def postgres_url(port: int, secrets: LabSecrets) -> str:
    """Where the database is, with the password of its owner."""
    return f"postgresql://{ROLE}:{secrets.postgres}@{HOST}:{port}/{DATABASE}"


def version_of_data(folder: LabFolder) -> str | None:
    """The major version whose data are there; None where there are none.

    Raises:
        LabInputError: where the folder holds something, but not a whole set of data.
    """
    data = folder.postgres
    if not data.exists():
        return None
    try:
        version = (data / "PG_VERSION").read_text().strip()
        whole = (data / "global" / "pg_control").is_file()
    except OSError:
        version, whole = "", False
    if not whole:
        raise LabInputError(
            f"{data} holds no whole data of PostgreSQL (PG_VERSION and global/pg_control are"
            " wanted): nothing in it was changed; put it back from a copy, or move it away to"
            " begin with an empty database"
        )
    return version


def postgres_server(
    folder: LabFolder, port: int, secrets: LabSecrets, programs: Programs
) -> Server:
    """The server; its data are made before its first start."""
    user = server_user(folder.postgres)
    settings = {
        "listen_addresses": HOST,
        "port": str(port),
        "unix_socket_directories": "",
        "log_destination": "stderr",
        "logging_collector": "off",
        "max_connections": "200",
    }
    options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
    return Server(
        name="postgres",
        shown="PostgreSQL",
        command=(str(programs.postgres), "-D", str(folder.postgres), *options),
        folder=folder.root,
        check=lambda: _check(port, secrets),
        port=port,
        user=user,
        begin=lambda run: _make(folder, secrets, programs, user, run),
        furnish=lambda: _furnish(port, secrets),
        end=signal.SIGINT,  # a fast shutdown: SIGTERM waits until every client has gone
    )


def _make(
    folder: LabFolder, secrets: LabSecrets, programs: Programs, user: User | None, run: Runner
) -> None:
    """Make the data beside their place, and put them there when they are whole."""
    if folder.postgres.exists():
        return
    place = folder.root / ".postgres-in-the-making"
    shutil.rmtree(place, ignore_errors=True)  # of a lab that was killed while it did this
    place.mkdir(mode=0o700)
    password = place / "password"
    data = place / "data"
    try:
        write_whole(password, secrets.postgres_superuser + "\n")
        if user is not None:
            for path in (place, password):
                _give(path, user)
        command = (
            str(programs.initdb),
            *("-D", str(data), "-U", _SUPERUSER, "--pwfile", str(password)),
            *("--auth", "scram-sha-256", "--encoding", "UTF8", "--no-locale", "--data-checksums"),
            "--no-instructions",
        )
        run(command, user, folder.log("postgres"))
        data.rename(folder.postgres)
    except OSError as error:
        raise LabError(f"PostgreSQL's data cannot be made: {error}") from error
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _give(path: Path, user: User) -> None:
    shutil.chown(path, user.uid, user.gid)


def _check(port: int, secrets: LabSecrets) -> None:
    import psycopg

    try:
        with _connected(port, secrets) as connection:
            connection.execute("SELECT 1")
    except psycopg.OperationalError as error:
        text = " ".join(str(error).split())
        if "password authentication failed" in text:
            raise LabError(
                f"PostgreSQL refuses the password of {_SUPERUSER} that the lab's secrets.json has:"
                " its data were made with another one; put both back from one copy"
            ) from None
        raise NotReady(text) from None


def _furnish(port: int, secrets: LabSecrets) -> None:
    """The role and its database; changes nothing where they are as they should be."""
    from psycopg import sql

    role = sql.Identifier(ROLE)
    with _connected(port, secrets) as connection:
        # PostgreSQL logs statements that fail, whole: the password itself is in none.
        verifier = connection.pgconn.encrypt_password(
            secrets.postgres.encode(), ROLE.encode(), b"scram-sha-256"
        )
        password = sql.Literal(verifier.decode())
        verb = "ALTER" if _there(connection, "pg_roles", "rolname", ROLE) else "CREATE"
        statement = sql.SQL("{} ROLE {} LOGIN PASSWORD {}").format(sql.SQL(verb), role, password)
        connection.execute(statement)
        if not _there(connection, "pg_database", "datname", DATABASE):
            database = sql.Identifier(DATABASE)
            connection.execute(sql.SQL("CREATE DATABASE {} OWNER {}").format(database, role))


def _there(connection: "psycopg.Connection[Any]", table: str, column: str, name: str) -> bool:
    from psycopg import sql

    asked = sql.SQL("SELECT 1 FROM {} WHERE {} = %s").format(
        sql.Identifier(table), sql.Identifier(column)
    )
    return connection.execute(asked, (name,)).fetchone() is not None


def _connected(port: int, secrets: LabSecrets) -> "psycopg.Connection[Any]":
    import psycopg

    return psycopg.connect(
        host=HOST,
        port=port,
        user=_SUPERUSER,
        password=secrets.postgres_superuser,
        dbname="postgres",
        connect_timeout=2,
        autocommit=True,
        application_name="esper lab",
    )
