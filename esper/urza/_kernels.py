"""The kernels of a library: rows in its database, and files beside it.

A file is there, whole, before the row that makes it findable, and goes after it. A put and a
removal of one kernel take turns by a lock of the database: a row never lacks its file, however the
two meet, and whoever is killed leaves at most a file without a row.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any

import sqlalchemy as sa
from pydantic import Field

from esper.artifacts import (
    Artifact,
    default_verdicts,
    is_trusted,
    programs_digest,
    read_artifact,
    trust,
)
from esper.contracts import (
    Count,
    Data,
    KernelRecord,
    KernelState,
    Name,
    Sha256,
    check_move,
    reason_text,
)
from esper.errors import (
    ArtifactError,
    ConflictError,
    InputError,
    KernelNotFoundError,
    LibraryError,
)
from esper.urza._blobs import Blobs, is_id
from esper.urza._connections import is_sqlite, lock, upsert
from esper.urza._database import Database
from esper.urza._failures import doing
from esper.urza._schema import KERNEL_TAGS, KERNELS, MEASUREMENTS, OUTCOMES
from esper.urza._search import kernel_record, platforms_text
from esper.urza._tags import KERNELS_TAGS, checked_tags
from esper.urza._valid import valid

_TRIES = 16
"""How often a file is written that a removal takes away before its row is there."""

_MOST_PLATFORMS = 4_096
"""Programs of which is remembered where they run."""

_K = KERNELS.c
_IS_BEGINNING = re.compile(r"[0-9a-f]{0,64}", re.ASCII).fullmatch


class _Measurement(Data):
    """What a measurement is kept under, as long as its columns are."""

    kernel_id: Sha256
    backend: Annotated[Name, Field(min_length=1, max_length=16)]
    device: Annotated[Name, Field(min_length=1, max_length=100)]
    batch: Count


class Kernels:
    """Kernels in a database and a store of files.

    Args:
        where: for messages.
    """

    def __init__(self, database: Database, blobs: Blobs, where: str) -> None:
        self._database = database
        self._blobs = blobs
        self._where = where

    def put(
        self, artifact: Artifact, *, tags: Iterable[str] = (), state: KernelState | None = None
    ) -> str:
        """See `KernelLibrary.put`."""
        kernel_id = artifact.kernel_id
        trusted = is_trusted(artifact)
        verified = trusted and state is not KernelState.TESTING
        state = state or (KernelState.VALIDATED if trusted else KernelState.TESTING)
        tags = checked_tags(tags)
        with doing(f"kernel {kernel_id[:12]} could not be kept in {self._where}"):
            row = self._row(artifact, state)
            for _ in range(_TRIES):
                self._blobs.write(kernel_id, artifact.data)
                if self._list(row, tags, verified=verified):
                    break
            else:
                raise LibraryError(
                    f"kernel {kernel_id[:12]} could not be kept in {self._where}: its file was"
                    f" removed {_TRIES} times while it was put. See who removes it."
                )
        _remember(artifact)
        return kernel_id

    def _row(self, artifact: Artifact, state: KernelState) -> dict[str, Any]:
        # It brings the compiler with it, which readers do without.
        from esper.tezzeret import artifact_cost

        manifest = artifact.manifest
        cost = artifact_cost(artifact)
        try:
            record = valid(
                KernelRecord,
                kernel_id=artifact.kernel_id,
                recipe=manifest.recipe,
                blueprint=manifest.blueprint,
                signature=str(manifest.signature),
                birth=manifest.birth,
                confidence=manifest.confidence,
                init_seed=manifest.init_seed,
                parameter_count=cost.parameter_count,
                flops=cost.flops,
                size_bytes=len(artifact.data),
                state=state,
                ancestor=manifest.ancestor,
                platforms=_platforms(manifest.digests["program.stablehlo"], artifact.stablehlo),
            )
        except InputError as error:
            raise LibraryError(
                f"kernel {artifact.kernel_id[:12]} could not be kept in {self._where}: {error}"
            ) from error
        row = record.model_dump(exclude={"schema_version", "reason", "tags", "created"})
        return row | {"state": state.value, "platforms": platforms_text(record.platforms)}

    def _list(self, row: dict[str, Any], tags: list[str], *, verified: bool) -> bool:
        """Make a kernel findable; False where its file was removed since it was written."""
        kernel_id = row["kernel_id"]
        with self._database.writing() as connection:
            lock(connection, _lock_of(kernel_id))
            size = self._blobs.size(kernel_id)
            if size is None:
                return False
            if size != row["size_bytes"]:
                raise LibraryError(
                    f"kernel {kernel_id[:12]} could not be kept in {self._where}: of its"
                    f" {row['size_bytes']} bytes {size} are there. {self._blobs.place(kernel_id)}"
                )
            now = self._database.now(connection)
            gain = sa.select(sa.func.avg(OUTCOMES.c.gain)).where(OUTCOMES.c.kernel_id == kernel_id)
            values = row | {"created": now, "used": now, "gain": gain.scalar_subquery()}
            insertion = upsert(connection, KERNELS).values(**values).on_conflict_do_nothing()
            if connection.scalar(insertion.returning(_K.kernel_id)) is None and verified:
                connection.execute(
                    sa.update(KERNELS)
                    .where(_K.kernel_id == kernel_id, _K.state == KernelState.TESTING.value)
                    .values(state=KernelState.VALIDATED.value)
                )
            KERNELS_TAGS.add(connection, kernel_id, tags)
        return True

    def get(self, kernel_id: str) -> Artifact:
        """See `KernelLibrary.get`."""
        data = self.read_bytes(kernel_id)
        try:
            return read_artifact(data, expected_id=kernel_id)
        except ArtifactError as error:
            raise ArtifactError(f"{error} {self._blobs.place(kernel_id)}") from error

    def read_bytes(self, kernel_id: str) -> bytes:
        """See `KernelLibrary.read_bytes`."""
        self._check_id(kernel_id)
        with doing(f"kernel {kernel_id[:12]} cannot be read from {self._where}"):
            try:
                return self._blobs.read(kernel_id)
            except FileNotFoundError as error:
                raise self._not_found(kernel_id) from error

    def iter_bytes(self, kernel_id: str, start: int = 0) -> Iterator[bytes]:
        """See `KernelLibrary.iter_bytes`."""
        self._check_id(kernel_id)
        what = f"kernel {kernel_id[:12]} cannot be read from {self._where}"
        with doing(what):
            try:
                pieces = self._blobs.pieces(kernel_id, start)
            except FileNotFoundError as error:
                raise self._not_found(kernel_id) from error

        def read() -> Iterator[bytes]:
            with doing(what):
                yield from pieces

        return read()

    def _check_id(self, kernel_id: str) -> None:
        if not is_id(kernel_id):
            raise KernelNotFoundError(
                f"the library {self._where} holds no kernel {kernel_id[:80]!r}: an id is 64"
                " hexadecimal digits, in lower case"
            )

    def _not_found(self, kernel_id: str) -> KernelNotFoundError:
        return KernelNotFoundError(
            f"the library {self._where} holds no kernel {kernel_id[:12]}: compile or copy it"
            " there first"
        )

    def record(self, kernel_id: str) -> KernelRecord:
        """See `KernelLibrary.record`."""
        self._check_id(kernel_id)
        what = f"the library {self._where} cannot be searched"
        with doing(what), self._database.reading() as connection:
            return self._one(connection, kernel_id)

    def _one(
        self, connection: sa.Connection, kernel_id: str, *, lock: bool = False
    ) -> KernelRecord:
        query = sa.select(KERNELS).where(_K.kernel_id == kernel_id)
        if lock and not is_sqlite(connection):
            query = query.with_for_update()
        row = connection.execute(query).mappings().one_or_none()
        if row is None:
            raise self._not_found(kernel_id)
        return kernel_record(row, KERNELS_TAGS.of(connection, [kernel_id]))

    def full_id(self, beginning: str) -> str:
        """See `KernelLibrary.full_id`."""
        query = sa.select(_K.kernel_id).order_by(_K.kernel_id).limit(3)
        # Above all digits of an id.
        query = query.where(_K.kernel_id >= beginning, _K.kernel_id < f"{beginning}g")
        found: list[str] = []
        if _IS_BEGINNING(beginning):
            what = f"the library {self._where} cannot be searched"
            with doing(what), self._database.reading() as connection:
                found = list(connection.scalars(query))
        if not found:
            raise self._not_found(beginning)
        if len(found) > 1:
            listed = ", ".join(kernel_id[:16] for kernel_id in found)
            raise InputError(
                f"several kernels begin with {beginning!r}: {listed}; give more of the id"
            )
        return found[0]

    def set_state(
        self,
        kernel_id: str,
        state: KernelState,
        *,
        expected: KernelState | None = None,
        reason: str = "",
    ) -> KernelRecord:
        """See `KernelLibrary.set_state`."""
        self._check_id(kernel_id)
        subject = f"kernel {kernel_id[:12]}"
        what = f"{subject} could not be changed in {self._where}"
        with doing(what), self._database.writing() as connection:
            current = self._one(connection, kernel_id, lock=True).state
            if current is state:
                return self._one(connection, kernel_id)
            if expected is not None and current is not expected:
                raise ConflictError(
                    f"{subject} is {current.value}, and was to become {state.value} from"
                    f" {expected.value}: look at it again"
                )
            check_move(subject, current, state)
            connection.execute(
                sa.update(KERNELS)
                .where(_K.kernel_id == kernel_id, _K.state == current.value)
                .values(state=state.value, reason=reason_text(reason))
            )
            return self._one(connection, kernel_id)

    def tag(self, kernel_id: str, *, add: Iterable[str], remove: Iterable[str]) -> KernelRecord:
        """See `KernelLibrary.tag`."""
        self._check_id(kernel_id)
        what = f"kernel {kernel_id[:12]} could not be changed in {self._where}"
        with doing(what), self._database.writing() as connection:
            self._one(connection, kernel_id, lock=True)
            KERNELS_TAGS.remove(connection, kernel_id, remove)
            KERNELS_TAGS.add(connection, kernel_id, add)
            return self._one(connection, kernel_id)

    def remove(self, kernel_id: str) -> None:
        """See `KernelLibrary.remove`."""
        if not is_id(kernel_id):
            return
        with doing(f"kernel {kernel_id[:12]} cannot be removed from {self._where}"):
            # The row first: a file that nothing names is harmless, a row without a file is not.
            with self._database.writing() as connection:
                forget(connection, kernel_id)
            self.drop_file(kernel_id)

    def drop_file(self, kernel_id: str) -> bool:
        """Remove a file that no row names; False where one does."""
        with self._database.writing() as connection:
            lock(connection, _lock_of(kernel_id))
            row = sa.select(_K.kernel_id).where(_K.kernel_id == kernel_id)
            if connection.scalar(row) is not None:
                return False
            self._blobs.delete(kernel_id)
        return True

    def unlisted(self) -> list[str]:
        """Ids of kernels whose files are there, and which are not found."""
        with doing(f"the library {self._where} cannot be searched"):
            # Before the rows: what is put in between is not taken for one.
            found = [blob.kernel_id for blob in self._blobs.listing()]
            with self._database.reading() as connection:
                listed = set(connection.scalars(sa.select(_K.kernel_id)))
        return sorted(set(found) - listed)

    def record_measurement(self, measurement: Mapping[str, Any]) -> None:
        """See `KernelLibrary.record_measurement`."""
        names = ("kernel_id", "backend", "device", "batch")
        missing = [name for name in names if name not in measurement]
        if missing:
            raise InputError(f"a measurement names {', '.join(names)}: {missing[0]} is missing")
        keys = valid(_Measurement, **{name: measurement[name] for name in names}).model_dump()
        content = dict(measurement)
        what = f"what was measured of kernel {keys['kernel_id'][:12]} could not be kept in"
        with doing(f"{what} {self._where}"), self._database.writing() as connection:
            insertion = upsert(connection, MEASUREMENTS).values(**keys, content=content)
            connection.execute(
                insertion.on_conflict_do_update(
                    index_elements=list(names), set_={"content": content}
                )
            )

    def measurements(self, kernel_id: str) -> list[dict[str, Any]]:
        """See `KernelLibrary.measurements`."""
        m = MEASUREMENTS.c
        query = sa.select(m.content).where(m.kernel_id == kernel_id)
        query = query.order_by(m.backend, m.device, m.batch)
        what = f"the library {self._where} cannot be searched"
        with doing(what), self._database.reading() as connection:
            return list(connection.scalars(query))


def forget(connection: sa.Connection, kernel_id: str) -> None:
    """Remove the rows of a kernel. What runs told of it stays: it may be compiled again."""
    for table in (KERNELS, MEASUREMENTS, KERNEL_TAGS):
        connection.execute(sa.delete(table).where(table.c.kernel_id == kernel_id))


def _lock_of(kernel_id: str) -> int:
    return int(kernel_id[:16], 16) - (1 << 63)


_PLATFORMS: dict[str, tuple[str, ...]] = {}
"""By the programs' digests: the programs themselves are not held."""


def _platforms(digest: str, program: bytes) -> tuple[str, ...]:
    """Where a program of some digest runs."""
    found = _PLATFORMS.get(digest)
    if found is None:
        found = _read_platforms(program)
        if len(_PLATFORMS) >= _MOST_PLATFORMS:
            _PLATFORMS.clear()
        _PLATFORMS[digest] = found
    return found


def _read_platforms(program: bytes) -> tuple[str, ...]:
    from jax import export

    try:
        return tuple(export.deserialize(bytearray(program)).platforms)
    except Exception:  # flatbuffers raises whatever the bytes lead it to
        # It runs nowhere, and whoever loads it is told why.
        return ()


def _remember(artifact: Artifact) -> None:
    """Later processes of this user trust what this one compiled, or has verified."""
    if is_trusted(artifact):
        verdicts = default_verdicts()
        if verdicts.get(programs_digest(artifact)) is None:
            trust(artifact, verdicts)
