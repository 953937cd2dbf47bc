"""Where commands print, and how an error becomes a message and an exit status."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from esper.cli._interrupt import raise_again
from esper.errors import EsperError, InputError, Interrupted
from esper_functional import KasminaException

out = Console()
err = Console(stderr=True)

Trace = Annotated[bool, typer.Option("--traceback", help="Show the traceback of an error.")]


@contextmanager
def errors(show_traceback: bool, advice: str = "", *, trains: bool = True) -> Iterator[None]:
    """Turn errors into one message and an exit status.

    Args:
        show_traceback: let an error through as it is.
        advice: what to do about a full disk and the like, besides.
        trains: the command needs jax and what else training does; it is imported here, where
            Ctrl-C is not yet answered.
    """
    if trains:
        import esper.tolaria  # noqa: F401

    try:
        raise_again()
        yield
    except (KasminaException, OSError) as error:
        if show_traceback:
            raise
        if isinstance(error, Interrupted):
            say(err, "yellow", str(error))
            raise typer.Exit(130) from error
        text = str(error) if isinstance(error, KasminaException) else _world(error, advice)
        say(err, "red", text)
        raise typer.Exit(2 if isinstance(error, InputError) else 1) from error
    except KeyboardInterrupt as error:
        err.print("[yellow]esper:[/] interrupted", highlight=False)
        raise typer.Exit(130) from error


def say(console: Console, colour: str, text: str) -> None:
    """Print a message as it is: a path in it may look like markup."""
    console.print(f"[{colour}]esper:[/] {escape(text)}", highlight=False, soft_wrap=True)


def counted(number: int, what: str) -> str:
    """So many of something, by its name for one of them."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def status_of(failures: list[EsperError]) -> int:
    """The exit status of a command that went on after failures."""
    return 2 if all(isinstance(failure, InputError) for failure in failures) else 1


def show_table(table: Table, *, whole: bool = False) -> None:
    """Print a table, at its own width where nobody's window has to hold it.

    Args:
        whole: on a terminal too, because a part of what it holds is of no use.
    """
    if whole or not out.is_terminal:
        # No window is wider than that.
        options = out.options.update(max_width=1 << 20)
        table.width = max(1, Measurement.get(out, options, table).maximum)
    out.print(table, soft_wrap=table.width is not None)


def _world(error: OSError, advice: str) -> str:
    where = f" ({error.filename})" if error.filename else ""
    return f"{error.strerror or error}{where}. Make room or give access{advice}."
