"""The libraries that all keep one contract, and what is put into them.

A kind is added by a name in `KINDS` and a way to open it in `Place.open`.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from esper.artifacts import Artifact, rewrite_artifact
from esper.contracts import BlueprintRequest, KernelOutcome, KernelSignature
from esper.urza import KernelLibrary, Library, S3Access
from tests.esper.cache_kernels import variant

KINDS = (
    "sqlite-folder",
    "sqlite-s3",
    "postgres-folder",
    "postgres-s3",
    "http-sqlite-folder",
    "http-postgres-s3",
)
SIGNATURE = KernelSignature(input_shape=(2,), output_shape=(8,))
OTHER_SIGNATURE = KernelSignature(input_shape=(4, 3), output_shape=(4, 3), dtype="bfloat16")


class Clock:
    """A clock that is set by tests."""

    def __init__(self) -> None:
        self.seconds = 1_000_000.0

    def __call__(self) -> float:
        return self.seconds


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a library of some kind is; each `open` gives another library of the same content."""

    kind: str
    database: str
    blobs: str
    s3: S3Access | None
    clock: Clock

    def open(self, **options: Any) -> KernelLibrary:
        options = {"clock": self.clock, "s3": self.s3, **options}
        if not self.kind.startswith("http-"):
            return Library.connect(self.database, self.blobs, **options)
        from tests.esper.service_thread import ServedLibrary

        path = self.database.removeprefix("sqlite:///")
        sqlite = None if path == self.database else Path(path)
        return cast(
            KernelLibrary,
            ServedLibrary(lambda: Library.connect(self.database, self.blobs, **options), sqlite),
        )


def make_place(kind: str, folder: Path, request: pytest.FixtureRequest) -> Place:
    database, _, blobs = kind.removeprefix("http-").partition("-")
    s3 = None
    if database == "postgres":
        url = request.getfixturevalue("postgres_url")
    else:
        url = f"sqlite:///{folder}/library.sqlite"
    if blobs == "s3":
        place = request.getfixturevalue("s3_url")
        s3 = S3Access(**request.getfixturevalue("s3_options"))
    else:
        place = str(folder / "files")
    return Place(kind, url, place, s3, Clock())


def blueprint_request(number: int = 0, **changes: Any) -> BlueprintRequest:
    """A blueprint to compile, different for each number."""
    source = json.dumps({"name": f"blueprint-{number:03d}"}, sort_keys=True, indent=1)
    return BlueprintRequest(**{"source": source, "signature": SIGNATURE, **changes})


def outcome(kernel_id: str, gain: float = 0.0, **changes: Any) -> KernelOutcome:
    """What a kernel did in a run."""
    values = {
        "run_id": "run",
        "kernel_id": kernel_id,
        "layer": 0,
        "seed": 0,
        "task": "spirals",
        "step": 10,
        "gain": gain,
        "kept": gain > 0,
    }
    return KernelOutcome(**{**values, **changes})


def stranger(artifact: Artifact, number: int = 0) -> Artifact:
    """A kernel of the same signature whose programs this process does not trust."""
    return rewrite_artifact(variant(artifact, number), stablehlo=artifact.stablehlo + b"\0")


Opener = Callable[..., KernelLibrary]
