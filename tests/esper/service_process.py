"""`esper serve` in a process of its own, and plain requests to it."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from esper.urza.service import Scope, TokenFile

_LIMITED = """
import functools, json, sys
from pathlib import Path
from esper.cli._serve import open_served
from esper.urza.service import Limits, ServiceOptions, serve
library, tokens, limits, port = sys.argv[1:]
serve(
    ServiceOptions(
        functools.partial(open_served, Path(library), None, None),
        token_file=Path(tokens),
        sqlite=Path(library) / "library.sqlite",
        limits=Limits(**json.loads(limits)),
        port=int(port),
    ),
    tell=lambda url: print("serving at", url, flush=True),
)
"""


class Answered:
    """An answer to a plain request."""

    def __init__(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body

    @property
    def data(self) -> Any:
        """Its JSON."""
        return json.loads(self.body)

    @property
    def problem(self) -> dict[str, Any]:
        """Its problem details."""
        assert self.headers["content-type"] == "application/problem+json", self.body[:300]
        assert self.data["status"] == self.status
        return self.data


class Serving:
    """A service that listens, and whoever may ask it."""

    def __init__(
        self,
        folder: Path,
        *,
        limits: Mapping[str, float] | None = None,
        arguments: Sequence[str] = (),
        port: int = 0,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.library = folder / "library"
        self.token_file = folder / "tokens.json"
        self._limits = limits
        self._arguments = arguments
        self.tokens: dict[Scope, str] = {}
        for scope in Scope:
            secret, _ = TokenFile(self.token_file).make(scope.value, scope)
            self.tokens[scope] = secret
        self.port = port
        self.process: subprocess.Popen[str]
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, at the port that it had."""
        places = [str(self.library), str(self.token_file)]
        if self._limits is None:
            command = [
                "-m",
                "esper.cli",
                "serve",
                "--library",
                places[0],
                "--token-file",
                places[1],
            ]
            command += ["--port", str(self.port), *self._arguments]
        else:
            command = ["-c", _LIMITED, *places, json.dumps(dict(self._limits)), str(self.port)]
        with (self.folder / "errors.txt").open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, *command],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
            )
        assert self.process.stdout is not None
        said = self.process.stdout.readline()
        found = re.search(r"http://\S+?:(\d+)", said)
        assert found is not None, said + self.errors()
        self.port = int(found[1])

    def errors(self) -> str:
        """What it has said that went wrong."""
        return (self.folder / "errors.txt").read_text()

    def kill(self) -> None:
        """End it as a power cut does."""
        self.process.kill()
        self.process.wait(30)
        self._close()

    def stop(self, number: int = signal.SIGTERM, seconds: float = 30.0) -> int:
        """Ask it to end: its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        status = self.process.wait(seconds)
        self._close()
        return status

    def close(self) -> None:
        """Have it ended, whatever state it is in."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)
        self._close()

    def _close(self) -> None:
        if self.process.stdout is not None:
            self.process.stdout.close()

    def ask(
        self,
        method: str,
        path: str,
        *,
        token: Scope | str | None = Scope.ADMIN,
        body: bytes | None = None,
        data: Any = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = 30.0,
    ) -> Answered:
        """One request over a connection of its own, with nothing in between."""
        sent = dict(headers or {})
        if token is not None:
            secret = self.tokens[token] if isinstance(token, Scope) else token
            sent.setdefault("Authorization", f"Bearer {secret}")
        if data is not None:
            body = json.dumps(data).encode()
            sent.setdefault("Content-Type", "application/json")
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request(method, path, body, sent)
            answer = connection.getresponse()
            content = answer.read()
            known = {name.lower(): value for name, value in answer.getheaders()}
            return Answered(answer.status, known, content)
        finally:
            connection.close()

    def upload(
        self,
        kernel_id: str,
        content: bytes,
        query: str = "",
        token: Scope = Scope.WRITE,
        **more: Any,
    ) -> Answered:
        """Upload a kernel."""
        kind = {"Content-Type": "application/octet-stream"}
        path = f"/api/v1/kernels/{kernel_id}{query}"
        headers = kind | more.pop("headers", {})
        return self.ask("PUT", path, token=token, body=content, headers=headers, **more)

    @contextlib.contextmanager
    def raw(self, timeout: float = 30.0) -> Iterator[socket.socket]:
        """A connection to write bytes to."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=timeout) as connection:
            yield connection


class Proxy:
    """Carries bytes to a service, and cuts, delays or stops them as it is told.

    Attributes:
        cut_after: bytes of answers after which each connection is cut; None for never.
        cut_requests_after: the same of requests.
        cuts: connections that are still to be cut so; None for all.
        silent: nothing is carried, and nobody is told.
        refusing: connections are closed at once.
        delay: seconds before each piece of an answer.
    """

    def __init__(self, port: int) -> None:
        self.target = port
        self.cut_after: int | None = None
        self.cut_requests_after: int | None = None
        self.cuts: int | None = None
        self.silent = False
        self.refusing = False
        self.delay = 0.0
        self.connections = 0
        self.sent = 0
        """Bytes of answers carried."""
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def drop(self) -> None:
        """Cut all connections that there are."""
        with self._lock:
            mine, self._open = list(self._open), set()
        for each in mine:
            _cut(each)

    def close(self) -> None:
        """Carry no more."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.drop()
        self._thread.join(10)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            if self.refusing:
                _cut(client)
                continue
            try:
                server = socket.create_connection(("127.0.0.1", self.target), timeout=10)
                server.settimeout(None)
            except OSError:
                _cut(client)
                continue
            with self._lock:
                self._open |= {client, server}
            for source, target, answers in ((client, server, False), (server, client, True)):
                threading.Thread(
                    target=self._carry, args=(source, target, answers), daemon=True
                ).start()

    def _carry(self, source: socket.socket, target: socket.socket, answers: bool) -> None:
        carried = 0
        try:
            while piece := source.recv(65536):
                while self.silent:
                    time.sleep(0.02)
                most = self.cut_after if answers else self.cut_requests_after
                cutting = most is not None and carried + len(piece) > most and self.cuts != 0
                if cutting and most is not None:
                    piece = piece[: max(0, most - carried)]
                if answers and self.delay:
                    time.sleep(self.delay)
                target.sendall(piece)
                carried += len(piece)
                if answers:
                    self.sent += len(piece)
                if cutting:
                    if self.cuts is not None:
                        self.cuts -= 1
                    break
        except OSError:
            pass
        finally:
            with self._lock:
                self._open -= {source, target}
            _cut(source)
            _cut(target)


def _cut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    with contextlib.suppress(OSError):
        connection.close()
