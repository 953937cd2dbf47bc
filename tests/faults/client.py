"""A client of a lab: asks for blueprints, puts kernels, records outcomes, publishes messages.

What was answered is written to a file, a line each, after the answer: whatever happens to anything
from then on, it has to be there. `python -m tests.faults.client URL BUS FOLDER NUMBER`.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from esper.artifacts import Artifact, read_artifact
from esper.contracts import BlueprintRequest, KernelOutcome, OonaMessage, Topic
from esper.errors import EsperError
from esper.oona import open_broker
from esper.urza import open_library
from tests.esper.cache_kernels import variant

KINDS = ("blueprint", "kernel", "outcome", "message")
_PAUSE = 0.1
_BLUEPRINT_EVERY = 4
"""Workers need longer for a blueprint than a client to ask for it."""


def acknowledged(folder: Path) -> list[tuple[str, str]]:
    """What clients were answered: kinds, and ids; a line that was cut short is none."""
    found: list[tuple[str, str]] = []
    for path in sorted(folder.glob("answers-*")):
        for line in path.read_text().splitlines(keepends=True):
            words = line.split()
            if line.endswith("\n") and len(words) == 2:
                found.append((words[0], words[1]))
    return found


class Client:
    """Does what clients do, until it is killed."""

    def __init__(self, url: str, bus: str, folder: Path, number: int) -> None:
        self.library = open_library(url, token=os.environ["ESPER_LIBRARY__TOKEN"])
        self.bus = _until_done(lambda: open_broker(bus))
        self.template = read_artifact((folder / "template.kernel").read_bytes())
        self.request = json.loads((folder / "request.json").read_text())
        self.number = number
        self.answers = (folder / f"answers-{number:04}").open("a", buffering=1)
        self.done = 0

    def run(self) -> None:
        """Ask for one thing after another."""
        while True:
            self.done += 1
            unique = self.number * 100_000 + self.done
            kernel = variant(self.template, unique)
            self.put(kernel)
            self.record(kernel, unique)
            self.publish(unique)
            if self.done % _BLUEPRINT_EVERY == 1:
                self.submit(unique)
            time.sleep(_PAUSE)

    def put(self, kernel: Artifact) -> None:
        self.answered("kernel", _until_done(lambda: self.library.put(kernel)))

    def record(self, kernel: Artifact, step: int) -> None:
        outcome = KernelOutcome(
            run_id=f"client-{self.number}",
            kernel_id=kernel.kernel_id,
            layer=0,
            seed=0,
            task="test",
            step=step,
            gain=0.5,
            kept=True,
        )
        _until_done(lambda: self.library.record_outcomes([outcome]))
        self.answered("outcome", f"{kernel.kernel_id}:{step}")

    def publish(self, unique: int) -> None:
        message = OonaMessage(
            topic=Topic.METRICS,
            key=f"client-{self.number}",
            sender_id="client",
            payload={"number": self.done},
        )
        # The same message again where it is not known whether it arrived.
        _until_done(lambda: self.bus.publish([message]))
        self.answered("message", f"{message.message_id}")

    def submit(self, unique: int) -> None:
        asked = BlueprintRequest.model_validate_json(
            json.dumps({**self.request, "init_seed": unique})
        )
        record = _until_done(lambda: self.library.submit(asked))
        self.answered("blueprint", record.blueprint_id)

    def answered(self, kind: str, what: str) -> None:
        self.answers.write(f"{kind} {what}\n")


def _until_done(call: Callable):
    while True:
        try:
            return call()
        except (EsperError, OSError) as error:
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
            time.sleep(0.1)


if __name__ == "__main__":
    _url, _bus, _folder, _number = sys.argv[1:]
    Client(_url, _bus, Path(_folder), int(_number)).run()
