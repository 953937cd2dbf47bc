"""What a lab is made of: its folder, secrets, ports, programs, and the processes it knows again."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from esper.lab import LabError, LabInputError, down, status
from esper.lab._asked import PORTS, asked_of, refuse_taken
from esper.lab._folder import LabFolder, write_whole
from esper.lab._leftovers import read_processes, write_processes
from esper.lab._logs import last_lines, put_aside
from esper.lab._postgres import version_of_data
from esper.lab._process import ProcessMark, how_it_ended, mark_of, start_leashed
from esper.lab._programs import find_programs
from esper.lab._secrets import LabSecrets, secrets_of
from esper.lab._tokens import write_tokens
from esper.lab._user import server_user
from esper.urza.service import Scope, TokenFile
from tests.esper.servers import needs

ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="what root alone meets")


def test_secrets_are_made_once_and_for_their_owner_alone(tmp_path):
    path = tmp_path / "secrets.json"
    made = secrets_of(path, used=False)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert secrets_of(path, used=True) == made
    assert len(set(made.model_dump().values())) == len(LabSecrets.model_fields)
    assert secrets_of(tmp_path / "another.json", used=False) != made


def test_secrets_are_not_shown(tmp_path):
    path = tmp_path / "secrets.json"
    made = secrets_of(path, used=False)
    assert not any(secret in repr(made) for secret in made.model_dump().values())
    path.write_text(json.dumps({**made.model_dump(), "redis": "short but secret"}))
    with pytest.raises(LabInputError, match=r"is damaged \(redis: .*put it back") as told:
        secrets_of(path, used=True)
    assert "short but secret" not in str(told.value)
    assert told.value.__cause__ is None


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"redis": 5}', "\x00\xff"])
def test_damaged_secrets_are_refused_and_kept(tmp_path, text):
    path = tmp_path / "secrets.json"
    path.touch(mode=0o600)
    path.write_text(text)
    with pytest.raises(LabInputError, match="is damaged.*put it back from a copy"):
        secrets_of(path, used=True)
    assert path.read_text() == text


def test_secrets_that_others_can_read_are_refused(tmp_path):
    path = tmp_path / "secrets.json"
    secrets_of(path, used=False)
    path.chmod(0o640)
    with pytest.raises(LabInputError, match=r"has mode 0640.*chmod 600"):
        secrets_of(path, used=True)


def test_lost_secrets_of_data_that_are_there_are_not_made_anew(tmp_path):
    with pytest.raises(LabInputError, match="is lost, and the data beside it"):
        secrets_of(tmp_path / "secrets.json", used=True)
    assert not (tmp_path / "secrets.json").exists()


def test_ports_are_chosen_once(tmp_path):
    path = tmp_path / "lab.yaml"
    first = asked_of(path, ports={}, workers=None)
    assert first.workers == 2
    assert len(set(first.ports.values())) == len(PORTS)
    assert asked_of(path, ports={}, workers=None) == first
    second = asked_of(path, ports={"redis": 6400}, workers=3)
    assert second.ports == {**first.ports, "redis": 6400}
    assert asked_of(path, ports={}, workers=None) == second


def test_a_taken_port_is_not_chosen(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            LabInputError, match=f"port {port} .*redis.*in use.*--port redis=NUMBER"
        ):
            refuse_taken("redis", port)
    refuse_taken("redis", port)
    first = asked_of(tmp_path / "lab.yaml", ports={}, workers=None)
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", first.ports["urza"]))
        taken.listen()
        again = asked_of(tmp_path / "other.yaml", ports={}, workers=None)
    assert again.ports["urza"] != first.ports["urza"]


@pytest.mark.parametrize(
    ("ports", "workers", "said"),
    [
        ({"redis": 0}, None, "port of redis is 0"),
        ({"redis": 65_536}, None, "port of redis is 65536"),
        ({"redis": 7000, "s3": 7000}, None, "two servers cannot have one port"),
        ({"oona": 7000}, None, "no server 'oona'.*postgres, redis, s3, urza"),
        ({}, 65, "workers"),
    ],
)
def test_ports_and_workers_that_cannot_be(tmp_path, ports, workers, said):
    with pytest.raises(LabInputError, match=said):
        asked_of(tmp_path / "lab.yaml", ports=ports, workers=workers)
    assert not (tmp_path / "lab.yaml").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ports: [", "is no YAML"),
        ("", "is not valid"),
        ("workers: 2", "is not valid.*ports"),
        ("ports: {redis: 1}", "a port each for postgres, redis, s3, urza"),
        ("ports: {postgres: 1, redis: 2, s3: 3, urza: 4}\nworker: 3", "is not valid.*worker"),
        ("ports: {postgres: '1', redis: 2, s3: 3, urza: 4}", "ports.postgres"),
    ],
)
def test_a_file_of_settings_that_is_not_valid(tmp_path, text, said):
    path = tmp_path / "lab.yaml"
    path.write_text(text)
    with pytest.raises(LabInputError, match=f"(?s){said}.*repair it"):
        asked_of(path, ports={}, workers=None)
    assert path.read_text() == text


def test_programs_that_are_missing_are_all_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LabInputError) as told:
        find_programs(postgres_version="99")
    assert _lines(str(told.value)) == [
        (
            "PostgreSQL 99, which made the data that are here (postgres and initdb, in PATH or"
            " /usr/lib/postgresql/*/bin): apt-get install postgresql-99"
        ),
        "Redis (redis-server): apt-get install redis-server",
    ]


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines()[1:]]


def test_a_half_made_database_is_left_alone(tmp_path):
    folder = LabFolder(tmp_path)
    assert version_of_data(folder) is None
    folder.postgres.mkdir()
    (folder.postgres / "base").mkdir()
    with pytest.raises(LabInputError, match="holds no whole data of PostgreSQL.*nothing in it"):
        version_of_data(folder)
    assert [path.name for path in folder.postgres.iterdir()] == ["base"]


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").touch()
    before = tmp_path.stat().st_mode
    with pytest.raises(LabInputError, match=r"no folder of a lab: it holds 'thesis.tex'"):
        LabFolder(tmp_path).make()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    assert tmp_path.stat().st_mode == before


def test_a_file_in_the_folders_place(tmp_path):
    (tmp_path / "lab").touch()
    with pytest.raises(LabInputError, match="cannot be made.*--folder"):
        LabFolder(tmp_path / "lab").make()


def test_a_full_disk_leaves_what_was_there(small_disk):
    place = small_disk(64)
    path = place / "secrets.json"
    write_whole(path, "before")
    with pytest.raises(LabError, match=r"(?s)cannot be written \(No space.*make room.*as it was"):
        write_whole(path, "x" * 100_000)
    assert path.read_text() == "before"
    assert [each.name for each in place.iterdir()] == ["secrets.json"]


@ROOT
def test_root_is_not_who_postgres_runs_as(tmp_path):
    tmp_path.chmod(0o700)
    with pytest.raises(
        LabInputError, match=r"user \w+ cannot reach .*is closed to others.*--folder"
    ):
        server_user(tmp_path / "postgres")
    data = tmp_path / "postgres"
    data.mkdir()
    with pytest.raises(LabInputError, match="belongs to root.*chown -R"):
        server_user(data)


def test_one_supervisor_at_a_time(tmp_path):
    folder = LabFolder(tmp_path)
    assert folder.holder() is None
    with folder.held():
        assert folder.holder() == os.getpid()
        message = f"up in {tmp_path} already.*{os.getpid()}"
        with pytest.raises(LabInputError, match=message), folder.held():
            raise AssertionError
    assert folder.holder() is None


def test_a_process_is_known_again_and_no_other_taken_for_it():
    with subprocess.Popen(["sleep", "60"]) as process:
        mark = mark_of(process.pid)
        assert mark is not None
        assert mark.alive
        assert ProcessMark.of_data(json.loads(json.dumps(mark.to_data()))) == mark
        assert not ProcessMark(mark.pid, mark.started - 1, mark.boot).alive
        assert not ProcessMark(mark.pid, mark.started, "another start of the machine").alive
        process.kill()
        until = time.monotonic() + 30
        while mark.alive:  # its remains, which nobody has waited for, are not it
            assert time.monotonic() < until
            time.sleep(0.01)
    assert mark_of(process.pid) is None


def test_down_ends_what_was_left_behind_and_nothing_else(tmp_path):
    folder = LabFolder(tmp_path)
    folder.make()
    ignoring = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(99)"
    with (
        subprocess.Popen(["sleep", "60"], start_new_session=True) as left,
        subprocess.Popen(["sleep", "60"]) as other,
    ):
        mark, strange = mark_of(left.pid), mark_of(other.pid)
        assert mark is not None
        assert strange is not None
        strange = ProcessMark(strange.pid, strange.started - 1, strange.boot)
        write_processes(folder, {"redis": mark, "urza": strange})
        assert status(tmp_path) == {"redis": left.pid}
        assert read_processes(folder) == {"redis": mark}
        assert down(tmp_path, patience=0.2) == ["redis"]
        assert left.wait(30) == -signal.SIGINT
        assert other.poll() is None
        other.kill()
    assert not folder.processes.exists()
    assert down(tmp_path) == []
    with subprocess.Popen([sys.executable, "-c", ignoring], start_new_session=True) as left:
        mark = mark_of(left.pid)
        assert mark is not None
        time.sleep(0.5)  # until it ignores; where it does not yet, it ends the sooner
        write_processes(folder, {"redis": mark})
        assert down(tmp_path, patience=0.2) == ["redis"]
        assert left.wait(30) in (-signal.SIGKILL, -signal.SIGINT)


@pytest.mark.parametrize("text", ["{", "[]", '{"redis": 5}', '{"redis": {"pid": 1}}', "\x00"])
def test_a_damaged_list_of_processes(tmp_path, text):
    folder = LabFolder(tmp_path)
    folder.processes.write_text(text)
    with pytest.raises(LabError, match="is damaged.*remove the file"):
        down(tmp_path)


def test_a_program_dies_with_who_started_it(tmp_path):
    needs("sleep")
    script = (
        "import signal, sys, time\n"
        "from pathlib import Path\n"
        "from esper.lab._process import start_leashed\n"
        "folder = Path(sys.argv[1])\n"
        "command = ('sleep', '60')\n"
        "process = start_leashed(command, folder=folder, log=folder / 'log',\n"
        "                        orphaned=signal.SIGINT)\n"
        "print(process.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        until = time.monotonic() + 30
        while Path(f"/proc/{pid}/comm").read_text() != "sleep\n":
            assert time.monotonic() < until
            time.sleep(0.01)
        parent.kill()
    until = time.monotonic() + 30
    while mark_of(pid) is not None:
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_program_that_is_not_there_is_named_in_its_log(tmp_path):
    process = start_leashed(("/no/such/program",), folder=tmp_path, log=tmp_path / "log")
    assert process.wait(30) == 1
    assert last_lines(tmp_path / "log") == ["/no/such/program: No such file or directory"]


@pytest.mark.parametrize(
    ("code", "said"),
    [(0, "ended with status 0"), (-9, "was ended by SIGKILL"), (-63, "was ended by signal 63")],
)
def test_how_it_ended(code, said):
    assert how_it_ended(code) == said


def test_a_long_log_is_put_aside(tmp_path):
    log = tmp_path / "redis.log"
    put_aside(log)
    log.write_bytes(b"first\n\nlast\n")
    put_aside(log)
    assert last_lines(log, 2) == ["first", "last"]
    with log.open("r+b") as file:
        file.truncate((16 << 20) + 1)
    put_aside(log)
    assert not log.exists()
    assert (tmp_path / "redis.log.1").exists()
    assert last_lines(log) == []


def test_tokens_of_others_stay_and_the_labs_are_the_services(tmp_path):
    folder = LabFolder(tmp_path)
    secrets = LabSecrets.new()
    TokenFile(folder.tokens).make("somebody", Scope.READ)
    write_tokens(folder, secrets)
    known = TokenFile(folder.tokens)
    found = known.find(secrets.admin_token)
    assert found is not None
    assert (found.name, found.scope) == ("lab-admin", Scope.ADMIN)
    assert {token.name for token in known.tokens()} == {
        *("somebody", "lab", "lab-worker", "lab-admin")
    }
    before = folder.tokens.stat().st_mtime_ns
    write_tokens(folder, secrets)
    assert folder.tokens.stat().st_mtime_ns == before
    assert known.revoke("lab")
    write_tokens(folder, secrets)
    assert known.find(secrets.user_token) is not None
    assert not any(value in folder.tokens.read_text() for value in secrets.model_dump().values())


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"schema_version": 2, "tokens": []}', '{"schema_version": 1, "tokens": [1]}'],
)
def test_a_file_of_tokens_that_is_none_is_left_alone(tmp_path, text):
    folder = LabFolder(tmp_path)
    folder.tokens.write_text(text)
    with pytest.raises(LabInputError, match=r"tokens\.json is no file of tokens .*put it back"):
        write_tokens(folder, LabSecrets.new())
    assert folder.tokens.read_text() == text
