"""`esper tamiyo serve` as a user meets it: a real process, real signals."""

import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from esper.cli._app import app
from esper.contracts import OonaMessage, Topic, payload_of
from esper.oona import SqliteBroker
from esper.tamiyo.policy import (
    SUMMARY,
    Familiar,
    LoadedPolicy,
    load_policy,
    make_effects,
    make_policy,
    save_policy,
)
from esper.tamiyo.service import GROUP
from tests.esper.tamiyo_reports import ACTIVE, report, signals
from tests.esper.test_cli import ENVIRONMENT

SHORT = {"env": ENVIRONMENT, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}


@contextmanager
def serving(folder, *arguments) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """The service on a file, with what it said first."""
    command = [sys.executable, "-m", "esper.cli", "tamiyo", "serve", "--bus", "sqlite:bus.sqlite"]
    process = subprocess.Popen([*command, "--port", "0", *arguments], cwd=folder, **SHORT)
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        if not said:
            raise AssertionError(process.communicate()[1])
        yield process, said
    finally:
        process.kill()
        process.communicate()


def get(said: str, path: str) -> str:
    found = re.search(r"http://\S+:\d+", said)
    assert found is not None, said
    with urllib.request.urlopen(f"{found[0]}/{path}", timeout=30) as answer:
        return answer.read().decode()


def test_it_decides_says_how_it_is_and_ends_when_it_is_told_to(tmp_path):
    with SqliteBroker(tmp_path / "bus.sqlite") as broker:
        told = broker.consumer("readers", [Topic.DECISION])
        # What is published before the service begins is not for a new group.
        broker.consumer(GROUP, [Topic.SEED_HEALTH, Topic.MODEL_REPORT]).close()
        payload = report(stage=ACTIVE, alpha=1.0).model_dump(mode="json")
        ill = signals(2, layer_id=1, error_count=5).model_dump(mode="json")
        broker.publish(
            [
                OonaMessage(topic=Topic.MODEL_REPORT, key="run", sender_id="a", payload=payload),
                OonaMessage(topic=Topic.SEED_HEALTH, key="run", sender_id="a", payload=ill),
            ]
        )
        with serving(tmp_path) as (process, said):
            assert re.match(r"Tamiyo decides, at http://127.0.0.1:\d+ \(Ctrl-C ends it\)\n", said)
            (delivery,) = told.receive(wait_seconds=60.0)
            assert delivery.message.key == "run"
            assert payload_of(delivery.message).layer == 1
            health = json.loads(get(said, "health"))
            assert (health["status"], health["models"], health["bus"]) == ("ok", 1, "ok")
            text = get(said, "metrics")
            families = {own.name for own in text_string_to_metric_families(text)}
            assert {"esper_tamiyo_signals", "esper_tamiyo_decisions"} <= families
            process.send_signal(signal.SIGTERM)
            rest, wrong = process.communicate(timeout=60)
        assert (process.returncode, rest) == (0, "esper: Tamiyo has ended\n")
        assert "Traceback" not in wrong
        with serving(tmp_path, "--shadow") as (process, said):
            assert said.startswith("Tamiyo advises in shadow, at ")
            process.send_signal(signal.SIGINT)
            rest, wrong = process.communicate(timeout=60)
        assert process.returncode == 130
        assert wrong.endswith("esper: interrupted\n")
        assert "Traceback" not in wrong


def test_what_it_learned_is_a_policy_when_it_was_ended(tmp_path):
    zeros = np.zeros(len(SUMMARY), np.float32)
    first = LoadedPolicy(
        policy=make_policy(jax.random.key(0), width=8, rounds=1, heads=2),
        effects=make_effects(jax.random.key(1), 8, members=2),
        familiar=Familiar(zeros, zeros + 1.0, np.float32(1.0)),
        max_epistemic=1.0,
        min_confidence=0.5,
        card={},
    )
    save_policy(tmp_path / "first", first)
    with serving(tmp_path, "--learn", "--policy", "first", "--folder", "kept") as (process, said):
        assert said.startswith("Tamiyo decides, at ")
        assert 'esper_tamiyo_updates_total{outcome="made"} 0.0' in get(said, "metrics")
        process.send_signal(signal.SIGTERM)
        rest, wrong = process.communicate(timeout=60)
    assert (process.returncode, rest) == (0, "esper: Tamiyo has ended\n"), wrong
    written = load_policy(tmp_path / "kept" / "policy.safetensors")
    assert written.card == {"online": {"updates": 0, "experiences": 0}}
    assert (tmp_path / "kept" / "learning.safetensors").is_file()


def test_one_that_is_started_takes_the_place_of_the_one_before(tmp_path):
    with (
        SqliteBroker(tmp_path / "bus.sqlite") as broker,
        serving(tmp_path) as (process, _),
    ):
        # Until the service has joined, it would take this one's place.
        while broker.statistics().group(GROUP, Topic.SEED_HEALTH) is None:
            time.sleep(0.02)
        broker.consumer(GROUP, [Topic.SEED_HEALTH, Topic.MODEL_REPORT], name="tamiyo")
        _, wrong = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "another consumer was started as 'tamiyo'" in " ".join(wrong.split())
    assert "Traceback" not in wrong


def told(*arguments: object, status: int) -> str:
    done = CliRunner().invoke(app, ["tamiyo", "serve", *map(str, arguments)])
    assert done.exit_code == status, done.stdout + done.stderr
    return " ".join((done.stdout + done.stderr).split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "none is named: give --bus URL"),
        (["--bus", "memory:"], "a bus in memory is in one process"),
        (["--bus", "http://x"], "names no bus"),
        (["--bus", "sqlite:no-folder/b"], "there is no folder"),
        (["--bus", "sqlite:b", "--learn"], "there is nobody who learns"),
        (["--bus", "sqlite:b", "--learn", "--shadow"], "there is nobody who learns"),
        (["--bus", "sqlite:b", "--learn"], "rules do not; give --policy FILE"),
        (["--bus", "sqlite:b", "--folder", "kept"], "--folder keeps what is learned"),
        (["--bus", "sqlite:b", "--policy", "no.policy"], "there is no policy no.policy"),
        (["--bus", "sqlite:b", "--sample", "2"], "--sample"),
        (["--bus", "sqlite:b", "--port", "99999"], "--port"),
        (["--bus", "sqlite:b", "--host", "no.such.host.example"], "is none of this machine"),
    ],
)
def test_what_cannot_be_is_refused_with_status_2(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in told(*arguments, status=2)


def test_a_port_that_is_taken_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port} of 127.0.0.1 is in use" in told(
            "--bus", "sqlite:b", "--port", port, status=2
        )


def test_the_service_does_without_what_policies_take():
    script = (
        "import sys, esper.tamiyo.service;"
        " print(*sorted({'equinox', 'torch', 'uvicorn', 'starlette'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, **SHORT)
    assert done.stdout.strip() == ""
