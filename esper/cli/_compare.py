"""`esper compare`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from esper.cli._console import Trace, err, errors, out
from esper.cli._missing import fetching_told
from esper.errors import InputError

if TYPE_CHECKING:
    from esper.tolaria.comparison import Comparison

_RESUME = "; what was run is whole, and the comparison goes on with --resume"


def compare(
    task: Annotated[str | None, typer.Option(help="spirals, digits, xor-N, …")] = None,
    backend: Annotated[str | None, typer.Option(help="jax or torch.")] = None,
    treatment: Annotated[
        str | None, typer.Option(help="The arm that is judged; heuristic by default.")
    ] = None,
    control: Annotated[
        list[str] | None,
        typer.Option(help="An arm that it is judged beside; several; by default all of Esper's."),
    ] = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FILE", help="An arm of your own, and its YAML keys; several."),
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, max=10_000, help="16 by default.")] = None,
    budget: Annotated[
        list[str] | None, typer.Option(help="steps or flops; both by default.")
    ] = None,
    metric: Annotated[str | None, typer.Option(help="test_accuracy, test_loss or reward.")] = None,
    smallest_effect: Annotated[
        float | None, typer.Option(help="The least difference that would matter; 0.02 by default.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file with keys that all arms share.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, max=256, help="Processes.")] = 1,
    folder: Annotated[
        Path | None,
        typer.Option("--out", help="Folder; by default runs/compare-TASK-BACKEND."),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Go on with a comparison.")
    ] = None,
    traceback: Trace = False,
) -> None:
    """Compare growth with its control arms, and judge it."""
    with errors(traceback, _RESUME):
        options: dict[str, tuple[str, Any]] = {
            "--task": ("task", task),
            "--backend": ("backend", backend),
            "--treatment": ("treatment", treatment),
            "--control": ("controls", control),
            "--arm": ("own_arms", arm),
            "--seeds": ("seeds", seeds),
            "--budget": ("budgets", budget),
            "--metric": ("metric", metric),
            "--smallest-effect": ("smallest_effect", smallest_effect),
            "--config": ("values", config),
        }
        # Of an option that may be given several times, none is an empty list.
        found = {
            option: own for option, own in options.items() if own[1] is not None and own[1] != []
        }
        if resume is not None and (found or folder is not None):
            extra = [*found, *(["--out"] if folder is not None else [])]
            raise InputError(
                "--resume goes on with what the comparison began with; leave out"
                f" {', '.join(extra)}"
            )
        given = dict(found.values())
        asked = None if resume is not None else _asked(given)
        place = resume if resume is not None else folder
        if place is None:
            assert asked is not None
            name, _, rest = asked.task.partition(":")
            name = f"gym-{rest.partition('?')[0]}" if name == "gym" else name
            place = Path("runs") / f"compare-{name}-{asked.backend}"
        _run(place, asked, workers)


def _asked(given: dict[str, Any]) -> "Comparison":
    from esper.tolaria import read_config_file
    from esper.tolaria.comparison import ARMS, make_comparison

    if "task" not in given:
        raise InputError("say what to train on: --task spirals, for example")
    values = dict(given)
    if "values" in values:
        values["values"] = read_config_file(values["values"])
    if "own_arms" in values:
        own: dict[str, Any] = {}
        for text in values["own_arms"]:
            name, found, file = text.partition("=")
            if not found or not name or not file:
                raise InputError(f"--arm takes NAME=FILE, such as mine=mine.yaml; got {text!r}")
            if name in own:
                raise InputError(f"--arm names {name!r} twice: give each arm a name of its own")
            own[name] = read_config_file(Path(file))
        values["own_arms"] = own
    for key in ("controls", "budgets"):
        if key in values:
            values[key] = tuple(values[key])
    if "seeds" in values:
        values["seeds"] = tuple(range(values["seeds"]))
    if "controls" not in values:
        treatment, own = values.get("treatment", "heuristic"), values.get("own_arms", {})
        values["controls"] = tuple(arm for arm in (*ARMS, *own) if arm != treatment)
    return make_comparison(**values)


def _run(place: Path, asked: "Comparison | None", workers: int) -> None:
    from esper.cli._grow import Stop
    from esper.tolaria.comparison import VerdictRefused, describe, run_comparison

    def tell(text: str) -> None:
        err.print(f"[dim]{escape(text)}[/]", highlight=False, soft_wrap=True)

    with fetching_told(place / "library"):
        found = run_comparison(place, asked, workers=workers, stop=Stop(), tell=tell)
    for verdict in found.verdicts:
        out.print(describe(verdict), highlight=False, markup=False, soft_wrap=True)
    out.print(f"report: {place / 'report.html'}", highlight=False, markup=False, soft_wrap=True)
    refused = [f"equal {own.design.budget}" for own in found.verdicts if own.refused]
    if refused:
        # Every reason was printed above.
        raise VerdictRefused(f"no verdict under {' and '.join(refused)}; see the reasons above")
