"""Loading a kernel into a seed: by itself, or by its id, in the caller's thread or in another."""

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from esper_adapters._naming import check_alpha, first_alpha
from esper_adapters.pytorch._kernel import TorchKernel
from esper_functional import (
    Event,
    EventKind,
    KasminaException,
    KernelMismatchError,
    SeedLifecycleState,
)

if TYPE_CHECKING:
    from esper_adapters.pytorch._layer import SeededLayer


class _Asked(NamedTuple):
    """One load: another of the same seed and kernel is another object."""

    kernel_id: str


def load(
    layer: "SeededLayer",
    seed: int,
    kernel: Any,
    alpha: float | None,
    step: int | None,
) -> bool:
    """Graft a kernel; False where there is none of that id. See `SeededLayer.load_kernel_sync`."""
    asked = _begin(layer, seed, kernel, alpha, step)
    return _finish(layer, seed, asked, alpha, step, lambda: _find(layer, kernel))


async def load_in_thread(
    layer: "SeededLayer",
    seed: int,
    kernel: Any,
    alpha: float | None,
    step: int | None,
) -> bool:
    """`load`, finding the kernel in a thread; the seed is LOADING meanwhile."""
    if layer.seed_table.replicas is not None:
        raise KasminaException(
            "load_kernel: the kernels are replicated, and a thread is done at another step on each"
            " rank: use load_kernel_sync on all ranks, or share_events"
        )
    asked = _begin(layer, seed, kernel, alpha, step)
    found: TorchKernel | BaseException
    try:
        found = await asyncio.to_thread(_find, layer, kernel)
    except BaseException as error:  # a cancelled task included: `_finish` raises it again
        found = error

    def outcome() -> TorchKernel:
        if isinstance(found, BaseException):
            raise found
        return found

    return _finish(layer, seed, asked, alpha, step, outcome)


def _find(layer: "SeededLayer", kernel: Any) -> TorchKernel:
    return layer.seed_table.fetch(kernel) if isinstance(kernel, str) else kernel


def _begin(
    layer: "SeededLayer",
    seed: int,
    kernel: Any,
    alpha: float | None,
    step: int | None,
) -> _Asked:
    """Ask for the kernel, as far as can be told that it may be."""
    from esper_adapters.pytorch._layer import SeededLayer

    if not isinstance(kernel, TorchKernel | str):
        raise KernelMismatchError(
            f"load_kernel takes an artifact's id or a TorchKernel; got {type(kernel).__name__}:"
            " make one by kernel_from_module or kernel_from_function"
        )
    if alpha is not None:
        check_alpha(alpha)
    if isinstance(kernel, TorchKernel):
        layer.check_kernel(kernel)
    kernel_id = kernel if isinstance(kernel, str) else kernel.kernel_id
    slot = layer.row * layer.num_seeds + seed
    table, asked = layer.seed_table, _Asked(kernel_id)
    with table.lock:
        now = table.at(step)
        event = Event(now, layer.row, seed, EventKind.LOAD, kernel_id, float(max(slot, 0)))
        SeededLayer.apply_event(layer, event)
        table.loading[layer.row, seed] = asked
    return asked


def _finish(
    layer: "SeededLayer",
    seed: int,
    asked: _Asked,
    alpha: float | None,
    step: int | None,
    find: Callable[[], TorchKernel],
) -> bool:
    from esper_adapters.pytorch._layer import SeededLayer

    table = layer.seed_table

    def end(kind: EventKind, value: float = 0.0, kernel: TorchKernel | None = None) -> bool:
        """End the load, if it is still under way: the seed may have been taken back meanwhile."""
        with table.lock:
            if table.loading.get((layer.row, seed)) is not asked:
                return False
            loading = layer.seeds.stage[layer.row, seed] == SeedLifecycleState.LOADING
            if loading:
                # While the kernel was looked for, the model may have gone on.
                now = table.step if step is None else max(step, table.step)
                event = Event(now, layer.row, seed, kind, asked.kernel_id, value)
                SeededLayer.apply_event(layer, event, kernel)
            del table.loading[layer.row, seed]
            return bool(loading)

    try:
        kernel = find() if table.replicas is None else table.replicas.find(find)
    except LookupError:
        end(EventKind.CANCEL)
        return False
    except asyncio.CancelledError:
        end(EventKind.CANCEL)
        raise
    except BaseException:
        # Whatever it was, the seed does not stay LOADING for good.
        end(EventKind.FAIL)
        raise
    try:
        value = first_alpha(kernel.confidence) if alpha is None else alpha
        return end(EventKind.ACTIVATE, value, kernel)
    except KernelMismatchError:
        end(EventKind.CANCEL)
        raise
    except BaseException:
        end(EventKind.FAIL)
        raise
