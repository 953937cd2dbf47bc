"""`esper watch`."""

from pathlib import Path
from typing import Annotated

import typer

from esper.cli._console import Trace, errors, out


def watch(
    runs: Annotated[
        Path,
        typer.Argument(metavar="RUN|DIR", help="Folder of a run, or of many.", show_default=False),
    ],
    port: Annotated[
        int, typer.Option(min=0, max=65_535, help="Where to listen; 0 chooses a free port.")
    ] = 8765,
    host: Annotated[
        str, typer.Option(help="The address to listen at; others than this one open it to others.")
    ] = "127.0.0.1",
    once: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write one page with its data inside, and serve none."),
    ] = None,
    traceback: Trace = False,
) -> None:
    """Show runs on a live page, while they train or when they have ended."""
    with errors(traceback, " or name another file"):
        from esper.nissa import serve_runs, write_page

        if once is None:
            serve_runs(runs, host=host, port=port, tell=_tell)
        else:
            count = write_page(runs, once)
            _tell(f"{once}: {count} {'run' if count == 1 else 'runs'}")


def _tell(text: str) -> None:
    out.print(text, highlight=False, markup=False, soft_wrap=True)
