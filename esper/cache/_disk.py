"""Artifacts in a folder that any number of processes share.

A file is named by the SHA-256 of the artifact that it holds, compressed, and
appears whole or not at all. The folder itself is the index: a file's
modification time is when it was last used, and what is kept is what lies there.
There is nothing beside it that could contradict it. Only the sum of the sizes is
written down, under a lock that ends with its process, and marked as unknown
while it changes: a process killed at any moment leaves the right sum, or none,
and then the next one counts the files.
"""

import errno
import fcntl
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import zstandard

from esper.artifacts import MAX_BYTES, Artifact, read_artifact
from esper.errors import ArtifactError, InputError

LEVEL = 3
"""Of the compression."""

_LEDGER = "usage"
_UNKNOWN = b"unknown".ljust(32)
_KEPT = re.compile(r"[0-9a-f]{64}\.zst")
_KERNEL_ID = re.compile(r"[0-9a-f]{64}")
_PARTIAL = ".partial"
_LOW_WATER = 0.9
"""Of the limit; what eviction comes down to, so that not every file put scans the folder."""


_READ_ONLY = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
"""What the system says where nothing may be written."""


class Put(NamedTuple):
    """What became of an artifact."""

    kept: bool
    """False for one larger than the whole tier."""
    evicted: int
    """How many files went to make room."""


class _Ledger:
    """The sum of the sizes, in a file that is locked while this is open."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def read(self) -> int | None:
        """The sum; None where it is not known."""
        text = os.pread(self._descriptor, len(_UNKNOWN), 0).strip()
        return int(text) if text.isdigit() else None

    def forget(self) -> None:
        """To be called before any change of the folder."""
        os.pwrite(self._descriptor, _UNKNOWN, 0)

    def write(self, used: int) -> None:
        """To be called when a change is complete."""
        os.pwrite(self._descriptor, str(used).encode().ljust(len(_UNKNOWN)), 0)


class DiskTier:
    """Keeps artifacts in a folder up to a number of bytes; those unused longest go first.

    A folder that is there and may not be written is read all the same.

    Args:
        folder: where; it holds nothing else.
        max_bytes: most bytes of all files together, as long as they are.
        max_artifact_bytes: most bytes of one artifact, uncompressed.

    Raises:
        InputError: where the folder cannot be used.
    """

    def __init__(
        self, folder: Path | str, max_bytes: int, *, max_artifact_bytes: int = MAX_BYTES
    ) -> None:
        self.folder = Path(folder).expanduser().absolute()
        self.max_bytes = max_bytes
        self.max_artifact_bytes = max_artifact_bytes
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.repair()
        except OSError as error:
            raise InputError(
                f"the folder {self.folder} cannot be used as the disk tier of a cache: {error}."
                " Choose a folder that can be read, and be written to keep anything, or none."
            ) from error

    @contextmanager
    def _locked(self) -> Iterator[_Ledger]:
        # Opened each time: a lock belongs to what was opened, and threads must wait too.
        descriptor = os.open(self.folder / _LEDGER, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield _Ledger(descriptor)
        finally:
            # A process forked meanwhile has this open too: to close it here ends no lock.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)

    def _path(self, kernel_id: str) -> Path:
        return self.folder / f"{kernel_id}.zst"

    def get(self, kernel_id: str) -> Artifact | None:
        """The artifact of an id, its bytes verified; None where it is not there.

        Raises:
            ArtifactError: where its file was damaged; it was removed where that is allowed.
            OSError: where its file cannot be read.
        """
        if not _KERNEL_ID.fullmatch(kernel_id):
            return None
        try:
            descriptor = os.open(self._path(kernel_id), os.O_RDONLY)
        except FileNotFoundError:
            return None
        with os.fdopen(descriptor, "rb") as file:
            try:
                artifact = read_artifact(self._decompressed(file), kernel_id)
            except (ArtifactError, ValueError, zstandard.ZstdError) as error:
                removed = self._remove(kernel_id, os.fstat(descriptor))
                raise ArtifactError(
                    f"the file of kernel {kernel_id[:12]} in {self.folder} was damaged and"
                    f" {'is' if removed else 'cannot be'} removed: {error}"
                ) from error
            # What may not be written is not marked as used.
            with suppress(OSError):
                _touch(descriptor)
        return artifact

    def _decompressed(self, file: BinaryIO) -> bytes:
        most = self.max_artifact_bytes
        # zstd makes nothing longer than this.
        longest = most + most // 128 + 1024
        frame = file.read(longest + 1)
        if len(frame) > longest:
            raise ValueError(f"it is longer than {longest} bytes")
        size = zstandard.get_frame_parameters(frame).content_size
        if size == zstandard.CONTENTSIZE_UNKNOWN or size > most:
            raise ValueError(f"its content is not known to be within {most} bytes")
        return zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)

    def _remove(self, kernel_id: str, damaged: os.stat_result) -> bool:
        """Whether the damaged file is gone."""
        path = self._path(kernel_id)
        # Where it cannot be removed, it is found damaged again, and never returned.
        with suppress(OSError), self._locked() as ledger:
            # Another process may have put a good one in its place.
            if os.path.samestat(path.stat(), damaged):
                # Nor may its size be what was counted once: they are counted anew.
                ledger.forget()
                path.unlink()
            return True
        return not path.exists()

    def put(self, artifact: Artifact) -> Put:
        """Keep an artifact; one that is there, and whole, is only marked as used.

        Raises:
            OSError: where it cannot be written; nothing half-written is visible.
        """
        path = self._path(artifact.kernel_id)
        with suppress(ArtifactError):
            if self.get(artifact.kernel_id) is not None:
                return Put(True, 0)
        frame = zstandard.ZstdCompressor(level=LEVEL).compress(artifact.data)
        if len(frame) > self.max_bytes or len(artifact.data) > self.max_artifact_bytes:
            return Put(False, 0)
        partial = self.folder / f"{artifact.kernel_id}.{secrets.token_hex(8)}{_PARTIAL}"
        with self._locked():
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            # Held until it is complete: what is locked by nobody was left by one who died.
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(frame)
                file.flush()
                os.fsync(descriptor)
                _touch(descriptor)
                return self._publish(partial, path, len(frame))
        finally:
            partial.unlink(missing_ok=True)

    def _publish(self, partial: Path, path: Path, size: int) -> Put:
        with self._locked() as ledger:
            if path.exists():
                return Put(True, 0)
            used, evicted = ledger.read(), 0
            ledger.forget()
            if used is None or used + size > self.max_bytes:
                used, evicted = self._make_room(size)
            partial.replace(path)
            ledger.write(used + size)
        return Put(True, evicted)

    def _make_room(self, size: int) -> tuple[int, int]:
        """The sum of what is left after eviction for a file of this size, and how many went."""
        kept = self._scan()
        used = sum(entry[2] for entry in kept)
        evicted = 0
        if used + size > self.max_bytes:
            most = max(0, int(_LOW_WATER * self.max_bytes) - size)
            for _, name, own in sorted(kept):
                if used <= most:
                    break
                (self.folder / name).unlink(missing_ok=True)
                used -= own
                evicted += 1
        return used, evicted

    def _scan(self) -> list[tuple[int, str, int]]:
        """When each file was last used, its name and its size; what dead writers left goes."""
        kept: list[tuple[int, str, int]] = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if _KEPT.fullmatch(entry.name):
                    with suppress(FileNotFoundError):
                        found = entry.stat()
                        kept.append((found.st_mtime_ns, entry.name, found.st_size))
                elif entry.name.endswith(_PARTIAL):
                    _remove_if_left(entry.path)
        return kept

    def repair(self) -> int:
        """Count the files anew and remove what dead writers left; the bytes in use.

        Raises:
            OSError: where the folder cannot be used.
        """
        try:
            with self._locked() as ledger:
                used = self._sum()
                ledger.write(used)
        except OSError as error:
            if error.errno not in _READ_ONLY:
                raise
            # Nor is there anything here that could be written down.
            used = self._sum()
        return used

    def _sum(self) -> int:
        return sum(entry[2] for entry in self._scan())

    def clear(self) -> int:
        """Remove all files; how many there were."""
        with self._locked() as ledger:
            ledger.forget()
            kept = self._scan()
            for _, name, _ in kept:
                (self.folder / name).unlink(missing_ok=True)
            ledger.write(0)
        return len(kept)

    def __len__(self) -> int:
        return sum(bool(_KEPT.fullmatch(name)) for name in os.listdir(self.folder))  # noqa: PTH208

    @property
    def bytes(self) -> int:
        """The sum of the sizes of all files, whoever put them there."""
        used = None
        with suppress(OSError), self._locked() as ledger:
            used = ledger.read()
        return self.repair() if used is None else used


def _touch(descriptor: int) -> None:
    # The system's own stamps are milliseconds apart, too coarse to tell an order.
    now = time.time_ns()
    os.utime(descriptor, ns=(now, now))


def _remove_if_left(path: str) -> None:
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(path)  # noqa: PTH108
        finally:
            os.close(descriptor)
