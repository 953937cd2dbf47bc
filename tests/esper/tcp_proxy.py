"""A line to a server that a test can cut, or that loses answers."""

import contextlib
import selectors
import socket
import threading
from types import TracebackType
from typing import Self


class Proxy:
    """Passes on what comes to its port, until it is told otherwise; a context manager.

    Args:
        port: of the server.
    """

    def __init__(self, port: int) -> None:
        self.url = ""
        self._server = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._peers: dict[socket.socket, socket.socket] = {}
        self._clients: set[socket.socket] = set()
        self._cut = threading.Event()
        self._swallow = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def cut(self) -> None:
        """Pass nothing on; who connects gets no answer."""
        self._cut.set()

    def mend(self) -> None:
        """Pass on again; what was on the line is gone, as are the connections."""
        self._cut.clear()

    def swallow_answers(self) -> None:
        """Lose the answer that comes next, and the connection on which it came."""
        self._swallow.set()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closing.set()
        self._thread.join()
        for one in list(self._peers):
            self._drop(one)
        self._selector.close()
        self._listener.close()

    def _run(self) -> None:
        was_cut = False
        while not self._closing.is_set():
            if self._cut.is_set():
                was_cut = True
                self._closing.wait(0.01)
                continue
            if was_cut:
                was_cut = False
                for one in list(self._peers):
                    self._drop(one)
            for key, _ in self._selector.select(0.01):
                one = key.fileobj
                assert isinstance(one, socket.socket)
                if one is self._listener:
                    self._connect()
                elif one in self._peers:
                    self._pass(one)

    def _connect(self) -> None:
        client, _ = self._listener.accept()
        try:
            server = socket.create_connection(("127.0.0.1", self._server))
        except OSError:
            client.close()
            return
        self._clients.add(client)
        for one, other in ((client, server), (server, client)):
            self._peers[one] = other
            self._selector.register(one, selectors.EVENT_READ)

    def _pass(self, one: socket.socket) -> None:
        try:
            data = one.recv(1 << 16)
            if data and one not in self._clients and self._swallow.is_set():
                self._swallow.clear()
                data = b""
            if data:
                self._peers[one].sendall(data)
                return
        except OSError:
            pass
        self._drop(one)

    def _drop(self, one: socket.socket) -> None:
        for each in (one, self._peers.get(one)):
            if each is not None and each in self._peers:
                del self._peers[each]
                self._clients.discard(each)
                with contextlib.suppress(KeyError):
                    self._selector.unregister(each)
                each.close()
