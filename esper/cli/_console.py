"""Where commands print, and how an error becomes a message and an exit status."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from esper.errors import InputError
from esper_functional import KasminaException

out = Console()
err = Console(stderr=True)

Trace = Annotated[bool, typer.Option("--traceback", help="Show the traceback of an error.")]


@contextmanager
def errors(show_traceback: bool) -> Iterator[None]:
    """Turn errors into one message and an exit status."""
    from esper.tolaria import Interrupted

    try:
        yield
    except (KasminaException, OSError) as error:
        if show_traceback:
            raise
        if isinstance(error, Interrupted):
            say(err, "yellow", str(error))
            raise typer.Exit(130) from error
        text = str(error) if isinstance(error, KasminaException) else world(error)
        say(err, "red", text)
        raise typer.Exit(2 if isinstance(error, InputError) else 1) from error
    except KeyboardInterrupt as error:
        err.print("[yellow]esper:[/] interrupted", highlight=False)
        raise typer.Exit(130) from error


def say(console: Console, colour: str, text: str) -> None:
    """Print a message as it is: a path in it may look like markup."""
    console.print(f"[{colour}]esper:[/] {escape(text)}", highlight=False, soft_wrap=True)


def world(error: OSError) -> str:
    where = f" ({error.filename})" if error.filename else ""
    return (
        f"{error.strerror or error}{where}. Make room or give access; what a run has recorded is"
        " whole, and it goes on with --resume."
    )
