"""CIFAR-10 from its own files, which the user has."""

import hashlib
import io
import tarfile
import warnings
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

import numpy as np

from esper.errors import InputError
from esper.tolaria.tasks._check import make_task
from esper.tolaria.tasks._cifar_pickle import read_batch
from esper.tolaria.tasks._conv_host import ConvHost
from esper.tolaria.tasks._task import Task

_PIXELS = 3 * 32 * 32
_RECORDS = 10_000
_VALIDATION = 0.1

_PYTHON_DIGESTS = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
"""MD5s of the members of the published archive, as torchvision checks them."""

_ARCHIVE_DIGESTS = {
    "c58f30108f718f92721af3b95e74349a": "the python version",
    "c32a1d4ab5d03f1284b67883e8d87530": "the binary version",
}
"""MD5s that https://www.cs.toronto.edu/~kriz/cifar.html gives of the archives."""


class CifarDigestWarning(UserWarning):
    """Files are well formed, and not the ones that CIFAR-10's page publishes."""


class _Version(NamedTuple):
    folder: str
    files: tuple[str, ...]
    """Five of training, then the one of testing."""


class _Found(NamedTuple):
    files: dict[str, bytes]
    """Five of training, then the one of testing, by name."""
    foreign: str
    """Which of them, or of what holds them, has another MD5 than the published one; or empty."""


_BINARY = _Version("cifar-10-batches-bin", tuple(f"{name}.bin" for name in _PYTHON_DIGESTS))
_PYTHON = _Version("cifar-10-batches-py", tuple(_PYTHON_DIGESTS))


def cifar10(place: Path, *, records: int = _RECORDS) -> Task:
    """CIFAR-10 (Krizhevsky, 2009): 60,000 colour photographs of 32×32, in 10 classes.

    The first 45,000 training images train, the last 5,000 of them validate, the 10,000 test
    images test. Examples `[3, 32, 32]` in -1 to 1, red, green and blue.

    Files whose MD5 is not the published one give a `CifarDigestWarning` and are used, for an
    archive may have been packed anew; what cannot be of CIFAR-10's form is refused, and which
    data a run had is told by its task's digest.

    Args:
        place: the folder `cifar-10-batches-bin` or `cifar-10-batches-py`, the one that holds
            it, or an archive `.tar.gz` of either, which is read without being unpacked. Nothing
            is unpickled: of the python version a reader of our own takes what CIFAR's files
            hold, and refuses all else.
        records: images in each of the six files.

    Raises:
        InputError: where a file is missing, has another size, or holds something else.
    """
    place = place.expanduser()
    try:
        found = _from_archive(place, records) if place.is_file() else _from_folder(place, records)
    except OSError as error:
        raise InputError(
            f"{place} cannot be read ({error}): expected CIFAR-10's folder or archive, readable"
        ) from error
    batches = [_decoded(name, data, records) for name, data in found.files.items()]
    if found.foreign:
        warnings.warn(
            f"{found.foreign}: all is well formed and is used, but it is not the data that"
            " CIFAR-10's page publishes",
            CifarDigestWarning,
            stacklevel=2,
        )
    x, y = (np.concatenate([batch[i] for batch in batches]) for i in range(2))
    tested = len(x) - records
    trained = tested - round(tested * _VALIDATION)

    def part(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        images = x[start:stop].reshape(-1, 3, 32, 32).astype(np.float32)
        images /= np.float32(127.5)
        images -= np.float32(1)
        return images, y[start:stop].astype(np.int32)

    return make_task(
        "cifar10",
        train=part(0, trained),
        validation=part(trained, tested),
        test=part(tested, len(x)),
        host=ConvHost(channels=3, size=32, widths=(8, 16, 16), classes=10),
    )


def _decoded(name: str, data: bytes, records: int) -> tuple[np.ndarray, np.ndarray]:
    """Images `[records, 3072]` and labels `[records]`, u8."""
    if name.endswith(".bin"):
        table = np.frombuffer(data, np.uint8).reshape(records, 1 + _PIXELS)
        x, y = table[:, 1:], table[:, 0]
    else:
        x, y = read_batch(data, name, records)
    if int(y.max()) > 9:
        row = int(np.argmax(y > 9))
        raise InputError(
            f"{name} has the label {y[row]} in image {row}: expected 0 to 9; is it CIFAR-10?"
        )
    return x, y


def _version(names: set[str], place: Path, records: int) -> _Version:
    """The version of which there are most files, by those that are there."""
    version = max((_BINARY, _PYTHON), key=lambda v: len(names.intersection(v.files)))
    missing = [name for name in version.files if name not in names]
    if len(missing) == len(version.files):
        raise InputError(
            f"{place} does not hold CIFAR-10: expected the files {', '.join(_BINARY.files)} or"
            f" {', '.join(_PYTHON.files)}, from https://www.cs.toronto.edu/~kriz/cifar.html"
        )
    if missing:
        raise InputError(
            f"{place} is incomplete: {missing[0]} is missing, expected {_size(missing[0], records)}"
            f" beside {', '.join(n for n in version.files if n in names)}; unpack the archive again"
        )
    return version


def _size(name: str, records: int) -> str:
    if name.endswith(".bin"):
        return f"{records * (1 + _PIXELS):,} bytes"
    return f"about {records * (1 + _PIXELS) / 1e6:.0f} MB"


def _check_size(name: str, size: int, records: int, where: Path) -> None:
    exact = records * (1 + _PIXELS)
    # The python files hold the images, and labels and names of two to about forty bytes each.
    fits = size == exact if name.endswith(".bin") else exact < size < exact + 64 * records + 4_096
    if not fits:
        raise InputError(
            f"{name} in {where} has {size:,} bytes: expected {_size(name, records)}; it is cut"
            " short or another file, so fetch it again"
        )


def _from_folder(place: Path, records: int) -> _Found:
    for inner in (_BINARY, _PYTHON):
        if (place / inner.folder).is_dir():
            place = place / inner.folder
            break
    if not place.is_dir():
        raise InputError(
            f"there is no folder or archive {place}: expected cifar-10-batches-bin,"
            " cifar-10-batches-py or their .tar.gz, from https://www.cs.toronto.edu/~kriz/cifar.html"
        )
    names = {path.name for path in place.iterdir() if path.is_file()}
    version = _version(names, place, records)
    for name in version.files:
        _check_size(name, (place / name).stat().st_size, records, place)
    files = {name: (place / name).read_bytes() for name in version.files}
    if version is _PYTHON:
        for name, data in files.items():
            digest = hashlib.md5(data).hexdigest()
            if digest != _PYTHON_DIGESTS[name]:
                published = _PYTHON_DIGESTS[name]
                return _Found(files, f"{name} in {place} has the MD5 {digest} and not {published}")
    return _Found(files, "")


def _from_archive(place: Path, records: int) -> _Found:
    with place.open("rb") as file:
        digest = hashlib.file_digest(file, "md5").hexdigest()
        file.seek(0)
        held = _members(place, file, records)
    version = _version(set(held), place, records)
    files = {name: held[name] for name in version.files}
    if digest in _ARCHIVE_DIGESTS:
        return _Found(files, "")
    return _Found(files, f"{place} has the MD5 {digest} and not {' or '.join(_ARCHIVE_DIGESTS)}")


def _members(place: Path, file: BinaryIO, records: int) -> dict[str, bytes]:
    """The members that are CIFAR's, by their names; the others are passed by."""
    known = {*_BINARY.files, *_PYTHON.files}
    held: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=file, mode="r:gz") as archive:
            for member in archive:
                name = PurePosixPath(member.name).name
                if name not in known or not member.isfile():
                    continue
                _check_size(name, member.size, records, place)
                content = archive.extractfile(member) or io.BytesIO()
                held[name] = content.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise InputError(
            f"{place} cannot be read as a .tar.gz archive ({error}): it is cut short or another"
            " file, so fetch it again"
        ) from error
    return held
