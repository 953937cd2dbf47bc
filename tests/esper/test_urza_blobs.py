"""Files of libraries: on servers that check who asks, and under puts, removals and kills."""

import contextlib
import http.client
import http.server
import itertools
import logging
import random
import signal
import subprocess
import sys
import threading
import time
import urllib.parse

import obstore
import pytest

from esper.artifacts import Artifact
from esper.contracts import KernelState, RetentionPolicy
from esper.errors import (
    AccessDeniedError,
    InputError,
    KernelNotFoundError,
    LibraryError,
    ServiceUnavailableError,
)
from esper.urza import Library, S3Access
from esper.urza._blobs import blob_name, open_blobs
from esper.urza._kernels import _MOST_PLATFORMS, _PLATFORMS, _platforms
from tests.esper.cache_kernels import variant
from tests.esper.servers import free_port
from tests.esper.urza_kinds import Clock, make_place

ALL = tuple(KernelState)


def connect(tmp_path, url, options, **changes):
    database = f"sqlite:///{tmp_path}/library.sqlite"
    return Library.connect(database, url, s3=S3Access(**{**options, **changes}))


def test_a_library_behind_a_server_that_checks_signatures(
    tmp_path, signed_s3_server, signed_s3_url, artifact
):
    library = connect(tmp_path, signed_s3_url, signed_s3_server.options)
    kernel_id = library.put(artifact)
    # It ignores that a put is only to create, and answers no ranges.
    library.put(artifact)
    assert library.get(kernel_id).data == artifact.data
    for start in (0, 1, 1_000, len(artifact.data)):
        assert b"".join(library.iter_bytes(kernel_id, start)) == artifact.data[start:]
    assert library.unlisted() == []
    library.check()
    files = list(signed_s3_server.folder.rglob("*.kernel"))
    assert [p.read_bytes() for p in files] == [artifact.data]
    signed_s3_server.kill()
    try:
        with pytest.raises(ServiceUnavailableError, match="cannot be read from .*Try again"):
            library.get(kernel_id)
        assert len(library.find()) == 1
    finally:
        signed_s3_server.start()
    assert library.get(kernel_id).data == artifact.data
    library.remove(kernel_id)
    assert not list(signed_s3_server.folder.rglob("*.kernel"))
    with pytest.raises(KernelNotFoundError):
        library.get(kernel_id)
    library.close()


@pytest.mark.parametrize("wrong", [{"secret_access_key": "hush"}, {"access_key_id": "nobody"}])
def test_a_wrong_key_is_told_of_and_not_shown(tmp_path, signed_s3_server, signed_s3_url, wrong):
    options = {**signed_s3_server.options, **wrong}
    with pytest.raises(InputError, match="refuses the bucket .*not know the key or its sec") as e:
        connect(tmp_path, signed_s3_url, options)
    assert options["secret_access_key"] not in str(e.value)
    assert options["secret_access_key"] not in repr(S3Access(**options))


def test_a_key_that_is_refused_later(tmp_path, signed_s3_server, signed_s3_url, artifact):
    library = connect(tmp_path, signed_s3_url, signed_s3_server.options)
    known = open_blobs(signed_s3_url, s3=S3Access(**signed_s3_server.options))
    known._store = obstore.store.S3Store(
        signed_s3_url.split("/")[2],
        client_options={"allow_http": True},
        **{**signed_s3_server.options, "secret_access_key": "hush"},
    )
    library._kernels._blobs = known
    with pytest.raises(AccessDeniedError, match="Check the name and the secret") as caught:
        library.put(artifact)
    assert "hush" not in str(caught.value)
    assert library.find() == []
    library.close()


def test_a_bucket_that_is_not_there(tmp_path, s3_options, signed_s3_server):
    for options in (s3_options, signed_s3_server.options):
        with pytest.raises(
            InputError, match="there is no bucket 'no-such-bucket' at http://.*: make it first, or"
        ):
            connect(tmp_path, "s3://no-such-bucket/lab", options)


def test_a_server_of_files_that_is_not_there(tmp_path, s3_options):
    endpoint = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(ServiceUnavailableError, match="the bucket 'lab' at http.*Try again later"):
        connect(tmp_path, "s3://lab", s3_options, endpoint=endpoint)


@pytest.mark.parametrize("where", ["gs://bucket/x", "s3://", "s3://A_B/x", "s3:///x", "http://a/b"])
def test_places_where_no_files_can_be_kept(tmp_path, where):
    with pytest.raises(InputError, match="expected a folder, or s3://BUCKET/FOLDER"):
        Library.connect(f"sqlite:///{tmp_path}/library.sqlite", where)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be used for kernels: .*that can be written"):
        Library.connect(f"sqlite:///{tmp_path}/library.sqlite", tmp_path / "file" / "kernels")


class _Unconditional(http.server.BaseHTTPRequestHandler):
    """Passes on what it is asked, but knows no conditions of a put."""

    target = ("", 0)
    protocol_version = "HTTP/1.1"

    def _pass_on(self):
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if "If-None-Match" in self.headers:
            answer = b"<Error><Code>NotImplemented</Code></Error>"
            return self._answer(501, [("Content-Length", str(len(answer)))], answer)
        with contextlib.closing(http.client.HTTPConnection(*self.target, timeout=60)) as onwards:
            headers = dict(self.headers.items())
            onwards.request(self.command, self.path, body=data, headers=headers)
            found = onwards.getresponse()
            return self._answer(found.status, found.getheaders(), found.read())

    def _answer(self, status, headers, body):
        self.send_response(status)
        for name, value in headers:
            if name.lower() != "connection":
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass_on  # noqa: N815

    def log_message(self, *arguments):
        pass


def test_a_server_that_knows_no_conditions(tmp_path, s3_url, s3_options, artifact, caplog):
    address = urllib.parse.urlsplit(s3_options["endpoint"])
    target = (address.hostname, address.port)
    handler = type("Handler", (_Unconditional,), {"target": target})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        library = connect(tmp_path, s3_url, s3_options, endpoint=endpoint)
        with caplog.at_level(logging.WARNING, logger="esper.urza"):
            for number in range(2):
                kernel = variant(artifact, number)
                library.put(kernel)
                assert library.get(kernel.kernel_id).data == kernel.data
                library.put(kernel)
        # It is said once.
        (said,) = caplog.records
        assert "cannot create a file only where there is none" in said.getMessage()
        library.close()
    finally:
        server.shutdown()
        server.server_close()


# Files that nothing names, and puts beside removals.


def test_files_that_nothing_names_go_when_they_are_old(tmp_path, artifact):
    clock = Clock()
    clock.seconds = time.time()
    library = Library(tmp_path, clock=clock)
    kernel_id = library.put(artifact)
    stray = variant(artifact, 1)
    library._blobs.write(stray.kernel_id, stray.data)
    (tmp_path / "kernels" / "notes.txt").write_text("not a kernel's")
    assert library.unlisted() == [stray.kernel_id]
    report = library.collect_garbage(RetentionPolicy(grace_seconds=600.0))
    assert (report.unlisted, report.young) == ((), 1)
    clock.seconds += 601.0
    dry = library.collect_garbage(RetentionPolicy(grace_seconds=600.0, dry_run=True))
    assert dry.unlisted == (stray.kernel_id,)
    assert library.unlisted() == [stray.kernel_id]
    report = library.collect_garbage(RetentionPolicy(grace_seconds=600.0))
    assert report.unlisted == (stray.kernel_id,)
    assert report.unlisted_bytes == len(stray.data)
    assert library.unlisted() == []
    assert library.get(kernel_id).data == artifact.data
    assert (tmp_path / "kernels" / "notes.txt").exists()
    library.close()


def test_half_files_go_when_they_are_old(tmp_path, artifact):
    clock = Clock()
    clock.seconds = time.time()
    library = Library(tmp_path, clock=clock)
    kernel_id = library.put(artifact)
    half = tmp_path / f"{blob_name(kernel_id)}#1"
    half.write_bytes(artifact.data[:1_000])
    other = half.with_name("notes.kernel#1")
    other.write_text("not a kernel's")
    # Without a grace time too: a put that is under way could not go on without it.
    report = library.collect_garbage(RetentionPolicy(grace_seconds=0.0))
    assert (report.unlisted, report.young) == ((), 1)
    clock.seconds += 3_601.0
    for dry_run in (True, False):
        assert half.exists()
        report = library.collect_garbage(RetentionPolicy(dry_run=dry_run))
        assert (report.unlisted, report.unlisted_bytes) == ((kernel_id,), 1_000)
    assert not half.exists()
    assert other.exists()
    assert library.get(kernel_id).data == artifact.data
    library.close()


@pytest.mark.parametrize("kind", ["sqlite-folder", "postgres-folder"])
def test_puts_beside_removals_leave_no_row_without_its_file(kind, tmp_path, request, artifact):
    place = make_place(kind, tmp_path, request)
    kernels = [variant(artifact, number) for number in range(3)]
    policy = RetentionPolicy(states=ALL, grace_seconds=0.0)
    failures, end = [], threading.Event()

    def work(task, seed):
        chance = random.Random(seed)
        library = place.open(clock=None)
        try:
            while not end.is_set():
                task(library, chance.choice(kernels))
        except Exception as error:
            failures.append(error)
        finally:
            library.close()

    def put(library, kernel):
        library.put(kernel)

    def get(library, kernel: Artifact):
        with contextlib.suppress(KernelNotFoundError):
            assert library.get(kernel.kernel_id).data == kernel.data

    def remove(library, kernel):
        library.remove(kernel.kernel_id)

    def collect(library, kernel):
        library.collect_garbage(policy)

    tasks = (put, put, get, remove, collect)
    threads = [threading.Thread(target=work, args=[t, i]) for i, t in enumerate(tasks)]
    for thread in threads:
        thread.start()
    library = place.open(clock=None)
    looks = 0
    until = time.monotonic() + 4.0
    try:
        while time.monotonic() < until and not failures:
            for record in library.find():
                there = library._blobs.size(record.kernel_id)
                looks += 1
                if there is None:
                    # Between the two it was removed whole, and may have been put again since.
                    with contextlib.suppress(KernelNotFoundError):
                        assert library.record(record.kernel_id).created > record.created
    finally:
        end.set()
        for thread in threads:
            thread.join()
    assert failures == []
    assert looks > 0
    for kernel in kernels:
        library.put(kernel)
        assert library.get(kernel.kernel_id).data == kernel.data
    library.close()


def test_what_a_run_refers_to_stays_while_garbage_is_collected(tmp_path, artifact):
    library = Library(tmp_path)
    policy = RetentionPolicy(states=ALL, grace_seconds=0.0)
    end, failures, kept = threading.Event(), [], []

    def collect():
        try:
            other = Library(tmp_path)
            while not end.is_set():
                other.collect_garbage(policy)
            other.close()
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=collect)
    thread.start()
    try:
        for number in range(25):
            kernel_id = library.put(variant(artifact, number))
            try:
                library.refer("run", [kernel_id])
            except KernelNotFoundError:
                continue
            kept.append(kernel_id)
    finally:
        end.set()
        thread.join()
    assert failures == []
    assert kept
    library.collect_garbage(policy)
    assert sorted(record.kernel_id for record in library.find()) == sorted(kept)
    for kernel_id in kept:
        assert library.get(kernel_id).kernel_id == kernel_id
    library.close()


_PUTS = """
import sys
from pathlib import Path
from esper.artifacts import read_artifact
from esper.urza import Library
from tests.esper.cache_kernels import variant
library = Library(sys.argv[1])
artifact = read_artifact(Path(sys.argv[2]).read_bytes())
print("ready", flush=True)
for number in range(10_000):
    print(library.put(variant(artifact, number)), flush=True)
"""


def test_who_is_killed_while_putting_leaves_no_half_kernel(tmp_path, artifact):
    (tmp_path / "artifact").write_bytes(artifact.data)
    chance = random.Random(0)
    done: list[str] = []
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", _PUTS, str(tmp_path / "library"), str(tmp_path / "artifact")],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout.readline() == "ready\n"
        done += [line.strip() for line in itertools.islice(process.stdout, chance.randrange(40))]
        time.sleep(chance.random() * 0.02)
        process.send_signal(signal.SIGKILL)
        done += [line.strip() for line in process.stdout if line.endswith("\n")]
        process.communicate()
        library = Library(tmp_path / "library")
        listed = {record.kernel_id for record in library.find()}
        # What was acknowledged is there, and all that is there is whole.
        assert set(done) <= listed
        for kernel_id in listed:
            assert library.get(kernel_id).kernel_id == kernel_id
        for kernel_id in library.unlisted():
            assert library.get(kernel_id).kernel_id == kernel_id
        library.close()
    assert len(done) > 4
    clock = Clock()
    clock.seconds = time.time() + 1e5
    library = Library(tmp_path / "library", clock=clock)
    library.collect_garbage(RetentionPolicy())
    files = {path.name for path in (tmp_path / "library" / "kernels").rglob("*.*")}
    assert files == {f"{record.kernel_id}.kernel" for record in library.find()}
    library.close()


def test_a_full_disk_beside_a_database_elsewhere(small_disk, tmp_path, artifact):
    disk = small_disk(64)
    library = Library.connect(f"sqlite:///{tmp_path}/library.sqlite", disk / "kernels")
    padded = variant(artifact, 1, padding=100_000)
    with pytest.raises(LibraryError, match="could not be kept in .*: .*No space left"):
        library.put(padded)
    assert library.find() == []
    kernel_id = library.put(artifact)
    assert library.get(kernel_id).data == artifact.data
    assert library.unlisted() == []
    library.close()


def test_names_of_files():
    assert blob_name("ab" * 32) == f"kernels/ab/{'ab' * 32}.kernel"


def test_where_a_program_runs_is_remembered_without_the_program():
    program = b"no program" * 1_000
    before = sys.getrefcount(program)
    assert _platforms("a program of the tests", program) == ()
    assert sys.getrefcount(program) == before
    for number in range(_MOST_PLATFORMS):
        _PLATFORMS[f"another {number}"] = ()
    _platforms("one more", program)
    assert len(_PLATFORMS) <= _MOST_PLATFORMS
    _PLATFORMS.clear()
