"""Who is let in, for what, and what is turned away before anything is done for it."""

import gzip
import json
import re
import time
import zlib
from collections.abc import Iterator

import pytest

from esper.errors import InputError
from esper.urza.service import Scope, TokenFile, make_app
from esper.urza.service._app import routes_of
from esper.urza.service._gate import GuardedRoute, needs, needs_of
from tests.esper.service_process import Serving

ID = "0" * 64
ROUTES = [
    (method, route.path, needs_of(route))
    for route in routes_of(make_app(lambda: None, TokenFile(None)))
    for method in sorted(route.methods)
]
OPEN = {"/healthz", "/readyz", "/api/v1/openapi.json"}
GUARDED = [(method, path, need) for method, path, need in ROUTES if need.scope is not None]


def _path(path: str) -> str:
    return re.sub(r"\{\w+\}", ID, path)


@pytest.fixture(scope="module")
def service(tmp_path_factory) -> Iterator[Serving]:
    serving = Serving(tmp_path_factory.mktemp("gate"), limits={"body_bytes": 20_000, "rate": 1e5})
    yield serving
    serving.close()


def test_every_endpoint_says_what_it_needs_and_only_three_are_open():
    assert {path for _, path, need in ROUTES if need.scope is None} == OPEN
    assert len(GUARDED) > 30
    writes = {(m, p) for m, p, need in GUARDED if need.scope is Scope.READ}
    assert all(method in ("GET", "HEAD") for method, _ in writes)

    async def forgotten() -> None: ...

    with pytest.raises(TypeError, match="the endpoint /x does not say what it needs"):
        GuardedRoute("/x", forgotten)
    needs(Scope.READ)(forgotten)
    assert needs_of(GuardedRoute("/x", forgotten)).scope is Scope.READ


@pytest.mark.parametrize(("method", "path", "need"), GUARDED, ids=lambda each: str(each)[:40])
def test_nobody_gets_in_without_a_token_that_allows_it(service, method, path, need):
    secret = service.tokens[Scope.ADMIN]
    wrong = [None, "x" * 40, secret[:-1], secret + "A", secret.swapcase(), ID]
    for token in wrong:
        answer = service.ask(method, _path(path), token=token)
        assert answer.status == 401, (token, answer.body)
        assert answer.headers["www-authenticate"].startswith('Bearer realm="esper"')
        assert "esper-version" not in answer.headers
        if method != "HEAD":
            assert answer.problem["error"] == "AccessDeniedError"
            assert secret[:10] not in answer.body.decode()
    for value in ("", "Bearer", "Bearer  ", f"Basic {secret}", secret, f"Bearer{secret}"):
        answer = service.ask(method, _path(path), token=None, headers={"Authorization": value})
        assert answer.status == 401, value
    for scope in Scope:
        answer = service.ask(method, _path(path), token=scope, headers={"Content-Type": "text/x"})
        if scope.allows(need.scope):
            assert answer.status not in (401, 403), answer.body
            continue
        assert answer.status == 403
        if method != "HEAD":
            assert answer.problem["error"] == "AccessDeniedError"
            expected = f"the token '{scope.value}' has the scope {scope.value}, and this needs"
            assert answer.problem["detail"].startswith(f"{expected} {need.scope.value}")


def test_what_is_refused_changes_nothing(service, artifact):
    for token in (None, Scope.READ):
        answer = service.ask(
            "PUT", f"/api/v1/kernels/{artifact.kernel_id}", token=token, body=artifact.data,
            headers={"Content-Type": "application/octet-stream"},
        )  # fmt: skip
        assert answer.status == (401 if token is None else 403)
    assert service.ask("GET", "/api/v1/kernels").data["items"] == []
    assert service.ask("POST", "/api/v1/tokens", token=Scope.WRITE,
                       data={"name": "mine", "scope": "admin"}).status == 403  # fmt: skip
    names = [each["name"] for each in service.ask("GET", "/api/v1/tokens").data["tokens"]]
    assert names == ["read", "write", "admin"]


def test_an_answer_that_is_remembered_is_given_to_no_other(service):
    path = "/api/v1/kernels?limit=17"
    secret, _ = TokenFile(service.token_file).make("brief", Scope.READ)
    first = service.ask("GET", path, token=secret)
    assert service.ask("GET", path, token=secret).body == first.body
    TokenFile(service.token_file).revoke("brief")
    for token in (secret, None, "x" * 40):
        assert service.ask("GET", path, token=token).status == 401
    assert service.ask("GET", f"{path}&x=1", token=Scope.READ).status == 422


def test_an_admin_makes_tokens_and_revokes_them_and_they_are_told_once(service):
    made = service.ask("POST", "/api/v1/tokens", data={"name": "new", "scope": "read"})
    assert made.status == 201
    secret = made.data["token"]
    assert service.ask("GET", "/api/v1/about", token=secret).data["token"] == "new"
    listed = service.ask("GET", "/api/v1/tokens")
    assert secret not in listed.body.decode()
    assert "sha256" not in listed.body.decode()
    again = service.ask("POST", "/api/v1/tokens", data={"name": "new", "scope": "read"})
    assert (again.status, again.problem["error"]) == (409, "ConflictError")
    assert service.ask("DELETE", "/api/v1/tokens/new").status == 204
    assert service.ask("GET", "/api/v1/about", token=secret).status == 401
    gone = service.ask("DELETE", "/api/v1/tokens/new")
    assert (gone.status, gone.problem["error"]) == (404, "InputError")
    late = TokenFile(service.token_file).make("late", Scope.READ, expires=time.time() - 1)[0]
    assert service.ask("GET", "/api/v1/about", token=late).status == 401
    TokenFile(service.token_file).revoke("late")


def test_an_unknown_parameter_is_refused_and_the_known_ones_named(service):
    answer = service.ask("GET", "/api/v1/kernels?blueprints=x")
    assert answer.status == 422
    assert answer.problem["error"] == "InputError"
    assert "'blueprints' is unknown: known are signature, blueprint," in answer.problem["detail"]
    assert "max_flops" in answer.problem["known"]
    twice = service.ask("GET", "/api/v1/kernels?limit=1&limit=2")
    assert "'limit' came twice, and has one value" in twice.problem["detail"]
    assert (
        service.ask("GET", "/api/v1/kernels?tag=a&tag=b&state=testing&state=invalid").status == 200
    )
    none = service.ask("GET", "/api/v1/about?x=1")
    assert none.problem["detail"] == "the parameter 'x' is unknown: there is none here"


@pytest.mark.parametrize(
    "query",
    [
        "limit=0", "limit=1001", "limit=x", "limit=", "state=gone", "order=size", "recipe=xyz",
        "signature=2-8", "signature=0->1", "max_flops=-1", "min_gain=nan", "min_gain=inf",
        "cursor=%00", "cursor=nonsense", "tag=", "blueprint=%00", "platform=" + "x" * 201,
    ],
)  # fmt: skip
def test_a_parameter_that_is_none_is_refused(service, query):
    answer = service.ask("GET", f"/api/v1/kernels?{query}")
    assert answer.status == 422, answer.body
    assert answer.problem["error"] == "InputError"


@pytest.mark.parametrize(
    "name",
    [
        "..", "../../etc/passwd", "..%2f..%2fetc%2fpasswd", "%2e%2e%2f%2e%2e", "....//", "%00",
        "%0a", ID[:-1], ID + "0", "A" * 64, ID + "%0a", ID + "/../" + ID, "..%5c..", "~", "%ff",
        "%d9%a1" * 64,
    ],
)  # fmt: skip
@pytest.mark.parametrize("part", ["", "/artifact", "/references"])
def test_an_id_is_64_digits_and_no_way_to_elsewhere(service, name, part):
    path = f"/api/v1/kernels/{name}{part}"
    for method in ("GET", "DELETE" if part == "" else "GET"):
        answer = service.ask(method, path)
        assert answer.status in (404, 405, 422), answer.body
        assert answer.problem["error"] in ("InputError", "KernelNotFoundError")
        assert b"root:" not in answer.body


def test_a_request_has_a_number_which_is_the_clients_where_that_can_be_shown(service):
    assert service.ask("GET", "/healthz", headers={"X-Request-ID": "run-7.b"}).headers[
        "x-request-id"
    ] == "run-7.b"  # fmt: skip
    for bad in ("a b", "x" * 65, "<script>", ""):
        made = service.ask("GET", "/nothing", headers={"X-Request-ID": bad}).headers["x-request-id"]
        assert re.fullmatch("[0-9a-f]{32}", made)


def test_no_answer_tells_what_serves_it(service):
    for path in ("/healthz", "/nothing", "/api/v1/kernels", "/api/v1/openapi.json"):
        for token in (None, Scope.READ):
            assert "server" not in service.ask("GET", path, token=token).headers


def test_what_there_is_not_and_what_may_not_be_done_with_what_there_is(service):
    missing = service.ask("GET", "/api/v2/kernels")
    assert (missing.status, missing.problem["error"]) == (404, "InputError")
    assert "has nothing at 'GET /api/v2/kernels'" in missing.problem["detail"]
    for method in ("PATCH", "POST", "OPTIONS", "TRACE", "NONSENSE"):
        answer = service.ask(method, f"/api/v1/kernels/{ID}")
        assert answer.status == 405
        assert answer.headers["allow"] == "DELETE, GET, HEAD, PUT"


def test_bodies_are_taken_as_they_are_and_not_unpacked(service):
    bomb = gzip.compress(bytes(50 << 20))
    data = json.dumps({"worker": "w"}).encode()
    kind = {"Content-Type": "application/json"}
    for coding, body in (
        ("gzip", gzip.compress(data)), ("deflate", zlib.compress(data)), ("br", data),
        ("gzip, gzip", b""),
    ):  # fmt: skip
        headers = kind | {"Content-Encoding": coding}
        answer = service.ask("POST", "/api/v1/claims", body=body, headers=headers)
        assert answer.status == 415
        assert "without Content-Encoding" in answer.problem["detail"]
    answer = service.upload(ID, bomb, headers={"Content-Encoding": "gzip"})
    assert (answer.status, answer.problem["error"]) == (415, "InputError")
    # Without the header it is bytes, of which the digest is another one.
    assert service.upload(ID, bomb).problem["error"] == "ArtifactError"
    plain = service.ask("GET", "/api/v1/kernels", headers={"Accept-Encoding": "gzip, br"})
    assert "content-encoding" not in plain.headers
    assert service.ask("POST", "/api/v1/claims", data={"worker": "w"},
                       headers={"Content-Encoding": "identity"}).status == 200  # fmt: skip


def test_a_body_that_is_too_large_is_refused_told_or_not(service):
    large = json.dumps({"worker": "w" * 30_000}).encode()
    kind = {"Content-Type": "application/json"}
    told = service.ask("POST", "/api/v1/claims", body=large, headers=kind)
    assert told.status == 413
    assert told.problem["detail"] == f"the body has {len(large)} bytes, and may have at most 20000"
    chunked = iter([large[:10_000], large[10_000:]])
    untold = service.ask("POST", "/api/v1/claims", body=chunked, headers=kind)  # pyright: ignore
    assert untold.status == 413
    assert "more than 20000 bytes" in untold.problem["detail"]
    with service.raw() as raw:
        head = f"Authorization: Bearer {service.tokens[Scope.WRITE]}\r\nContent-Length: {10**30}"
        raw.sendall(f"POST /api/v1/claims HTTP/1.1\r\nHost: x\r\n{head}\r\n\r\n".encode())
        assert raw.recv(1000).split()[1] in (b"413", b"400")


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"", "no ClaimRequest"), (b"[]", "no ClaimRequest"), (b"{", "no ClaimRequest"),
        (b'{"worker": "w", "most": false}', "most: Input should be a valid integer"),
        (b'{"worker": "w", "most": "1"}', "most: Input should be a valid integer"),
        (b'{"worker": "w", "lease_seconds": NaN}', "lease_seconds"),
        (b'{"worker": "w", "lease_seconds": 1e999}', "lease_seconds"),
        (b'{"worker": "w", "more": 1}', "more: Extra inputs are not permitted"),
        (b'{"worker": "w\\u0000"}', "worker"), (b"[" * 9000 + b"]" * 9000, "ClaimRequest"),
        (b'\xff\xfe', "ClaimRequest"),
        (b'{"worker": "w", "most": 1' + b"0" * 5000 + b"}", "out of range"),
    ],
)  # fmt: skip
def test_a_malformed_body_is_refused_with_what_is_wrong(service, body, expected):
    answer = service.ask(
        "POST", "/api/v1/claims", body=body, headers={"Content-Type": "application/json"}
    )
    assert answer.status == 422, answer.body
    assert answer.problem["error"] == "InputError"
    assert expected in answer.problem["detail"]


def test_a_newer_clients_data_is_refused_by_its_version(service):
    answer = service.ask("POST", "/api/v1/claims", data={"schema_version": 9, "worker": "w"})
    assert (answer.status, answer.problem["error"]) == (422, "SchemaVersionError")
    assert "has schema version 9" in answer.problem["detail"]
    kind = service.ask("POST", "/api/v1/claims", body=b"{}", headers={"Content-Type": "text/plain"})
    assert kind.status == 415
    assert "expected a ClaimRequest as application/json" in kind.problem["detail"]


def test_heads_that_are_none_are_refused_and_the_service_goes_on(service):
    for head in (
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100),
        b"GET /healthz HTTP/1.1\r\nHost: x\r\n" + b"X: " + b"y" * 200_000 + b"\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"POST /api/v1/claims HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    ):
        with service.raw() as raw:
            raw.sendall(head)
            answer = raw.recv(1000)
            assert answer[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 505", b""), answer
    assert service.ask("GET", "/healthz").status == 200


def test_the_description_tells_of_every_endpoint_its_scope_and_its_problems(service):
    text = service.ask("GET", "/api/v1/openapi.json", token=None).data
    for method, path, need in ROUTES:
        if path == "/api/v1/openapi.json" or method == "HEAD":
            continue
        operation = text["paths"][path][method.lower()]
        assert operation.get("x-scope") == (None if need.scope is None else need.scope.value)
        assert {"4XX", "5XX"} <= set(operation["responses"])
        assert ("requestBody" in operation) == (need.body is not None or need.upload)
    references = re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(text))
    assert set(references) <= set(text["components"]["schemas"])


def test_one_token_may_not_ask_more_often_than_is_agreed(tmp_path):
    service = Serving(tmp_path, limits={"rate": 2.0, "burst": 3.0})
    try:
        answers = [service.ask("GET", "/api/v1/about", token=Scope.READ) for _ in range(5)]
        refused = [answer for answer in answers if answer.status == 429]
        assert answers[0].status == 200
        assert refused
        assert refused[0].problem["error"] == "ServiceUnavailableError"
        assert "asks more than 2 times a second" in refused[0].problem["detail"]
        assert int(refused[0].headers["retry-after"]) >= 1
        assert service.ask("GET", "/api/v1/about", token=Scope.WRITE).status == 200
        assert service.ask("GET", "/healthz", token=None).status == 200
    finally:
        service.close()


def test_a_service_that_nobody_could_ask_does_not_start(tmp_path):
    from esper.urza.service import ServiceOptions, serve

    options = ServiceOptions(lambda: None, token_file=tmp_path / "tokens.json")  # pyright: ignore
    with pytest.raises(InputError, match="nobody has a token, so nobody could ask"):
        serve(options)
