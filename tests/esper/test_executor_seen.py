"""What an executor remembers of its inputs is bounded, and what it forgot runs all the same."""

import torch

from esper.execution import RealKernelExecutor
from esper.execution._seen import MOST, Seen
from tests.adapters.kernels import artifact


def test_the_kinds_added_last_are_known():
    seen = Seen()
    for kind in range(3 * MOST):
        seen.add(kind)
        seen.add(kind)
        assert len(seen) == min(kind + 1, MOST)
    assert [kind for kind in range(3 * MOST) if kind in seen] == list(range(2 * MOST, 3 * MOST))


def test_batches_of_many_shapes_leave_no_more_behind_than_so_many():
    executor, source = RealKernelExecutor(trust=lambda _: None), artifact("low_rank")
    first = executor.execute_kernel(source, torch.ones(1, 3))
    for size in range(2, MOST + 10):
        executor.execute_kernel(source, torch.ones(size, 3))
    ready = executor.load(source) and executor._loader.kept(source.kernel_id)
    assert ready is not None
    assert len(ready.seen) == len(ready.loaded.seen) == MOST
    assert torch.equal(executor.execute_kernel(source, torch.ones(1, 3)), first)
