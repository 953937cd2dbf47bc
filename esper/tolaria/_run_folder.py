"""The folder of one run: what is in it, and that no two runs share it.

run.json        what was asked for, versions, kernels
events.jsonl    the ledger
metrics.jsonl   measurements at decision boundaries
checkpoints/    see `esper.checkpoints`
regions.npz     decisions over the plane, for tasks of two features
report.html
"""

import dataclasses
import fcntl
import hashlib
import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from esper._files import write_atomically
from esper.errors import RunFolderError
from esper.tolaria._config import GrowConfig

SCHEMA_VERSION = 2
RUN = "run.json"


class HostRecord(NamedTuple):
    """What a run's record says of its host."""

    sites: tuple[str, ...]
    """Names of the layers with seeds, in the order of the seed state's rows."""
    parameters: int
    step_flops: float | None = None
    """Of a training step of the host alone, counted; None where it was not recorded."""


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """A run's folder and what its `run.json` says."""

    path: Path
    config: GrowConfig
    kernels: dict[str, list[str]]
    """The ids of the kernels to choose from, by layer name."""
    host: HostRecord | None
    """None for runs of schema version 1."""
    task_digest: str | None
    """SHA-256 of the data; None for runs of schema version 1."""
    schema_version: int
    genesis: str
    """SHA-256 of what `run.json` says but for where the library is; the ledger follows it."""

    @property
    def ledger(self) -> Path:
        """The ledger's file."""
        return self.path / "events.jsonl"

    @property
    def metrics(self) -> Path:
        """The measurements' file."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def regions(self) -> Path:
        """Decisions over the plane."""
        return self.path / "regions.npz"

    @property
    def report(self) -> Path:
        """The report."""
        return self.path / "report.html"

    @property
    def library(self) -> Path:
        """The folder of the library."""
        return library_folder(self.path, self.config)


def library_folder(run: Path, config: GrowConfig) -> Path:
    """Where a run's library is: as configured, else `library` beside the run folder."""
    return config.library if config.library is not None else run.absolute().parent / "library"


def run_name(run: Path) -> str:
    """What a run is called on a bus: the end of its path, as a message takes it."""
    return "".join(letter if letter.isprintable() else "?" for letter in str(run))[-200:]


def _genesis(content: dict[str, Any]) -> str:
    """The hash that a ledger follows: one run is the same wherever its kernels are kept."""
    config = {key: value for key, value in content["config"].items() if key != "library"}
    return hashlib.sha256(
        json.dumps({**content, "config": config}, sort_keys=True).encode()
    ).hexdigest()


@contextmanager
def locked(folder: RunFolder) -> Iterator[None]:
    """Keep every other process from training a run meanwhile.

    Raises:
        RunFolderError: where another one is.
    """
    with (folder.path / RUN).open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunFolderError(
                f"the run {folder.path} is being trained by another process; wait for it, or stop"
                " it first"
            ) from error
        yield


def has_run(path: Path) -> bool:
    """Whether a folder holds a run."""
    return (path / RUN).exists()


def check_free(path: Path) -> None:
    """Refuse an output folder that is in use, before anything is computed for it.

    Raises:
        RunFolderError: where it holds a run, or anything else.
    """
    try:
        if not path.exists():
            return
    except OSError as error:
        raise RunFolderError(
            f"the output folder {path} cannot be used: {error.strerror}; give another --out"
        ) from error
    if not path.is_dir():
        raise RunFolderError(f"the output folder {path} is a file; give another --out")
    if has_run(path):
        raise RunFolderError(
            f"the output folder {path} holds another run: go on with it by --resume {path}, or give"
            " another --out"
        )
    # A partial file is what a full disk or a kill left of a run that was never begun.
    if any(not entry.name.endswith(".partial") for entry in path.iterdir()):
        raise RunFolderError(
            f"the output folder {path} is not empty and holds no run; give another --out"
        )


_PACKAGES = (
    *(
        "esper-morphogenetic",
        "numpy",
        "jax",
        "jaxlib",
        "torch",
        "equinox",
        "flax",
        "optax",
        "grain",
    ),
)
"""On which what a run computes may depend."""


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def create_run(
    path: Path,
    config: GrowConfig,
    kernels: dict[str, list[str]],
    *,
    host: HostRecord,
    task_digest: str,
    branch: dict[str, Any] | None = None,
) -> RunFolder:
    """Make the folder of a new run.

    Args:
        kernels: ids to choose from, by layer name.
        task_digest: SHA-256 of the data.
        branch: from which run it branched off, and where.

    Raises:
        RunFolderError: where the folder is in use or cannot be written.
    """
    check_free(path)
    if config.library is not None:
        # Resuming may be asked for from another folder.
        config = config.model_copy(update={"library": config.library.expanduser().absolute()})
    content = {
        "schema_version": SCHEMA_VERSION,
        "config": config.model_dump(mode="json"),
        "kernels": kernels,
        "host": {
            "sites": list(host.sites),
            "parameters": host.parameters,
            "step_flops": host.step_flops,
        },
        "task": {"name": config.task, "digest": task_digest},
        **({} if branch is None else {"branch": branch}),
        "versions": _versions(),
    }
    data = json.dumps(content, sort_keys=True, indent=1).encode()
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / "events.jsonl").touch()
        write_atomically(path / RUN, data)
    except OSError as error:
        raise RunFolderError(
            f"the output folder {path} cannot be written: {error}; give another --out"
        ) from error
    return RunFolder(path, config, kernels, host, task_digest, SCHEMA_VERSION, _genesis(content))


def _upgraded(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a run of schema version 1, in today's words."""
    new = dict(config)
    new["blueprints"] = [new.pop("blueprint")]
    # A multiple of decide_every was not asked for then, and nothing is trained any more.
    new["checkpoint_every"] = new["decide_every"]
    return new


def open_run(path: Path) -> RunFolder:
    """Read the folder of a run.

    Raises:
        RunFolderError: where it holds no run, or one that this version cannot read.
    """
    try:
        data = (path / RUN).read_bytes()
    except OSError as error:
        # Of one seed, a run is the folder that was asked for.
        beside = f"; {path.parent} is a run itself" if (path.parent / RUN).exists() else ""
        raise RunFolderError(
            f"{path} holds no run: {path / RUN} cannot be read ({error.strerror or error}){beside}"
        ) from error
    try:
        content: dict[str, Any] = json.loads(data)
        schema_version = content["schema_version"]
        if schema_version not in (1, SCHEMA_VERSION):
            raise RunFolderError(
                f"{path / RUN} has schema version {schema_version}, this Esper reads up to"
                f" {SCHEMA_VERSION}: use the Esper that wrote it, or a newer one"
            )
        values, host, digest = content["config"], None, None
        if schema_version == 1:
            values = _upgraded(values)
        else:
            own = content["host"]
            sites = tuple(map(str, own["sites"]))
            host = HostRecord(sites, int(own["parameters"]), own.get("step_flops"))
            digest = str(content["task"]["digest"])
        config = GrowConfig.model_validate_json(json.dumps(values))
        kernels = {str(k): [str(i) for i in v] for k, v in content["kernels"].items()}
        genesis = _genesis(content)
    except (ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
        raise RunFolderError(f"{path / RUN} is damaged: {error}") from error
    return RunFolder(path, config, kernels, host, digest, schema_version, genesis)
