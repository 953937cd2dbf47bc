"""Several runs of one configuration that differ in their seed: a folder of run folders."""

import json
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from esper._files import write_atomically
from esper.errors import RunFolderError
from esper.tolaria._config import GrowConfig, make_config
from esper.tolaria._run_folder import check_free

STUDY = "study.json"
_SCHEMA_VERSION = 2


class Study(NamedTuple):
    """A folder and the runs in it, whether begun or not."""

    path: Path
    runs: list[tuple[Path, GrowConfig]]


def _runs(path: Path, config: GrowConfig, seeds: int) -> list[tuple[Path, GrowConfig]]:
    values = config.model_dump()
    return [
        (path / f"seed-{seed}", make_config(**(values | {"seed": seed})))
        for seed in range(config.seed, config.seed + seeds)
    ]


def is_study(path: Path) -> bool:
    """Whether a folder holds a study."""
    return (path / STUDY).exists()


def create_study(path: Path, config: GrowConfig, seeds: int) -> Study:
    """Make the folder of `seeds` runs, with seeds from the configuration's on.

    Raises:
        RunFolderError: where the folder is in use or cannot be written.
    """
    if is_study(path):
        raise RunFolderError(
            f"the output folder {path} holds another study: go on with it by --resume {path}, or"
            " give another --out"
        )
    check_free(path)
    runs = _runs(path, config, seeds)
    content = {
        "schema_version": _SCHEMA_VERSION,
        "config": config.model_dump(mode="json"),
        "seeds": seeds,
    }
    try:
        path.mkdir(parents=True, exist_ok=True)
        write_atomically(path / STUDY, json.dumps(content, sort_keys=True, indent=1).encode())
    except OSError as error:
        raise RunFolderError(
            f"the output folder {path} cannot be written: {error}; give another --out"
        ) from error
    return Study(path, runs)


def open_study(path: Path) -> Study:
    """Read the folder of a study.

    Raises:
        RunFolderError: where its description is damaged.
    """
    try:
        content = json.loads((path / STUDY).read_bytes())
        version = content["schema_version"]
        if version == 1:
            raise RunFolderError(
                f"{path / STUDY} was written by an older Esper, whose runs this one does not train"
                " on: each of them can be replayed and shown by itself"
            )
        if version != _SCHEMA_VERSION:
            raise RunFolderError(
                f"{path / STUDY} has schema version {version}, this Esper reads {_SCHEMA_VERSION}:"
                " use the Esper that wrote it, or a newer one"
            )
        config = GrowConfig.model_validate_json(json.dumps(content["config"]))
        seeds = int(content["seeds"])
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
        raise RunFolderError(f"{path / STUDY} is damaged: {error}") from error
    return Study(path, _runs(path, config, seeds))
