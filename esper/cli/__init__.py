"""The command line: `esper grow`, `esper replay`, `esper kernels`.

Exit status: 0 done, 1 failed, 2 bad usage or input, 130 interrupted.
"""

from esper.cli._interrupt import end_at_once

__all__ = ["main"]


def main() -> None:
    """Entry point of the command `esper`."""
    # Before the imports, which take seconds; `errors` takes over when they are done.
    end_at_once()
    from esper.cli._app import app

    try:
        app(prog_name="esper")
    finally:
        end_at_once()
