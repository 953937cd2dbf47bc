"""The commands of `esper`."""

from pathlib import Path
from typing import Annotated

import typer

import esper
from esper.cli import _blueprints, _config, _kernels, _library, _serve, _tamiyo
from esper.cli._compare import compare
from esper.cli._console import out
from esper.cli._defaults import defaults_of
from esper.cli._grow import grow
from esper.cli._replay import replay
from esper.cli._serve import serve
from esper.cli._watch import watch
from esper.cli._worker import worker

app = typer.Typer(
    name="esper",
    help="Neural networks that grow while they train.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show_version(asked: bool) -> None:
    if asked:
        out.print(f"esper {esper.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, help="Show the version.")
    ] = False,
    config: Annotated[
        Path | None,
        typer.Option(
            help="The file of settings; by default esper.yaml here, or in ~/.config/esper."
        ),
    ] = None,
) -> None:
    context.default_map = defaults_of(context.command, config)


app.command()(grow)
app.command()(replay)
app.command()(compare)
app.command()(watch)
app.command()(serve)
app.command()(worker)
app.add_typer(_kernels.app)
app.add_typer(_library.app)
app.add_typer(_blueprints.app)
app.add_typer(_serve.app)
app.add_typer(_tamiyo.app)
app.add_typer(_config.app)
