"""TorchScript archives: made reproducible, and scanned before they are loaded.

`torch.jit.load` runs code (`__setstate__`) and may write files, so an archive
is read as data first. It must be what `esper.tezzeret` writes: one class with
one method of straight-line code that calls allowed functions of torch alone,
and pickles without foreign globals.
"""

import io
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator
from typing import Any

from esper.artifacts._archive import read_archive, write_archive
from esper.artifacts._source import scan_source
from esper.errors import ArtifactError

ROOT = "kernel"
CODE = f"{ROOT}/code/__torch__.py"
MAX_BYTES = 64 << 20

_VERSION = {f"{ROOT}/.data/version", f"{ROOT}/version"}
"""torch writes one of the two, by the age of the operators used."""
_PICKLES = {f"{ROOT}/data.pkl", f"{ROOT}/constants.pkl"}
_REQUIRED = _PICKLES | {CODE, f"{ROOT}/byteorder"}

_VERSION_TEXT = re.compile(rb"[0-9]{1,4}\n?")
_MAX_PICKLE = 4096


def normalise(archive: bytes) -> bytes:
    """Rewrite what `torch.jit.save` wrote so that its bytes depend on its content alone.

    Drops the source locations (paths of the machine that compiled) and the
    serialisation id, and fixes names and dates.
    """
    with zipfile.ZipFile(io.BytesIO(archive)) as source:
        members = {name.split("/", 1)[1]: source.read(name) for name in source.namelist()}
    kept = {
        f"{ROOT}/{name}": data
        for name, data in members.items()
        if f"{ROOT}/{name}" in _REQUIRED | _VERSION
    }
    return write_archive(kept)


def _scan_pickle(name: str, data: bytes) -> None:
    allowed_globals = {"__torch__ EsperKernel"}
    allowed_ops = {
        "PROTO", "GLOBAL", "EMPTY_TUPLE", "NEWOBJ", "EMPTY_DICT", "BUILD", "STOP", "BINPUT",
        "MARK", "SETITEMS",
    }  # fmt: skip
    for op, argument in _operations(name, data):
        if op.name not in allowed_ops:
            raise ArtifactError(f"{name} uses the pickle operation {op.name}, which is not allowed")
        if op.name == "GLOBAL" and argument not in allowed_globals:
            raise ArtifactError(f"{name} names the global {argument!r}, which is not allowed")


def _operations(name: str, data: bytes) -> Iterator[tuple[Any, Any]]:
    if len(data) > _MAX_PICKLE:
        raise ArtifactError(f"{name} is larger than {_MAX_PICKLE} bytes")
    try:
        for op, argument, position in pickletools.genops(data):
            if op.name == "STOP" and position != len(data) - 1:
                raise ArtifactError(f"{name} goes on after its end")
            yield op, argument
    except (ValueError, IndexError, EOFError) as error:
        raise ArtifactError(f"{name} cannot be read: {error}") from error


def load(archive: bytes) -> Any:
    """The scripted module `program(params..., x)` of an archive that passes `scan`.

    Raises:
        ArtifactError: for one that does not.
    """
    import torch

    scan(archive)
    with warnings.catch_warnings():
        # TorchScript is deprecated by torch and is what it can load without Python code.
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.load(io.BytesIO(archive))


def scan(archive: bytes) -> int:
    """Refuse an archive that could do anything but compute; runs nothing.

    Returns:
        How many tensors its program takes.

    Raises:
        ArtifactError: saying what was found.
    """
    try:
        members = read_archive(archive, max_bytes=MAX_BYTES)
    except ValueError as error:
        raise ArtifactError(f"its TorchScript cannot be read: {error}") from error
    odd = sorted((set(members) - _VERSION) ^ _REQUIRED)
    if odd or len(_VERSION & set(members)) != 1:
        raise ArtifactError(
            f"its TorchScript archive has unexpected or missing members: {odd or 'version'}"
        )
    for name in sorted(_VERSION & set(members)):
        if not _VERSION_TEXT.fullmatch(members[name]):
            raise ArtifactError(f"its TorchScript has the version {members[name][:40]!r}")
    if members[f"{ROOT}/byteorder"] not in (b"little", b"big"):
        raise ArtifactError(
            f"its TorchScript has the byte order {members[f'{ROOT}/byteorder'][:40]!r}"
        )
    arguments = scan_source(members[CODE])
    for name in sorted(_PICKLES):
        _scan_pickle(name, members[name])
    return arguments
