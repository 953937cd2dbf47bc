"""Runs followed for as long as a page looks at them, each once for all its pages."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from esper.nissa._catalogue import Catalogue
from esper.nissa._messages import Cursor, message
from esper.nissa._run_files import State
from esper.nissa._watched import WatchedRun

INTERVAL = 0.04
"""Seconds between two looks at a run's files."""

RESCAN = 2.0
"""Seconds between two looks at the folder of runs."""

_STATE_EVERY = 1.0


class Bell:
    """Rings for everyone who waits at that moment."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def ring(self) -> None:
        """Wake all who wait."""
        self._event.set()
        self._event = asyncio.Event()

    async def wait(self, seconds: float) -> bool:
        """Wait for it; False where it did not ring in time."""
        try:
            await asyncio.wait_for(self._event.wait(), seconds)
        except TimeoutError:
            return False
        return True


class Feed:
    """One run, followed while somebody looks."""

    def __init__(self, run: WatchedRun) -> None:
        self.run = run
        self.bell = Bell()
        self.state = State.TRAINING
        self.ready = False
        """Whether the files have been read to their ends once."""
        self.lock = asyncio.Lock()
        """Held while the run is read or told of."""
        self.watchers = 0
        self._task: asyncio.Task[None] | None = None
        self._looked = -_STATE_EVERY

    def start(self) -> None:
        """Follow the files."""
        self._task = asyncio.create_task(self._follow())

    def stop(self) -> None:
        """Let them be."""
        if self._task is not None:
            self._task.cancel()

    async def told(self, cursor: Cursor) -> dict[str, object]:
        """What the page with this cursor does not know yet."""
        async with self.lock:
            return message(self.run, cursor, self.state)

    async def _follow(self) -> None:
        while True:
            before = (self.run.version, self.state, self.ready)
            async with self.lock:
                try:
                    more = await asyncio.to_thread(self.run.poll)
                except OSError:  # away for a moment; the page says how long nothing came
                    more = False
                if time.monotonic() - self._looked >= _STATE_EVERY:
                    self.state = await asyncio.to_thread(lambda: self.run.state)
                    self._looked = time.monotonic()
            self.ready = self.ready or not more
            if self.ready and before != (self.run.version, self.state, self.ready):
                self.bell.ring()
            await asyncio.sleep(0.0 if more else INTERVAL)


class Feeds:
    """The feeds of the runs of a catalogue; a run that nobody looks at is let go."""

    def __init__(self, catalogue: Catalogue) -> None:
        self.catalogue = catalogue
        self.bell = Bell()
        """Rings when the list of runs has changed."""
        self._feeds: dict[str, Feed] = {}
        self._scan = asyncio.Lock()
        self._scanned = time.monotonic()

    @asynccontextmanager
    async def following(self, name: str) -> AsyncIterator[Feed]:
        """The feed of a run.

        Raises:
            KeyError: where there is no run of that name.
            InputError: where it cannot be read.
        """
        feed = self._feeds.get(name)
        if feed is None:
            feed = Feed(WatchedRun(self.catalogue.paths[name], name))
            self._feeds[name] = feed
            feed.start()
        feed.watchers += 1
        try:
            yield feed
        finally:
            feed.watchers -= 1
            if not feed.watchers:
                feed.stop()
                self._feeds.pop(name, None)

    def find(self, name: str) -> Feed | None:
        """The feed of a run that somebody looks at."""
        return self._feeds.get(name)

    async def rescan(self) -> None:
        """Look at the folder of runs again, where that was not done lately."""
        if time.monotonic() - self._scanned < RESCAN or self._scan.locked():
            return
        async with self._scan:
            before = self.catalogue.summaries
            await asyncio.to_thread(self.catalogue.refresh)
            self._scanned = time.monotonic()
            if before != self.catalogue.summaries:
                self.bell.ring()
