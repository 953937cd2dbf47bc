"""`esper config`: what is configured, and where each value comes from."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from esper.cli._console import err, out, say, show_table
from esper.errors import InputError

if TYPE_CHECKING:
    from esper.settings import Loaded

app = typer.Typer(name="config", help="What is configured, and by what.", no_args_is_help=True)


def config_of(context: typer.Context) -> Path | None:
    """The file that `esper --config` names."""
    return context.find_root().params.get("config")


def _tried(read: "Callable[[], Loaded]") -> "Loaded":
    try:
        return read()
    except InputError as error:
        say(err, "red", str(error))
        raise typer.Exit(2) from None


@app.command("show")
def show(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Show each setting, and where it comes from; secrets are not shown."""
    from esper.settings import load_settings, shown_value

    loaded = _tried(lambda: load_settings(config_of(context)))
    rows = [
        (name, shown_value(loaded.value(name)), loaded.origins[name]) for name in loaded.origins
    ]
    if as_json:
        content = {
            "file": None if loaded.file is None else str(loaded.file),
            "looked_in": [str(path) for path in loaded.looked_in],
            "settings": {name: {"value": value, "from": origin} for name, value, origin in rows},
        }
        typer.echo(json.dumps(content, indent=2))
        return
    table = Table("setting", "value", "from", box=None, pad_edge=False)
    for name, value, origin in rows:
        shown = "" if value is None else value if isinstance(value, str) else json.dumps(value)
        table.add_row(*map(escape, (name, shown, origin)))
    show_table(table, whole=True)
    if loaded.file is None:
        looked = " or ".join(map(str, loaded.looked_in))
        say(err, "dim", f"no file of settings was read: there is none at {looked}")


@app.command("check")
def check(
    file: Annotated[Path, typer.Argument(help="A file of settings.", show_default=False)],
) -> None:
    """Check a file of settings, without the environment."""
    from esper.settings import check_settings_file

    loaded = _tried(lambda: check_settings_file(file))
    given = [name for name in loaded.origins if loaded.is_given(name)]
    says = f"says {', '.join(given)}" if given else "says nothing"
    say(out, "green", f"{file} is valid, and {says}")
