"""The files of a library: in a folder, or in a bucket of S3.

A file is named by the SHA-256 of what it holds, is written once and whole, and is verified by
whoever reads it. All that is asked of a store is put, get, list and delete.
"""

import contextlib
import dataclasses
import datetime as dt
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, GenericError, NotSupportedError
from obstore.store import LocalStore, ObjectStore, S3Store

from esper.artifacts import MAX_BYTES
from esper.errors import AccessDeniedError, ArtifactError, EsperError, InputError
from esper.urza._failures import FAILURES, failure, reason

_LOG = logging.getLogger(__name__)
_IS_ID = re.compile(r"[0-9a-f]{64}", re.ASCII).fullmatch
_IS_HALF = re.compile(r"([0-9a-f]{64})\.kernel#[0-9]+", re.ASCII).fullmatch
"""What `LocalStore` names a file until it is whole."""
_IS_BUCKET = re.compile(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(/.*)?", re.ASCII).fullmatch
_FOLDER = "kernels"
_PIECE_BYTES = 1 << 20
_S3_CLIENT: dict[str, Any] = {"timeout": "300s", "connect_timeout": "5s", "allow_http": True}
"""HTTP is used where the endpoint asks for it, within a machine or a closed network."""
_S3_RETRIES: dict[str, Any] = {
    "max_retries": 4,
    "retry_timeout": dt.timedelta(seconds=20),
    "backoff": {"max_backoff": dt.timedelta(seconds=3)},
}


def is_id(text: str) -> bool:
    """Whether a text is an id: 64 hexadecimal digits in lower case."""
    return _IS_ID(text) is not None


@dataclasses.dataclass(frozen=True)
class S3Access:
    """How a server of S3 is reached; what is None is taken from `AWS_` variables."""

    endpoint: str | None = None
    access_key_id: str | None = None
    secret_access_key: str | None = dataclasses.field(default=None, repr=False)
    session_token: str | None = dataclasses.field(default=None, repr=False)
    region: str | None = None


@dataclasses.dataclass(frozen=True)
class Blob:
    """A file, as a listing tells of it."""

    kernel_id: str
    size: int
    changed: float
    """In seconds since 1970, by the store's clock."""


def blob_name(kernel_id: str) -> str:
    """Where a kernel's file is in its store."""
    return f"{_FOLDER}/{kernel_id[:2]}/{kernel_id}.kernel"


class Blobs:
    """Files by id.

    Args:
        where: for messages; it shows no secret.
        folder: where the files are, if they are in a folder.
    """

    def __init__(self, store: ObjectStore, where: str, folder: Path | None = None) -> None:
        self.where = where
        self._store = store
        self._folder = folder
        self._conditional = True

    def write(self, kernel_id: str, data: bytes) -> None:
        """Write a file; one that is there and damaged is mended.

        Raises:
            FAILURES: where it cannot be written; nothing of it is visible then.
        """
        name = blob_name(kernel_id)
        if self._conditional:
            try:
                obstore.put(self._store, name, data, mode="create")
                return
            except AlreadyExistsError:
                pass
            except (NotSupportedError, GenericError) as error:
                if not _is_not_implemented(error):
                    raise
                # All who write this name write the same: no harm where two do at once.
                self._conditional = False
                _LOG.warning(
                    "%s cannot create a file only where there is none: files are looked for first"
                    " from now on",
                    self.where,
                )
        if not self._holds(name, data):
            obstore.put(self._store, name, data)

    def _holds(self, name: str, data: bytes) -> bool:
        try:
            found = obstore.get(self._store, name)
        except FileNotFoundError:
            return False
        return found.meta["size"] == len(data) and bytes(found.bytes()) == data

    def read(self, kernel_id: str) -> bytes:
        """A whole file.

        Raises:
            FileNotFoundError: where there is none.
            ArtifactError: where it is larger than any artifact.
        """
        found = obstore.get(self._store, blob_name(kernel_id))
        size = found.meta["size"]
        if size > MAX_BYTES:
            raise ArtifactError(
                f"kernel {kernel_id[:12]} is damaged: its file has {size} bytes, and an"
                f" artifact at most {MAX_BYTES}. Remove its file and compile it again."
                f" {self.place(kernel_id)}"
            )
        return bytes(found.bytes())

    def pieces(self, kernel_id: str, start: int) -> Iterator[bytes]:
        """A file from some byte on; it is opened before this returns.

        Raises:
            FileNotFoundError: where there is none.
            InputError: where `start` lies outside of it.
        """
        name = blob_name(kernel_id)
        size = obstore.head(self._store, name)["size"]
        if not 0 <= start <= size:
            raise InputError(
                f"kernel {kernel_id[:12]} has {size} bytes and cannot be read from byte {start} on"
            )
        if start == size:
            return iter(())
        if start == 0:
            return _from(obstore.get(self._store, name), 0)
        try:
            return _from(obstore.get(self._store, name, options={"range": {"offset": start}}), 0)
        except GenericError as error:
            if "non-partial response" not in reason(error):
                raise
            # The server answers no ranges.
            return _from(obstore.get(self._store, name), start)

    def size(self, kernel_id: str) -> int | None:
        """Of a file; None where there is none."""
        try:
            return obstore.head(self._store, blob_name(kernel_id))["size"]
        except FileNotFoundError:
            return None

    def delete(self, kernel_id: str) -> None:
        """Remove a file; none there is no error."""
        with contextlib.suppress(FileNotFoundError):
            obstore.delete(self._store, blob_name(kernel_id))

    def listing(self) -> Iterator[Blob]:
        """All files, in no order."""
        for batch in obstore.list(self._store, prefix=_FOLDER):
            for found in batch:
                kernel_id = Path(found["path"]).stem
                if is_id(kernel_id) and found["path"].endswith(blob_name(kernel_id)):
                    yield Blob(kernel_id, found["size"], found["last_modified"].timestamp())

    def halves(self) -> Iterator[tuple[Path, Blob]]:
        """Files of a folder that are not whole: of puts under way, and of those that were killed.

        A server of S3 keeps none that could be listed.
        """
        if self._folder is None:
            return
        for path in self._folder.glob(f"{_FOLDER}/*/*.kernel#*"):
            found = _IS_HALF(path.name)
            if found is not None:
                # It may become whole in between.
                with contextlib.suppress(FileNotFoundError):
                    status = path.stat()
                    yield path, Blob(found.group(1), status.st_size, status.st_mtime)

    def check(self) -> None:
        """Ask the store for something.

        Raises:
            FAILURES: where it does not answer.
        """
        next(iter(obstore.list(self._store, prefix=_FOLDER, chunk_size=1)), None)

    def place(self, kernel_id: str) -> str:
        """Where a file is, as a sentence."""
        return f"Its file is {self.where}/{blob_name(kernel_id)}."


def _from(found: "obstore.GetResult", skip: int) -> Iterator[bytes]:
    for piece in found.stream(min_chunk_size=_PIECE_BYTES):
        data = bytes(piece)
        if skip < len(data):
            yield data[skip:]
        skip = max(0, skip - len(data))


def _is_not_implemented(error: BaseError) -> bool:
    return isinstance(error, NotSupportedError) or "status code: 501" in reason(error)


def folder_blobs(folder: Path) -> Blobs:
    """The files of a folder, which is there."""
    return Blobs(LocalStore(folder), str(folder), folder)


def open_blobs(where: str, *, s3: S3Access | None = None) -> Blobs:
    """The files of a folder or of a bucket, which was asked whether it answers.

    Args:
        where: a folder, which is made, or `s3://BUCKET/FOLDER`.

    Raises:
        InputError: where it is neither, or cannot be used as it is given.
        ServiceUnavailableError: where the server does not answer.
    """
    if "://" not in where:
        folder = Path(where).expanduser().absolute()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return folder_blobs(folder)
        except (OSError, BaseError) as error:
            raise InputError(
                f"the folder {folder} cannot be used for kernels: {reason(error)}. Choose one that"
                " can be written."
            ) from error
    found = _IS_BUCKET(where)
    if found is None:
        raise InputError(
            f"kernels cannot be kept in {where[:200]!r}: expected a folder, or s3://BUCKET/FOLDER"
        )
    bucket, prefix = found.group(1), (found.group(2) or "").strip("/")
    given = {} if s3 is None else {k: v for k, v in vars(s3).items() if v is not None}
    try:
        store = S3Store(
            bucket,
            prefix=prefix or None,
            client_options=_S3_CLIENT,  # pyright: ignore[reportArgumentType]
            retry_config=_S3_RETRIES,  # pyright: ignore[reportArgumentType]
            **given,
        )
        blobs = Blobs(store, f"s3://{bucket}/{prefix}".rstrip("/"))
        blobs.check()
    except (*FAILURES, ValueError) as error:
        raise _refused(bucket, s3, error) from error
    return blobs


def _refused(bucket: str, s3: S3Access | None, error: Exception) -> EsperError:
    endpoint = (s3.endpoint if s3 is not None else None) or "its server"
    if "NoSuchBucket" in str(error):
        return InputError(
            f"there is no bucket {bucket!r} at {endpoint}: make it first, or name another"
        )
    found = failure(f"the bucket {bucket!r} at {endpoint} cannot be used", error)
    if isinstance(found, AccessDeniedError):
        return InputError(
            f"{endpoint} refuses the bucket {bucket!r} to this access key, or does not know the key"
            f" or its secret: {reason(error)}. Check both."
        )
    return found
