"""Zip archives whose bytes depend on their content alone."""

import io
import zipfile
from collections.abc import Mapping

_EPOCH = (1980, 1, 1, 0, 0, 0)


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


def read_archive(data: bytes, *, max_bytes: int) -> dict[str, bytes]:
    """The members of an archive.

    Raises:
        ValueError: for what is no zip archive, for compressed or repeated members, and
            for more than `max_bytes` of content.
    """
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
            return {name: archive.read(name) for name in names}
    except (zipfile.BadZipFile, NotImplementedError, EOFError, OSError) as error:
        raise ValueError(f"it is not a readable zip archive ({error})") from error
