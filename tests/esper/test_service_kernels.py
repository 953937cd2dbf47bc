"""Kernels through the service: whole or not at all, in parts, by states and pages."""

import concurrent.futures
import hashlib
import json
import signal
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.artifacts import Artifact, rewrite_artifact
from esper.contracts import KernelQuery
from esper.urza import Library
from esper.urza.service import Scope
from esper.urza.service._problems import RefusedError
from esper.urza.service._ranges import asked_range
from tests.esper.cache_kernels import variant
from tests.esper.service_process import Serving
from tests.esper.service_thread import ServedLibrary

LIMITS = {"upload_bytes": 400_000, "cached_bytes": 100_000, "cache_bytes": 200_000}


@pytest.fixture(scope="module")
def service(tmp_path_factory) -> Iterator[Serving]:
    serving = Serving(tmp_path_factory.mktemp("kernels"), limits=LIMITS)
    yield serving
    serving.close()


@pytest.fixture(scope="module")
def large(artifact) -> Artifact:
    """A kernel that the service keeps in memory no more."""
    return rewrite_artifact(artifact, blueprint_name="large", torchscript=bytes(range(256)) * 800)


@pytest.fixture(scope="module", params=["small", "large"])
def kernel(request, service, artifact, large) -> Artifact:
    chosen = artifact if request.param == "small" else large
    assert service.upload(chosen.kernel_id, chosen.data).status in (200, 201)
    return chosen


def _artifact(kernel: Artifact) -> str:
    return f"/api/v1/kernels/{kernel.kernel_id}/artifact"


def test_a_kernel_is_uploaded_once_and_is_tested_first(service, artifact):
    kernel = variant(artifact, 1)
    path = f"/api/v1/kernels/{kernel.kernel_id}"
    first = service.upload(kernel.kernel_id, kernel.data, "?tag=a")
    assert (first.status, first.headers["location"]) == (201, path)
    assert (first.data["state"], first.data["tags"]) == ("testing", ["a"])
    again = service.upload(kernel.kernel_id, kernel.data, "?tag=b&state=deployed")
    assert (again.status, again.data["state"], again.data["tags"]) == (200, "testing", ["a", "b"])
    assert (
        service.upload(kernel.kernel_id, kernel.data, "?trusted=true").data["state"] == "validated"
    )
    assert service.ask("GET", path).data == service.upload(kernel.kernel_id, kernel.data).data
    trusted = variant(artifact, 2)
    assert (
        service.upload(trusted.kernel_id, trusted.data, "?trusted=true").data["state"]
        == "validated"
    )


def test_what_is_not_what_it_says_is_refused_and_leaves_nothing(service, artifact, tmp_path):
    kernel = variant(artifact, 3)
    before = set((service.library / "kernels").rglob("*"))
    other = service.upload("ab" * 32, kernel.data)
    assert (other.status, other.problem["error"]) == (422, "ArtifactError")
    assert f"have the SHA-256 {kernel.kernel_id}, expected {'ab' * 32}" in other.problem["detail"]
    for content in (b"", b"PK", b"x" * 5000, kernel.data[:-1], kernel.data + b"x"):
        name = hashlib.sha256(content).hexdigest()
        refused = service.upload(name, content)
        assert (refused.status, refused.problem["error"]) == (422, "ArtifactError")
        assert "is not a kernel artifact" in refused.problem["detail"]
        assert service.ask("GET", f"/api/v1/kernels/{name}").status == 404
    huge = service.upload("ab" * 32, bytes(400_001))
    assert (huge.status, huge.problem["error"]) == (413, "InputError")
    kind = service.upload(kernel.kernel_id, kernel.data, headers={"Content-Type": "text/plain"})
    assert kind.status == 415
    assert set((service.library / "kernels").rglob("*")) == before


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_an_upload_that_is_cut_leaves_nothing(service, artifact, share):
    kernel = variant(artifact, 4)
    sent = kernel.data[: int(share * len(kernel.data))]
    with service.raw() as raw:
        raw.sendall(
            f"PUT /api/v1/kernels/{kernel.kernel_id} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer"
            f" {service.tokens[Scope.WRITE]}\r\nContent-Type: application/octet-stream\r\n"
            f"Content-Length: {len(kernel.data)}\r\n\r\n".encode()
            + sent
        )
        time.sleep(0.1)
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    assert service.ask("GET", f"/api/v1/kernels/{kernel.kernel_id}").status == 404
    assert not list(service.library.rglob(f"*{kernel.kernel_id}*"))


def test_a_kernel_comes_whole_and_may_be_kept_for_ever(service, kernel):
    answer = service.ask("GET", _artifact(kernel), token=Scope.READ)
    assert (answer.status, answer.body) == (200, kernel.data)
    assert answer.headers["etag"] == f'"{kernel.kernel_id}"'
    assert answer.headers["cache-control"] == "private, max-age=31536000, immutable"
    assert answer.headers["accept-ranges"] == "bytes"
    head = service.ask("HEAD", _artifact(kernel))
    assert (head.status, head.body) == (200, b"")
    assert int(head.headers["content-length"]) == len(kernel.data)


@pytest.mark.parametrize("tag", ['"ID"', 'W/"ID"', "*", '"x", "ID"', '"a" ,W/"ID"'])
def test_who_has_a_kernel_is_not_sent_it_again(service, kernel, tag):
    headers = {"If-None-Match": tag.replace("ID", kernel.kernel_id)}
    answer = service.ask("GET", _artifact(kernel), headers=headers)
    assert (answer.status, answer.body) == (304, b"")
    assert answer.headers["etag"] == f'"{kernel.kernel_id}"'
    other = service.ask("GET", _artifact(kernel), headers={"If-None-Match": '"' + "0" * 64 + '"'})
    assert other.status == 200
    gone = service.ask(
        "GET", f"/api/v1/kernels/{'0' * 64}/artifact", headers={"If-None-Match": "*"}
    )
    assert gone.status == 404


@pytest.mark.parametrize(
    ("asked", "start", "end"),
    [("0-", 0, None), ("5-9", 5, 10), ("-7", -7, None), ("1000-99999999", 1000, None),
     ("0-0", 0, 1), ("-999999999", 0, None), (" 5 - 9 ", 5, 10)],
)  # fmt: skip
def test_a_part_is_that_part(service, kernel, asked, start, end):
    answer = service.ask("GET", _artifact(kernel), headers={"Range": f"bytes={asked}"})
    expected = kernel.data[start:end]
    assert (answer.status, answer.body) == (206, expected)
    first = start % len(kernel.data)
    told = f"bytes {first}-{first + len(expected) - 1}/{len(kernel.data)}"
    assert answer.headers["content-range"] == told


@pytest.mark.parametrize(
    "asked",
    ["bytes=9-5", "bytes=a-b", "bytes=-", "lines=0-5", "bytes=0-5,10-15", "bytes=" + "0-,"* 2000,
     "bytes=0x5-9", "bytes=٣-٩", "5-9", "bytes=--5", "bytes=1" + "0" * 40 + "-"],
)  # fmt: skip
def test_what_is_no_part_is_the_whole_once(service, kernel, asked):
    headers = {"Range": asked.encode().decode("latin-1")}
    answer = service.ask("GET", _artifact(kernel), headers=headers)
    assert (answer.status, len(answer.body)) == (200, len(kernel.data))


def test_a_part_beyond_the_end_is_refused_with_the_size(service, kernel):
    for asked in (f"{len(kernel.data)}-", "999999999-", "-0"):
        answer = service.ask("GET", _artifact(kernel), headers={"Range": f"bytes={asked}"})
        assert (answer.status, answer.problem["error"]) == (416, "InputError")
        assert answer.headers["content-range"] == f"bytes */{len(kernel.data)}"
    for condition, status in ((f'"{kernel.kernel_id}"', 206), ('"x"', 200), ("W/x", 200)):
        headers = {"Range": "bytes=1-", "If-Range": condition}
        assert service.ask("GET", _artifact(kernel), headers=headers).status == status


@given(asked=st.text(alphabet="0123456789-, =bytes", max_size=30), size=st.integers(0, 2000))
def test_any_range_is_a_part_of_the_content_or_all_of_it(asked, size):
    try:
        found = asked_range({"range": asked}, "0" * 64, size)
    except RefusedError:
        return
    if found is not None:
        start, end = found
        assert 0 <= start < end <= size


def test_what_was_removed_is_gone_at_once_for_whoever_removed_it(service, artifact):
    kernel = variant(artifact, 5)
    service.upload(kernel.kernel_id, kernel.data)
    assert service.ask("GET", _artifact(kernel)).status == 200
    assert service.ask("DELETE", f"/api/v1/kernels/{kernel.kernel_id}").status == 204
    for path in (_artifact(kernel), f"/api/v1/kernels/{kernel.kernel_id}"):
        answer = service.ask("GET", path)
        assert (answer.status, answer.problem["error"]) == (404, "KernelNotFoundError")
    assert service.ask("DELETE", f"/api/v1/kernels/{kernel.kernel_id}").status == 204


def test_an_answer_is_never_older_than_what_another_process_has_written(service, artifact):
    kernel = variant(artifact, 6)
    service.upload(kernel.kernel_id, kernel.data)
    path = f"/api/v1/kernels/{kernel.kernel_id}"
    beside = Library(service.library)
    for number in range(20):
        tag = f"t{number}"
        beside.tag(kernel.kernel_id, add=[tag])
        assert tag in service.ask("GET", path).data["tags"]
        assert kernel.kernel_id in service.ask("GET", f"/api/v1/kernels?tag={tag}").body.decode()
    assert service.ask("GET", _artifact(kernel)).status == 200
    beside.remove(kernel.kernel_id)
    beside.close()
    assert service.ask("GET", path).status == 404
    time.sleep(2.1)
    assert service.ask("GET", _artifact(kernel)).status == 404


def test_a_kernel_that_is_damaged_is_sent_as_it_is_and_never_remembered(service, artifact):
    kernel = variant(artifact, 7)
    service.upload(kernel.kernel_id, kernel.data)
    (file,) = service.library.rglob(f"*{kernel.kernel_id}*")
    file.write_bytes(kernel.data[:-1] + b"?")
    for _ in range(2):
        assert service.ask("GET", _artifact(kernel)).body == kernel.data[:-1] + b"?"
    service.upload(kernel.kernel_id, kernel.data)
    assert service.ask("GET", _artifact(kernel)).body == kernel.data


def test_a_large_kernel_that_is_too_short_is_cut_and_not_taken_for_whole(service, artifact):
    kernel = rewrite_artifact(artifact, blueprint_name="short", torchscript=b"ab" * 100_000)
    service.upload(kernel.kernel_id, kernel.data)
    (file,) = service.library.rglob(f"*{kernel.kernel_id}*")
    file.write_bytes(kernel.data[:-1000])
    import http.client

    with pytest.raises(http.client.IncompleteRead):
        service.ask("GET", _artifact(kernel))


def test_a_move_that_may_not_be_is_refused_with_those_that_may(service, artifact):
    kernel = variant(artifact, 8)
    service.upload(kernel.kernel_id, kernel.data)
    path = f"/api/v1/kernels/{kernel.kernel_id}/state"
    refused = service.ask("POST", path, data={"to": "deployed"})
    assert (refused.status, refused.problem["error"]) == (409, "IllegalTransitionError")
    assert refused.problem["legal_moves"] == ["validated", "invalid"]
    assert "it may become validated, invalid" in refused.problem["detail"]
    assert service.ask("POST", path, data={"to": "validated", "expected": "testing"}).status == 200
    other = service.ask("POST", path, data={"to": "invalid", "expected": "testing"})
    assert (other.status, other.problem["error"]) == (409, "ConflictError")
    source = json.dumps({"name": "b"}, sort_keys=True, indent=1)
    asked = {"source": source, "signature": {"input_shape": [2], "output_shape": [8]}}
    blueprint = service.ask("POST", "/api/v1/blueprints", data=asked).data["blueprint_id"]
    assert service.ask("POST", "/api/v1/blueprints", data=asked).data["blueprint_id"] == blueprint
    path = f"/api/v1/blueprints/{blueprint}/state"
    refused = service.ask("POST", path, data={"to": "validated"})
    assert (refused.status, refused.problem["legal_moves"]) == (409, ["compiling", "invalid"])


def test_pages_lead_to_one_another(service, artifact):
    made = {variant(artifact, number).kernel_id for number in range(20, 27)}
    for number in range(20, 27):
        kernel = variant(artifact, number)
        service.upload(kernel.kernel_id, kernel.data, "?tag=paged")
    path, found = "/api/v1/kernels?tag=paged&limit=3", []
    while True:
        answer = service.ask("GET", path)
        found += [each["kernel_id"] for each in answer.data["items"]]
        if answer.data["next_cursor"] is None:
            assert "link" not in answer.headers
            break
        link, _, relation = answer.headers["link"].partition("; ")
        assert relation == 'rel="next"'
        path = link.strip("<>")
        assert path.startswith("/api/v1/kernels?tag=paged&limit=3&cursor=")
    assert len(found) == len(made) == 7
    assert set(found) == made
    assert KernelQuery().limit == 100


def test_the_metrics_count_what_was_done_and_name_no_kernel(service, kernel):
    service.ask("GET", _artifact(kernel))
    text = service.ask("GET", "/metrics", token=Scope.READ).body.decode()
    route = 'route="/api/v1/kernels/{kernel_id}/artifact",status="200"'
    line = next(line for line in text.splitlines() if route in line and 'method="GET"' in line)
    assert float(line.rpartition(" ")[2]) >= 1
    assert kernel.kernel_id not in text
    assert "urza_request_seconds_bucket" in text
    assert service.ask("GET", "/metrics", token=None).status == 401


def test_uploads_that_wait_for_the_library_are_not_all_held_in_memory(tmp_path, artifact):
    begun, go = threading.Semaphore(0), threading.Event()

    class Slow(Library):
        def put(self, *given, **named):
            begun.release()
            go.wait(60)
            return super().put(*given, **named)

    kernels = [variant(artifact, number) for number in range(8)]
    library = ServedLibrary(lambda: Slow(tmp_path))
    with concurrent.futures.ThreadPoolExecutor() as threads:
        try:
            put = [threads.submit(library.put, kernel) for kernel in kernels]
            assert all(begun.acquire(timeout=60) for _ in range(4))
            # There are threads for more.
            assert not begun.acquire(timeout=0.5)
        finally:
            go.set()
        assert [each.result() for each in put] == [kernel.kernel_id for kernel in kernels]
    library.close()


def test_killed_in_the_middle_of_uploads_it_shows_no_half_kernel(tmp_path, artifact):
    service = Serving(tmp_path, limits=LIMITS)
    try:
        kernels = [variant(artifact, number) for number in range(12)]
        known = []
        for number, kernel in enumerate(kernels):
            if number % 4 == 3:
                with service.raw() as raw:
                    raw.sendall(
                        f"PUT /api/v1/kernels/{kernel.kernel_id} HTTP/1.1\r\nHost: x\r\n"
                        f"Authorization: Bearer {service.tokens[Scope.WRITE]}\r\nContent-Type:"
                        f" application/octet-stream\r\nContent-Length: {len(kernel.data)}\r\n\r\n"
                        "".encode()
                        + kernel.data[:20_000]
                    )
                    service.kill()
                service.start()
                assert service.ask("GET", f"/api/v1/kernels/{kernel.kernel_id}").status == 404
            elif service.upload(kernel.kernel_id, kernel.data).status == 201:
                known.append(kernel)
        assert len(known) == 9
        for kernel in known:
            assert service.ask("GET", _artifact(kernel)).body == kernel.data
        assert service.stop(signal.SIGTERM) == 0
    finally:
        service.close()
