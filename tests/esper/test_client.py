"""The client, before services that are killed, cut, slow, strange, and of other versions."""

import asyncio
import concurrent.futures
import http.server
import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
from pydantic import SecretStr

import esper
from esper.artifacts import Artifact, rewrite_artifact
from esper.cache import KernelCache
from esper.contracts import BlueprintQuery, BlueprintState, Claim, KernelQuery, KernelState
from esper.errors import (
    AccessDeniedError,
    CircuitBreakerOpenError,
    EsperError,
    InputError,
    KernelNotFoundError,
    LeaseLostError,
    LibraryError,
    SchemaVersionError,
    ServiceUnavailableError,
)
from esper.recovery import CircuitBreaker, RetryPolicy
from esper.urza import KernelLibrary, Library, open_library
from esper.urza.client import AsyncLibraryClient, LibraryClient
from esper.urza.client._library import Operations
from esper.urza.client._operation import operation, streamed
from esper.urza.service import Scope
from tests.esper.cache_kernels import variant
from tests.esper.service_process import Proxy, Serving
from tests.esper.service_thread import ServedLibrary
from tests.esper.urza_kinds import blueprint_request

QUICK = RetryPolicy(attempts=6, base_delay=0.05, max_delay=0.5, jitter=0.0)
ONCE = RetryPolicy(attempts=1)


@pytest.fixture(scope="module")
def service(tmp_path_factory) -> Iterator[Serving]:
    serving = Serving(tmp_path_factory.mktemp("client"), limits={"cached_bytes": 100_000})
    yield serving
    serving.close()


@pytest.fixture
def proxy(service) -> Iterator[Proxy]:
    carrying = Proxy(service.port)
    yield carrying
    carrying.close()


@pytest.fixture
def client(service, proxy) -> Iterator[LibraryClient]:
    made = LibraryClient(proxy.url, service.tokens[Scope.ADMIN], retry=QUICK, timeout=5.0)
    yield made
    made.close()


@pytest.fixture(scope="module")
def large(artifact) -> Artifact:
    return rewrite_artifact(artifact, blueprint_name="large", torchscript=bytes(range(256)) * 4000)


def test_both_clients_have_the_whole_library_written_once(service):
    methods = {name for name in vars(KernelLibrary) if not name.startswith("_")}
    assert methods <= set(vars(Operations))
    for name in methods:
        assert isinstance(vars(Operations)[name], operation | streamed), name
        for kind in (LibraryClient, AsyncLibraryClient):
            assert name not in vars(kind), f"{name} is written twice"
    with LibraryClient(service.url, service.tokens[Scope.READ]) as client:
        assert isinstance(client, KernelLibrary)
        assert client.record.__doc__ is not None


def test_it_stands_behind_the_cache_and_where_a_folder_may_stand(service, artifact):
    library = open_library(service.url, token=service.tokens[Scope.WRITE])
    kernel_id = library.put(artifact, tags=["cached"])
    cache = KernelCache(library=library)
    found = cache.load_kernel_sync(kernel_id)
    assert found is not None
    assert found.data == artifact.data
    assert cache.load_kernel_sync("0" * 64) is None
    cache.close()
    library.close()


def test_the_asynchronous_client_does_the_same(service, artifact):
    kernel = variant(artifact, 1)

    async def work() -> None:
        async with AsyncLibraryClient(service.url, service.tokens[Scope.ADMIN]) as client:
            kernel_id = await client.put(kernel, tags=["a"])
            assert (await client.record(kernel_id)).tags == ("a",)
            assert (await client.get(kernel_id)).data == kernel.data
            pieces = [piece async for piece in await client.iter_bytes(kernel_id, 5)]
            assert b"".join(pieces) == kernel.data[5:]
            pages = await asyncio.gather(
                *(client.search(KernelQuery(tags=("a",))) for _ in range(20))
            )
            assert {page.items[0].kernel_id for page in pages} == {kernel_id}
            with pytest.raises(KernelNotFoundError, match="holds no kernel"):
                await client.get("0" * 64)
            await client.remove(kernel_id)

    asyncio.run(work())


def test_errors_are_those_of_the_library_with_its_words(client, service, artifact):
    from esper.urza import Library

    embedded = Library(service.library)
    kernel_id = embedded.put(variant(artifact, 2))
    calls: list[Callable[[Any], object]] = [
        lambda library: library.record("0" * 64),
        lambda library: library.set_state(kernel_id, KernelState.TESTING),
        lambda library: library.set_state(
            kernel_id, KernelState.INVALID, expected=KernelState.TESTING
        ),
        lambda library: library.refer("run", ["0" * 64]),
        lambda library: library.blueprint("0" * 64),
        lambda library: library.search(KernelQuery(cursor="x")),
        lambda library: library.claim("worker", most=0),
        lambda library: library.tag(kernel_id, add=["a\nb"]),
    ]
    for call in calls:
        with pytest.raises(EsperError) as expected:
            call(embedded)
        with pytest.raises(EsperError) as found:
            call(client)
        assert (type(found.value), str(found.value)) == (type(expected.value), str(expected.value))
    embedded.close()


@pytest.mark.parametrize("token", [None, "x" * 40])
def test_who_may_not_is_told_so_and_no_token_is_shown(service, token):
    secret = token or "nothing"
    with LibraryClient(service.url, token, retry=QUICK) as client:
        with pytest.raises(AccessDeniedError, match="token") as refused:
            client.find()
        assert secret not in repr(client) + str(refused.value) + str(vars(client))
    reader = LibraryClient(service.url, SecretStr(service.tokens[Scope.READ]))
    with pytest.raises(AccessDeniedError, match="has the scope read, and this needs write"):
        reader.claim("worker")
    reader.close()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("lab:8420", "such as http://lab:8420"), ("ftp://lab", "got 'ftp://lab'"),
        ("http://", "such as"), ("http://lab:99999999", "no valid host or port"),
        ("http://lab/?a=b", "such as"), ("http://user:hunter2@lab", "holds a user or a password"),
        ("http://la b", "such as"),
    ],
)  # fmt: skip
def test_an_address_that_is_none(url, message):
    with pytest.raises(InputError, match=message) as refused:
        LibraryClient(url)
    assert "hunter2" not in str(refused.value)


def test_a_token_that_is_none_is_refused_unshown():
    for token in ("secret-with space", "secret\n", "secret\r\nX: y", "sécret"):
        with pytest.raises(InputError, match="without spaces or line breaks") as refused:
            LibraryClient("http://127.0.0.1:1", token)
        assert "cret" not in str(refused.value)


def test_the_settings_token_is_shown_to_the_library_that_they_name_alone(
    service, tmp_path, monkeypatch
):
    monkeypatch.setenv("ESPER_LIBRARY__WHERE", service.url + "/")
    monkeypatch.setenv("ESPER_LIBRARY__TOKEN", service.tokens[Scope.READ])
    with LibraryClient(service.url) as client:
        assert client.about().token == "read"
    monkeypatch.setenv("ESPER_LIBRARY__WHERE", "http://elsewhere:8420")
    with LibraryClient(service.url) as client, pytest.raises(AccessDeniedError, match="none came"):
        client.about()


@pytest.mark.parametrize("after", [0, 10, 300, 200_000])
def test_answers_that_are_cut_are_asked_for_again(client, proxy, large, after):
    kernel_id = client.put(large)
    proxy.cut_after, proxy.cuts = after, 3
    proxy.drop()
    if after < 1000:
        assert client.record(kernel_id).kernel_id == kernel_id
    else:
        assert client.get(kernel_id).data == large.data
    assert proxy.cuts == 0


def test_a_download_goes_on_where_it_was_cut(client, proxy, large):
    kernel_id = client.put(large)
    proxy.sent, proxy.cut_after, proxy.cuts = 0, 300_000, 3
    proxy.drop()
    assert client.get(kernel_id).data == large.data
    # Not all of it again and again: what had come was kept.
    assert proxy.sent < len(large.data) + 300_000
    proxy.sent, proxy.cuts = 0, 2
    proxy.drop()
    assert b"".join(client.iter_bytes(kernel_id, 1000)) == large.data[1000:]


def test_a_download_that_nobody_takes_leaves_its_connection_to_others(service, large):
    token = service.tokens[Scope.ADMIN]
    with LibraryClient(service.url, token, retry=ONCE, connections=1, timeout=5.0) as client:
        kernel_id = client.put(large)
        pieces = client.iter_bytes(kernel_id)
        pieces.close()
        assert list(pieces) == []
        del pieces
        client.iter_bytes(kernel_id)
        next(client.iter_bytes(kernel_id))
        assert client.record(kernel_id).kernel_id == kernel_id

    async def work() -> None:
        async with AsyncLibraryClient(
            service.url, token, retry=ONCE, connections=1, timeout=5.0
        ) as client:
            pieces = await client.iter_bytes(kernel_id)
            await pieces.aclose()
            assert [piece async for piece in pieces] == []
            await client.iter_bytes(kernel_id)
            await anext(await client.iter_bytes(kernel_id))
            assert (await client.record(kernel_id)).kernel_id == kernel_id

    asyncio.run(work())


def test_an_upload_that_is_cut_is_sent_again_and_is_there_once(client, proxy, artifact):
    kernel = rewrite_artifact(artifact, blueprint_name="cut", torchscript=b"ab" * 500_000)
    proxy.cut_requests_after, proxy.cuts = 400_000, 2
    proxy.drop()
    assert client.put(kernel, tags=["x"]) == kernel.kernel_id
    assert len(client.search(KernelQuery(blueprint="cut")).items) == 1
    assert client.get(kernel.kernel_id).data == kernel.data


def test_what_was_done_though_its_answer_was_lost_is_not_done_twice(client, proxy):
    client.submit(blueprint_request(900))
    (claim,) = client.claim("worker")
    # The answer is cut when the service has done its part.
    proxy.cut_after, proxy.cuts = 5, 1
    proxy.drop()
    back = client.give_back(claim)
    assert back.state.value == "unvalidated"
    (claim,) = client.claim("worker")
    proxy.cuts = 1
    proxy.drop()
    assert client.fail(claim, "does not fit").reason == "does not fit"
    # A claim is not asked for again: what it took waits for its lease to run out.
    client.submit(blueprint_request(901))
    proxy.cuts = 1
    proxy.drop()
    with pytest.raises(ServiceUnavailableError, match=r"cannot be reached: .*\(tried 1 times\)"):
        client.claim("worker", lease_seconds=0.2)
    time.sleep(0.3)
    (claim,) = client.claim("worker")
    assert (claim.blueprint.name, claim.attempt) == ("blueprint-901", 2)


def test_a_service_that_is_killed_and_comes_back_is_waited_for(tmp_path, artifact):
    service = Serving(tmp_path)
    patient = RetryPolicy(attempts=400, base_delay=0.5, factor=1.0, jitter=0.0)
    breaker = CircuitBreaker(1000, name="none")
    try:
        client = LibraryClient(
            service.url, service.tokens[Scope.WRITE], retry=patient, breaker=breaker, timeout=10.0
        )
        known = [client.put(variant(artifact, number)) for number in range(3)]
        done: list[str] = []

        def work() -> None:
            for number in range(3, 9):
                done.append(client.put(variant(artifact, number)))
                time.sleep(0.05)

        thread = threading.Thread(target=work)
        thread.start()
        time.sleep(0.1)
        service.kill()
        service.start()
        thread.join(240)
        assert len(done) == 6
        for kernel_id in known + done:
            assert client.get(kernel_id).kernel_id == kernel_id
        client.close()
    finally:
        service.close()


def test_a_service_that_is_away_is_left_alone_for_a_while(service, proxy):
    now = [0.0]
    breaker = CircuitBreaker(3, 5.0, half_open_max_calls=1, clock=lambda: now[0], name="it")
    client = LibraryClient(
        proxy.url, service.tokens[Scope.READ], retry=ONCE, breaker=breaker, timeout=2.0
    )
    proxy.refusing = True
    for _ in range(3):
        with pytest.raises(
            ServiceUnavailableError, match=f"library at {proxy.url} cannot be reach"
        ):
            client.find()
    asked = proxy.connections
    with pytest.raises(CircuitBreakerOpenError, match="none is made for another 5.0 s"):
        client.find()
    assert proxy.connections == asked
    proxy.refusing = False
    now[0] = 6.0
    assert isinstance(client.find(), list)
    # An answer that says no is an answer.
    for _ in range(5):
        with pytest.raises(KernelNotFoundError):
            client.record("0" * 64)
    assert breaker.state.value == "closed"
    client.close()


def test_a_service_that_does_not_answer_is_not_waited_for_longer_than_agreed(service, proxy):
    client = LibraryClient(proxy.url, service.tokens[Scope.READ], retry=ONCE, timeout=0.3)
    proxy.silent = True
    with pytest.raises(ServiceUnavailableError, match=r"tried 1 times.*Check its address"):
        client.find()
    proxy.silent = False
    assert isinstance(client.find(), list)
    client.close()


def test_nothing_listens():
    with (
        LibraryClient("http://127.0.0.1:1", "x" * 30, retry=ONCE) as client,
        pytest.raises(ServiceUnavailableError, match="http://127.0.0.1:1 cannot be reached"),
    ):
        client.find()


class _Strange(http.server.BaseHTTPRequestHandler):
    url: ClassVar[str]
    answers: ClassVar[list[tuple[int, dict[str, str], bytes]]] = []
    asked: ClassVar[list[dict[str, str]]] = []

    def do_GET(self) -> None:
        self.asked.append({name.lower(): value for name, value in self.headers.items()})
        status, headers, body = self.answers.pop(0) if self.answers else (200, {}, b"{}")
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()

    def log_message(self, *what: object) -> None:
        pass


@pytest.fixture
def strange() -> Iterator[type[_Strange]]:
    """Something else that answers, as it is told."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Strange)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    _Strange.answers, _Strange.asked = [], []
    _Strange.url = f"http://127.0.0.1:{server.server_port}"
    yield _Strange
    server.shutdown()
    thread.join()
    server.server_close()


def _problem(status: int, error: str, detail: str = "why") -> bytes:
    return json.dumps(
        {"type": "x", "title": "x", "status": status, "error": error, "detail": detail}
    ).encode()


def test_what_answers_and_is_no_library_is_told_apart(strange):
    client = LibraryClient(strange.url, "x" * 30, retry=QUICK)
    strange.answers = [(200, {}, b"<html>")]
    with pytest.raises(LibraryError, match="answered is no About"):
        client.about()
    strange.answers = [(404, {"Content-Type": "text/html"}, b"<html>")]
    with pytest.raises(InputError, match=r"no library of Esper's: 404 with text/html came"):
        client.about()
    strange.answers = [(302, {"Location": "http://elsewhere/"}, b"")]
    with pytest.raises(InputError, match=r"leads to 'http://elsewhere/'.*the token is sent to no"):
        client.about()
    assert len(strange.asked) == 3
    strange.answers = [(502, {"Content-Type": "text/html"}, b"<html>")] * 9
    with pytest.raises(ServiceUnavailableError, match="what stands before it"):
        client.about()
    assert len(strange.asked) == 3 + QUICK.attempts
    strange.answers = [(418, {}, _problem(418, "KeyboardInterrupt"))]
    with pytest.raises(LibraryError, match="^why$"):
        client.about()
    client.close()


def test_an_error_of_a_download_that_is_cut_is_asked_for_again(strange):
    client = LibraryClient(strange.url, "x" * 30, retry=RetryPolicy(attempts=2, base_delay=0.0))
    gone = _problem(404, "KernelNotFoundError", "holds no kernel")
    cut = (404, {"Content-Length": "1000"}, gone)
    strange.answers = [cut, (404, {}, gone)]
    with pytest.raises(KernelNotFoundError, match="holds no kernel"):
        client.read_bytes("0" * 64)
    strange.answers = [cut, cut]
    with pytest.raises(ServiceUnavailableError, match=r"cannot be reached.*\(tried 2 times\)"):
        client.read_bytes("0" * 64)
    client.close()


def test_another_version_is_told(strange):
    client = LibraryClient(strange.url, "x" * 30, retry=QUICK)
    newer = {"Esper-Version": "99.1"}
    about = {"esper": "99.1", "token": "t", "scope": "read"}
    strange.answers = [(200, newer, json.dumps({"schema_version": 2, **about}).encode())]
    told = f"The service is Esper 99.1, and this is Esper {esper.__version__}: update the older"
    with pytest.raises(SchemaVersionError, match=f"has schema version 2.*{told}"):
        client.about()
    strange.answers = [(404, newer, _problem(404, "InputError", "nothing at 'GET /x'"))]
    with pytest.raises(InputError, match=f"nothing at .*{told}"):
        client.about()
    strange.answers = [(422, {"Esper-Version": esper.__version__}, _problem(422, "InputError"))]
    with pytest.raises(InputError, match="^why$"):
        client.about()
    client.close()


def test_a_service_that_asks_for_time_is_given_it(strange):
    client = LibraryClient(strange.url, "x" * 30, retry=RetryPolicy(attempts=2, base_delay=0.0))
    busy = _problem(429, "ServiceUnavailableError", "come again")
    good = json.dumps({"esper": "1", "token": "t", "scope": "read"}).encode()
    strange.answers = [(429, {"Retry-After": "1"}, busy), (200, {}, good)]
    began = time.monotonic()
    assert client.about().token == "t"
    assert time.monotonic() - began >= 1.0
    strange.answers = [(503, {"Retry-After": "86400"}, busy)]
    with pytest.raises(ServiceUnavailableError, match="come again"):
        client.about()
    assert len(strange.asked) == 3
    assert strange.asked[0]["user-agent"] == f"esper/{esper.__version__}"
    assert strange.asked[0]["authorization"] == "Bearer " + "x" * 30
    client.close()


@pytest.mark.parametrize("status", [502, 503, 504])
def test_what_may_not_be_repeated_is_asked_once_where_it_may_have_been_done(strange, status):
    client = LibraryClient(strange.url, "x" * 30, retry=QUICK)
    away = (status, {}, _problem(status, "ServiceUnavailableError", "gave up"))
    for ask in (lambda: client.claim("worker"), lambda: client.make_token("alice", "read")):
        strange.answers, strange.asked[:] = [away], []
        with pytest.raises(ServiceUnavailableError, match="gave up"):
            ask()
        assert len(strange.asked) == 1
    # Whoever is told to come again was not let in.
    busy = (429, {}, _problem(429, "ServiceUnavailableError", "come again"))
    strange.answers, strange.asked[:] = [busy, (200, {}, b'{"claims": []}')], []
    assert client.claim("worker") == []
    assert len(strange.asked) == 2
    client.close()


@pytest.mark.parametrize("status", [502, 503, 504])
def test_what_was_not_begun_is_asked_again_whatever_a_newer_service_says_besides(strange, status):
    told = json.loads(_problem(status, "ServiceUnavailableError"))
    busy = (status, {}, json.dumps(told | {"begun": False, "of a newer one": [1]}).encode())
    client = LibraryClient(strange.url, "x" * 30, retry=QUICK)
    strange.answers = [busy, busy, (200, {}, b'{"claims": []}')]
    assert client.claim("worker") == []
    assert len(strange.asked) == 3
    begun = (status, {}, json.dumps(told | {"begun": True}).encode())
    strange.answers, strange.asked[:] = [busy, begun], []
    with pytest.raises(ServiceUnavailableError, match="^why$"):
        client.claim("worker")
    assert len(strange.asked) == 2
    client.close()


def test_claims_and_tokens_that_a_service_turned_away_are_asked_for_again(service):
    tokens = service.token_file.read_bytes()
    already = service.errors().count("cannot be read")
    with (
        LibraryClient(service.url, service.tokens[Scope.ADMIN], retry=QUICK) as client,
        concurrent.futures.ThreadPoolExecutor(2) as threads,
    ):
        client.submit(blueprint_request(903, priority=9))
        service.token_file.write_text("no tokens")
        try:
            claiming = threads.submit(client.claim, "worker")
            making = threads.submit(client.make_token, "turned-away", "read")
            for _ in range(1000):
                if service.errors().count("cannot be read") >= already + 2:
                    break
                time.sleep(0.01)
        finally:
            service.token_file.write_bytes(tokens)
        (claim,) = claiming.result()
        assert (claim.blueprint.name, claim.attempt) == ("blueprint-903", 1)
        with LibraryClient(service.url, making.result()) as made:
            assert made.about().token == "turned-away"
        client.fail(claim, "does not fit")


def test_a_claim_that_ended_though_the_service_gave_up_on_it_is_not_lost(client, strange):
    record = client.submit(blueprint_request(902, priority=9))
    (claim,) = client.claim("worker")
    asking = LibraryClient(strange.url, "x" * 30, retry=QUICK)
    lost = (409, {}, _problem(409, "LeaseLostError", "is somebody else's"))
    strange.answers = [
        (504, {}, _problem(504, "ServiceUnavailableError")), lost,
        (200, {}, record.model_dump_json().encode()),
    ]  # fmt: skip
    assert asking.fail(claim, "does not fit") == record
    # Who came too often has done nothing: the lease is lost to somebody else.
    strange.answers = [(429, {}, _problem(429, "ServiceUnavailableError")), lost]
    with pytest.raises(LeaseLostError, match="somebody else's"):
        asking.fail(claim, "does not fit")
    asking.close()
    client.fail(claim, "does not fit")


class _Late(Library):
    """A library whose claims are made at once, and told late."""

    told = threading.Event()

    def claim(self, worker: str, *, most: int = 1, lease_seconds: float = 60.0) -> list[Claim]:
        claims = super().claim(worker, most=most, lease_seconds=lease_seconds)
        self.told.wait(60)
        return claims


def test_claims_whose_answer_comes_too_late_are_given_back(tmp_path, monkeypatch):
    monkeypatch.setattr("esper.urza.service._state.ANSWER_SECONDS", 1.0)
    place = tmp_path / "late"
    _Late.told.clear()
    with ServedLibrary(lambda: _Late(place), place / "library.sqlite", retry=QUICK) as library:
        for number in range(3):
            library.submit(blueprint_request(number))
        waiting = BlueprintQuery(states=(BlueprintState.UNVALIDATED,))
        try:
            with pytest.raises(ServiceUnavailableError, match="did not answer within"):
                library.claim("worker", lease_seconds=3600.0)
            assert len(library.blueprints(waiting).items) == 2
        finally:
            _Late.told.set()
        for _ in range(200):
            found = library.blueprints(waiting).items
            if len(found) == 3:
                break
            time.sleep(0.02)
        assert [each.attempts for each in found] == [0, 0, 0]
        (claim,) = library.claim("worker")
        assert claim.attempt == 1


def test_waits_are_drawn_between_nothing_and_the_policy(service):
    policy = RetryPolicy(attempts=9, base_delay=1.0, factor=2.0, max_delay=8.0)
    draws = [
        LibraryClient(service.url, "x" * 30, retry=policy, draws=random.Random(seed))
        ._exchange.delays()
        for seed in range(200)
    ]  # fmt: skip
    for most in (1.0, 2.0, 4.0, 8.0, 8.0):
        waits = [next(each) for each in draws]
        assert all(0.0 <= wait <= most for wait in waits)
        assert min(waits) < 0.1 * most
        assert max(waits) > 0.9 * most


def test_pages_of_blueprints_come_through(client):
    client.submit(blueprint_request(950, tags=("paged",)))
    (found,) = client.blueprints(BlueprintQuery(tags=("paged",), limit=1)).items
    assert found.name == "blueprint-950"


def test_httpx_is_imported_by_who_makes_a_client_alone():
    script = (
        "import sys, esper.urza, esper.urza.client\n"
        "before = 'httpx' in sys.modules\n"
        "esper.urza.client.LibraryClient('http://lab')\n"
        "print(before, 'httpx' in sys.modules, 'fastapi' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "True", "False"]
    missing = (
        "import sys\nsys.modules['httpx'] = None\n"
        "from esper.urza.client import LibraryClient\nLibraryClient('http://lab')"
    )
    done = subprocess.run(
        [sys.executable, "-c", missing], capture_output=True, text=True, check=False
    )
    assert "pip install 'esper-morphogenetic[client]'" in done.stderr
