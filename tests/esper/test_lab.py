"""A lab's stores, brought up for real: what is told, what stays, what is left when things die."""

import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import obstore
import psycopg
import pytest
import redis
from obstore.exceptions import PermissionDeniedError
from obstore.store import S3Store

from esper.lab._postgres import postgres_server
from esper.lab._process import wait_until_gone
from esper.lab._programs import find_programs
from esper.lab._secrets import secrets_of
from tests.esper.lab_process import PATIENCE, LabProcess, needs_servers

STORES = ("postgres", "redis", "s3")


@pytest.fixture(scope="module")
def lab() -> Iterator[LabProcess]:
    """Stores that are up; each test leaves them so."""
    needs_servers()
    with LabProcess() as made:
        made.up("--stores")
        yield made


@pytest.fixture
def own_lab() -> Iterator[LabProcess]:
    needs_servers()
    with LabProcess() as made:
        yield made


def database(lab: LabProcess) -> "psycopg.Connection":
    return psycopg.connect(lab.config()["library"]["database"], autocommit=True)


def bus(lab: LabProcess) -> "redis.Redis":
    return redis.Redis.from_url(lab.config()["bus"]["url"])


def blobs(lab: LabProcess, secret: str | None = None) -> S3Store:
    known = lab.config()["library"]["s3"]
    return S3Store(
        "esper",
        endpoint=known["endpoint"],
        region=known["region"],
        access_key_id=known["access_key_id"],
        secret_access_key=secret or known["secret_access_key"],
        client_options={"allow_http": True},
        retry_config={"max_retries": 0},
    )


def put_all(lab: LabProcess, value: str) -> None:
    with database(lab) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS kept (value text)")
        connection.execute("INSERT INTO kept VALUES (%s)", (value,))
    with bus(lab) as client:
        client.rpush("kept", value)
    obstore.put(blobs(lab), f"kept/{value}", value.encode())


def all_kept(lab: LabProcess) -> list[set[str]]:
    with database(lab) as connection:
        rows = {row[0] for row in connection.execute("SELECT value FROM kept")}
    with bus(lab) as client:
        items = {item.decode() for item in client.lrange("kept", 0, -1)}
    found = obstore.list(blobs(lab), "kept").collect()
    names = {Path(meta["path"]).name for meta in found}
    return [rows, items, names]


def test_the_stores_serve_who_knows_the_secrets(lab):
    put_all(lab, "first")
    assert all("first" in kept for kept in all_kept(lab))


def test_the_stores_refuse_who_does_not(lab):
    ports = lab.ports
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(f"postgresql://esper:wrong@127.0.0.1:{ports['postgres']}/esper")
    with (
        redis.Redis(port=ports["redis"]) as client,
        pytest.raises(redis.exceptions.AuthenticationError),
    ):
        client.ping()
    with pytest.raises(PermissionDeniedError, match="SignatureDoesNotMatch"):
        obstore.get(blobs(lab, secret="wrong"), "kept/first")


def test_the_role_of_the_library_owns_its_database_and_nothing_else(lab):
    with database(lab) as connection:
        asked = "SELECT rolsuper OR rolcreatedb OR rolcreaterole FROM pg_roles WHERE rolname = %s"
        assert connection.execute(asked, ("esper",)).fetchone() == (False,)
        assert connection.execute("SHOW data_checksums").fetchone() == ("on",)
        assert connection.execute("SHOW fsync").fetchone() == ("on",)


def test_the_password_of_the_role_is_in_no_statement_that_the_server_logs(lab):
    secrets = secrets_of(lab.folder.secrets, used=True)
    server = postgres_server(lab.folder, lab.ports["postgres"], secrets, find_programs())
    address = f"postgresql://postgres:{secrets.postgres_superuser}@127.0.0.1:{server.port}/postgres"
    log = lab.folder.log("postgres")
    with psycopg.connect(address, autocommit=True) as connection:
        connection.execute("ALTER ROLE postgres SET log_statement = 'all'")
        try:
            server.furnish()
        finally:
            connection.execute("ALTER ROLE postgres RESET log_statement")
    assert 'ALTER ROLE "esper" LOGIN PASSWORD' in log.read_text()
    assert secrets.postgres not in log.read_text()
    with database(lab) as connection:  # by the same password
        assert connection.execute("SELECT 1").fetchone() == (1,)


def test_what_redis_acknowledges_is_on_the_disk(lab):
    with bus(lab) as client:
        found = client.config_get("append*")
        assert (found["appendonly"], found["appendfsync"]) == ("yes", "always")
        assert client.config_get("maxmemory-policy")["maxmemory-policy"] == "noeviction"


def test_the_stores_listen_at_this_machine_alone(lab):
    address = next((found for found in _own_addresses() if not found.startswith("127.")), None)
    if address is None:
        pytest.skip("this machine has no other address")
    for name in STORES:
        with socket.socket() as tried:
            tried.settimeout(5)
            assert tried.connect_ex((address, lab.ports[name])) != 0, name


def _own_addresses() -> set[str]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        try:
            asked.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            return set()
        return {asked.getsockname()[0]}


def test_no_secret_is_where_others_can_see_it(lab):
    secrets = re.findall(r'": "(.+)"', lab.folder.secrets.read_text())
    assert len(secrets) == 8
    for path in (lab.folder.secrets, lab.folder.config, lab.folder.service_config):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    seen = lab.said + "".join(path.read_text() for path in lab.folder.logs.iterdir())
    for mark in lab.marks().values():
        seen += Path(f"/proc/{mark.pid}/cmdline").read_text()
    assert not [secret for secret in secrets if secret in seen]
    for name in ("redis/redis.conf", "redis", "s3", "logs", "postgres"):
        assert not stat.S_IMODE((lab.folder.root / name).stat().st_mode) & 0o077, name


def test_status_names_the_processes(lab):
    done = lab.call("status")
    assert done.returncode == 0
    for name, mark in lab.marks().items():
        assert f"{name} (process {mark.pid})" in done.stdout
    assert f"lab (process {lab.process.pid})" in done.stdout


@pytest.mark.parametrize("name", STORES)
def test_a_store_that_is_killed_comes_again_with_all_it_had(lab, name):
    put_all(lab, f"before-{name}")
    killed = lab.marks()[name]
    os.kill(killed.pid, signal.SIGKILL)
    said = lab.hear("was ended by SIGKILL")
    assert "it is started again in" in said
    lab.hear(rf"is up again at port {lab.ports[name]}")
    assert lab.marks()[name] != killed
    assert all(f"before-{name}" in kept for kept in all_kept(lab))


def test_a_second_lab_in_one_folder_is_refused(lab):
    done = lab.call("up", "--stores")
    assert done.returncode == 2
    assert f"a lab is up in {lab.folder.root} already (process {lab.process.pid})" in done.stderr
    assert set(lab.marks()) == set(STORES)


def test_a_lab_that_ended_or_was_killed_goes_on_with_what_it_had(own_lab):
    own_lab.up("--stores")
    put_all(own_lab, "first")
    files = {path: path.read_text() for path in (own_lab.folder.secrets, own_lab.folder.asked)}
    marks = list(own_lab.marks().values())
    assert own_lab.end(signal.SIGINT) == 130
    assert "all servers have ended" in own_lab.said
    assert not [mark for mark in marks if mark.alive]
    assert own_lab.call("status").returncode == 1
    assert "no lab is up" in own_lab.call("down").stdout

    own_lab.up("--stores", ports=False)
    assert own_lab.marks()["redis"] not in marks
    assert files == {path: path.read_text() for path in files}
    assert all_kept(own_lab) == [{"first"}] * 3
    put_all(own_lab, "second")
    marks = list(own_lab.marks().values())
    own_lab.process.kill()
    own_lab.process.wait(PATIENCE)
    assert not wait_until_gone(marks, PATIENCE), "they are told by the kernel"

    own_lab.up("--stores")
    assert all_kept(own_lab) == [{"first", "second"}] * 3
    done = own_lab.call("down")
    assert done.returncode == 0
    assert done.stdout == "ended postgres, redis, s3\n"
    assert own_lab.process.wait(PATIENCE) == 0


def test_a_lab_that_ends_as_it_is_made_is_made_the_next_time(own_lab):
    making = own_lab.folder.root / ".postgres-in-the-making"
    own_lab.start("--stores")
    _wait_for(making / "data" / "base")
    assert own_lab.end() == 0
    assert not making.exists()
    assert not own_lab.folder.postgres.exists()

    own_lab.start("--stores")
    _wait_for(making / "data" / "base")
    own_lab.process.kill()
    own_lab.process.wait(PATIENCE)
    assert not own_lab.folder.postgres.exists()

    own_lab.up("--stores")
    put_all(own_lab, "first")
    assert own_lab.end() == 0
    assert not making.exists()


def _wait_for(path: Path) -> None:
    until = time.monotonic() + PATIENCE
    while not path.exists():
        assert time.monotonic() < until, path
        time.sleep(0.005)


def test_a_port_that_is_taken(own_lab):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", own_lab.ports["redis"]))
        taken.listen()
        own_lab.start("--stores")
        assert own_lab.process.wait(PATIENCE) == 2
        own_lab.hear(rf"port {own_lab.ports['redis']} .*redis.*--port redis=NUMBER")
    assert not own_lab.folder.postgres.exists()


def test_a_full_disk_is_said_before_anything_is_made(own_lab, small_disk):
    place = small_disk(4096)
    place.chmod(0o711)
    command = [sys.executable, "-m", "esper.lab", "up", "--folder", str(place / "lab"), "--stores"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert done.returncode == 1
    assert re.search(r"has \d MiB left and the lab wants 128 MiB at least: make room", done.stderr)
    assert not (place / "lab" / "postgres").exists()


def test_a_disk_that_fills_while_the_lab_is_up(small_disk):
    needs_servers()
    place = small_disk(256 << 10)
    with LabProcess(place) as lab:
        lab.up("--stores")
        put_all(lab, "before")
        filler = place / "filler"
        with filler.open("wb") as file:
            try:
                while file.write(b"\0" * (1 << 20)):
                    file.flush()
            except OSError:
                pass
        os.kill(lab.marks()["redis"].pid, signal.SIGKILL)
        lab.hear("Redis (was ended|cannot be started)")
        filler.unlink()
        lab.hear("Redis is up again")
        assert all_kept(lab) == [{"before"}] * 3
        assert lab.end() == 0


def test_the_process_that_supervises_is_a_small_one():
    program = (
        "import sys\n"
        "from esper.lab import _command\n"
        "print([name for name in ('jax', 'torch', 'numpy', 'obstore') if name in sys.modules])\n"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_targets_of_make_are_these_commands():
    root = Path(__file__).parents[2]
    for target, verb in (("up", "up"), ("down", "down")):
        done = subprocess.run(
            ["make", "-n", "-o", "setup", "-o", ".venv/.installed", target],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        )
        assert f"python -m esper.lab {verb}" in done.stdout
