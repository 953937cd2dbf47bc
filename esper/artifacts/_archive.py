"""Zip archives whose bytes depend on their content alone."""

import io
import struct
import zipfile
from collections.abc import Mapping

_EPOCH = (1980, 1, 1, 0, 0, 0)
_END = b"PK\x05\x06"
_END_BYTES = 22
_LOCATOR = b"PK\x06\x07"
_LOCATOR_BYTES = 20
_MAX_MEMBERS = 32
_MAX_DIRECTORY = 1 << 14


def write_archive(members: Mapping[str, bytes]) -> bytes:
    """Stored, sorted, with one fixed date: equal members give equal bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(members):
            info = zipfile.ZipInfo(name, _EPOCH)
            # Otherwise the platform that writes is recorded.
            info.create_system = 3
            archive.writestr(info, members[name])
    return buffer.getvalue()


def _check_end(data: bytes) -> None:
    """Look at how many members an archive says it has, before they are all listed."""
    end = data[-_END_BYTES:]
    if len(end) < _END_BYTES or not end.startswith(_END):
        raise ValueError("it is not a readable zip archive (it does not end like one)")
    members, size = struct.unpack("<HI", end[10:16])
    if members > _MAX_MEMBERS or size > _MAX_DIRECTORY:
        raise ValueError(f"it lists {members} members in {size} bytes, more than is read")
    # An archive with 64-bit numbers says before its end how many members it really has.
    if data[-_END_BYTES - _LOCATOR_BYTES : -_END_BYTES].startswith(_LOCATOR):
        raise ValueError("it is a zip archive with 64-bit numbers, which none of ours has")


def longest(max_bytes: int) -> int:
    """How long an archive may be that holds so many bytes of content."""
    # Each member has a header of its own, shorter than its entry in the directory.
    return max_bytes + 2 * _MAX_DIRECTORY + _END_BYTES


def read_archive(data: bytes, *, max_bytes: int) -> dict[str, bytes]:
    """The members of an archive that `write_archive` wrote, or would have.

    An archive has many ways to say the same, and some readers see what others do not: one way
    alone is read, so that every bit of it has a meaning.

    Raises:
        ValueError: for what is no zip archive, for compressed or repeated members, for more
            than `max_bytes` of content, and for any byte that is not as it would be written.
    """
    if len(data) > longest(max_bytes):
        raise ValueError(f"it has {len(data)} bytes, at most {longest(max_bytes)} are read")
    _check_end(data)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            infos = archive.infolist()
            names = [info.filename for info in infos]
            if len(set(names)) != len(names):
                raise ValueError("two members have one name")
            if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
                raise ValueError("a member is compressed; only stored members are read")
            if sum(info.file_size for info in infos) > max_bytes:
                raise ValueError(f"its content is larger than {max_bytes} bytes")
            if sum(info.file_size for info in infos) > len(data):
                raise ValueError("its members are larger than itself")
            members = {name: archive.read(name) for name in names}
    # An encrypted member is a RuntimeError, and names may be of any encoding.
    except (zipfile.BadZipFile, RuntimeError, EOFError, OSError, struct.error) as error:
        raise ValueError(f"it is not a readable zip archive ({error})") from error
    if write_archive(members) != data:
        raise ValueError("its bytes are not as they are written; it was made or changed elsewhere")
    return members
