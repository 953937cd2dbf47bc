"""The library of kernels on one machine: a folder of files and a SQLite database.

Files are named by the SHA-256 of their bytes and are written once, before the
row that makes them findable; a file is verified whenever it is read.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import obstore
import sqlalchemy as sa
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore
from sqlalchemy.event import listen
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from esper.artifacts import (
    Artifact,
    default_verdicts,
    is_trusted,
    programs_digest,
    read_artifact,
    trust,
)
from esper.contracts import KernelSignature
from esper.errors import ArtifactError, InputError, KernelNotFoundError, LibraryError
from esper.tezzeret import artifact_cost

_DATABASE = "library.sqlite"
_METADATA = sa.MetaData()

_KERNELS = sa.Table(
    "kernels",
    _METADATA,
    sa.Column("kernel_id", sa.String(64), primary_key=True),
    sa.Column("recipe", sa.String(64), nullable=False, index=True),
    sa.Column("blueprint", sa.String(64), nullable=False),
    sa.Column("signature", sa.String(200), nullable=False, index=True),
    sa.Column("birth", sa.String(8), nullable=False),
    sa.Column("confidence", sa.Float, nullable=False),
    sa.Column("init_seed", sa.Integer, nullable=False),
    sa.Column("parameter_count", sa.Integer, nullable=False),
    sa.Column("flops", sa.Integer, nullable=False),
    sa.Column("size_bytes", sa.Integer, nullable=False),
)


_MEASUREMENTS = sa.Table(
    "measurements",
    _METADATA,
    sa.Column("kernel_id", sa.String(64), primary_key=True),
    sa.Column("backend", sa.String(16), primary_key=True),
    sa.Column("device", sa.String(100), primary_key=True),
    sa.Column("batch", sa.Integer, primary_key=True),
    sa.Column("content", sa.JSON, nullable=False),
)
"""What was measured of kernels, which is not part of them: it differs by machine."""


@dataclasses.dataclass(frozen=True)
class KernelRecord:
    """What the library knows of a kernel without opening it."""

    kernel_id: str
    recipe: str
    """What it was compiled from; see `esper.tezzeret.kernel_recipe`."""
    blueprint: str
    signature: str
    """As `str(KernelSignature)`."""
    birth: str
    confidence: float
    init_seed: int
    parameter_count: int
    flops: int
    """Floating-point operations per example, forward: counted from the blueprint, or, for a
    user's own kernel, by XLA from its StableHLO at batch 1."""
    size_bytes: int


def _record(artifact: Artifact) -> KernelRecord:
    manifest = artifact.manifest
    cost = artifact_cost(artifact)
    return KernelRecord(
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
    )


def _remember(artifact: Artifact) -> None:
    """Later processes of this user trust what this one compiled, or has verified."""
    if is_trusted(artifact):
        verdicts = default_verdicts()
        if verdicts.get(programs_digest(artifact)) is None:
            trust(artifact, verdicts)


def _reason(error: Exception) -> str:
    """An error in one line, without what SQLAlchemy adds to it."""
    cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    return str(cause).splitlines()[0]


def _use_wal(connection: Any, _: Any) -> None:
    # Readers in other processes are not blocked by a writer.
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA busy_timeout=10000")
    cursor.close()


class Library:
    """Put, get and find kernels in a folder.

    Args:
        folder: where it is.
        create: make it where it does not exist.

    Raises:
        InputError: where the folder cannot be used, or holds no library and may not be made.
    """

    def __init__(self, folder: Path | str, *, create: bool = True) -> None:
        self.folder = Path(folder).expanduser().absolute()
        if not create and not (self.folder / _DATABASE).is_file():
            raise InputError(f"there is no library in {self.folder}: {_DATABASE} is not there")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._blobs = LocalStore(self.folder / "kernels", mkdir=True)
            self._engine = sa.create_engine(
                sa.URL.create("sqlite", database=str(self.folder / _DATABASE))
            )
            listen(self._engine, "connect", _use_wal)
            _METADATA.create_all(self._engine)
        except (OSError, BaseError, SQLAlchemyError) as error:
            raise InputError(
                f"the library folder {self.folder} cannot be used: {_reason(error)}. Choose a"
                " folder that can be written and holds nothing else."
            ) from error

    def close(self) -> None:
        """Let go of the database."""
        self._engine.dispose()

    @staticmethod
    def _blob(kernel_id: str) -> str:
        return f"{kernel_id[:2]}/{kernel_id}.kernel"

    def put(self, artifact: Artifact) -> str:
        """Keep an artifact; putting it again changes nothing.

        Returns:
            Its id.

        Raises:
            LibraryError: where it could not be written whole; nothing half-written is visible.
        """
        record = _record(artifact)
        try:
            try:
                obstore.put(
                    self._blobs, self._blob(artifact.kernel_id), artifact.data, mode="create"
                )
            except AlreadyExistsError:
                self.get(artifact.kernel_id)
            with self._engine.begin() as connection:
                row = dataclasses.asdict(record)
                connection.execute(sa.insert(_KERNELS).prefix_with("OR IGNORE").values(**row))
        except (OSError, OverflowError, BaseError, SQLAlchemyError) as error:
            raise LibraryError(
                f"kernel {artifact.kernel_id[:12]} could not be kept in {self.folder}:"
                f" {_reason(error)}"
            ) from error
        _remember(artifact)
        return artifact.kernel_id

    def get(self, kernel_id: str) -> Artifact:
        """The artifact of that id, its bytes verified.

        Raises:
            KernelNotFoundError: where the library has none.
            ArtifactError: where its file is damaged.
            LibraryError: where its file cannot be read.
        """
        data = self.read_bytes(kernel_id)
        try:
            return read_artifact(data, expected_id=kernel_id)
        except ArtifactError as error:
            path = self.folder / "kernels" / self._blob(kernel_id)
            raise ArtifactError(f"{error} Its file is {path}.") from error

    def read_bytes(self, kernel_id: str) -> bytes:
        """The file of that id as it is, which may be damaged.

        Raises:
            KernelNotFoundError: where the library has none.
            LibraryError: where its file cannot be read.
        """
        try:
            return bytes(obstore.get(self._blobs, self._blob(kernel_id)).bytes())
        except FileNotFoundError as error:
            raise KernelNotFoundError(
                f"the library {self.folder} holds no kernel {kernel_id[:12]}: compile or copy it"
                " there first"
            ) from error
        except (OSError, BaseError) as error:
            raise LibraryError(
                f"kernel {kernel_id[:12]} cannot be read from {self.folder}: {error}"
            ) from error

    def full_id(self, beginning: str) -> str:
        """The id of the one kernel whose id begins so.

        Raises:
            InputError: where there are several.
            KernelNotFoundError: where there is none.
            LibraryError: where the library cannot be searched.
        """
        query = sa.select(_KERNELS.c.kernel_id).where(
            _KERNELS.c.kernel_id.startswith(beginning, autoescape=True)
        )
        found = self._rows(query.order_by(_KERNELS.c.kernel_id).limit(3))
        if not found:
            raise KernelNotFoundError(
                f"the library {self.folder} holds no kernel {beginning[:12]}: compile or copy it"
                " there first"
            )
        if len(found) > 1:
            listed = ", ".join(row["kernel_id"][:16] for row in found)
            raise InputError(
                f"several kernels begin with {beginning!r}: {listed}; give more of the id"
            )
        return found[0]["kernel_id"]

    def remove(self, kernel_id: str) -> None:
        """Remove a kernel, and what was measured of it. One that is not there is no error.

        Raises:
            LibraryError: where it cannot be removed; then it is still found, or its file is left.
        """
        try:
            # The row first: a file that nothing names is harmless, a row without a file is not.
            with self._engine.begin() as connection:
                for table in (_KERNELS, _MEASUREMENTS):
                    connection.execute(sa.delete(table).where(table.c.kernel_id == kernel_id))
            obstore.delete(self._blobs, self._blob(kernel_id))
        except FileNotFoundError:
            return
        except (OSError, BaseError, SQLAlchemyError) as error:
            raise LibraryError(
                f"kernel {kernel_id[:12]} cannot be removed from {self.folder}: {_reason(error)}"
            ) from error

    def _rows(self, query: Any) -> list[Any]:
        try:
            with self._engine.connect() as connection:
                return list(connection.execute(query).mappings())
        except SQLAlchemyError as error:
            raise LibraryError(
                f"the library {self.folder} cannot be searched: {_reason(error)}"
            ) from error

    def record_measurement(self, measurement: Mapping[str, Any]) -> None:
        """Keep what a kernel cost on some device; an older one of equal kernel and device goes.

        Args:
            measurement: `esper.execution.KernelMeasurement.to_dict()`.

        Raises:
            LibraryError: where it could not be written.
        """
        keys = {name: measurement[name] for name in ("kernel_id", "backend", "device", "batch")}
        row = {**keys, "content": dict(measurement)}
        try:
            with self._engine.begin() as connection:
                connection.execute(sa.insert(_MEASUREMENTS).prefix_with("OR REPLACE").values(**row))
        except SQLAlchemyError as error:
            raise LibraryError(
                f"what was measured of kernel {keys['kernel_id'][:12]} could not be kept in"
                f" {self.folder}: {_reason(error)}"
            ) from error

    def measurements(self, kernel_id: str) -> list[dict[str, Any]]:
        """What was measured of a kernel, by backend, device and batch."""
        query = (
            sa.select(_MEASUREMENTS.c.content)
            .where(_MEASUREMENTS.c.kernel_id == kernel_id)
            .order_by(_MEASUREMENTS.c.backend, _MEASUREMENTS.c.device, _MEASUREMENTS.c.batch)
        )
        return [row["content"] for row in self._rows(query)]

    def find(
        self,
        signature: KernelSignature | None = None,
        *,
        blueprint: str | None = None,
        recipe: str | None = None,
    ) -> list[KernelRecord]:
        """The kernels that fit a signature, ordered by blueprint, seed and id."""
        query = sa.select(_KERNELS).order_by(
            _KERNELS.c.blueprint, _KERNELS.c.init_seed, _KERNELS.c.kernel_id
        )
        if signature is not None:
            query = query.where(_KERNELS.c.signature == str(signature))
        if blueprint is not None:
            query = query.where(_KERNELS.c.blueprint == blueprint)
        if recipe is not None:
            query = query.where(_KERNELS.c.recipe == recipe)
        return [KernelRecord(**row) for row in self._rows(query)]
