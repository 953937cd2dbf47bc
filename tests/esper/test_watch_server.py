"""The live page's server as a client meets it: a real process on a free port."""

import asyncio
import base64
import hashlib
import json
import os
import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from esper.cli._watch import watch
from esper.nissa._catalogue import Catalogue
from esper.nissa._feed import Feeds
from esper.nissa._page import live_page
from esper.nissa._server import _events
from tests.esper.watch_runs import Plan, RunMaker, make_run
from tests.esper.watch_server import Server, serving

HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1>"


ODD = os.fsdecode(b"bytes \xff")
"""A folder may be called by what is no text."""


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder / "study" / "seed-0", steps=300, busy=0.3)
    make_run(folder / "newer", steps=20)
    make_run(folder / ODD, steps=20)
    (folder / "newer" / "run.json").write_text('{"schema_version": 3}')
    (folder / "secret.txt").write_text("secret")
    return folder


@pytest.fixture(scope="module")
def server(root) -> Iterator[Server]:
    with serving(root) as found:
        yield found


def test_says_where_it_is(server, root):
    assert server.said == f"watching 3 runs in {root} at {server.url} (Ctrl-C ends it)\n"
    assert server.url.startswith("http://127.0.0.1:")
    status, _, body = server.get("healthz")
    assert (status, json.loads(body)) == (200, {"status": "ok", "runs": 3})


def test_the_page_may_run_its_own_script_and_nothing_else(server):
    status, headers, page = server.get("")
    assert status == 200
    policy = headers["content-security-policy"]
    assert policy == live_page()[1]
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy
    assert "unsafe" not in policy
    for tag in ("script", "style"):
        (own,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, flags=re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY"
    # Nothing of the page comes from elsewhere.
    assert set(re.findall(r"\w+://[^'\" )]+", page)) == {"http://www.w3.org/2000/svg"}
    assert not re.findall(r" style=| on\w+=\"|innerHTML|eval\(", page)


def test_a_list_of_runs_and_what_is_wrong_with_them(server):
    listed = {run["name"]: run for run in json.loads(server.get("api/runs")[2])}
    assert set(listed) == {"newer", "study/seed-0", ODD}
    assert listed["study/seed-0"]["state"] == "ended"
    assert listed["newer"]["state"] == "unreadable"
    assert "has schema version 3" in listed["newer"]["trouble"]
    with server.stream("newer") as stream:
        assert "has schema version 3" in stream.next("trouble")["what"]
        assert stream.rest() == "\n"


@pytest.mark.parametrize(
    "path",
    [
        "../secret.txt", "secret.txt", "..%2fsecret.txt", "api/stream?run=../..",
        "api/stream?run=/etc", "api/stream?run=study", "api/stream",
        "api/seed?run=..&layer=0&seed=0", "docs", "openapi.json", "study/seed-0/run.json",
    ],
)  # fmt: skip
def test_nothing_else_is_served(server, path):
    status, _, body = server.get(path)
    assert status == 404
    assert "secret" not in body.replace("secret.txt", "")


def test_a_run_that_is_unknown_is_named(server):
    assert server.get("api/stream?run=none")[2] == "no run 'none' here: see /api/runs\n"
    assert server.get("api/seed?run=none&layer=a&seed=0")[:1] == (400,)
    assert server.get("api/seed?run=none")[2] == "layer and seed must be whole numbers from 0\n"


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost", 200), ("127.0.0.1:1", 200), ("evil.example", 400), ("evil.example:80", 400)],
)
def test_names_that_lead_here_from_elsewhere_are_refused(server, host, status):
    assert server.get("healthz", Host=host)[0] == status


def test_prometheus_reads_the_runs(server):
    status, headers, text = server.get("metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain")
    families = {family.name: family for family in text_string_to_metric_families(text)}
    step = {s.labels["run"]: s.value for s in families["esper_step"].samples}
    assert step["study/seed-0"] == 300.0
    states = {(s.labels["run"], s.labels["state"]) for s in families["esper_run_state"].samples}
    assert states == {
        ("study/seed-0", "ended"), ("newer", "unreadable"), ("bytes \\udcff", "ended"),
    }  # fmt: skip
    places = {(s.labels["layer"], s.labels["seed"])
              for s in families["esper_seed_alpha"].samples}  # fmt: skip
    assert ("3", "1") in places


def test_a_page_is_told_all_and_then_what_is_new(server, root):
    maker = RunMaker(root / "live", Plan(steps=10_000, busy=0.3, reason=HOSTILE))
    for _ in range(5):
        maker.boundary()
    # The list is looked at every two seconds by those who listen.
    with server.stream("study/seed-0") as stream:
        while "live" not in [run["name"] for run in stream.next("runs")]:
            pass
    with server.stream("live") as stream:
        told = stream.next()
        assert told["state"] == "training"
        assert told["series"]["step"] == [0, 20, 40, 60, 80]
        assert HOSTILE in [entry["reason"] for entry in told["entries"]["list"]]
        maker.boundary()
        told = stream.next()
        while "series" not in told:
            told = stream.next()
        assert "head" not in told
        assert told["series"]["from"] == 4
        assert told["series"]["step"] == [80, 100]
        history = json.loads(server.get("api/seed?run=live&layer=1&seed=1")[2])
        assert history["step"] == [0, 20, 40, 60, 80, 100]
        maker.go_back(3)
        maker.boundary()
        while told.get("series", {}).get("from") != 0:
            told = stream.next()
        assert told["series"]["step"] == [0, 20, 40, 60]
        # A file that was replaced is read anew, and the page begins again.
        partial = root / "live" / "metrics.partial"
        lines = (root / "live" / "metrics.jsonl").read_bytes().split(b"\n")
        partial.write_bytes(b"\n".join(lines[:2]) + b"\n")
        partial.replace(root / "live" / "metrics.jsonl")
        while "head" not in told:
            told = stream.next()
        assert told["series"]["step"] == [0, 20]
    maker.close()


def test_a_run_that_is_gone_by_then_is_told(root):
    async def told() -> list[str]:
        return [text async for text in _events(Feeds(Catalogue(root)), "a", lambda: False)]

    listed, trouble = asyncio.run(told())
    assert listed == "event: runs\ndata: []\n\n"
    assert trouble == 'event: trouble\ndata: {"what":"the run a is gone"}\n\n'


def test_ctrl_c_ends_it_with_one_word_though_a_page_listens(tmp_path):
    make_run(tmp_path / "run", steps=100)
    with serving(tmp_path / "run") as server:
        assert server.said.startswith("watching 1 run in ")
        with server.stream(".") as stream:
            assert stream.next()["head"]["name"] == "."
            server.process.send_signal(signal.SIGINT)
            stream.rest()
        out, err = server.process.communicate(timeout=30)
        assert (server.process.returncode, out, err) == (130, "", "esper: interrupted\n")


# What is refused


def command(*arguments: object, status: int) -> str:
    app = typer.Typer()
    app.command()(watch)
    done = CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "200"})
    assert done.exit_code == status, done.output
    return done.output


def test_a_port_in_use_is_named(root):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = command(root, "--port", port, status=2)
        expected = f"port {port} of 127.0.0.1 is in use: give another by --port, or --port 0"
        assert expected in said


@pytest.mark.parametrize(
    ("host", "said"),
    [
        ("192.0.2.1", "cannot listen at 192.0.2.1, port 0: "),
        ("no such host", "the address 'no such host' is none of this machine"),
    ],
)
def test_an_address_of_another_machine(root, host, said):
    assert said in command(root, "--host", host, "--port", 0, status=2)


def test_folders_that_hold_no_run(tmp_path, root):
    assert "there is no folder" in command(tmp_path / "none", status=2)
    assert "no run in" in command(tmp_path, status=2)
    for more in ((), ("--once", tmp_path / "page.html")):
        assert "has schema version 3" in command(root / "newer", *more, status=2)
    assert not (tmp_path / "page.html").exists()


def test_one_page_is_written_and_named(tmp_path, root):
    file = tmp_path / "page.html"
    assert command(root / "study", "--once", file, status=0) == f"{file}: 1 run\n"
    assert b"Content-Security-Policy" in file.read_bytes()


def test_a_page_that_cannot_be_written(tmp_path, root):
    said = command(root, "--once", tmp_path / "none" / "page.html", status=2)
    assert "there is no folder" in said
    assert "give another --once" in said
    assert "it is a folder" in command(root, "--once", tmp_path, status=2)


def test_the_extra_is_named_where_it_is_missing(tmp_path, root, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "uvicorn", None)
    said = command(root, "--port", 0, status=2)
    assert "the live page needs starlette and uvicorn" in said
    assert "pip install 'esper-morphogenetic[watch]'" in said
