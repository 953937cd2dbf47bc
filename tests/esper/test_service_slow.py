"""Clients that are slow, services that are told to end, and parts that do not answer."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from esper.errors import InputError
from esper.urza.service import Scope, ServiceOptions, TokenFile
from esper.urza.service import serve as run_service
from tests.esper.cache_kernels import variant
from tests.esper.service_process import Serving
from tests.esper.test_cli import esper, esper_here

LIMITS = {
    "header_seconds": 0.5, "idle_seconds": 0.5, "slowest": 20_000, "keep_alive_seconds": 1.0,
    "upload_bytes": 64 << 20, "requests": 6, "uploads": 2, "shutdown_seconds": 3.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def service(tmp_path_factory) -> Iterator[Serving]:
    serving = Serving(tmp_path_factory.mktemp("slow"), limits=LIMITS)
    yield serving
    serving.close()


def _head(service: Serving, kernel_id: str, length: int) -> bytes:
    return (
        f"PUT /api/v1/kernels/{kernel_id} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer"
        f" {service.tokens[Scope.WRITE]}\r\nContent-Type: application/octet-stream\r\n"
        f"Content-Length: {length}\r\n\r\n"
    ).encode()


def _rest(raw: socket.socket) -> bytes:
    """All that comes until the connection ends."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := raw.recv(65536):
            found += piece
    return found


@pytest.mark.parametrize("head", [b"", b"G", b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-"])
def test_a_head_that_does_not_come_is_not_waited_for(service, head):
    with service.raw(timeout=20) as raw:
        if head:
            raw.sendall(head)
        assert _rest(raw).startswith(b"HTTP/1.1 408 Request Timeout\r\n")


def test_a_head_that_comes_byte_by_byte_is_not_waited_for_even_after_an_answer(service):
    with service.raw(timeout=20) as raw:
        raw.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert raw.recv(65536).startswith(b"HTTP/1.1 200 OK")
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for byte in b"GET /healthz HTTP/1.1\r\nHost: " + b"x" * 200:
                raw.sendall(bytes([byte]))
                time.sleep(0.05)
            pytest.fail("200 bytes, one at a time, were waited for")


def test_a_body_that_stops_is_refused_with_what_was_expected(service):
    with service.raw(timeout=20) as raw:
        raw.sendall(_head(service, "ab" * 32, 100_000) + bytes(1000))
        answer = _rest(raw)
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"the body came too slowly: 1000 bytes in" in answer
    assert b"expected 20000 bytes a second" in answer


def test_a_body_that_trickles_is_refused_though_it_never_stops(service):
    with service.raw(timeout=20) as raw:
        raw.sendall(_head(service, "ab" * 32, 100_000))
        raw.settimeout(0.05)
        answer = b""
        for _ in range(200):
            try:
                raw.sendall(b"x")
                answer += raw.recv(65536)
            except TimeoutError:
                continue
            except (BrokenPipeError, ConnectionResetError):
                break
            if answer:
                break
    assert answer.startswith(b"HTTP/1.1 408"), answer


def test_who_does_not_read_an_answer_is_cut_off_and_costs_no_memory(tmp_path, artifact):
    from esper.artifacts import rewrite_artifact

    service = Serving(tmp_path, limits=LIMITS)
    try:
        large = rewrite_artifact(artifact, blueprint_name="large", torchscript=bytes(24 << 20))
        assert service.upload(large.kernel_id, large.data).status == 201
        path = f"/api/v1/kernels/{large.kernel_id}/artifact"
        head = f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer"
        with service.raw(timeout=20) as raw:
            raw.sendall(f"{head} {service.tokens[Scope.READ]}\r\n\r\n".encode())
            time.sleep(3.0)
            assert len(_rest(raw)) < len(large.data)
        answer = service.ask("GET", path)
        assert (answer.status, answer.body) == (200, large.data)
    finally:
        service.close()


def test_who_reads_slowly_and_is_never_silent_gets_the_whole_answer(service, artifact):
    from esper.artifacts import rewrite_artifact

    large = rewrite_artifact(artifact, blueprint_name="slowly", torchscript=os.urandom(8 << 20))
    assert service.upload(large.kernel_id, large.data).status == 201
    path = f"/api/v1/kernels/{large.kernel_id}/artifact"
    head = f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer"
    with socket.socket() as raw:
        # A small buffer: what is not read here waits at the service.
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.settimeout(20)
        raw.connect(("127.0.0.1", service.port))
        raw.sendall(f"{head} {service.tokens[Scope.READ]}\r\n\r\n".encode())
        found = b""
        # Several times as long as it waits for who is silent.
        for _ in range(125):
            found += raw.recv(2000)
            time.sleep(0.02)
        found += _rest(raw)
    assert found.endswith(large.data)


def test_more_than_is_agreed_at_once_are_told_to_come_again(service):
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(service.raw()) for _ in range(6)]
        for raw in held[:2]:
            raw.sendall(_head(service, "ab" * 32, 100_000) + bytes(20_000))
        time.sleep(0.2)
        third = service.upload("ab" * 32, b"x")
        assert (third.status, third.problem["error"]) == (503, "ServiceUnavailableError")
        assert "receives 2 kernels already" in third.problem["detail"]
        for raw in held[2:]:
            raw.sendall(
                b"POST /api/v1/claims HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                + f"Authorization: Bearer {service.tokens[Scope.WRITE]}\r\n".encode()
                + b"Content-Length: 10000\r\n\r\n"
            )
        time.sleep(0.1)
        answers = [service.ask("GET", "/healthz", token=None) for _ in range(3)]
        refused = [answer for answer in answers if answer.status == 503]
        assert refused
        assert "answers 6 requests already" in refused[0].problem["detail"]
        assert refused[0].headers["retry-after"] == "1"
        assert "x-request-id" in refused[0].headers
    time.sleep(1.0)
    assert service.ask("GET", "/healthz", token=None).status == 200


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_it_ends_when_it_is_asked_to_and_lets_what_runs_end(tmp_path, artifact, number, status):
    service = Serving(tmp_path, arguments=["--grace", "10"])
    try:
        kernel = variant(artifact, 1)
        with service.raw() as raw:
            raw.sendall(_head(service, kernel.kernel_id, len(kernel.data)) + kernel.data[:1000])
            time.sleep(0.3)
            service.process.send_signal(number)
            time.sleep(0.5)
            with pytest.raises(OSError, match="refused"):
                socket.create_connection(("127.0.0.1", service.port), timeout=5)
            raw.sendall(kernel.data[1000:])
            assert _rest(raw).startswith(b"HTTP/1.1 201 Created")
        # A second signal would end it at once.
        service.process.wait(30)
        assert service.stop() == status
        assert "Traceback" not in service.errors()
        service.start()
        found = service.ask("GET", f"/api/v1/kernels/{kernel.kernel_id}/artifact")
        assert found.body == kernel.data
        assert service.stop() == 0
    finally:
        service.close()


def test_what_does_not_end_in_time_is_cut_and_the_service_ends_all_the_same(tmp_path):
    service = Serving(tmp_path, limits=LIMITS | {"idle_seconds": 60.0, "shutdown_seconds": 1.0})
    try:
        with service.raw(timeout=20) as raw:
            raw.sendall(_head(service, "ab" * 32, 100_000) + bytes(1000))
            time.sleep(0.3)
            assert service.stop() == 0
            assert not _rest(raw).startswith(b"HTTP/1.1 2")
    finally:
        service.close()


def test_several_workers_answer_count_together_and_end_together(tmp_path, artifact):
    service = Serving(tmp_path, arguments=["--workers", "2", "--open-metrics"])
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                if service.ask("GET", "/readyz", token=None, timeout=5).status == 200:
                    break
            time.sleep(0.2)
        service.upload(artifact.kernel_id, artifact.data)
        path = f"/api/v1/kernels/{artifact.kernel_id}"
        for number in range(20):
            change = {"add": [f"t{number}"], "remove": [f"t{number - 1}"] if number else []}
            assert service.ask("POST", f"{path}/tags", data=change).status == 200
            assert service.ask("GET", path).data["tags"] == [f"t{number}"]
        text = service.ask("GET", "/metrics", token=None).body.decode()
        line = next(line for line in text.splitlines() if "/tags" in line and "_total" in line)
        assert float(line.rpartition(" ")[2]) == 20.0
        assert service.stop(seconds=60) == 0
        assert "Traceback" not in service.errors()
    finally:
        service.close()


def test_it_is_ready_while_database_and_blobs_answer_and_not_else(tmp_path, artifact):
    service = Serving(tmp_path)
    try:
        ready = service.ask("GET", "/readyz", token=None)
        assert (ready.status, ready.data["database"], ready.data["blobs"]) == (200, "ok", "ok")
        service.upload(artifact.kernel_id, artifact.data)
        kernels = service.library / "kernels"
        kernels.rename(service.library / "away")
        time.sleep(1.1)
        broken = service.ask("GET", "/readyz", token=None)
        assert (broken.status, broken.data["database"], broken.data["blobs"]) == (
            503, "ok", "failed",
        )  # fmt: skip
        assert str(service.library) not in broken.body.decode()
        assert service.ask("GET", "/healthz", token=None).status == 200
        (service.library / "away").rename(kernels)
        time.sleep(1.1)
        assert service.ask("GET", "/readyz", token=None).status == 200
        # One kernel without its file concerns who asks for that one.
        second = variant(artifact, 1)
        assert service.upload(second.kernel_id, second.data).status == 201
        first = service.ask("GET", "/api/v1/kernels?order=parameters").data["items"][0]["kernel_id"]
        (file,) = kernels.rglob(f"{first}*")
        file.unlink()
        time.sleep(1.1)
        assert service.ask("GET", "/readyz", token=None).status == 200
        # What is no database any more.
        for file in service.library.glob("library.sqlite*"):
            file.write_bytes(b"nothing of a database" * 500)
        time.sleep(1.1)
        broken = service.ask("GET", "/readyz", token=None)
        assert (broken.status, broken.data["database"]) == (503, "failed")
        asked = service.ask("GET", "/api/v1/kernels?limit=7")
        assert asked.status in (500, 503)
        assert asked.problem["error"] in ("LibraryError", "InputError")
    finally:
        service.close()


def test_a_file_of_tokens_that_cannot_be_read_is_no_fault_of_who_asks(service):
    tokens = service.token_file.read_bytes()
    service.token_file.write_text("no tokens")
    try:
        for token in (service.tokens[Scope.ADMIN], "x" * 40):
            refused = service.ask("GET", "/api/v1/kernels", token=token)
            assert (refused.status, refused.problem["error"]) == (503, "ServiceUnavailableError")
            assert (refused.headers["retry-after"], refused.problem["begun"]) == ("1", False)
            assert str(service.token_file) not in refused.body.decode()
        assert f"tokens in {service.token_file} cannot be read" in service.errors()
    finally:
        service.token_file.write_bytes(tokens)
    assert service.ask("GET", "/api/v1/kernels").status == 200


def test_many_clients_at_once_all_get_their_answers(tmp_path, artifact):
    service = Serving(tmp_path)
    try:
        service.upload(artifact.kernel_id, artifact.data)
        path = f"/api/v1/kernels/{artifact.kernel_id}"
        statuses: list[int] = []

        def ask() -> None:
            parts = ("", "/artifact", "/usage")
            statuses.extend(service.ask("GET", path + part, timeout=60).status for part in parts)

        threads = [threading.Thread(target=ask) for _ in range(100)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert statuses == [200] * 300
    finally:
        service.close()


def test_tokens_are_made_listed_and_revoked_on_the_command_line(tmp_path):
    file = tmp_path / "tokens.json"
    place = ["--token-file", str(file)]
    made = esper("token", "make", "alice", "--scope", "write", "--days", "30", *place, check=0)
    secret = made.stdout.strip()
    token = TokenFile(file).find(secret)
    assert token is not None
    assert (token.name, token.scope) == ("alice", Scope.WRITE)
    listed = esper_here("token", "list", *place, check=0)
    assert "alice" in listed.stdout
    assert secret not in listed.output + made.stderr
    esper_here("token", "revoke", "alice", *place, check=0)
    assert TokenFile(file).find(secret) is None
    again = esper_here("token", "revoke", "alice", *place, check=2)
    assert "has no token 'alice'" in again.stderr
    unknown = esper_here("token", "make", "bob", "--scope", "root", *place, check=2)
    assert "there is no scope 'root': expected one of read, write, admin" in unknown.stderr


def test_what_it_cannot_be_started_with_is_said(tmp_path):
    def refused(*arguments: str) -> str:
        done = esper_here("serve", "--library", tmp_path / "library", *arguments, check=2)
        return " ".join(done.stderr.split())

    none = refused("--port", "0")
    assert "nobody has a token, so nobody could ask" in none
    assert "esper token make NAME --scope admin" in none
    place = ("--library", tmp_path / "library")
    esper_here("token", "make", "admin", "--scope", "admin", *place, check=0)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"port {port} of 127.0.0.1 is in use" in refused("--port", port)
    assert "give both --database and --blobs" in refused("--database", "sqlite:///x")
    assert "give both --database and --blobs" in refused("--blobs", "s3://bucket/x")
    missing = str(tmp_path / "nope.pem")
    secure = refused("--port", "0", "--certificate", missing, "--key", missing)
    assert f"{missing} cannot be read: expected a PEM file" in secure
    assert "takes both --certificate and --key" in refused("--key", "x")
    secret = "hunter2-hunter2"
    away = esper(
        "serve", *place, "--database", f"postgresql://user:{secret}@127.0.0.1:1/none",
        "--blobs", tmp_path / "blobs",
    )  # fmt: skip
    assert away.returncode in (1, 2)
    assert secret not in away.stderr + away.stdout
    options = ServiceOptions(lambda: None, token_file=None, workers=0)  # pyright: ignore
    with pytest.raises(InputError, match="at least 1 worker"):
        run_service(options)


def test_the_service_does_not_import_what_only_training_needs(tmp_path):
    script = (
        "import sys\nfrom esper.cli._serve import open_served\nimport esper.urza.service as s\n"
        "s.make_app(lambda: None, s.TokenFile(None))\n"
        "print(*sorted({m.partition('.')[0] for m in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert not {"torch", "optax", "orbax", "equinox", "flax", "matplotlib"} & set(
        done.stdout.split()
    )
