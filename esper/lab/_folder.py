"""The folder of a lab: what lies where, and that one process at a time has it."""

import errno
import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from esper.lab._errors import LabError, LabInputError


@dataclass(frozen=True)
class LabFolder:
    """Where a lab keeps its data.

    What is stored lies in `postgres`, `redis` and `s3`; each may be copied while the lab is down.
    """

    root: Path

    @property
    def asked(self) -> Path:
        """Ports and the number of workers; a user may change it."""
        return self.root / "lab.yaml"

    @property
    def secrets(self) -> Path:
        """Passwords and tokens, made once; mode 0600."""
        return self.root / "secrets.json"

    @property
    def processes(self) -> Path:
        """Which processes were started, for `down`."""
        return self.root / "processes.json"

    @property
    def lock(self) -> Path:
        """Held by the process that supervises the servers."""
        return self.root / "lock"

    @property
    def logs(self) -> Path:
        """What each server says."""
        return self.root / "logs"

    def log(self, name: str) -> Path:
        """What one server says."""
        return self.logs / f"{name}.log"

    @property
    def postgres(self) -> Path:
        """PostgreSQL's data."""
        return self.root / "postgres"

    @property
    def redis(self) -> Path:
        """Redis' data."""
        return self.root / "redis"

    @property
    def s3(self) -> Path:
        """A folder for each bucket."""
        return self.root / "s3"

    @property
    def config(self) -> Path:
        """What everybody who uses the lab sets as ESPER_CONFIG."""
        return self.root / "esper.yaml"

    @property
    def service_config(self) -> Path:
        """What the service itself reads."""
        return self.root / "service.yaml"

    @property
    def worker_config(self) -> Path:
        """What the workers read."""
        return self.root / "worker.yaml"

    @property
    def tokens(self) -> Path:
        """Digests of the tokens that the service knows."""
        return self.root / "tokens.json"

    def make(self) -> None:
        """Make the folders that are not there.

        Raises:
            LabInputError: where something else is in their place, or they may not be made.
        """
        try:
            if not self.root.exists():
                self.root.mkdir(parents=True)
                self.root.chmod(0o711)  # the user of PostgreSQL goes through it
            self._refuse_strange()
            for folder in (self.logs, self.redis, self.s3):
                folder.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise LabInputError(
                f"the lab's folder {self.root} cannot be made ({error.strerror}: {error.filename});"
                " make room or give access there, or name another by --folder"
            ) from error

    def _refuse_strange(self) -> None:
        """Raise LabInputError where the folder holds what no lab has put there."""
        if self.asked.exists():
            return
        own = {self.lock, self.processes, self.secrets, self.config, self.service_config}
        own |= {self.worker_config}
        own |= {self.logs, self.postgres, self.redis, self.s3, self.asked, self.tokens}
        names = {path.name for path in own}
        strange = [path.name for path in self.root.iterdir() if path.name not in names]
        strange = sorted(name for name in strange if not name.startswith("."))
        if strange:
            raise LabInputError(
                f"{self.root} is no folder of a lab: it holds {strange[0]!r}; name another, or one"
                " that is not there yet, by --folder"
            )

    @contextmanager
    def held(self) -> Iterator[None]:
        """While this process is the lab's only supervisor.

        Raises:
            LabInputError: where another one is.
        """
        descriptor = os.open(self.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                other = os.read(descriptor, 20).decode(errors="replace").strip()
                raise LabInputError(
                    f"a lab is up in {self.root} already (process {other or 'unknown'}):"
                    " end it by `make down`, or name another folder by --folder"
                ) from error
            os.ftruncate(descriptor, 0)
            os.write(descriptor, str(os.getpid()).encode())
            yield
        finally:
            os.close(descriptor)

    def holder(self) -> int | None:
        """The process that supervises the lab now; None where there is none."""
        try:
            descriptor = os.open(self.lock, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return int(os.read(descriptor, 20) or b"0") or None
        finally:
            os.close(descriptor)
        return None


def write_whole(path: Path, text: str) -> None:
    """Put a file there that only its owner reads: as a whole, or as it was before.

    Raises:
        LabError: where the disk is full, or the folder is not to be written.
    """
    name: str | None = None
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # mode 0600
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except OSError as error:
        if name is not None:
            Path(name).unlink(missing_ok=True)
        full = " make room there;" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise LabError(
            f"{path} cannot be written ({error.strerror});{full} what was there is as it was"
        ) from error
