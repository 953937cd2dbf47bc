"""A run that goes on refers to its kernels again, so that nobody collects them under it."""

import contextlib
import itertools
import shutil

import pytest

from esper.contracts import KernelState, RetentionPolicy
from esper.errors import Interrupted
from esper.tolaria import Hooks, resume_run, start_run
from esper.tolaria._run_folder import open_run
from esper.urza import Library
from tests.esper.runs import EVENTFUL, config

ANY = RetentionPolicy(states=tuple(KernelState), grace_seconds=0.0)
VALUES = EVENTFUL | {"steps": 40, "variants": 1}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a library, and a run over it that was stopped and then released."""
    folder = tmp_path_factory.mktemp("resumed")
    asked = itertools.count()
    with pytest.raises(Interrupted):
        start_run(
            folder / "run",
            config(folder, "torch", VALUES),
            hooks=Hooks(stop=lambda: next(asked) >= 10),
        )
    with contextlib.closing(Library(folder / "library")) as library:
        library.release_run(open_run(folder / "run").genesis)
    return folder


def test_a_run_that_goes_on_after_its_release_keeps_its_kernels_and_one_that_ended_does_not(place):
    shutil.copytree(place / "run", place / "again")
    run = open_run(place / "again")
    chosen = {kernel_id for ids in run.kernels.values() for kernel_id in ids}
    with contextlib.closing(Library(place / "library")) as library:
        collected = []
        hooks = Hooks(on_step=lambda step, loss: collected.append(library.collect_garbage(ANY)))
        resume_run(run.path, hooks=hooks)
        assert collected
        assert {(report.removed, report.referenced) for report in collected} == {((), len(chosen))}
        assert all(library.references(kernel_id) == [run.genesis] for kernel_id in chosen)
        library.release_run(run.genesis)
        resume_run(run.path)
        assert not any(library.references(kernel_id) for kernel_id in chosen)
