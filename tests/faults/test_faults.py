"""Real processes are killed and cut off at random moments: nothing that was answered is lost.

`FAULTS_ROUNDS` says how many rounds, `FAULTS_SEED` which, `FAULTS_TABLE` where a
line of JSON goes for each; `experiments/faults.py` runs many, and makes a table of them.
"""

import contextlib
import json
import os
import sqlite3
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from esper.contracts import KernelOutcome
from esper.tezzeret import CompileJob, compile_blueprint, load_blueprint
from esper.tezzeret.service import request_of
from esper.urza import Library
from experiments.faults import table
from tests.esper.cache_kernels import variant
from tests.esper.servers import Server, create_database, needs, postgres_server
from tests.esper.servers._redis import start_redis
from tests.faults.lab import FAULTS, SIGNATURE, lab_of, missing, one_round, plan

__all__ = ["postgres_server"]

ROUNDS = int(os.environ.get("FAULTS_ROUNDS", "6"))
SEED = int(os.environ.get("FAULTS_SEED", "7"))

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture
def durable_redis(tmp_path: Path) -> Iterator[Server]:
    """A server of its own, which has written what it says yes to."""
    needs("redis-server")
    server = start_redis(tmp_path, fsync="always")
    yield server
    server.stop()


def test_whatever_dies_nothing_that_was_answered_is_lost_and_all_goes_on_by_itself(
    tmp_path: Path, postgres_server: Server, durable_redis: Server
):
    sys.stdout.write(f"seed {SEED}, {ROUNDS} rounds\n")
    template = compile_blueprint(load_blueprint("low_rank"), SIGNATURE, sizes={"rank": 2})
    table = os.environ.get("FAULTS_TABLE")
    database = create_database(postgres_server)
    with lab_of(tmp_path, postgres_server, database, durable_redis, template) as lab:
        for number, (name, pause, seed) in enumerate(plan(ROUNDS, SEED), start=1):
            row = {"round": number, **one_round(lab, name, pause, seed)}
            sys.stdout.write(f"{json.dumps(row)}\n")
            if table is not None:
                with Path(table).open("a") as file:
                    file.write(json.dumps(row) + "\n")


def test_what_a_library_or_a_bus_has_lost_since_it_was_found_is_told(tmp_path: Path):
    template = compile_blueprint(load_blueprint("low_rank"), SIGNATURE, sizes={"rank": 2})
    library = Library(tmp_path / "library")
    ids = [library.put(variant(template, number)) for number in range(3)]
    for step, kernel_id in enumerate(ids * 9):
        outcome = {"kernel_id": kernel_id, "step": step, "layer": 0, "seed": 0, "gain": 0.5}
        library.record_outcomes(
            [KernelOutcome(run_id="client-0", task="test", kept=True, **outcome)]
        )
    asked = library.submit(request_of(CompileJob(load_blueprint("low_rank"), SIGNATURE)))
    (claim,) = library.claim("a worker", lease_seconds=60.0)
    library.complete(claim, ids[2])
    answered = [("kernel", each) for each in ids] + [("blueprint", asked.blueprint_id)]
    answered += [("outcome", f"{each}:{step}") for step, each in enumerate(ids * 9)]
    answered += [("message", "1-0"), ("message", "2-0")]
    compiled = [asked.blueprint_id]

    def lost(heard=("1-0", "2-0")) -> list[str]:
        return missing(library, answered, compiled=compiled, heard=heard)

    assert lost() == []
    assert lost(heard=["2-0"]) == ["message 1-0 was published and is not received"]
    with contextlib.closing(sqlite3.connect(tmp_path / "library" / "library.sqlite")) as database:
        database.execute("DELETE FROM kernel_outcomes WHERE step = 3")
        database.commit()
    gone = f"outcome {ids[0]}:3 was recorded and is not found"
    assert lost() == [gone]
    library.remove(ids[1])
    assert f"kernel {ids[1]} was put and is not found" in lost()
    assert gone in lost()
    (blob,) = (tmp_path / "library").rglob(f"{ids[0]}*")
    blob.write_bytes(blob.read_bytes()[:-1])
    assert any(each.startswith(f"kernel {ids[0]} is found and") for each in lost())
    library.close()


def test_rounds_are_the_same_for_one_seed_and_every_fault_comes():
    rounds = plan(200, SEED)
    assert rounds == plan(200, SEED) != plan(200, SEED + 1)
    counts = Counter(name for name, _, _ in rounds)
    assert counts.keys() == FAULTS.keys()
    assert counts["all"] == 10
    assert min(counts.values()) >= 10
    assert {name for name, _, _ in plan(20, SEED)} == set(FAULTS)


def test_many_rounds_are_a_table():
    row = {"answered_after": 1.0, "compiled_after": 2.5, "blueprint": 4, "kernel": 3}
    row |= {"outcome": 2, "message": 1}
    rows = [{"fault": "redis", **row}, {"fault": "redis", **row, "answered_after": 4.0}]
    text = table(rows)
    assert "| redis | 2 | 2.5 | 4.0 | 2.5 | 2.5 |" in text
    assert "2 rounds; clients were answered for 3 kernels, 2 outcomes, 1 messages and 4" in text
