"""The library of kernels on one machine: a folder of files and a SQLite database.

Files are named by the SHA-256 of their bytes and are written once, before the
row that makes them findable; a file is verified whenever it is read.
"""

import dataclasses
import re
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import obstore
import sqlalchemy as sa
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore
from sqlalchemy.exc import SQLAlchemyError

from esper.artifacts import (
    MAX_BYTES,
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
from esper.urza._database import DATABASE, KERNELS, MEASUREMENTS, open_database, reason

_IS_ID = re.compile(r"[0-9a-f]{64}", re.ASCII).fullmatch


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


class Library:
    """Put, get and find kernels in a folder.

    Args:
        folder: where it is.
        create: make it where it does not exist, and write to it; else it may be a library that
            can only be read.

    Raises:
        InputError: where the folder cannot be used, or holds no library and may not be made.
    """

    def __init__(self, folder: Path | str, *, create: bool = True) -> None:
        self.folder = Path(folder).expanduser().absolute()
        if not create and not (self.folder / DATABASE).is_file():
            raise InputError(f"there is no library in {self.folder}: {DATABASE} is not there")
        try:
            if create:
                self.folder.mkdir(parents=True, exist_ok=True)
            self._files = LocalStore(self.folder)
            self._engine = open_database(self.folder / DATABASE, create=create)
        except (OSError, BaseError, SQLAlchemyError, sqlite3.Error) as error:
            need = "written" if create else "read"
            raise InputError(
                f"the library folder {self.folder} cannot be used: {reason(error)}. Choose a"
                f" folder that can be {need} and holds nothing else."
            ) from error

    def close(self) -> None:
        """Let go of the database."""
        self._engine.dispose()

    @staticmethod
    def _name(kernel_id: str) -> str:
        return f"kernels/{kernel_id[:2]}/{kernel_id}.kernel"

    def put(self, artifact: Artifact) -> str:
        """Keep an artifact; putting it again changes nothing, and mends a file that is damaged.

        Returns:
            Its id.

        Raises:
            LibraryError: where it could not be written whole; nothing half-written is visible.
        """
        record = _record(artifact)
        try:
            self._write(artifact)
            with self._engine.begin() as connection:
                row = dataclasses.asdict(record)
                connection.execute(sa.insert(KERNELS).prefix_with("OR IGNORE").values(**row))
        except (OSError, OverflowError, BaseError, SQLAlchemyError) as error:
            raise LibraryError(
                f"kernel {artifact.kernel_id[:12]} could not be kept in {self.folder}:"
                f" {reason(error)}"
            ) from error
        _remember(artifact)
        return artifact.kernel_id

    def _write(self, artifact: Artifact) -> None:
        name = self._name(artifact.kernel_id)
        try:
            obstore.put(self._files, name, artifact.data, mode="create")
        except AlreadyExistsError:
            found = obstore.get(self._files, name)
            same = found.meta["size"] == len(artifact.data)
            if not same or bytes(found.bytes()) != artifact.data:
                obstore.put(self._files, name, artifact.data)

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
            raise ArtifactError(f"{error} {self._where(kernel_id)}") from error

    def read_bytes(self, kernel_id: str) -> bytes:
        """The file of that id as it is, which may be damaged.

        Raises:
            KernelNotFoundError: where the library has none.
            ArtifactError: where it is larger than any artifact.
            LibraryError: where its file cannot be read.
        """
        if not _IS_ID(kernel_id):
            raise KernelNotFoundError(
                f"the library {self.folder} holds no kernel {kernel_id[:80]!r}: an id is 64"
                " hexadecimal digits, in lower case"
            )
        try:
            found = obstore.get(self._files, self._name(kernel_id))
            size = found.meta["size"]
            if size > MAX_BYTES:
                raise ArtifactError(
                    f"kernel {kernel_id[:12]} is damaged: its file has {size} bytes, and an"
                    f" artifact at most {MAX_BYTES}. Remove its file and compile it again."
                    f" {self._where(kernel_id)}"
                )
            return bytes(found.bytes())
        except FileNotFoundError as error:
            raise KernelNotFoundError(
                f"the library {self.folder} holds no kernel {kernel_id[:12]}: compile or copy it"
                " there first"
            ) from error
        except (OSError, BaseError) as error:
            raise LibraryError(
                f"kernel {kernel_id[:12]} cannot be read from {self.folder}: {error}"
            ) from error

    def _where(self, kernel_id: str) -> str:
        return f"Its file is {self.folder / self._name(kernel_id)}."

    def full_id(self, beginning: str) -> str:
        """The id of the one kernel whose id begins so.

        Raises:
            InputError: where there are several.
            KernelNotFoundError: where there is none.
            LibraryError: where the library cannot be searched.
        """
        query = sa.select(KERNELS.c.kernel_id).where(
            KERNELS.c.kernel_id.startswith(beginning, autoescape=True)
        )
        found = self._rows(query.order_by(KERNELS.c.kernel_id).limit(3))
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
                for table in (KERNELS, MEASUREMENTS):
                    connection.execute(sa.delete(table).where(table.c.kernel_id == kernel_id))
            if _IS_ID(kernel_id):
                obstore.delete(self._files, self._name(kernel_id))
        except FileNotFoundError:
            return
        except (OSError, BaseError, SQLAlchemyError) as error:
            raise LibraryError(
                f"kernel {kernel_id[:12]} cannot be removed from {self.folder}: {reason(error)}"
            ) from error

    def unlisted(self) -> list[str]:
        """Ids of kernels whose files are there, and which are not found.

        A put or a removal leaves one that was cut short; another process's `put` has one for a
        moment. `put` lists it.

        Raises:
            LibraryError: where the library cannot be searched.
        """
        try:
            # Before the rows: what is put in between is not taken for one.
            found = [
                Path(file["path"]).stem
                for batch in obstore.list(self._files, prefix="kernels")
                for file in batch
            ]
        except (OSError, BaseError) as error:
            raise LibraryError(
                f"the library {self.folder} cannot be searched: {reason(error)}"
            ) from error
        listed = {row["kernel_id"] for row in self._rows(sa.select(KERNELS.c.kernel_id))}
        return sorted(each for each in found if _IS_ID(each) and each not in listed)

    def _rows(self, query: Any) -> list[Any]:
        try:
            with self._engine.connect() as connection:
                return list(connection.execute(query).mappings())
        except SQLAlchemyError as error:
            raise LibraryError(
                f"the library {self.folder} cannot be searched: {reason(error)}"
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
                connection.execute(sa.insert(MEASUREMENTS).prefix_with("OR REPLACE").values(**row))
        except SQLAlchemyError as error:
            raise LibraryError(
                f"what was measured of kernel {keys['kernel_id'][:12]} could not be kept in"
                f" {self.folder}: {reason(error)}"
            ) from error

    def measurements(self, kernel_id: str) -> list[dict[str, Any]]:
        """What was measured of a kernel, by backend, device and batch."""
        query = (
            sa.select(MEASUREMENTS.c.content)
            .where(MEASUREMENTS.c.kernel_id == kernel_id)
            .order_by(MEASUREMENTS.c.backend, MEASUREMENTS.c.device, MEASUREMENTS.c.batch)
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
        query = sa.select(KERNELS).order_by(
            KERNELS.c.blueprint, KERNELS.c.init_seed, KERNELS.c.kernel_id
        )
        if signature is not None:
            query = query.where(KERNELS.c.signature == str(signature))
        if blueprint is not None:
            query = query.where(KERNELS.c.blueprint == blueprint)
        if recipe is not None:
            query = query.where(KERNELS.c.recipe == recipe)
        return [KernelRecord(**row) for row in self._rows(query)]
