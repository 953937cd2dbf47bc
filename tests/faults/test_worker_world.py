"""What becomes of a worker when its disk is full, and when clocks jump."""

import contextlib
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from esper.contracts import BlueprintState
from esper.errors import LibraryError
from esper.tezzeret import CompilePool
from esper.urza import Library
from tests.esper.test_worker import VALIDATED, asked, states, until, working

PATIENCE_SECONDS = 120.0


@pytest.fixture(scope="module")
def pool() -> Iterator[CompilePool]:
    with CompilePool(workers=1) as workers:
        yield workers


def test_a_full_disk_loses_nothing_shows_nothing_half_and_is_waited_for(small_disk, pool):
    place = small_disk(1024)
    library = Library(place / "library")
    ids = [library.submit(asked(seed=seed)).blueprint_id for seed in range(4)]
    filler = place / "filler"
    _fill(filler)
    with working(library, pool) as worker:
        until(lambda: worker.statistics().library_away > 2, PATIENCE_SECONDS)
        with pytest.raises(LibraryError):
            library.submit(asked(seed=100))
        # Some room, which is soon used up again: it is full in the middle of something.
        os.truncate(filler, filler.stat().st_size - (40 << 10))
        away = worker.statistics().library_away
        until(
            lambda: (
                worker.statistics().library_away > away + 2
                or states(library, ids) == [VALIDATED] * 4
            ),
            PATIENCE_SECONDS,
        )
        # What is found is whole, and what is compiled is found.
        for record in library.find():
            assert library.get(record.kernel_id).kernel_id == record.kernel_id
        assert BlueprintState.INVALID not in states(library, ids)
        filler.unlink()
        until(lambda: states(library, ids) == [VALIDATED] * 4, PATIENCE_SECONDS)
        kept = {library.blueprint(each).kernel_id for each in ids}
    assert worker.statistics().failed == 0
    for kernel_id in kept:
        assert library.get(kernel_id).kernel_id == kernel_id
    library.close()


def _fill(path: Path) -> None:
    """Write a file until nothing more can be written anywhere."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)


@pytest.mark.parametrize("seed", range(3))
def test_clocks_that_jump_cost_a_compilation_at_most(tmp_path, pool, seed):
    draws = random.Random(seed)
    now = [1e9]
    # A jump ahead is for every lease what a worker that is gone is.
    library = Library(tmp_path / "library", clock=lambda: now[0], max_attempts=1_000)
    ids = [library.submit(asked(seed=number)).blueprint_id for number in range(6)]
    stop = threading.Event()

    def jump() -> None:
        while not stop.is_set():
            now[0] = max(1.0, now[0] + draws.choice([-86_400.0, -30.0, 0.5, 30.0, 86_400.0]))
            time.sleep(draws.uniform(0.0, 0.05))

    jumping = threading.Thread(target=jump)
    jumping.start()
    try:
        with working(library, pool, lease_seconds=0.5) as one, working(library, pool) as other:
            until(lambda: states(library, ids) == [VALIDATED] * 6, PATIENCE_SECONDS)
    finally:
        stop.set()
        jumping.join()
    assert len(library.find()) == len({library.blueprint(each).kernel_id for each in ids}) == 6
    both = one.statistics(), other.statistics()
    assert sum(done.failed for done in both) == 0
    assert sum(done.compiled + done.lost for done in both) >= 6
    library.close()
