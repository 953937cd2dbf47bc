"""`esper kernels` and its commands."""

import typer

from esper.cli._compile import compile_kernels
from esper.cli._prune import prune
from esper.cli._show import list_kernels, show
from esper.cli._verify import fetch, verify

app = typer.Typer(name="kernels", help="Compile, keep and look at kernels.", no_args_is_help=True)

app.command("compile")(compile_kernels)
app.command("list")(list_kernels)
for command in (show, verify, fetch, prune):
    app.command()(command)
