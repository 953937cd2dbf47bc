"""The command line: `esper grow`, `esper replay`, `esper kernels`.

Exit status: 0 done, 1 failed, 2 bad usage or input, 130 interrupted.
"""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import esper
from esper.errors import InputError
from esper_functional import KasminaException

app = typer.Typer(
    name="esper",
    help="Neural networks that grow while they train.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_out = Console()
_err = Console(stderr=True)

_Trace = Annotated[bool, typer.Option("--traceback", help="Show the traceback of an error.")]


def _show_version(asked: bool) -> None:
    if asked:
        _out.print(f"esper {esper.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, help="Show the version.")
    ] = False,
) -> None:
    pass


@contextmanager
def _errors(show_traceback: bool) -> Iterator[None]:
    """Turn errors into one message and an exit status."""
    from esper.tolaria import Interrupted

    try:
        yield
    except (KasminaException, OSError) as error:
        if show_traceback:
            raise
        if isinstance(error, Interrupted):
            _say(_err, "yellow", str(error))
            raise typer.Exit(130) from error
        text = str(error) if isinstance(error, KasminaException) else _world(error)
        _say(_err, "red", text)
        raise typer.Exit(2 if isinstance(error, InputError) else 1) from error
    except KeyboardInterrupt as error:
        _err.print("[yellow]esper:[/] interrupted", highlight=False)
        raise typer.Exit(130) from error


def _say(console: Console, colour: str, text: str) -> None:
    """Print a message as it is: a path in it may look like markup."""
    console.print(f"[{colour}]esper:[/] {escape(text)}", highlight=False, soft_wrap=True)


def _world(error: OSError) -> str:
    where = f" ({error.filename})" if error.filename else ""
    return (
        f"{error.strerror or error}{where}. Make room or give access; what a run has recorded is"
        " whole, and it goes on with --resume."
    )


class _Stop:
    """Becomes true at the first Ctrl-C; a second one interrupts at once."""

    def __init__(self) -> None:
        self._asked = False
        signal.signal(signal.SIGINT, self._handle)
        signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        _err.print(
            "[yellow]esper:[/] stopping after this step; once more stops at once", highlight=False
        )

    def __call__(self) -> bool:
        return self._asked


@app.command()
def grow(
    task: Annotated[str | None, typer.Option(help="spirals or digits.")] = None,
    backend: Annotated[str | None, typer.Option(help="jax or torch.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file with the keys of a configuration.")
    ] = None,
    seeds: Annotated[
        int, typer.Option(min=1, max=10_000, help="Number of runs, with seeds from `seed` on.")
    ] = 1,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the run (or runs); by default runs/TASK-BACKEND."),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Go on with an interrupted run.")
    ] = None,
    traceback: _Trace = False,
) -> None:
    """Train a network that grows, and record the run."""
    with _errors(traceback):
        if resume is not None:
            given = {"--task": task, "--backend": backend, "--config": config, "--out": out}
            extra = [name for name, value in given.items() if value is not None]
            if extra or seeds != 1:
                raise InputError(
                    f"--resume goes on with what the run began with; leave out"
                    f" {', '.join(extra) or '--seeds'}"
                )
            _resume(resume)
        else:
            _start(task, backend, config, seeds, out)


def _start(
    task: str | None, backend: str | None, config: Path | None, seeds: int, out: Path | None
) -> None:
    from esper.tolaria import create_study, make_config, read_config_file

    values = read_config_file(config) if config is not None else {}
    values |= {k: v for k, v in (("task", task), ("backend", backend)) if v is not None}
    if "task" not in values:
        raise InputError("say what to train on: --task spirals or --task digits")
    values.setdefault("backend", "jax")
    first = make_config(**values)
    place = out if out is not None else Path("runs") / f"{first.task}-{first.backend}"
    if seeds == 1:
        _train([(place, first)], place, resuming=False)
    else:
        _train(create_study(place, first, seeds).runs, place, resuming=False)


def _resume(path: Path) -> None:
    from esper.tolaria import is_study, open_run, open_study

    runs = open_study(path).runs if is_study(path) else [(path, open_run(path).config)]
    _train(runs, path, resuming=True)


def _train(runs: list[tuple[Path, Any]], place: Path, *, resuming: bool) -> None:
    """Train each run to its end, then show what came of all of them."""
    from esper.nissa import ProgressView, describe_stages, read_run, write_report
    from esper.oona import InProcessBus
    from esper.tolaria import has_run, resume_run, start_run

    stop = _Stop()
    for path, config in runs:
        bus = InProcessBus()
        label = f"{config.task} · {config.backend} · seed {config.seed}"
        with ProgressView(bus, label, config.steps, _out) as view:
            if resuming and has_run(path):
                resume_run(path, bus=bus, stop=stop, watch=view.refresh)
            else:
                start_run(path, config, bus=bus, stop=stop, watch=view.refresh, tell=_tell)
    table = Table("run", "test accuracy", "parameters", "seeds", box=None)
    records = [record for path, _ in runs if (record := read_run(path)).metrics]
    for record in records:
        last = record.metrics[-1]
        table.add_row(
            escape(str(record.path)),
            f"{last['test_accuracy']:.1%}",
            str(last["parameters"]),
            describe_stages(last["stages"]),
        )
    _out.print(table)
    if len(records) > 1:
        first = runs[0][1]
        write_report(
            place / "report.html",
            {f"{first.task}, {first.backend}": {"grown": records}},
            title=f"Esper: {first.task}",
        )
    _out.print(f"report: {place / 'report.html'}", highlight=False, markup=False, soft_wrap=True)


def _tell(text: str) -> None:
    _out.print(f"[dim]{escape(text)}[/]", highlight=False)


@app.command()
def replay(
    run: Annotated[Path, typer.Argument(help="Folder of a run.", show_default=False)],
    traceback: _Trace = False,
) -> None:
    """Verify a run's ledger and fold it to the states that were recorded."""
    with _errors(traceback):
        from esper.tolaria import replay_run

        found = replay_run(run)
        table = Table("step", "recorded by", "digest", box=None)
        for step, name in found.verified:
            table.add_row(str(step), name, "equal")
        _out.print(table)
        _out.print(
            f"{found.lines} lines whole, {found.events} events folded to step {found.step};"
            f" digest {found.digest}",
            highlight=False,
            soft_wrap=True,
        )


kernels = typer.Typer(name="kernels", help="Compile and look at kernels.", no_args_is_help=True)
app.add_typer(kernels)

_Library = Annotated[Path, typer.Option("--library", help="Folder of the library.")]


@kernels.command("compile")
def compile_kernel(
    blueprint: Annotated[str, typer.Argument(help="Name of a blueprint of the library.")],
    in_features: Annotated[
        int, typer.Option("--in", min=1, max=1 << 20, help="Features of the input.")
    ],
    out_features: Annotated[
        int, typer.Option("--out", min=1, max=1 << 20, help="Features of the output.")
    ],
    library: _Library = Path("runs/library"),
    init_seed: Annotated[
        int, typer.Option(min=0, max=2**31 - 1, help="Seed of the first parameters.")
    ] = 0,
    traceback: _Trace = False,
) -> None:
    """Compile a blueprint for a signature and keep it in the library."""
    with _errors(traceback):
        from esper.contracts import KernelSignature
        from esper.tezzeret import compile_blueprint, load_blueprint
        from esper.urza import Library

        ir = load_blueprint(blueprint)
        signature = KernelSignature(input_shape=(in_features,), output_shape=(out_features,))
        store = Library(library)
        _out.print(
            store.put(compile_blueprint(ir, signature, init_seed=init_seed)), highlight=False
        )


@kernels.command("list")
def list_kernels(library: _Library = Path("runs/library"), traceback: _Trace = False) -> None:
    """Show the kernels of the library, and the blueprints that can be compiled."""
    with _errors(traceback):
        from esper.tezzeret import blueprint_names, load_blueprint
        from esper.urza import Library

        table = Table("kernel", "blueprint", "signature", "seed", "parameters", "bytes", box=None)
        for row in Library(library, create=False).find():
            table.add_row(
                row.kernel_id,
                row.blueprint,
                row.signature,
                str(row.init_seed),
                str(row.parameter_count),
                str(row.size_bytes),
            )
        _out.print(table)
        _out.print(f"blueprints: {', '.join(blueprint_names())}", highlight=False)
        for name in blueprint_names():
            _out.print(f"  [bold]{name}[/]: {load_blueprint(name).summary}", highlight=False)


def main() -> None:
    """Entry point of the command `esper`."""
    app(prog_name="esper")


if __name__ == "__main__":
    sys.exit(main())
