"""The library's service under load: `python -m experiments.bench.urza`.

The service and its clients run on one machine. Clients are closed loops: each asks again as soon as
it has its answer, so what is measured is how long one waits where so many ask. What is asked for:
the record of a kernel, a page of 20 of a search, and a kernel of 1 MB.
"""

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from experiments.bench._results import console, machine

ROOT = Path(__file__).parents[2]
PACKAGES = ("fastapi", "uvicorn", "uvloop", "httptools", "pydantic", "sqlalchemy", "obstore")
P95_MILLISECONDS = 100.0
"""At 64 clients."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """The work."""

    clients: tuple[int, ...] = (1, 8, 64, 256, 1000)
    work: tuple[str, ...] = ("record", "search", "blob")
    seconds: float = 5.0
    """Of each measurement."""
    warm: float = 1.0
    """Seconds before it that do not count."""
    kernels: int = 200
    large: int = 8
    """Kernels of 1 MB."""
    workers: int = 1
    database: str | None = None
    """PostgreSQL's address; SQLite where there is none."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """One kind of work at one number of clients."""

    work: str
    clients: int
    requests: int
    per_second: float
    p50: float
    p95: float
    p99: float
    """Milliseconds."""
    worst: float
    failed: int
    reasons: tuple[str, ...]
    megabytes_per_second: float
    clients_processor: float
    """Share of one core that the clients took."""
    microseconds: float
    """Processor time of the service for each request."""


def fill(library: Path, settings: Settings, database: str | None) -> tuple[list[str], list[str]]:
    """Make kernels: the ids of all, and those of 1 MB."""
    from esper.artifacts import rewrite_artifact
    from esper.contracts import KernelSignature
    from esper.tezzeret import compile_blueprint, load_blueprint
    from esper.urza import Library

    store = Library(library) if database is None else Library.connect(database, library)
    small, large = (
        compile_blueprint(
            load_blueprint("residual_mlp"),
            KernelSignature(input_shape=(size,), output_shape=(size,)),
            sizes={"width": width},
        )
        for size, width in ((2, 8), (256, 250))
    )
    ids: list[list[str]] = []
    for first, count in ((small, settings.kernels), (large, settings.large)):
        draws = np.random.default_rng(0)
        made = []
        for _ in range(count):
            params = {
                name: draws.standard_normal(value.shape).astype(value.dtype)
                for name, value in first.params.items()
            }
            made.append(store.put(rewrite_artifact(first, params=params, birth="free")))
        ids.append(made)
    store.close()
    return ids[0], ids[1]


class Serving(NamedTuple):
    """A service, and who may ask it."""

    port: int
    token: str
    process: int


@contextmanager
def service(folder: Path, settings: Settings, database: str | None) -> Iterator[Serving]:
    """A service in processes of its own."""
    from esper.urza.service import Scope, TokenFile

    secret, _ = TokenFile(folder / "tokens.json").make("bench", Scope.READ)
    where = ["--library", str(folder / "library")]
    if database is not None:
        where += ["--database", database, "--blobs", str(folder / "library")]
    command = [
        sys.executable, "-m", "esper.cli", "serve", *where, "--port", "0",
        "--token-file", str(folder / "tokens.json"), "--workers", str(settings.workers),
    ]  # fmt: skip
    paths = [ROOT, ROOT / "functional", ROOT / "adapters"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "COLUMNS": "200"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        found = re.search(r"http://\S+?:(\d+)", said)
        if found is None:
            raise RuntimeError(f"the service did not start: {said}")
        yield Serving(int(found[1]), secret, process.pid)
    finally:
        process.terminate()
        process.wait(60)


def _processor_seconds(process: int) -> float:
    """What a process and its children have taken so far; 0 where the system does not tell."""
    parents: dict[int, tuple[int, float]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(") ")[2].split()
        except OSError:
            continue
        ticks = int(fields[11]) + int(fields[12])
        parents[int(status.parent.name)] = (int(fields[1]), ticks / os.sysconf("SC_CLK_TCK"))
    family = {process}
    while more := {each for each, (parent, _) in parents.items() if parent in family} - family:
        family |= more
    return sum(parents[each][1] for each in family if each in parents)


def measure(
    serving: Serving, work: str, paths: Sequence[str], clients: int, settings: Settings
) -> Measured:
    """One kind of work at one number of clients."""
    asked = {
        "port": serving.port, "paths": list(paths), "token": serving.token, "clients": clients,
        "seconds": settings.seconds, "warm": settings.warm,
    }  # fmt: skip
    began, before = time.perf_counter(), _processor_seconds(serving.process)
    done = subprocess.run(
        [sys.executable, "-m", "experiments.bench._closed_loop"],
        input=json.dumps(asked), cwd=ROOT, text=True, capture_output=True, check=True,
    )  # fmt: skip
    lasted = time.perf_counter() - began
    spent = _processor_seconds(serving.process) - before
    heard = json.loads(done.stdout)
    times = np.array(heard["milliseconds"] or [float("nan")])
    p50, p95, p99 = (float(np.percentile(times, share)) for share in (50, 95, 99))
    return Measured(
        work=work, clients=clients, requests=len(heard["milliseconds"]),
        per_second=len(heard["milliseconds"]) / settings.seconds,
        p50=p50, p95=p95, p99=p99, worst=float(times.max()),
        failed=len(heard["failed"]), reasons=tuple(sorted(set(heard["failed"]))[:5]),
        megabytes_per_second=heard["received"] / (settings.seconds + settings.warm) / 1e6,
        clients_processor=heard["processor_seconds"] / lasted,
        microseconds=1e6 * spent / max(1, heard["answers"]),
    )  # fmt: skip


def run(settings: Settings) -> list[Measured]:
    """All of it."""
    found: list[Measured] = []
    with tempfile.TemporaryDirectory(prefix="esper-bench-") as name:
        folder = Path(name)
        small, large = fill(folder / "library", settings, settings.database)
        paths = {
            "record": [f"/api/v1/kernels/{each}" for each in small],
            "search": ["/api/v1/kernels?limit=20", "/api/v1/kernels?limit=20&order=created"],
            "blob": [f"/api/v1/kernels/{each}/artifact" for each in large],
        }
        with service(folder, settings, settings.database) as serving:
            for work in settings.work:
                found += [
                    measure(serving, work, paths[work], clients, settings)
                    for clients in settings.clients
                ]
    return found


def show(found: Sequence[Measured], settings: Settings) -> None:
    """The table."""
    where = "SQLite" if settings.database is None else "PostgreSQL"
    table = Table(
        title=f"Urza over HTTP, {where}, {settings.workers} worker(s)", title_justify="left"
    )
    for heading in (
        "work", "clients", "requests/s", "MB/s", "p50 ms", "p95 ms", "p99 ms", "worst ms", "failed",
        "clients' core", "service's µs", "target", "",
    ):  # fmt: skip
        table.add_column(heading, justify="left" if heading == "work" else "right", no_wrap=True)
    for row in found:
        target, met = "", None
        if row.clients == 64:
            target, met = (
                f"p95 < {P95_MILLISECONDS:g}",
                row.p95 < P95_MILLISECONDS and not row.failed,
            )
        if row.clients == 1000:
            target, met = "none failed", row.failed == 0
        table.add_row(
            row.work, str(row.clients), f"{row.per_second:,.0f}",
            f"{row.megabytes_per_second:,.0f}",
            f"{row.p50:,.1f}", f"{row.p95:,.1f}", f"{row.p99:,.1f}", f"{row.worst:,.0f}",
            str(row.failed), f"{row.clients_processor:.0%}",
            f"{row.microseconds:,.0f}", target,
            "" if met is None else "[green]met[/]" if met else "[red]not met[/]",
        )  # fmt: skip
    console().print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, prog="experiments.bench.urza")
    parser.add_argument("--clients", type=int, nargs="+", default=list(Settings.clients))
    parser.add_argument("--work", nargs="+", choices=Settings.work, default=list(Settings.work))
    parser.add_argument("--seconds", type=float, default=Settings.seconds)
    parser.add_argument("--warm", type=float, default=Settings.warm)
    parser.add_argument("--workers", type=int, default=Settings.workers)
    parser.add_argument("--database", help="postgresql://...; by default SQLite")
    parser.add_argument("--json", type=Path, default=Path("runs/bench/urza.json"))
    given = parser.parse_args(arguments)
    settings = Settings(
        clients=tuple(given.clients), work=tuple(given.work), seconds=given.seconds,
        warm=given.warm, workers=given.workers, database=given.database,
    )  # fmt: skip
    found = run(settings)
    show(found, settings)
    content: dict[str, Any] = {
        "machine": machine(None, PACKAGES),
        # Its password is nobody's business.
        "settings": dataclasses.asdict(settings) | {"database": settings.database is not None},
        "measured": [dataclasses.asdict(row) for row in found],
    }
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
