"""Clients in a closed loop, for `urza`: each asks again as soon as it has its answer.

They read as little of an answer as there is to read, its status and its length, because on one
machine what the clients compute is taken from the service. The times are from the first byte of a
request handed to the kernel to the last byte of its answer.
"""

import asyncio
import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

TIMEOUT = 60.0
"""Seconds after which a request has failed."""


@dataclasses.dataclass
class Heard:
    """What one or more clients saw."""

    milliseconds: list[float] = dataclasses.field(default_factory=list)
    failed: list[str] = dataclasses.field(default_factory=list)
    received: int = 0
    """Bytes of bodies."""
    answers: int = 0
    """Of any kind, those too that came before it counted."""


class Client(asyncio.Protocol):
    """One client with one connection."""

    def __init__(self, requests: Iterator[bytes], heard: Heard, until: float, warm: float) -> None:
        self._requests = requests
        self._heard = heard
        self._until = until
        self._warm = warm
        self._head = b""
        self._left = -1
        self._status = 0
        self._began = 0.0
        self._transport: Any = None
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._next()

    def data_received(self, data: bytes) -> None:
        if self._left < 0:
            self._head += data
            head, found, body = self._head.partition(b"\r\n\r\n")
            if not found:
                return
            self._status = int(head[9:12])
            lower = head.lower()
            at = lower.index(b"content-length:") + 15
            self._left = int(lower[at : at + 20].split(b"\r\n", 1)[0])
            data = body
        self._left -= len(data)
        self._heard.received += len(data)
        if self._left <= 0:
            self._answered()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self._heard.failed.append(f"the connection was lost: {exc}")
            self.done.set_result(None)

    def _answered(self) -> None:
        now = time.perf_counter()
        self._heard.answers += 1
        if not 200 <= self._status < 300:
            self._heard.failed.append(f"status {self._status}")
        elif self._began >= self._warm:
            self._heard.milliseconds.append(1e3 * (now - self._began))
        if now >= self._until:
            self.done.set_result(None)
            self._transport.close()
        else:
            self._next()

    def _next(self) -> None:
        self._head, self._left = b"", -1
        self._began = time.perf_counter()
        self._transport.write(next(self._requests))


async def ask(
    port: int, paths: Sequence[str], token: str, clients: int, seconds: float, warm: float
) -> Heard:
    """Have so many clients ask for so long."""
    heard = Heard()
    requests = [
        (f"GET {path} HTTP/1.1\r\nHost: urza\r\nAuthorization: Bearer {token}\r\n\r\n").encode()
        for path in paths
    ]
    loop = asyncio.get_running_loop()
    began = time.perf_counter()
    until = began + warm + seconds
    running: list[Client] = []
    for place in range(clients):
        turn = itertools.cycle(
            requests[place % len(requests) :] + requests[: place % len(requests)]
        )
        try:
            _, client = await loop.create_connection(
                lambda turn=turn: Client(turn, heard, until, began + warm), "127.0.0.1", port
            )
            running.append(client)
        except OSError as error:
            heard.failed.append(f"no connection: {error}")
    ended, late = await asyncio.wait(
        [client.done for client in running], timeout=warm + seconds + TIMEOUT
    )
    heard.failed += [f"no answer in {TIMEOUT:.0f} s"] * len(late)
    del ended
    return heard


def main() -> None:
    """Read what to ask from standard input, and write what was heard."""
    asked = json.load(sys.stdin)
    began = time.process_time()
    heard = asyncio.run(ask(**asked))
    told = dataclasses.asdict(heard) | {"processor_seconds": time.process_time() - began}
    json.dump(told, sys.stdout)


if __name__ == "__main__":
    main()
