"""The commands of `esper`."""

from typing import Annotated

import typer

import esper
from esper.cli import _kernels
from esper.cli._compare import compare
from esper.cli._console import out
from esper.cli._grow import grow
from esper.cli._replay import replay
from esper.cli._watch import watch

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
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, help="Show the version.")
    ] = False,
) -> None:
    pass


app.command()(grow)
app.command()(replay)
app.command()(compare)
app.command()(watch)
app.add_typer(_kernels.app)
