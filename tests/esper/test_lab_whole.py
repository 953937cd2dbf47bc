"""A whole lab: what one process asks for is compiled by another, and everybody can use it."""

import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from esper.urza.service import Scope, TokenFile
from tests.esper.lab_process import PATIENCE, LabProcess, needs_servers

ALL = {"postgres", "redis", "s3", "urza", "worker-1", "worker-2"}


@pytest.fixture(scope="module")
def lab() -> Iterator[LabProcess]:
    needs_servers()
    with LabProcess() as made:
        made.up()
        yield made


def esper(lab: LabProcess, *words: str) -> str:
    """What a command says to somebody who has set what the lab told them to."""
    clean = {
        name: value
        for name, value in os.environ.items()
        if name == "ESPER_CACHE_DIR" or not name.startswith("ESPER_")
    }
    done = subprocess.run(
        [sys.executable, "-m", "esper.cli", *words],
        env={**clean, "ESPER_CONFIG": str(lab.folder.config), "COLUMNS": "200"},
        cwd=lab.place,
        capture_output=True,
        text=True,
        check=False,
        timeout=2 * PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def compiled(lab: LabProcess, count: int) -> list[str]:
    """Ask for kernels, and wait until workers have made them; their ids."""
    asked = ("residual_mlp", "--in", "2", "--out", "8", "--size", "width=4")
    wait = ("--seeds", str(count), "--wait", str(int(PATIENCE)))
    return esper(lab, "blueprints", "submit", *asked, *wait).split()


def test_the_lab_says_what_its_users_set_and_they_have_it(lab):
    assert f"export ESPER_CONFIG={lab.folder.config}" in lab.said
    assert set(lab.marks()) == ALL
    shown = esper(lab, "config", "show")
    for name, value in (
        ("library.where", f"http://127.0.0.1:{lab.ports['urza']}"),
        ("library.token", "***"),
        ("bus.url", f"redis://:***@127.0.0.1:{lab.ports['redis']}/0"),
    ):
        (line,) = [line.split() for line in shown.splitlines() if line.startswith(name)]
        assert line[1] == value
        assert line[2].startswith(f"{lab.folder.config}:")


def test_its_tokens_are_those_of_the_service(lab):
    tokens = {token.name: token.scope for token in TokenFile(lab.folder.tokens).tokens()}
    assert tokens == {"lab": Scope.WRITE, "lab-worker": Scope.WRITE, "lab-admin": Scope.ADMIN}
    assert stat.S_IMODE(lab.folder.tokens.stat().st_mode) == 0o600
    assert stat.S_IMODE(lab.folder.worker_config.stat().st_mode) == 0o600


def test_what_is_asked_for_is_compiled_and_outlives_whoever_dies(lab):
    (first,) = compiled(lab, 1)
    assert len(first) == 64
    blob = lab.folder.s3 / "esper" / "library" / "kernels" / first[:2] / f"{first}.kernel"
    assert blob.is_file()
    for name in ("urza", "worker-1"):
        os.kill(lab.marks()[name].pid, signal.SIGKILL)
    lab.hear("Urza is up again")
    lab.hear("worker 1 is up again")
    again, second = compiled(lab, 2)
    assert again == first, "it is there, and not made twice"
    assert second != first


def test_no_secret_is_on_a_command_line_or_in_a_log(lab):
    secrets = [value for value in _secrets(lab) if value]
    seen = lab.said + "".join(path.read_text() for path in lab.folder.logs.iterdir())
    for mark in lab.marks().values():
        seen += Path(f"/proc/{mark.pid}/cmdline").read_text()
    assert not [secret for secret in secrets if secret in seen]


def _secrets(lab: LabProcess) -> list[str]:
    return list(json.loads(lab.folder.secrets.read_text()).values())


def test_all_end_and_nothing_is_left(lab):
    marks = lab.marks()
    assert set(marks) == ALL
    assert lab.end(signal.SIGINT) == 130
    assert not [name for name, mark in marks.items() if mark.alive]
    assert "was killed" not in lab.said
    assert _processes_of(lab) == []


def _processes_of(lab: LabProcess) -> list[str]:
    """All that have the lab's folder in their command line or environment."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            text = (place / "cmdline").read_text() + (place / "environ").read_text(errors="replace")
        except OSError:
            continue
        if str(lab.folder.root) in text:
            found.append(text.split("\0")[0])
    return found
