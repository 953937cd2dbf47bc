"""`esper tamiyo train`, `evaluate` and `explain`: the policy that learns."""

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from esper.cli._console import Trace, err, errors, out, say
from esper.errors import InputError, Interrupted

PolicyFile = Annotated[
    Path | None, typer.Option(help="A policy's file; without one, that which comes with Esper.")
]
_QUICK = "a quick policy is for trying the commands out: it has learned next to nothing"


def train(
    where: Annotated[Path, typer.Option("--out", help="The file to write the policy to.")],
    folder: Annotated[
        Path | None, typer.Option(help="Where training is kept, and goes on from.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of everything that is drawn.")] = 0,
    iterations: Annotated[
        int | None, typer.Option(min=1, help="Of learning; the recipe's by default.")
    ] = None,
    method: Annotated[
        str, typer.Option(help="How it tells what it does not know: ensemble or dropout.")
    ] = "ensemble",
    quick: Annotated[bool, typer.Option("--quick", help="A tiny one, to try this out.")] = False,
    traceback: Trace = False,
) -> None:
    """Train a policy in the gym, measure its limits, and hold it against other controllers."""
    with errors(traceback):
        learning, policies = _imported()
        recipe = _recipe(learning, seed=seed, iterations=iterations, method=method, quick=quick)
        if not where.parent.is_dir():
            raise InputError(f"--out names a file in {where.parent}, which is no folder: make it")
        if where.is_dir() or not os.access(where.parent, os.W_OK):
            wrong = "is a folder" if where.is_dir() else f"cannot be written in {where.parent}"
            raise InputError(f"--out names a file, and {where} {wrong}: name another one")
        try:
            loaded = learning.make(recipe, folder, told=_told)
        except KeyboardInterrupt as error:
            where_from = "" if folder is None else f"; go on with --folder {folder}"
            raise Interrupted(f"stopped before the policy was done{where_from}") from error
        policies.save_policy(where, loaded)
        if quick:
            say(err, "yellow", _QUICK)
        _show_card(loaded.card)
        out.print(f"written to {where}", highlight=False, markup=False, soft_wrap=True)


def evaluate(
    policy: PolicyFile = None,
    episodes: Annotated[int, typer.Option(min=2, help="Of each family.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Of the episodes.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="In a tiny gym.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, one row a line.")] = False,
    traceback: Trace = False,
) -> None:
    """Hold a policy against other controllers, in the gym's families and in those held out."""
    with errors(traceback):
        import jax

        learning, policies = _imported()
        loaded = policies.load_policy(policy)
        environment = _recipe(learning, seed=0, quick=quick).environment
        judged = learning.judge(environment, loaded, jax.random.key(seed), episodes)
        rows = [row._asdict() for row in judged]
        if as_json:
            for row in rows:
                out.print(json.dumps(row), highlight=False, markup=False, soft_wrap=True)
        else:
            out.print(_judged(rows))


def explain(
    run: Annotated[
        Path | None, typer.Argument(help="A run's folder; without one, a policy is explained.")
    ] = None,
    policy: PolicyFile = None,
    traceback: Trace = False,
) -> None:
    """What was decided in a run, and what came of it; or what is known of a policy."""
    with errors(traceback):
        if run is None:
            _, policies = _imported()
            _show_card(policies.load_policy(policy).card)
            return
        if policy is not None:
            raise InputError("a run was decided by its own policy: leave out --policy, or the run")
        from esper.tolaria import decisions_of, open_run
        from esper.tolaria._ledger import read_ledger

        folder = open_run(run)
        entries = [entry.data for entry in read_ledger(folder.ledger, folder.genesis)]
        decided = decisions_of(entries)
        notes = [entry for entry in entries if entry["kind"] == "note"]
        if not decided and not notes and folder.config.controller != "learned":
            raise InputError(
                f"in the run {run} nothing was decided of which an effect was expected: expected"
                " one that was begun with --controller learned"
            )
        if decided:
            out.print(_decided(decided))
        if notes:
            out.print(_noted(notes))
        if not decided and not notes:
            out.print("it waited at every boundary: nothing else was likelier to it")


def _imported() -> Any:
    """What learns, and its policies.

    Raises:
        InputError: where the extra that they need is not installed.
    """
    try:
        from esper.tamiyo import learning, policy
    except ModuleNotFoundError as error:
        raise InputError(
            f"a policy needs {error.name}, which is not installed; install"
            " 'esper-morphogenetic[all]'"
        ) from error
    return learning, policy


def _recipe(
    learning: Any,
    *,
    seed: int,
    iterations: int | None = None,
    method: str = "ensemble",
    quick: bool,
) -> Any:
    if method not in ("ensemble", "dropout"):
        raise InputError(f"--method is ensemble or dropout, got {method!r}")
    recipe = learning.quick_recipe() if quick else learning.Recipe()
    if iterations is not None:
        own = dataclasses.replace(recipe.learning, iterations=iterations)
        recipe = dataclasses.replace(recipe, learning=own)
    return dataclasses.replace(recipe, seed=seed, method=method)


def _told(row: Mapping[str, Any]) -> None:
    err.print(
        f"iteration {row['iteration'] + 1}: return {row['return']:.3f}, explained variance"
        f" {row['explained_variance']:.2f}, entropy {row['entropy']:.2f}",
        highlight=False,
    )


def _show_card(card: Mapping[str, Any]) -> None:
    training, effects = card["training"], card["effects"]
    out.print(
        f"trained on {training['steps']:,} steps of the gym: return {training['return']:.3f},"
        f" explained variance {training['explained_variance']:.2f}, {training['health']}\n"
        f"effects learned from {effects['decisions']:,} decisions: calibration error"
        f" {effects['calibration_error']:.3f}, correlation with what was measured"
        f" {effects['correlation']:.2f}",
        highlight=False,
        soft_wrap=True,
    )
    if (online := card.get("online")) is not None:
        out.print(
            f"since then it learned from {online['experiences']:,} decisions of a service, in"
            f" {online['updates']:,} updates; all else here is of the policy before",
            highlight=False,
            soft_wrap=True,
        )
    out.print(_judged(card["judged"]))


def _judged(rows: Iterable[Mapping[str, Any]]) -> Table:
    table = Table(title="Returns by family, and the policy's lead in equal episodes (95 %)")
    for name in ("family", "arm", "return", "lead"):
        table.add_column(name, justify="left" if name in ("family", "arm") else "right")
    for row in rows:
        lead = "" if row["arm"] == "learned" else f"{row['lead']:+.3f} ± {row['lead_half']:.3f}"
        table.add_row(row["family"], row["arm"], f"{row['mean']:+.3f} ± {row['half']:.3f}", lead)
    return table


def _decided(decided: Iterable[Any]) -> Table:
    table = Table(title="What was decided, expected, and measured")
    for name in ("step", "what", "where", "confidence", "effect", "moved by", "worth measured"):
        table.add_column(name)
    for own in decided:
        entry = own.decision
        worth = own.worths[-1]["value"] if own.worths else None
        table.add_row(
            str(entry["step"]),
            entry["action"],
            f"{entry['layer']}, {entry['seed']}",
            _text(entry["confidence"]),
            f"{_text(entry['value'])} ({_text(entry['low'])} to {_text(entry['high'])})",
            ", ".join(name for name, _ in entry["features"]),
            _text(worth),
        )
    return table


def _noted(notes: Iterable[Mapping[str, Any]]) -> Table:
    table = Table(title="What was noted, such as why it waited")
    table.add_column("step")
    table.add_column("note")
    for entry in notes:
        table.add_row(str(entry["step"]), str(entry["reason"]))
    return table


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
