"""Serving the live page until somebody ends it."""

from collections.abc import Callable
from pathlib import Path

from esper._sockets import listening
from esper.errors import InputError
from esper.nissa._catalogue import Catalogue
from esper.nissa._run_files import describe_run, find_runs

_EVERYWHERE = {"0.0.0.0", "::", ""}


def serve_runs(
    root: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8765,
    tell: Callable[[str], None] = lambda text: None,
) -> None:
    """Serve the live page of a run, or of the runs below a folder, until Ctrl-C.

    Args:
        root: the folder; nothing outside of it is served.
        host: the address to listen at. Everyone who can reach it can read the runs.
        port: 0 for one that is free.
        tell: is given the page's address once it can be opened.

    Raises:
        InputError: where there is no run, the only one cannot be read, the port is taken, the
            address is not this machine's, or the packages of the extra `watch` are missing.
        KeyboardInterrupt: after Ctrl-C, when all is closed.
    """
    try:
        import uvicorn

        from esper.nissa._server import make_app
    except ImportError as error:
        raise InputError(
            f"the live page needs starlette and uvicorn, which cannot be imported ({error}):"
            " pip install 'esper-morphogenetic[watch]'"
        ) from error
    runs = find_runs(root)
    if len(runs) == 1:
        describe_run(*runs.values())
    catalogue = Catalogue(root)
    catalogue.refresh()
    with listening(host, port, backlog=128) as listener:
        address = listener.getsockname()
        shown = f"[{address[0]}]" if ":" in address[0] else address[0]
        hosts = ["*"] if host in _EVERYWHERE else sorted({host, "localhost", "127.0.0.1", shown})
        app = make_app(catalogue, hosts=hosts, stopping=lambda: server.should_exit)
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                lifespan="off",
                ws="none",
                log_level="error",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=2,
            )
        )
        count = f"{len(runs)} runs" if len(runs) > 1 else "1 run"
        tell(f"watching {count} in {root} at http://{shown}:{address[1]}/ (Ctrl-C ends it)")
        server.run(sockets=[listener])
