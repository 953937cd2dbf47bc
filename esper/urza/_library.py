"""The library in this process: a database and files, or a server's of each."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from esper.artifacts import Artifact
from esper.contracts import (
    CURRENT_KERNELS,
    BlueprintQuery,
    BlueprintRecord,
    BlueprintRequest,
    BlueprintState,
    Claim,
    GarbageReport,
    KernelOutcome,
    KernelQuery,
    KernelRecord,
    KernelSignature,
    KernelState,
    KernelUsage,
    Page,
    RetentionPolicy,
)
from esper.errors import AccessDeniedError, EsperError, InputError, LibraryError
from esper.urza._blobs import Blobs, S3Access, folder_blobs, open_blobs
from esper.urza._database import DATABASE, Database, open_folder, open_url
from esper.urza._failures import FAILURES, failure, reason
from esper.urza._kernels import Kernels
from esper.urza._outcomes import Outcomes
from esper.urza._queue import Queue
from esper.urza._retention import Retention
from esper.urza._search import Search

MAX_ATTEMPTS = 3


class Library:
    """Kernels and blueprints in a folder: files, and a SQLite database. It is a `KernelLibrary`.

    Files are named by the SHA-256 of their bytes and are written once, before the row that makes
    them findable; a file is verified whenever it is read. `connect` keeps the database, the files,
    or both on servers.

    Args:
        folder: where it is.
        create: make it where it does not exist, and write to it; else it may be a library that
            can only be read. One that an older Esper made is brought up to date when it is
            written to.
        clock: in seconds since 1970; by default that of the database's machine.
        max_attempts: how often a blueprint is claimed, without being completed, before it is
            INVALID.

    Raises:
        InputError: where the folder cannot be used, or holds no library and may not be made.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        create: bool = True,
        clock: Callable[[], float] | None = None,
        max_attempts: int = MAX_ATTEMPTS,
    ) -> None:
        path = Path(folder).expanduser().absolute()
        if not create and not (path / DATABASE).is_file():
            raise InputError(f"there is no library in {path}: {DATABASE} is not there")
        try:
            if create:
                path.mkdir(parents=True, exist_ok=True)
            blobs = folder_blobs(path)
            database = open_folder(path / DATABASE, create=create, clock=clock)
        except FAILURES as error:
            if isinstance(error, EsperError):
                raise
            need = "written" if create else "read"
            raise InputError(
                f"the library folder {path} cannot be used: {reason(error)}. Choose a"
                f" folder that can be {need} and holds nothing else."
            ) from error
        self._folder: Path | None = path
        self._assemble(database, blobs, str(path), max_attempts)

    @classmethod
    def connect(
        cls,
        database: str,
        blobs: Path | str,
        *,
        s3: S3Access | None = None,
        create: bool = True,
        clock: Callable[[], float] | None = None,
        max_attempts: int = MAX_ATTEMPTS,
    ) -> Self:
        """A library whose database or files are on servers.

        Args:
            database: `postgresql://USER:PASSWORD@HOST/DATABASE` or `sqlite:///PATH`.
            blobs: a folder, or `s3://BUCKET/FOLDER`.
            s3: how the bucket's server is reached; by default by `AWS_` variables.
            create: make the tables where there are none.
            clock: in seconds since 1970; by default that of the database's machine.
            max_attempts: as above.

        Raises:
            InputError: where one of them cannot be used as it is given.
            ServiceUnavailableError: where a server does not answer.
        """
        library = cls.__new__(cls)
        library._folder = None
        try:
            opened = open_url(database, create=create, clock=clock)
        except FAILURES as error:
            if isinstance(error, EsperError):
                raise
            found = failure("the library's database cannot be used", error)
            if isinstance(found, AccessDeniedError | LibraryError):
                found = InputError(str(found))
            raise found from error
        try:
            files = open_blobs(str(blobs), s3=s3)
        except BaseException:
            opened.close()
            raise
        library._assemble(opened, files, f"{opened.where}, {files.where}", max_attempts)
        return library

    def _assemble(self, database: Database, blobs: Blobs, where: str, max_attempts: int) -> None:
        self.where = where
        """For messages; it shows no secret."""
        self._database = database
        self._blobs = blobs
        self._kernels = Kernels(database, blobs, where)
        self._search = Search(database)
        self._outcomes = Outcomes(database)
        self._queue = Queue(database, max_attempts=max_attempts)
        self._retention = Retention(database, blobs, self._kernels, where)

    def __repr__(self) -> str:
        return f"Library({self.where!r})"

    @property
    def folder(self) -> Path:
        """Where it is.

        Raises:
            LibraryError: for a library that is in no folder.
        """
        if self._folder is None:
            raise LibraryError(f"the library {self.where} is not one folder")
        return self._folder

    def close(self) -> None:
        """See `KernelLibrary.close`."""
        self._database.close()

    def check(self) -> None:
        """Ask the database and the store of files for something.

        Raises:
            ServiceUnavailableError, LibraryError: where one of them does not answer.
        """
        what = f"the library {self.where} does not answer"
        try:
            with self._database.reading() as connection:
                self._database.now(connection)
                connection.exec_driver_sql("SELECT count(*) FROM kernel_tags WHERE tag = ''")
            self._blobs.check()
        except FAILURES as error:
            raise failure(what, error) from error

    def put(
        self, artifact: Artifact, *, tags: Iterable[str] = (), state: KernelState | None = None
    ) -> str:
        """See `KernelLibrary.put`."""
        return self._kernels.put(artifact, tags=tags, state=state)

    def get(self, kernel_id: str) -> Artifact:
        """See `KernelLibrary.get`."""
        return self._kernels.get(kernel_id)

    def read_bytes(self, kernel_id: str) -> bytes:
        """See `KernelLibrary.read_bytes`."""
        return self._kernels.read_bytes(kernel_id)

    def iter_bytes(self, kernel_id: str, start: int = 0) -> Iterator[bytes]:
        """See `KernelLibrary.iter_bytes`."""
        return self._kernels.iter_bytes(kernel_id, start)

    def record(self, kernel_id: str) -> KernelRecord:
        """See `KernelLibrary.record`."""
        return self._kernels.record(kernel_id)

    def full_id(self, beginning: str) -> str:
        """See `KernelLibrary.full_id`."""
        return self._kernels.full_id(beginning)

    def find(
        self,
        signature: KernelSignature | None = None,
        *,
        blueprint: str | None = None,
        recipe: str | None = None,
        states: Iterable[KernelState] = CURRENT_KERNELS,
    ) -> list[KernelRecord]:
        """See `KernelLibrary.find`."""
        return self._search.find(signature, blueprint, recipe, states)

    def search(self, query: KernelQuery) -> Page[KernelRecord]:
        """See `KernelLibrary.search`."""
        return self._search.kernels(query)

    def set_state(
        self,
        kernel_id: str,
        state: KernelState,
        *,
        expected: KernelState | None = None,
        reason: str = "",
    ) -> KernelRecord:
        """See `KernelLibrary.set_state`."""
        return self._kernels.set_state(kernel_id, state, expected=expected, reason=reason)

    def tag(
        self, kernel_id: str, *, add: Iterable[str] = (), remove: Iterable[str] = ()
    ) -> KernelRecord:
        """See `KernelLibrary.tag`."""
        return self._kernels.tag(kernel_id, add=add, remove=remove)

    def remove(self, kernel_id: str) -> None:
        """See `KernelLibrary.remove`."""
        self._kernels.remove(kernel_id)

    def unlisted(self) -> list[str]:
        """Ids of kernels whose files are there, and which are not found.

        A put or a removal leaves one that was cut short; another process's `put` has one for a
        moment. `put` lists it.

        Raises:
            LibraryError: where the library cannot be searched.
        """
        return self._kernels.unlisted()

    def record_measurement(self, measurement: Mapping[str, Any]) -> None:
        """See `KernelLibrary.record_measurement`."""
        self._kernels.record_measurement(measurement)

    def measurements(self, kernel_id: str) -> list[dict[str, Any]]:
        """See `KernelLibrary.measurements`."""
        return self._kernels.measurements(kernel_id)

    def record_outcomes(self, outcomes: Sequence[KernelOutcome]) -> None:
        """See `KernelLibrary.record_outcomes`."""
        self._outcomes.record(outcomes)

    def outcomes(self, kernel_id: str) -> list[KernelOutcome]:
        """See `KernelLibrary.outcomes`."""
        return self._outcomes.of(kernel_id)

    def usage(self, kernel_id: str) -> KernelUsage:
        """See `KernelLibrary.usage`."""
        return self._outcomes.usage(kernel_id)

    def refer(self, run_id: str, kernel_ids: Iterable[str]) -> None:
        """See `KernelLibrary.refer`."""
        self._outcomes.refer(run_id, kernel_ids)

    def release_run(self, run_id: str) -> None:
        """See `KernelLibrary.release_run`."""
        self._outcomes.release(run_id)

    def references(self, kernel_id: str) -> list[str]:
        """See `KernelLibrary.references`."""
        return self._outcomes.references(kernel_id)

    def collect_garbage(self, policy: RetentionPolicy) -> GarbageReport:
        """See `KernelLibrary.collect_garbage`."""
        return self._retention.collect(policy)

    def submit(self, request: BlueprintRequest) -> BlueprintRecord:
        """See `KernelLibrary.submit`."""
        return self._queue.submit(request)

    def blueprint(self, blueprint_id: str) -> BlueprintRecord:
        """See `KernelLibrary.blueprint`."""
        return self._queue.blueprint(blueprint_id)

    def blueprints(self, query: BlueprintQuery) -> Page[BlueprintRecord]:
        """See `KernelLibrary.blueprints`."""
        return self._search.blueprints(query)

    def set_blueprint_state(
        self,
        blueprint_id: str,
        state: BlueprintState,
        *,
        expected: BlueprintState | None = None,
        reason: str = "",
    ) -> BlueprintRecord:
        """See `KernelLibrary.set_blueprint_state`."""
        return self._queue.set_state(blueprint_id, state, expected=expected, reason=reason)

    def claim(self, worker: str, *, most: int = 1, lease_seconds: float = 60.0) -> list[Claim]:
        """See `KernelLibrary.claim`."""
        return self._queue.claim(worker, most=most, lease_seconds=lease_seconds)

    def renew(self, claim: Claim) -> Claim:
        """See `KernelLibrary.renew`."""
        return self._queue.renew(claim)

    def complete(self, claim: Claim, kernel_id: str) -> BlueprintRecord:
        """See `KernelLibrary.complete`."""
        return self._queue.complete(claim, kernel_id)

    def fail(self, claim: Claim, reason: str, *, retry: bool = False) -> BlueprintRecord:
        """See `KernelLibrary.fail`."""
        return self._queue.fail(claim, reason, retry=retry)

    def give_back(self, claim: Claim) -> BlueprintRecord:
        """See `KernelLibrary.give_back`."""
        return self._queue.give_back(claim)
