"""`esper replay`."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from esper.cli._console import Trace, errors, out, show_table
from esper.cli._missing import fetching_told
from esper.errors import InputError, Interrupted

if TYPE_CHECKING:
    from esper.tolaria import Replay, WhatIf


def replay(
    run: Annotated[Path, typer.Argument(help="Folder of a run.", show_default=False)],
    to: Annotated[
        int | None, typer.Option(metavar="STEP", help="Show the seeds as they were before a step.")
    ] = None,
    retrain: Annotated[
        str | None,
        typer.Option(metavar="FROM..TO", help="Train a stretch again, and compare it bit by bit."),
    ] = None,
    what_if: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Branch off with other decisions, and compare."),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option("--out", help="Folder of the branch; by default RUN-what-if."),
    ] = None,
    traceback: Trace = False,
) -> None:
    """Verify a run's ledger and fold it to the states that were recorded."""
    with errors(traceback):
        if folder is not None and what_if is None:
            raise InputError("--out is the folder of a branch; give --what-if FILE with it")
        stretch = None if retrain is None else _stretch(retrain)
        from esper.tolaria import read_what_if, replay_run

        # Refused before anything is looked at.
        wanted = None if what_if is None else read_what_if(what_if)
        found = replay_run(run, to=to)
        table = Table("step", "recorded by", "digest", box=None)
        for step, name in found.verified:
            table.add_row(str(step), name, "equal")
        show_table(table)
        _say(
            f"{found.lines} lines whole, {found.events} events folded to step {found.step};"
            f" digest {found.digest}"
        )
        if found.rollbacks:
            _say(f"the run was taken back {found.rollbacks} times")
        if to is not None:
            _show_seeds(found)
        if stretch is not None:
            with fetching_told(found.folder.library):
                _retrain(run, *stretch)
        if wanted is not None:
            with fetching_told(found.folder.library):
                _branch(run, wanted, folder)


def _say(text: str) -> None:
    out.print(text, highlight=False, markup=False, soft_wrap=True)


def _stretch(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,8})\.\.(\d{1,8})", text)
    if found is None:
        raise InputError(f"--retrain takes FROM..TO, such as 500..1000; got {text!r}")
    return int(found.group(1)), int(found.group(2))


def _show_seeds(found: "Replay") -> None:
    import numpy as np

    from esper_functional import SeedLifecycleState

    state, host = found.state, found.folder.host
    table = Table("layer", "seed", "stage", "alpha", "health", box=None)
    for layer, seed in np.argwhere(np.asarray(state.stage) != SeedLifecycleState.DORMANT):
        health = float(state.health[layer, seed])
        table.add_row(
            host.sites[layer] if host is not None else str(layer),
            str(seed),
            SeedLifecycleState(int(state.stage[layer, seed])).name,
            f"{float(state.alpha[layer, seed]):.4f}",
            "–" if np.isnan(health) else f"{health:.3f}",
        )
    if table.row_count:
        show_table(table)
    else:
        _say("all seeds are DORMANT")


def _retrain(run: Path, first: int, last: int) -> None:
    from esper.tolaria import retrain_run

    found = retrain_run(run, first, last)
    arrays = ", ".join(map(str, found.checkpoints)) or "none on the way"
    _say(
        f"trained again from step {found.began} to {found.last}: {found.lines} lines of the ledger"
        f" and {found.boundaries} measurements equal; checkpoints equal to the last bit: {arrays}"
    )


def _branch(run: Path, wanted: "WhatIf", folder: Path | None) -> None:
    from esper.cli._grow import Stop
    from esper.nissa import read_run, write_report
    from esper.tolaria import Hooks, branch_run

    place = folder if folder is not None else run.with_name(run.name + "-what-if")
    try:
        branch_run(run, place, wanted, hooks=Hooks(stop=Stop()))
    except Interrupted as error:
        raise Interrupted(
            f"stopped; the branch goes on with esper grow --resume {place}"
        ) from error
    arms = {"recorded": read_run(run), "what if": read_run(place)}
    last = {name: record.metrics[-1] for name, record in arms.items()}
    table = Table("at the end", *arms, box=None)
    for key, form in (
        ("step", "{:,}"),
        ("validation_loss", "{:.4g}"),
        ("test_loss", "{:.4g}"),
        ("test_accuracy", "{:.1%}"),
        ("parameters", "{:,}"),
        ("flops", "{:.3g}"),
    ):
        table.add_row(key.replace("_", " "), *(_shown(row.get(key), form) for row in last.values()))
    show_table(table)
    report = place / "report.html"
    sections = {"what if": {name: [record] for name, record in arms.items()}}
    write_report(report, sections, title=f"Esper: {run.name}, and what if")
    _say(f"report: {report}")


def _shown(value: Any, form: str) -> str:
    return "–" if value is None else form.format(value)
