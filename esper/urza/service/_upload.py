"""A kernel that comes in: to a temporary file, its digest taken on the way.

Until it is whole and is what it says, nobody sees anything of it.
"""

import hashlib
import tempfile
from collections.abc import Callable, Iterable
from typing import IO, TypeVar

from esper.artifacts import Artifact, read_artifact
from esper.errors import ArtifactError, InputError, LibraryError
from esper.urza.service._body import Body
from esper.urza.service._problems import RefusedError, turned_away
from esper.urza.service._state import Service

T = TypeVar("T")

_HELD = 1 << 20
"""Bytes that are held before they are written and digested, in a thread."""


async def take_in(
    service: Service, kernel_id: str, body: Body, kind: str, keep: Callable[[Artifact], T]
) -> T:
    """Receive a kernel, read it as data, and keep it; no program of it is loaded.

    Args:
        kernel_id: what its digest has to be.
        kind: the Content-Type.
        keep: is given the kernel, in a thread.

    Returns:
        What `keep` returns.

    Raises:
        CutShortError: where the client has gone.
        RefusedError: for what is no kernel, or another.
        LibraryError: where there is no room for it.
    """
    if kind.partition(";")[0].strip().lower() != "application/octet-stream":
        raise RefusedError(
            415,
            InputError,
            f"expected a kernel as application/octet-stream, got the type {kind[:80]!r}",
        )
    if service.uploading >= service.limits.uploads:
        raise turned_away(
            503, f"the service receives {service.limits.uploads} kernels already: try again later"
        )
    service.uploading += 1
    file: IO[bytes] = tempfile.SpooledTemporaryFile(_HELD)  # noqa: SIM115
    try:
        digest = await _receive(service, body, file)
        if digest != kernel_id:
            raise RefusedError(
                422,
                ArtifactError,
                f"what came is not kernel {kernel_id[:12]}: its bytes have the SHA-256 {digest},"
                f" expected {kernel_id}. Upload it again.",
            )
        async with service.reading_in:
            return await service.run(_read_and_keep, file, kernel_id, keep)
    except OSError as error:
        raise LibraryError(
            f"kernel {kernel_id[:12]} could not be received: {error.strerror or error}. Make room"
            " in the service's folder for temporary files."
        ) from error
    finally:
        service.uploading -= 1
        file.close()


async def _receive(service: Service, body: Body, file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    held: list[bytes] = []
    size = 0
    async for part in body.parts():
        held.append(part)
        size += len(part)
        if size >= _HELD:
            await service.run(_keep, held, digest, file)
            held, size = [], 0
        service.metrics.received.inc(len(part))
    if size > 64 << 10:
        await service.run(_keep, held, digest, file)
    else:
        _keep(held, digest, file)
    return digest.hexdigest()


def _keep(parts: Iterable[bytes], digest: "hashlib._Hash", file: IO[bytes]) -> None:
    content = b"".join(parts)
    digest.update(content)
    file.write(content)


def _read_and_keep(file: IO[bytes], kernel_id: str, keep: Callable[[Artifact], T]) -> T:
    # In one step: a kernel that was read and waited for its turn to be kept would be held so long.
    return keep(_read(file, kernel_id))


def _read(file: IO[bytes], kernel_id: str) -> Artifact:
    file.seek(0)
    try:
        return read_artifact(file.read(), expected_id=kernel_id)
    except ArtifactError as error:
        raise RefusedError(422, ArtifactError, str(error)) from error
