"""Servers kept alive: small programs that do what servers may do."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from esper.lab import LabError
from esper.lab._folder import LabFolder
from esper.lab._leftovers import read_processes
from esper.lab._process import mark_of
from esper.lab._server import NotReady, Server
from esper.lab._supervisor import Supervisor, refuse_full
from esper.lab._watched import FIRST_TRIES, LONGEST_PAUSE, Watched

SERVES = """
import pathlib, signal, sys, time
place = pathlib.Path(sys.argv[1])
def end(number, frame):
    with place.with_suffix(".order").open("a") as file:
        file.write(sys.argv[2] + "\\n")
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
place.touch()
print("serves", flush=True)
time.sleep(600)
"""
DEAF = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
pathlib.Path(sys.argv[1]).touch()
time.sleep(600)
"""
FAILS = "print('cannot find my data', flush=True); raise SystemExit(3)"
WITH_CHILD = """
import os, pathlib, subprocess, sys, time
child = subprocess.Popen(["sleep", "600"])
place = pathlib.Path(sys.argv[1])
place.with_suffix(".child").write_text(str(child.pid))
place.touch()
time.sleep(600)
"""


class Lab:
    """A folder, what was told, and what is to happen when something is told."""

    def __init__(self, root: Path) -> None:
        self.folder = LabFolder(root / "lab")
        self.folder.make()
        self.told: list[str] = []
        self.react: dict[str, Callable[[], None]] = {}

    def tell(self, text: str) -> None:
        self.told.append(text)
        for part, action in list(self.react.items()):
            if part in text:
                del self.react[part]
                action()

    def server(self, name: str, program: str, **more) -> Server:
        place = self.folder.root / "here"
        place = place.with_name(f"here-{name}")

        def check() -> None:
            if not place.exists():
                raise NotReady("is not here yet")

        return Server(
            name=name,
            shown=name.title(),
            command=(sys.executable, "-I", "-c", program, str(place), name),
            folder=self.folder.root,
            **{"check": check, **more},
        )

    def run(self, *servers: Server) -> signal.Signals:
        return Supervisor(self.folder, servers, self.tell, lambda: self.tell("all up")).run()

    def pid(self, name: str) -> int:
        return read_processes(self.folder)[name].pid


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


def end_this(number: signal.Signals = signal.SIGTERM) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_servers_come_up_in_order_and_end_in_the_other(lab, number):
    before = [signal.getsignal(each) for each in (number, signal.SIGCHLD)]
    lab.react["all up"] = end_this(number)
    ended_by = lab.run(
        lab.server("store", SERVES),
        lab.server("service", SERVES, needs=("store",)),
        lab.server("worker", SERVES, needs=("service",)),
    )
    assert ended_by is number
    ups = [line.split()[0] for line in lab.told if " is up" in line]
    assert ups == ["Store", "Service", "Worker"]
    orders = [lab.folder.root / f"here-{name}.order" for name in ("worker", "service", "store")]
    times = [path.stat().st_mtime_ns for path in orders]
    assert times == sorted(times)
    assert lab.told[-1] == "all servers have ended"
    assert not lab.folder.processes.exists()
    assert [signal.getsignal(each) for each in (number, signal.SIGCHLD)] == before


def test_a_server_that_dies_is_started_again_and_that_is_said(lab):
    lab.react["all up"] = lambda: os.kill(lab.pid("store"), signal.SIGKILL)
    lab.react["Store is up again"] = end_this()
    other: list[int] = []
    lab.react["Store was ended"] = lambda: other.append(lab.pid("service"))
    lab.react["is up again"] = lambda: other.append(lab.pid("service"))
    lab.run(lab.server("store", SERVES), lab.server("service", SERVES, needs=("store",)))
    said = next(line for line in lab.told if "was ended by SIGKILL" in line)
    assert said.startswith("Store was ended by SIGKILL; it is started again in 1 s")
    assert said.endswith("serves")
    assert other[0] == other[1], "one that needs it was not left alone"


def test_what_a_server_that_died_had_started_is_ended(lab):
    lab.react["all up"] = lambda: os.kill(lab.pid("worker"), signal.SIGKILL)
    gone: list[bool] = []

    def look() -> None:
        pid = int((lab.folder.root / "here-worker.child").read_text())
        until = time.monotonic() + 30
        while mark_of(pid) is not None and time.monotonic() < until:
            time.sleep(0.01)
        gone.append(mark_of(pid) is None)
        end_this()()

    lab.react["was ended by SIGKILL"] = look
    lab.run(lab.server("worker", WITH_CHILD))
    assert gone == [True]


def test_pauses_double_up_to_a_bound(lab):
    watched = Watched(lab.server("store", SERVES), ever=True)
    pauses = [watched.pause() for _ in range(8)]
    assert pauses == [1, 2, 4, 8, 16, 30, 30, 30]
    assert pauses[-1] == LONGEST_PAUSE
    assert not watched.given_up


def test_a_server_that_never_comes_up_ends_the_lab_with_its_last_words(lab):
    with pytest.raises(LabError) as told:
        lab.run(lab.server("store", SERVES), lab.server("service", FAILS, needs=("store",)))
    text = str(told.value)
    assert f"Service ended with status 3 before it was ready, {FIRST_TRIES} times" in text
    assert str(lab.folder.log("service")) in text
    assert text.endswith("cannot find my data")
    assert (lab.folder.root / "here-store.order").exists(), "the other one was ended in order"


def test_a_server_that_does_not_answer_in_time_is_killed(lab):
    def never() -> None:
        raise NotReady("answers 503")

    with pytest.raises(LabError, match=r"was not ready within 1 s \(answers 503\), 3 times"):
        lab.run(lab.server("service", SERVES, check=never, start_seconds=1))


def test_a_server_that_listens_nowhere_says_when_it_serves(lab):
    log = lab.folder.log("worker")
    log.write_text("serves, as it said before\n")
    with pytest.raises(LabError, match=r"\(it has not said 'serves, as it said before'\), 3 times"):
        lab.run(lab.server("worker", SERVES, says="serves, as it said before", start_seconds=0.3))
    lab.react["all up"] = end_this()
    lab.run(lab.server("worker", SERVES, says="serves"))


def test_a_check_that_breaks_is_a_server_that_is_not_ready(lab):
    def breaks() -> None:
        raise ConnectionResetError(104, "reset while it asked")

    with pytest.raises(LabError, match="ConnectionResetError: .*reset while it asked"):
        lab.run(lab.server("service", SERVES, check=breaks, start_seconds=0.5))


def test_a_server_that_does_not_end_is_killed(lab):
    lab.react["all up"] = end_this()
    lab.run(lab.server("store", DEAF, end_seconds=0.3))
    assert "Store did not end by itself and was killed" in lab.told


def test_who_asks_twice_does_not_wait(lab):
    def twice() -> None:
        end_this(signal.SIGINT)()
        end_this(signal.SIGINT)()

    # Not so for a signal that `make` and its group pass on to each other.
    lab.react["all up"] = lambda: [end_this()(), end_this()()]
    lab.run(lab.server("store", SERVES))
    assert (lab.folder.root / "here-store.order").exists()
    lab.react["all up"] = twice
    assert lab.run(lab.server("deaf", DEAF, end_seconds=600)) is signal.SIGINT
    assert "Deaf did not end by itself and was killed" in lab.told


def test_what_comes_first_fails_with_what_its_program_said(lab):
    tries: list[int] = []

    def begin(run) -> None:
        tries.append(1)
        command = (sys.executable, "-I", "-c", "raise SystemExit('no room at all')")
        run(command, None, lab.folder.log("store"))

    with pytest.raises(LabError, match=r"(?s)cannot be started: .*status 1.*no room at all"):
        lab.run(lab.server("store", SERVES, begin=begin))
    assert len(tries) == FIRST_TRIES


def test_what_comes_first_ends_when_the_lab_is_told_to(lab):
    def begin(run) -> None:
        lab.tell("begun")
        run(("sleep", "600"), None, lab.folder.log("store"))
        raise AssertionError

    lab.react["begun"] = end_this()
    lab.run(lab.server("store", SERVES, begin=begin))
    assert lab.told == ["begun", "all servers have ended"]


def test_what_comes_after_is_done_before_others_start(lab):
    done: list[str] = []

    def furnish() -> None:
        assert not (lab.folder.root / "here-service").exists()
        done.append("furnished")

    lab.react["all up"] = end_this()
    lab.run(
        lab.server("store", SERVES, furnish=furnish),
        lab.server("service", SERVES, needs=("store",)),
    )
    assert done == ["furnished"]


def test_a_disk_with_too_little_room(lab):
    refuse_full(lab.folder, 1)
    with pytest.raises(LabError, match=r"MiB left and the lab wants 1099511627776 MiB.*make room"):
        refuse_full(lab.folder, 1 << 60)
