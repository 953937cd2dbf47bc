"""Real processes are killed and cut off at random moments: nothing that was answered is lost.

`FAULTS_ROUNDS` says how many rounds, `FAULTS_SEED` which, `FAULTS_TABLE` where a
line of JSON goes for each; `experiments/faults.py` runs many, and makes a table of them.
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from esper.tezzeret import compile_blueprint, load_blueprint
from experiments.faults import table
from tests.esper.servers import Server, create_database, needs, postgres_server
from tests.esper.servers._redis import start_redis
from tests.faults.lab import FAULTS, SIGNATURE, lab_of, one_round, plan

__all__ = ["postgres_server"]

ROUNDS = int(os.environ.get("FAULTS_ROUNDS", "8"))
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
