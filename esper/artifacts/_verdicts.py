"""Verdicts that are remembered: a small SQLite database in the user's cache folder.

It saves time and holds nothing that could not be found out again. So a database that is damaged is
put aside and begun anew, and where no file can be written they are remembered in memory.
"""

import contextlib
import hashlib
import os
import sqlite3
import threading
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import TracebackType

from esper.artifacts._verdict import Verdict

_DATABASE = "verdicts.sqlite"
_TABLE = """
CREATE TABLE IF NOT EXISTS verdicts (
    digest TEXT PRIMARY KEY, verdict TEXT NOT NULL, seal TEXT NOT NULL
) WITHOUT ROWID
"""
_BUSY_SECONDS = 10.0


class VerdictsInMemoryWarning(UserWarning):
    """Verdicts cannot be kept in a file, and are forgotten when the process ends."""


def cache_folder() -> Path:
    """`ESPER_CACHE_DIR`, or `esper` in `XDG_CACHE_HOME`, or `~/.cache/esper`."""
    own, shared = os.environ.get("ESPER_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own).expanduser()
    return (Path(shared) if shared else Path("~/.cache")).expanduser() / "esper"


class _Damaged(Exception):
    pass


class VerdictStore:
    """Verdicts by `programs_digest`, for any number of threads and processes.

    Where the folder cannot be used it works in memory, warns once, and says why in `reason`.

    Args:
        folder: where the database is; by default the user's cache folder.
    """

    def __init__(self, folder: Path | str | None = None) -> None:
        self.folder = Path(folder).expanduser() if folder is not None else cache_folder()
        self.reason = ""
        """Why verdicts are in memory alone; empty where they are in the file."""
        self._lock = threading.RLock()
        self._closed = False
        try:
            self._database = self._open()
        except (OSError, sqlite3.Error, _Damaged) as error:
            self._forget_the_file(error)

    @property
    def path(self) -> Path:
        """The database, whether or not it can be used."""
        return self.folder / _DATABASE

    def get(self, digest: str) -> Verdict | None:
        """The verdict of that digest, or None."""
        found = self._ask("SELECT verdict, seal FROM verdicts WHERE digest = ?", digest)
        if not found:
            return None
        text, seal = found[0]
        try:
            if seal != _seal(digest, text):
                raise ValueError("a row is not as it was written")
            return Verdict.from_json(text)
        except ValueError as error:
            self._begin_anew(error)
            return None

    def put(self, digest: str, verdict: Verdict) -> None:
        """Remember a verdict, in place of an earlier one."""
        text = verdict.to_json()
        row = (digest, text, _seal(digest, text))
        self._ask("INSERT OR REPLACE INTO verdicts VALUES (?, ?, ?)", *row)

    def __len__(self) -> int:
        found = self._ask("SELECT count(*) FROM verdicts")
        return found[0][0] if found else 0

    def close(self) -> None:
        """Let go of the database. Closing twice does nothing.

        Nothing is asked of a closed store; it raises `ValueError` then, as a closed file does.
        """
        with self._lock:
            self._closed = True
            self._database.close()

    def __enter__(self) -> "VerdictStore":
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self.close()

    def _ask(self, statement: str, *values: str) -> list[tuple]:
        with self._lock:
            if self._closed:
                raise ValueError(f"the store of verdicts in {self.folder} is closed: open another")
            try:
                return self._execute(statement, values)
            except sqlite3.Error as error:
                if self._is_damage(error):
                    self._begin_anew(error)
                else:
                    self._forget_the_file(error)
            try:
                return self._execute(statement, values)
            except sqlite3.Error as error:
                self._forget_the_file(error)
                return self._execute(statement, values)

    def _execute(self, statement: str, values: tuple[str, ...]) -> list[tuple]:
        with self._database:
            return self._database.execute(statement, values).fetchall()

    def _open(self) -> sqlite3.Connection:
        if os.name != "posix":
            raise OSError("its lock needs Linux or macOS")
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        _check_mode(self.folder)
        with self._alone():
            try:
                return self._connect()
            except (sqlite3.Error, _Damaged) as error:
                if not self._is_damage(error):
                    raise
                self._set_aside()
                return self._connect()

    def _is_damage(self, error: Exception) -> bool:
        """Whether the file is at fault, and not a lock, a full disk or a folder made read-only."""
        if not isinstance(error, sqlite3.OperationalError):
            return isinstance(error, sqlite3.DatabaseError | _Damaged)
        # A bit of its header can make a file look newer than this SQLite writes.
        primary = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
        writable = os.access(self.folder, os.W_OK) and os.access(self.path, os.W_OK)
        return primary == sqlite3.SQLITE_ERROR or (primary == sqlite3.SQLITE_READONLY and writable)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Two processes that find the same damage are not to set each other's new file aside."""
        import fcntl  # not on every system, where the store works in memory

        with (self.folder / f"{_DATABASE}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _connect(self) -> sqlite3.Connection:
        for path in filter(Path.exists, (self.path, *self._logs())):
            _check_owner(path)
        if self.path.exists():
            _check_mode(self.path)
        database = sqlite3.connect(
            self.path, timeout=_BUSY_SECONDS, check_same_thread=False, isolation_level=None
        )
        try:
            database.execute("PRAGMA journal_mode=WAL")
            database.execute("PRAGMA synchronous=NORMAL")
            if (answer := database.execute("PRAGMA quick_check(1)").fetchone()) != ("ok",):
                raise _Damaged(str(answer))
            database.execute(_TABLE)
            columns = [row[1] for row in database.execute("PRAGMA table_info(verdicts)")]
            if columns != ["digest", "verdict", "seal"]:
                raise _Damaged(f"it has the columns {columns}")
            self.path.chmod(0o600)
        except BaseException:
            database.close()
            raise
        return database

    def _set_aside(self) -> None:
        for number in range(1000):
            aside = self.path.with_name(f"{_DATABASE}.damaged-{number}")
            if not aside.exists():
                break
        else:
            raise OSError(f"there are too many damaged databases in {self.folder}; remove them")
        self.path.rename(aside)
        for path in self._logs():
            path.unlink(missing_ok=True)

    def _logs(self) -> list[Path]:
        """What SQLite writes beside the database, and reads again."""
        return [self.path.with_name(_DATABASE + suffix) for suffix in ("-wal", "-shm")]

    def _begin_anew(self, error: Exception) -> None:
        with self._lock:
            self._database.close()
            try:
                with self._alone():
                    # Another process may have done so already, and its file is good.
                    if not self._is_good():
                        self._set_aside()
                    self._database = self._connect()
            except (OSError, sqlite3.Error, _Damaged):
                self._forget_the_file(error)

    def _is_good(self) -> bool:
        try:
            with contextlib.closing(self._connect()) as database:
                rows = database.execute("SELECT digest, verdict, seal FROM verdicts").fetchall()
                database.execute("BEGIN")
                database.execute("INSERT OR REPLACE INTO verdicts VALUES ('', '', '')")
                database.execute("ROLLBACK")
        except (sqlite3.Error, _Damaged):
            return False
        return all(seal == _seal(digest, text) for digest, text, seal in rows)

    def _forget_the_file(self, error: Exception) -> None:
        self.reason = f"{self.folder} cannot be used: {error}"
        self._database = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
        self._database.execute(_TABLE)
        warnings.warn(
            f"verdicts on kernels are kept in memory alone, because {self.reason}. Name another"
            " folder by ESPER_CACHE_DIR.",
            VerdictsInMemoryWarning,
            stacklevel=4,
        )


def _check_owner(path: Path) -> None:
    """Refuse what another user wrote: a verdict in it would be believed."""
    owner = path.stat().st_uid
    if owner != os.getuid():
        raise OSError(f"{path.name} belongs to another user ({owner})")


def _check_mode(path: Path) -> None:
    """Refuse what another user may write."""
    _check_owner(path)
    mode = path.stat().st_mode
    if mode & 0o022:
        raise OSError(f"others may write {path.name} (its mode is {mode & 0o7777:o}; chmod go-w)")


def _seal(digest: str, text: str) -> str:
    """SQLite reads a flipped bit of a text as another text."""
    return hashlib.sha256(f"{digest} {text}".encode()).hexdigest()


@cache
def _default(folder: Path) -> VerdictStore:
    return VerdictStore(folder)


def default_verdicts() -> VerdictStore:
    """The user's own store, opened once for each folder that it is said to be in."""
    return _default(cache_folder())
