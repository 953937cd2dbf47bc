"""Serving Tamiyo until somebody ends it."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from esper._sockets import listening
from esper.errors import InputError
from esper.tamiyo.service._heap import frozen_heap
from esper.tamiyo.service._loop import TamiyoService

_EVERYWHERE = {"0.0.0.0", "::", ""}
_CLOSE_SECONDS = 5.0


def serve_tamiyo(
    service: TamiyoService,
    *,
    host: str = "127.0.0.1",
    port: int = 8430,
    tell: Callable[[str], None] = lambda text: None,
) -> None:
    """Serve until SIGTERM, after which this returns, or Ctrl-C; from the main thread.

    What was heard until then is decided upon. The loop runs in this thread, and HTTP in another.

    Args:
        service: what is served; who gives it closes its bus.
        host: the address to listen at. Everyone who can reach it can read health and metrics.
        port: 0 for one that is free.
        tell: is given the address once it can be asked.

    Raises:
        InputError: where the port is taken, the address is not this machine's, or the packages of
            the extra `watch` are missing.
        LeaseLostError: where another service was started in its place.
        KeyboardInterrupt: after Ctrl-C, when all is closed.
    """
    interrupted = threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            interrupted.set()
        service.stop()

    with _answering(service, host, port) as address:
        before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            tell(address)
            with frozen_heap():
                service.run()
        finally:
            for number, action in before.items():
                signal.signal(number, action)
    if interrupted.is_set():
        raise KeyboardInterrupt


@contextmanager
def _answering(service: TamiyoService, host: str, port: int) -> Iterator[str]:
    """A thread that answers over HTTP, and its address."""
    try:
        import uvicorn

        from esper.tamiyo.service._server import make_app
    except ImportError as error:
        raise InputError(
            f"the service needs starlette and uvicorn, which cannot be imported ({error}):"
            " pip install 'esper-morphogenetic[watch]'"
        ) from error
    with listening(host, port, backlog=128) as listener:
        own, number = listener.getsockname()[:2]
        shown = f"[{own}]" if ":" in own else own
        hosts = ["*"] if host in _EVERYWHERE else sorted({host, "localhost", "127.0.0.1", shown})
        server = uvicorn.Server(
            uvicorn.Config(
                make_app(service, hosts=hosts),
                lifespan="off",
                ws="none",
                log_config=None,
                log_level="error",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=2,
            )
        )
        thread = threading.Thread(
            target=server.run, args=([listener],), name="esper-tamiyo-http", daemon=True
        )
        thread.start()
        try:
            yield f"http://{shown}:{number}"
        finally:
            server.should_exit = True
            thread.join(_CLOSE_SECONDS)
