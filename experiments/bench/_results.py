"""What benchmarks find, and the tables and files they leave."""

import dataclasses
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclasses.dataclass(frozen=True)
class Timing:
    """One variant's time, alone and against the reference's in the same rounds."""

    microseconds: float
    """Median time of one call."""
    ratio: float
    """Median of the paired ratios."""
    quartiles: tuple[float, float]
    """The ratios' interquartile range."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One piece of work in its variants: the reference, its second twin, the candidate."""

    name: str
    target: float | None
    """The candidate's ratio is to be at most this; None for no target."""
    repeats: int
    """Calls in one timing."""
    reference: Timing
    again: Timing
    candidate: Timing
    variant: str = ""
    """Which candidate, where there are several."""
    rounds: int = 0
    """Timings of each."""
    extra: Mapping[str, float | int | str] = dataclasses.field(default_factory=dict)
    """Further columns, by heading."""

    @property
    def met(self) -> bool | None:
        """Whether the median ratio is within the target, noise or not; None without one."""
        return None if self.target is None else self.candidate.ratio <= self.target


@dataclasses.dataclass(frozen=True)
class Figure:
    """A number by itself."""

    name: str
    value: float
    unit: str
    target: float | None = None
    """The value is to be at most this; None for no target."""

    @property
    def met(self) -> bool | None:
        """Whether the value is within the target; None without one."""
        return None if self.target is None else self.value <= self.target


@dataclasses.dataclass(frozen=True)
class Check:
    """Something that is so or not, without a clock."""

    name: str
    expected: str
    found: str

    @property
    def met(self) -> bool:
        """Whether what was found is what was expected."""
        return self.found == self.expected


@dataclasses.dataclass
class Results:
    """What has been measured so far."""

    rows: list[Row] = dataclasses.field(default_factory=list)
    figures: list[Figure] = dataclasses.field(default_factory=list)
    checks: list[Check] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    only: str = ""
    """Comparisons whose names do not contain this are passed over."""
    offered: list[str] = dataclasses.field(default_factory=list)
    """The names that `wants` was asked for."""

    def wants(self, name: str) -> bool:
        """Whether a comparison of this name is to be made; the name is noted as one there is."""
        self.offered.append(name)
        return self.only in name

    @property
    def nothing_wanted(self) -> bool:
        """Whether no comparison that there is was to be made."""
        return not any(self.only in name for name in self.offered)


def machine(core: int | None, packages: Sequence[str]) -> dict[str, Any]:
    """What was measured on; packages that are not installed have version None."""
    versions: dict[str, str | None] = {}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "pinned_to": core,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def console() -> Console:
    """A console wide enough for the tables where the output is not a terminal."""
    plain = Console()
    return plain if plain.is_terminal else Console(width=190)


def _verdict(met: bool | None) -> str:
    if met is None:
        return ""
    return "[green]met[/]" if met else "[red]not met[/]"


def _bound(target: float | None) -> str:
    return "" if target is None else f"≤ {target:g}"


def print_rows(out: Console, title: str, rows: Sequence[Row], names: tuple[str, str]) -> None:
    """One line a row; `names` are the reference's and the candidate's."""
    reference, candidate = names
    further = list(dict.fromkeys(heading for row in rows for heading in row.extra))
    table = Table(title=title, title_justify="left")
    table.add_column("work", no_wrap=True)
    for heading in (
        f"{reference} µs", f"{candidate} µs", f"{reference} again / {reference}",
        f"{candidate} / {reference}", *further, "target", "",
    ):  # fmt: skip
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            f"{row.name}: {row.variant}" if row.variant else row.name,
            f"{row.reference.microseconds:.1f}",
            f"{row.candidate.microseconds:.1f}",
            _ratio(row.again),
            _ratio(row.candidate),
            *(_cell(row.extra.get(heading, "")) for heading in further),
            _bound(row.target),
            _verdict(row.met),
        )
    out.print(table)


def _cell(value: float | int | str) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def _ratio(timing: Timing) -> str:
    low, high = timing.quartiles
    return f"{timing.ratio:.4f} [dim]({low:.3f}–{high:.3f})[/]"


def print_figures(out: Console, title: str, figures: Sequence[Figure]) -> None:
    """One line a figure."""
    table = Table("what", title=title, title_justify="left")
    for heading in ("value", "unit", "target", ""):
        table.add_column(heading, justify="left" if heading == "unit" else "right")
    for figure in figures:
        table.add_row(
            figure.name,
            f"{figure.value:,.4g}",
            figure.unit,
            _bound(figure.target),
            _verdict(figure.met),
        )
    out.print(table)


def print_checks(out: Console, title: str, checks: Sequence[Check]) -> None:
    """One line a check."""
    table = Table("what", "expected", "found", "", title=title, title_justify="left")
    for check in checks:
        table.add_row(check.name, check.expected, check.found, _verdict(check.met))
    out.print(table)


def write_json(
    path: Path,
    *,
    benchmark: str,
    settings: Any,
    machine: Mapping[str, Any],
    results: Results,
) -> None:
    """Write what was measured; times in µs, `settings` a dataclass."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "benchmark": benchmark,
        "settings": dataclasses.asdict(settings),
        "machine": dict(machine),
        "notes": results.notes,
    }
    for kind in ("rows", "figures", "checks"):
        content[kind] = [
            dataclasses.asdict(found) | {"met": found.met} for found in getattr(results, kind)
        ]
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def finish(
    out: Console,
    results: Results,
    *,
    benchmark: str,
    title: str,
    names: tuple[str, str],
    settings: Any,
    machine: Mapping[str, Any],
    path: Path,
    started: float,
) -> None:
    """Print all tables, write the file, and say how many targets were met."""
    if results.checks:
        print_checks(out, f"{benchmark}: checks", results.checks)
    if results.rows:
        print_rows(out, title, results.rows, names)
    if results.figures:
        print_figures(out, f"{benchmark}: figures", results.figures)
    for note in results.notes:
        out.print(note, markup=False)
    write_json(path, benchmark=benchmark, settings=settings, machine=machine, results=results)
    found = [*results.checks, *results.rows, *results.figures]
    outcomes = [entry.met for entry in found if entry.met is not None]
    where = "not pinned" if machine["pinned_to"] is None else f"core {machine['pinned_to']}"
    out.print(
        f"{sum(outcomes)} of {len(outcomes)} targets met, {time.perf_counter() - started:.0f} s on"
        f" {machine['cpu']}, {where}; {path}",
        markup=False,
    )
