"""What all studies have in common: the command line, the folder of results, exit statuses."""

import argparse
import dataclasses
import importlib.metadata
import io
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import matplotlib as mpl
from matplotlib.figure import Figure

from esper._files import write_atomically
from esper.errors import InputError
from esper_functional import KasminaException

S = TypeVar("S")

INTERRUPTED = 130
"""The exit status after Ctrl-C."""
RESULTS = "results.json"
PLOT = "plot.svg"
SCHEMA_VERSION = 1
_PACKAGES = ("esper-morphogenetic", "numpy", "jax", "jaxlib", "optax", "torch", "scikit-learn")
_STYLE: dict[Any, Any] = {"svg.hashsalt": "esper", "svg.fonttype": "none", "font.size": 9.0}


@dataclasses.dataclass(frozen=True)
class Table:
    """What a study found, for people; every cell is text."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclasses.dataclass(frozen=True)
class Found:
    """What a study found."""

    numbers: Mapping[str, Any]
    """All of them by seed, as JSON has them."""
    table: Table
    figure: Figure
    notes: tuple[str, ...] = ()
    """Sentences that belong under the table."""


@dataclasses.dataclass(frozen=True)
class Study(Generic[S]):
    """A question, and the function that measures its answer; `S` is its frozen settings."""

    name: str
    doc: str | None
    full: S
    quick: S
    measure: Callable[[S, Path], Found]
    """Takes the settings and the study's own folder, in which it may make runs."""


def run(study: Study[Any], argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, and write `results.json` and `plot.svg`.

    Args:
        argv: the arguments; those of the process by default.

    Returns:
        The exit status: 0; 1 where a run fails; 2 for input that cannot be used, such as a folder
        that holds something; 130 after Ctrl-C.

    Raises:
        SystemExit: with status 2, for bad usage.
    """
    settings, out, quick = _parse(study, argv)
    try:
        claim(out)
        found = study.measure(settings, out)
        write(out, study.name, settings, found, quick=quick)
    except (KasminaException, OSError) as error:
        _say(study, str(error))
        return 2 if isinstance(error, InputError) else 1
    except KeyboardInterrupt:
        _say(study, "interrupted, no results are written")
        return INTERRUPTED
    print(markdown(found.table))
    for note in found.notes:
        print(f"\n{note}")
    print(f"\n{out / RESULTS}\n{out / PLOT}")
    return 0


def _parse(study: Study[Any], argv: Sequence[str] | None) -> tuple[Any, Path, bool]:
    parser = argparse.ArgumentParser(
        prog=f"experiments.studies.{study.name}",
        description=study.doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="a tiny version, of no evidence")
    parser.add_argument("--seeds", type=_count, help="how many runs of each arm")
    parser.add_argument("--out", type=Path, default=Path("runs/studies") / study.name,
                        help="a folder that is new or empty")  # fmt: skip
    if "task" in {field.name for field in dataclasses.fields(study.full)}:
        parser.add_argument("--task", help=f"by default {study.full.task}")
    given = parser.parse_args(argv)
    settings = study.quick if given.quick else study.full
    changes = {
        name: value
        for name in ("seeds", "task")
        if (value := getattr(given, name, None)) is not None
    }
    return dataclasses.replace(settings, **changes), given.out, given.quick


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def claim(out: Path) -> None:
    """Make a study's folder.

    Raises:
        InputError: where it holds something.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(
            f"the output folder {out} is in use: expected a new or an empty one; give another --out"
        )
    out.mkdir(parents=True, exist_ok=True)


def write(out: Path, name: str, settings: Any, found: Found, *, quick: bool) -> None:
    """Write the plot and then the results: a folder with results is whole."""
    write_atomically(out / PLOT, svg(found.figure))
    content = {
        "schema_version": SCHEMA_VERSION,
        "study": name,
        "quick": quick,
        "machine": machine(),
        "settings": dataclasses.asdict(settings),
        "numbers": found.numbers,
        "table": dataclasses.asdict(found.table),
        "notes": found.notes,
    }
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False, default=str)
    write_atomically(out / RESULTS, text.encode())


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    versions: dict[str, str] = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions,
    }


def svg(figure: Figure) -> bytes:
    """The figure; equal figures are equal bytes."""
    with mpl.rc_context(_STYLE):
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def markdown(table: Table) -> str:
    """The table in Markdown."""
    lines = [table.columns, tuple("---" for _ in table.columns), *table.rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _say(study: Study[Any], message: str) -> None:
    print(f"experiments.studies.{study.name}: {message}", file=sys.stderr)
