"""What servers say: appended to files, of which the last lines are shown where one ended."""

from pathlib import Path

_TOO_LONG = 16 << 20
"""Bytes from which on a log is put aside when the lab comes up; one earlier log is kept."""


def put_aside(log: Path) -> None:
    """Begin a new log where this one has grown long."""
    if log.exists() and log.stat().st_size > _TOO_LONG:
        log.replace(log.with_suffix(".log.1"))


def length_of(log: Path) -> int:
    """How much a log holds, in bytes."""
    return log.stat().st_size if log.exists() else 0


def holds(log: Path, text: str, start: int) -> bool:
    """Whether a text is in a log, after so many bytes of it."""
    with log.open("rb") as file:
        file.seek(start)
        return text.encode() in file.read(_TOO_LONG)


def last_lines(log: Path, count: int = 5) -> list[str]:
    """The end of a log."""
    try:
        with log.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - 16_384))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return [line for line in text.splitlines() if line.strip()][-count:]
