"""What the live page costs: `python -m experiments.bench.watch`.

A run of 200 layers with 8 seeds each is written ten boundaries a second by one process, served by
another, and shown by a headless Chromium. For each measurement that arrives, the page's own clock
tells the time from the server's event to the frame that shows it: when the browser was about to
paint it, and when it had. Every seed that runs has a new health at each boundary, and so an entry
in the ledger: about 15,000 lines a second.

The reader of run folders alone is measured too: a long run from its files, and the first message
of a page.
"""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.bench._command import Benchmark, run
from experiments.bench._paired import Sampling
from experiments.bench._results import Check, Figure, Results

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

ROOT = Path(__file__).parents[2]

STOPWATCH = """
{
window.heard = [];
const Plain = window.EventSource;
window.EventSource = class extends Plain {
  constructor(...given) {
    super(...given);
    this.addEventListener("run", (event) => {
      const came = performance.now();
      // What the page's own reading of it costs is part of it; this one is not.
      const step = event.data.includes('"series"') ? window.heard.length : null;
      if (step === null) return;
      requestAnimationFrame(() => {
        const framed = performance.now();
        const channel = new MessageChannel();
        channel.port1.onmessage = () => {
          const painted = performance.now();
          window.heard.push([performance.timeOrigin + painted, framed - came, painted - came]);
        };
        channel.port2.postMessage(0);
      });
    });
  }
};
}
"""
"""Listens before the page does; what it asks for at the next frame comes before the page's own
drawing, so that the message it posts then is handled when that frame is painted."""


SERVE = """
import sys
from pathlib import Path
from esper.nissa import serve_runs
serve_runs(Path(sys.argv[1]), port=int(sys.argv[2]), tell=lambda text: print(text, flush=True))
"""


@dataclasses.dataclass(frozen=True)
class Settings:
    """The work, and the targets."""

    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    layers: int = 200
    seeds: int = 8
    rate: float = 10.0
    """Boundaries a second."""
    seconds: float = 30.0
    rows: int = 100_000
    """Of a long run."""
    painted_milliseconds: float = 100.0
    """From the server's event to the painted frame, at the 95th percentile: as long as it takes
    until the next event."""

    @property
    def lasting(self) -> float:
        """Seconds of watching: fewer for a rough look."""
        return min(self.seconds, max(5.0, self.sampling.rounds / 10))


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextmanager
def started(*command: str) -> Iterator["subprocess.Popen[str]"]:
    """A process of this Python, ended when the block is over."""
    paths = [ROOT, ROOT / "functional", ROOT / "adapters"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    process = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE
    )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def browser() -> "Iterator[Chrome]":
    """A headless Chromium of the system's."""
    from selenium.webdriver import Chrome, ChromeOptions, ChromeService

    options = ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1440,1000"):
        options.add_argument(argument)
    driver = Chrome(options=options, service=ChromeService("/usr/bin/chromedriver"))
    try:
        yield driver
    finally:
        driver.quit()


def awaited(what: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait until something is so.

    Raises:
        TimeoutError: where it is not in time.
    """
    limit = time.monotonic() + seconds
    while not what():
        if time.monotonic() > limit:
            raise TimeoutError("the page did not come in time")
        time.sleep(0.05)


def measure_page(results: Results, settings: Settings) -> None:
    """A wide run, watched while it is written."""
    name = f"live page, {settings.layers} layers × {settings.seeds} seeds, {settings.rate:g}/s"
    if not results.wants(name):
        return
    with tempfile.TemporaryDirectory() as folder:
        runs, port = Path(folder) / "runs", free_port()
        shape = ["--layers", str(settings.layers), "--seeds", str(settings.seeds)]
        life = ["--steps", "1000000", "--ramp", "300", "--trial", "500"]
        writer = ["-m", "tests.esper.watch_runs", str(runs / "wide"), *shape, *life]
        with started(*writer, "--rate", str(settings.rate)):
            metrics = runs / "wide" / "metrics.jsonl"
            awaited(lambda: metrics.exists() and metrics.stat().st_size > 0)
            with started("-c", SERVE, str(runs), str(port)) as server, browser() as driver:
                assert server.stdout is not None
                server.stdout.readline()
                watch(results, name, settings, driver, port, metrics, server.pid)


def watch(
    results: Results,
    name: str,
    settings: Settings,
    driver: "Chrome",
    port: int,
    metrics: Path,
    server: int,
) -> None:
    """Look at the page for a while, and read what its stopwatch says."""
    driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": STOPWATCH})
    driver.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
    driver.get(f"http://127.0.0.1:{port}/")
    awaited(lambda: driver.execute_script("return window.heard.length") > 10)
    driver.execute_script("window.heard.length = 0")
    before = sum(1 for _ in metrics.open("rb"))
    spent, drawn = processor_seconds(server), main_thread_seconds(driver)
    began = time.monotonic()
    time.sleep(settings.lasting)
    heard: list[list[float]] = driver.execute_script("return window.heard")
    lasted = time.monotonic() - began
    used = (processor_seconds(server) - spent) / lasted
    drawn = main_thread_seconds(driver) - drawn
    written = sum(1 for _ in metrics.open("rb")) - before
    shown = len(heard)
    framed, painted = (np.array([row[i] for row in heard]) for i in (1, 2))
    figures = [
        ("measurements written a second", written / lasted, "1/s", None),
        ("updates shown a second", shown / lasted, "1/s", None),
        ("page's main thread, processor time an update", 1e3 * drawn / shown, "ms", None),
        ("event to frame, median", float(np.median(framed)), "ms", None),
        ("event to painted, median", float(np.median(painted)), "ms", None),
        (
            "event to painted, 95th percentile",
            float(np.percentile(painted, 95)),
            "ms",
            settings.painted_milliseconds,
        ),
        ("event to painted, longest", float(painted.max()), "ms", None),
        ("server's share of a core", 100.0 * used, "%", None),
    ]
    results.figures += [Figure(f"{name}: {what}", *rest) for what, *rest in figures]
    cells = driver.execute_script("return document.querySelectorAll('#grid .cell').length")
    results.checks.append(
        Check(f"{name}: cells", str(settings.layers * settings.seeds), str(cells))
    )
    results.notes.append(
        f"Load of the machine while the page was looked at: {os.getloadavg()[0]:.1f} on"
        f" {os.cpu_count()} cores, with the writer, the server and the browser on them."
    )


def main_thread_seconds(driver: "Chrome") -> float:
    """What the page's main thread has used of the processor so far."""
    found = driver.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
    return {metric["name"]: metric["value"] for metric in found}["TaskDuration"]


def processor_seconds(process: int) -> float:
    """What a process has used of the processor so far."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def best(call: Callable[[], Any], times: int = 3) -> float:
    """The shortest time of a call, in seconds."""
    taken: list[float] = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return min(taken)


def measure_reader(results: Results, settings: Settings) -> None:
    """A long run read from its files, and what a page is told at first."""
    from esper.nissa import write_page
    from esper.nissa._history import POINTS
    from esper.nissa._messages import Cursor, message
    from esper.nissa._run_files import State
    from esper.nissa._watched import WatchedRun
    from tests.esper.watch_runs import long_rows, make_run

    name = f"a run of {settings.rows:,} measurements"
    if not results.wants(name):
        return
    with tempfile.TemporaryDirectory() as folder:
        path = make_run(Path(folder) / "long", layers=2, seeds=2, steps=100)
        long_rows(path, settings.rows)

        def read() -> WatchedRun:
            watched = WatchedRun(path, "long")
            watched.poll_to_end()
            return watched

        watched = read()
        first = json.dumps(message(watched, Cursor(), State.ENDED))
        telling = best(lambda: json.dumps(message(watched, Cursor(), State.ENDED)))
        page = Path(folder) / "page.html"
        write_page(path, page)
        results.checks.append(
            Check(
                f"{name}: points kept",
                "yes",
                "yes" if len(watched.history.points) <= POINTS else "no",
            )
        )
        told: Sequence[tuple[str, float, str]] = (
            ("read from its files", best(read), "s"),
            ("first message", 1e3 * telling, "ms"),
            ("first message", len(first) / 1024, "KiB"),
            ("one page with its data", page.stat().st_size / 1024, "KiB"),
        )
        results.figures += [Figure(f"{name}: {what}", value, unit) for what, value, unit in told]


def measure(settings: Settings, only: str = "") -> Results:
    """The reader and the page."""
    results = Results(only=only)
    measure_reader(results, settings)
    measure_page(results, settings)
    return results


BENCHMARK = Benchmark(
    name="watch",
    doc=__doc__,
    settings=Settings,
    measure=measure,
    packages=("esper-morphogenetic", "numpy", "starlette", "uvicorn", "selenium"),
    pinned=False,
)


if __name__ == "__main__":
    sys.exit(run(BENCHMARK))
