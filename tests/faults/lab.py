"""A lab of real processes: PostgreSQL, Redis, the service, workers, clients; each can be killed.

What goes between processes goes through proxies that can be stopped.
"""

import hashlib
import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from esper.artifacts import Artifact
from esper.contracts import (
    BlueprintQuery,
    BlueprintRecord,
    BlueprintState,
    KernelQuery,
    KernelSignature,
    KernelState,
    Topic,
)
from esper.errors import EsperError
from esper.oona import open_broker
from esper.tezzeret import CompileJob, load_blueprint
from esper.tezzeret.service import request_of
from esper.urza import KernelLibrary, Library, open_library
from esper.urza.service import Scope
from tests.esper.servers import Server
from tests.esper.service_process import Proxy, Serving
from tests.esper.test_cli import ENVIRONMENT
from tests.faults.client import KINDS, acknowledged

ROOT = Path(__file__).parents[2]
SIGNATURE = KernelSignature(input_shape=(3,), output_shape=(4,))
LEASE_SECONDS = 10
OUTCOMES_SHOWN = 1_000
"""Of a kernel, by `KernelLibrary.outcomes`."""

PATIENCE_SECONDS = 180.0
"""Within which all has to go on by itself, on a machine that may have much else to do."""


def until(true: Callable[[], object], what: str, seconds: float = PATIENCE_SECONDS) -> None:
    """Wait until it is true."""
    limit = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < limit, f"{what}: not within {seconds:g} s"
        time.sleep(0.05)


class Started:
    """A process of `python -m …` that is killed and started again, one of several of its kind."""

    def __init__(self, arguments: Callable[[int], list[str]], folder: Path, token: str) -> None:
        self._arguments = arguments
        self._log = folder / f"log-{arguments(0)[0]}"
        path = os.pathsep.join(map(str, (ROOT, ROOT / "functional", ROOT / "adapters")))
        self._environment = {**ENVIRONMENT, "PYTHONPATH": path, "ESPER_LIBRARY__TOKEN": token}
        self._numbers = itertools.count()
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", *self._arguments(next(self._numbers))]
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=self._environment, cwd=ROOT
            )

    def kill(self) -> list[int]:
        """SIGKILL; gives the processes that it had started, which are to end by themselves."""
        assert self.process is not None
        children = _children(self.process.pid)
        self.process.kill()
        self.process.wait(60)
        return children

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None


class Lab:
    """The processes, and what was seen of them.

    Args:
        folder: of all files but those of the servers.
        database: the address of an empty database on `postgres`.
        template: a kernel, of which clients make others.
    """

    def __init__(
        self, folder: Path, postgres: Server, database: str, redis: Server, template: Artifact
    ) -> None:
        self.folder = folder
        self.postgres, self.redis = postgres, redis
        (folder / "template.kernel").write_bytes(template.data)
        request = request_of(CompileJob(load_blueprint("low_rank"), SIGNATURE))
        (folder / "request.json").write_text(request.model_dump_json())
        blobs = str(folder / "blobs")
        self.library = Library.connect(database, blobs)
        self.service = Serving(
            folder / "service", arguments=["--database", database, "--blobs", blobs]
        )
        token = self.service.tokens[Scope.WRITE]
        self.to_service = Proxy(self.service.port)
        self.to_redis = Proxy(int(redis.url.rpartition(":")[2].partition("/")[0]))
        bus = f"redis://127.0.0.1:{self.to_redis.port}/0"
        self.reader = open_library(self.service.url, token=self.service.tokens[Scope.READ])
        self.heard: dict[str, int] = {}
        self.order: dict[str, list[int]] = {}
        self._looked_at: set[str] = set()
        self.problems: list[str] = []
        self._closing = threading.Event()
        worker = ["esper.cli", "worker", "--library", self.to_service.url, "--bus", bus]
        worker += ["--lease", str(LEASE_SECONDS)]
        self.workers = [
            Started(lambda n, w=w: [*worker, "--name", f"worker-{w}-{n}"], folder, token)
            for w in range(2)
        ]
        self.client = Started(
            lambda n: ["tests.faults.client", self.to_service.url, bus, str(folder), str(n)],
            folder,
            token,
        )
        for each in (*self.workers, self.client):
            each.start()
        self._threads = [
            threading.Thread(target=self._listen, daemon=True),
            threading.Thread(target=self._look, daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """End everything but the servers."""
        self._closing.set()
        for each in (*self.workers, self.client):
            if each.running:
                each.kill()
        self.service.close()
        for thread in self._threads:
            thread.join(60)
        self.to_service.close()
        self.to_redis.close()
        self.reader.close()
        self.library.close()

    # What is seen meanwhile.

    def _listen(self) -> None:
        """Receives all messages, as one of those who use the bus does."""
        while not self._closing.is_set():
            with (
                suppress(EsperError, OSError),
                open_broker(self.redis.url) as bus,
                bus.consumer("lab", [Topic.METRICS], start="all", name="lab") as consumer,
            ):
                while not self._closing.is_set():
                    deliveries = consumer.receive(256, wait_seconds=0.5)
                    for delivery in deliveries:
                        self._hear(delivery.message)
                    consumer.acknowledge(deliveries)
            self._closing.wait(0.2)

    def _hear(self, message) -> None:
        if message.message_id in self.heard:
            return
        number = message.payload["number"]
        self.heard[message.message_id] = number
        self.order.setdefault(message.key, []).append(number)

    def _look(self) -> None:
        """Reads the newest kernels through the service: what is found is whole, at any moment."""
        while not self._closing.is_set():
            with suppress(OSError):  # the service may be away
                try:
                    self._look_at_newest()
                except OSError:
                    raise
                except EsperError as error:
                    self.problems.append(f"{type(error).__name__}: {error}")
            self._closing.wait(0.3)

    def _look_at_newest(self, most: int = 100) -> None:
        """Reads those of the newest kernels that were not read before."""
        query = KernelQuery(states=tuple(KernelState), order="created", limit=most)
        for record in self.reader.search(query).items:
            if record.kernel_id not in self._looked_at:
                if not is_whole(self.reader, record.kernel_id):
                    self.problems.append(f"kernel {record.kernel_id} is found and not whole")
                self._looked_at.add(record.kernel_id)

    # What is asked of it after each fault.

    def counts(self) -> dict[str, int]:
        """How much of each kind clients were answered."""
        found = dict.fromkeys(KINDS, 0)
        for kind, _ in acknowledged(self.folder):
            found[kind] += 1
        return found

    def goes_on(self, before: dict[str, int]) -> bool:
        """Whether clients were answered more of every kind."""
        now = self.counts()
        return all(now[kind] > before[kind] for kind in KINDS)

    def check(self, *, compiled: set[str]) -> None:
        """Whatever was answered is there, and nothing half.

        Args:
            compiled: blueprints that are to be compiled by now.
        """
        answered = acknowledged(self.folder)
        published = {what for kind, what in answered if kind == "message"}
        until(lambda: published <= self.heard.keys(), "messages that were published are received")
        problems = missing(self.library, answered, compiled=compiled, heard=set(self.heard))
        assert not problems, "\n".join(problems)
        for key, numbers in self.order.items():
            assert numbers == sorted(numbers), f"{key} was received out of order"
        assert not self.problems, self.problems

    def asked_for(self) -> set[str]:
        """Blueprints that were submitted, as clients were answered."""
        return {what for kind, what in acknowledged(self.folder) if kind == "blueprint"}

    def is_compiled(self, asked: set[str]) -> bool:
        """Whether these blueprints need nothing more."""
        try:
            found = blueprints_of(self.library)
        except OSError:
            return False
        left = (BlueprintState.UNVALIDATED, BlueprintState.COMPILING)
        return all(each in found and found[each].state not in left for each in asked)


# What is found after each fault. Nothing is remembered from one time to the next: what was found
# before may be lost since.


def is_whole(library: KernelLibrary, kernel_id: str) -> bool:
    """Whether the bytes of a kernel that is found are those that its id says."""
    return hashlib.sha256(library.read_bytes(kernel_id)).hexdigest() == kernel_id


def blueprints_of(library: Library) -> dict[str, BlueprintRecord]:
    """All that were submitted to a library."""
    found, cursor = {}, None
    while True:
        page = library.blueprints(BlueprintQuery(limit=1000, cursor=cursor))
        found |= {record.blueprint_id: record for record in page.items}
        cursor = page.next_cursor
        if cursor is None:
            return found


def missing(
    library: Library,
    answered: Iterable[tuple[str, str]],
    *,
    compiled: Iterable[str],
    heard: Collection[str],
) -> list[str]:
    """What was answered and is not there, or half, a line for each; nothing where all is well.

    Args:
        answered: as `acknowledged` gives it.
        compiled: blueprints that are to be compiled by now.
        heard: messages that were received.

    Raises:
        ValueError: for more outcomes of a kernel than the library shows.
    """
    by_kind: dict[str, set[str]] = {kind: set() for kind in KINDS}
    for kind, what in answered:
        by_kind[kind].add(what)
    kernels = {record.kernel_id for record in library.find(states=tuple(KernelState))}
    problems = [
        f"kernel {each} was put and is not found" for each in sorted(by_kind["kernel"] - kernels)
    ]
    for each in sorted(kernels):
        try:
            whole = is_whole(library, each)
        except EsperError as error:
            problems.append(f"kernel {each} is found and cannot be read: {error}")
        else:
            problems += [] if whole else [f"kernel {each} is found and not whole"]
    steps: dict[str, set[int]] = defaultdict(set)
    for what in by_kind["outcome"]:
        kernel_id, _, step = what.partition(":")
        steps[kernel_id].add(int(step))
    for kernel_id, own in sorted(steps.items()):
        if len(own) > OUTCOMES_SHOWN:
            raise ValueError(
                f"kernel {kernel_id} was given {len(own)} outcomes, of which a library shows the"
                f" last {OUTCOMES_SHOWN:,}: let clients put more kernels, with fewer outcomes each"
            )
        for step in sorted(own - {each.step for each in library.outcomes(kernel_id)}):
            problems.append(f"outcome {kernel_id}:{step} was recorded and is not found")
    blueprints = blueprints_of(library)
    for each in sorted(by_kind["blueprint"] - blueprints.keys()):
        problems.append(f"blueprint {each} was submitted and is not found")
    for each, record in sorted(blueprints.items()):
        if record.state is BlueprintState.INVALID:
            problems.append(f"blueprint {each} is invalid: {record.reason}")
    for each in sorted(set(compiled) & blueprints.keys()):
        record = blueprints[each]
        if record.state is not BlueprintState.VALIDATED:
            problems.append(f"blueprint {each} is to be compiled and is {record.state.value}")
        elif record.kernel_id not in kernels:
            problems.append(f"blueprint {each} has a kernel that is not found: {record.kernel_id}")
    for each in sorted(by_kind["message"] - set(heard)):
        problems.append(f"message {each} was published and is not received")
    return problems


# Faults: each takes the lab and a random generator, and is over when it returns.


def kill_service(lab: Lab, draws: random.Random) -> None:
    lab.service.kill()
    time.sleep(draws.uniform(0.0, 1.0))
    lab.service.start()


def kill_worker(lab: Lab, draws: random.Random) -> None:
    worker = draws.choice(lab.workers)
    children = worker.kill()
    worker.start()
    until(lambda: not any(map(_is_there, children)), "what a killed worker had started ends")


def kill_compiler(lab: Lab, draws: random.Random) -> None:
    worker = draws.choice(lab.workers)
    assert worker.process is not None
    for child in _children(worker.process.pid):
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def kill_redis(lab: Lab, draws: random.Random) -> None:
    lab.redis.kill()
    time.sleep(draws.uniform(0.0, 1.0))
    lab.redis.start()


def kill_postgres(lab: Lab, draws: random.Random) -> None:
    lab.postgres.kill()
    time.sleep(draws.uniform(0.0, 1.0))
    lab.postgres.start()


def kill_client(lab: Lab, draws: random.Random) -> None:
    lab.client.kill()
    lab.client.start()


def kill_all(lab: Lab, draws: random.Random) -> None:
    for kill in (lab.service, lab.redis, lab.postgres, lab.client, *lab.workers):
        kill.kill()
    lab.postgres.start()
    lab.redis.start()
    lab.service.start()
    for each in (lab.client, *lab.workers):
        each.start()


def cut_network(lab: Lab, draws: random.Random) -> None:
    proxies = draws.choice([[lab.to_service], [lab.to_redis], [lab.to_service, lab.to_redis]])
    for proxy in proxies:
        proxy.silent = True
    time.sleep(float(os.environ.get("FAULTS_CUT_SECONDS", "3")))
    for proxy in proxies:
        if draws.random() < 0.5:
            # Connections that were idle for too long are gone on some networks.
            proxy.drop()
        proxy.silent = False


FAULTS = {
    "service": kill_service,
    "worker": kill_worker,
    "compiler": kill_compiler,
    "redis": kill_redis,
    "postgres": kill_postgres,
    "client": kill_client,
    "network": cut_network,
    "all": kill_all,
}


def plan(rounds: int, seed: int) -> list[tuple[str, float, int]]:
    """A fault, when it comes, and a seed of its own, for each round.

    Each comes as often, but for that of all at once, which takes longest and comes every 20 rounds.
    """
    draws = random.Random(seed)
    names: list[str] = []
    while len(names) < rounds:
        turn = [name for name in FAULTS if name != "all"]
        draws.shuffle(turn)
        names += turn
    names[19::20] = ["all"] * len(names[19::20])
    return [(name, draws.uniform(0.0, 1.5), draws.randrange(1 << 31)) for name in names[:rounds]]


@contextmanager
def lab_of(*given) -> Iterator[Lab]:
    """A lab that is up: clients are answered, and the first blueprint is compiled."""
    lab = Lab(*given)
    try:
        until(lambda: lab.goes_on(dict.fromkeys(KINDS, 0)), "the first answers")
        first = lab.asked_for()
        until(lambda: lab.is_compiled(first), "the first blueprint is compiled")
        yield lab
    finally:
        lab.close()


def one_round(lab: Lab, name: str, pause: float, seed: int) -> dict[str, object]:
    """One fault, then everything resumes by itself, and is checked; what the round was like."""
    time.sleep(pause)
    FAULTS[name](lab, random.Random(seed))
    begun = time.monotonic()
    before, asked = lab.counts(), lab.asked_for()
    until(lambda: lab.goes_on(before), f"clients are answered after {name}")
    answered = time.monotonic() - begun
    until(lambda: lab.is_compiled(asked), f"blueprints are compiled after {name}")
    compiled = time.monotonic() - begun
    lab.check(compiled=asked)
    return {
        "fault": name,
        "pause": round(pause, 3),
        "answered_after": round(answered, 2),
        "compiled_after": round(compiled, 2),
        **lab.counts(),
    }


def _children(pid: int) -> list[int]:
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    mine = [int(word) for word in text.split()]
    return mine + [each for child in mine for each in _children(child)]


def _is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
