"""What the parts of a running service share."""

import asyncio
import concurrent.futures
import functools
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from starlette.requests import Request

from esper.errors import ServiceUnavailableError
from esper.urza.service._limits import Limits
from esper.urza.service._memory import Changes, Memory
from esper.urza.service._metrics import Metrics
from esper.urza.service._problems import RETRY_SECONDS, RefusedError
from esper.urza.service._rate import Rate
from esper.urza.service._tokens import TokenFile

if TYPE_CHECKING:
    from esper.urza import KernelLibrary

P = ParamSpec("P")
T = TypeVar("T")

ANSWER_SECONDS = 60.0
"""The library has to answer within."""

log = logging.getLogger("esper.urza.service")


class Service:
    """A library, who may ask it, and how much.

    Args:
        library: what is asked; its methods run in threads.
        tokens: who may.
        limits: how much.
        changes: tells whether the library's database has changed, where anything does.
    """

    def __init__(
        self,
        library: "KernelLibrary",
        tokens: TokenFile,
        limits: Limits,
        *,
        changes: Changes | None = None,
    ) -> None:
        from esper.urza.service._blobs import Blobs

        self.library = library
        self.tokens = tokens
        self.limits = limits
        self.memory = Memory(changes)
        self.metrics = Metrics()
        self.rate = Rate(limits.rate, limits.burst)
        self.running = 0
        self.uploading = 0
        self.reading_in = asyncio.Semaphore(4)
        """Uploads whose content is in memory, until the library has kept it."""
        self._threads = concurrent.futures.ThreadPoolExecutor(
            limits.threads, thread_name_prefix="urza"
        )
        self._undoing: set[asyncio.Future[None]] = set()
        self.blobs: Blobs = Blobs(self)

    async def ask(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Ask the library, in a thread.

        Raises:
            RefusedError: with 503, where it does not answer.
        """
        return await self._in_time(self.run(call, *args, **kwargs))

    async def ask_or_undo(
        self, undo: Callable[[T], object], call: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Ask the library, in a thread; what it does too late is undone.

        Args:
            undo: is given, in a thread, the result that came when nobody waited for it any more.

        Raises:
            RefusedError: as `ask`.
        """
        running = self._threads.submit(functools.partial(call, *args, **kwargs))
        answer = asyncio.wrap_future(running)
        try:
            return await self._in_time(asyncio.shield(answer))
        except RefusedError:
            if not running.cancel():
                undoing = asyncio.ensure_future(self._undo(undo, answer))
                # The loop itself keeps no task alive.
                self._undoing.add(undoing)
                undoing.add_done_callback(self._undoing.discard)
            raise

    async def _undo(self, undo: Callable[[T], object], answer: Awaitable[T]) -> None:
        try:
            await self.run(undo, await answer)
        except Exception:
            log.exception("what the library did too late could not be undone")

    async def _in_time(self, answer: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                return await answer
        except TimeoutError as error:
            log.error("the library did not answer within %s s", ANSWER_SECONDS)
            raise RefusedError(
                503,
                ServiceUnavailableError,
                f"the library did not answer within {ANSWER_SECONDS:.0f} s: try again later",
                headers={"Retry-After": str(RETRY_SECONDS)},
            ) from error

    async def run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run something in a thread, however long it takes."""
        work = functools.partial(call, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def close(self) -> None:
        """Let go of threads and library."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self.library.close()


def service_of(request: Request) -> Service:
    """The service that a request came to."""
    return request.app.state.service
