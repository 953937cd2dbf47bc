"""Artifacts run by themselves: loaded, kept, timed, and their errors counted."""

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from esper.artifacts import Artifact, ensure_trusted
from esper.errors import InputError
from esper.execution._backends import Params, backend_of
from esper.execution._incidents import Incidents
from esper.execution._latency import Latencies
from esper.execution._load import Trust
from esper.execution._loader import KernelLoader, Ready
from esper.execution._measure import KernelMeasurement, measure
from esper.recovery import ErrorRecoveryManager
from esper.recovery._check import require
from esper_functional import KernelMismatchError

if TYPE_CHECKING:
    from esper_adapters.pytorch import TorchKernel
    from esper_functional import Kernel


class RealKernelExecutor:
    """Runs kernels straight from their artifacts, outside of any layer. Threads may share one.

    Programs are kept by the digest of their bytes: kernels that differ in parameters alone share
    one, which is loaded, and compiled for each shape, once. In torch the artifact's own
    TorchScript comes first; where it has none, or it cannot be loaded, its StableHLO runs by jax
    over the bridge. The second is an event, and an error that is counted.

    There is no time limit here. A kernel runs in the thread that asks for it, and a thread cannot
    be stopped: a timeout around it would fire when the kernel has ended, or leave it running.
    What may loop for ever is found out before, in a process that can be killed: see
    `esper.artifacts`, which decides what is trusted.

    Blending and the containment of what is not finite are the layers'.

    Args:
        device: where kernels run: torch's (by default CUDA's where there is one) or jax's (by
            default what jax takes). Inputs that are elsewhere are copied to it.
        backend: `torch` or `jax`.
        max_kernel_cache_size: programs that are kept, and kernels with their parameters; what
            was used longest ago goes.
        trust: raises ArtifactError for an artifact that is not to be run; asked before anything
            of it is loaded. By default `esper.artifacts.ensure_trusted`; None where that was done.
        recovery: what errors are recorded with, and told by; one of its own by default.
        clock: gives seconds, for latencies.
        synchronize: wait for CUDA in every call, so that latencies are the kernels' and not
            only of their launch. Results of jax are always waited for.

    Raises:
        InputError: for an unknown backend, a device that is not there, or a cache of no whole
            number of kernels from 1.
    """

    def __init__(
        self,
        device: Any = None,
        *,
        backend: Literal["torch", "jax"] = "torch",
        max_kernel_cache_size: int = 100,
        trust: Trust | None = ensure_trusted,
        recovery: ErrorRecoveryManager | None = None,
        clock: Callable[[], float] = time.perf_counter,
        synchronize: bool = False,
    ) -> None:
        require("max_kernel_cache_size of an executor", max_kernel_cache_size, 1, whole=True)
        self._backend = backend_of(backend, device, synchronize)
        self.error_recovery = recovery or ErrorRecoveryManager()
        self._incidents = Incidents(self.error_recovery, self._backend.name)
        self._clock = clock
        self._compilation = Latencies()
        self._execution = Latencies()
        self._loader = KernelLoader(
            self._backend, trust, self._incidents, max_kernel_cache_size,
            clock, self._compilation,
        )  # fmt: skip

    @property
    def device(self) -> str:
        """Where kernels run."""
        return self._backend.device

    def load(self, artifact: Artifact) -> "TorchKernel | Kernel":
        """The kernel of an artifact, for the backend, with its parameters at birth.

        Raises:
            ArtifactError: where it is not trusted, or holds no program that can be loaded.
            KernelExecutionError: where loading failed in another way.
        """
        return self._loader.ready(artifact).kernel

    def execute_kernel(
        self,
        artifact: Artifact,
        x: Any,
        *,
        params: Mapping[str, Any] | None = None,
        check: bool = False,
    ) -> Any:
        """Run a kernel on a batch.

        Gradients pass through, to `x` and to `params`; in jax also where it is called inside of
        `jax.grad` or `jax.jit`, and then it is not timed.

        Args:
            x: `[*batch, *example]`, in the kernel's dtype.
            params: by name, in place of those at birth, and of their shapes and dtypes.
            check: whether a result that is not finite is an error. It needs to be waited for,
                and so cannot be asked for where jax traces.

        Returns:
            `[*batch, *output]`.

        Raises:
            KernelMismatchError: for an input or parameters of another structure. It is recorded,
                but not as an error of this kernel.
            InputError: for `check` inside of a transformation of jax.
            ArtifactError: see `load`.
            KernelExecutionError: where it raised, or `check` found what is not finite. The error
                is recorded; what raised it is its cause.
        """
        ready = self._loader.ready(artifact)
        try:
            x = self._backend.enter(x)
            kind = x.shape, x.dtype
            known = kind in ready.seen
            if not known:
                self._check_input(ready, x, artifact.kernel_id)
            values = ready.params if params is None else self._in_order(ready, params, artifact)
        except KernelMismatchError as error:
            self._incidents.misused(error, artifact)
            raise
        loaded = ready.loaded
        compiles = not (known or loaded.route == "torchscript" or kind in loaded.seen)
        begun = self._clock()
        try:
            y = loaded.run(values, x)
            timed = self._backend.wait(y)
        except Exception as error:
            what = f"failed on {self._where(ready)} for {_of(x)}"
            raise self._incidents.failed(error, artifact, what) from error
        if check and not timed:
            raise InputError(
                "check=True was asked for inside of jax.jit, jax.grad or another transformation,"
                " where a result has no numbers yet: leave it out there, and look at what comes"
                " out of the transformation"
            )
        if timed:
            (self._compilation if compiles else self._execution).add(self._clock() - begun)
            if not known:
                ready.seen.add(kind)
                loaded.seen.add(kind)
            if check and (bad := self._backend.not_finite(y)):
                what = f"returned {bad} numbers that are not finite for {_of(x)}"
                raise self._incidents.failed(None, artifact, f"{what} on {self._where(ready)}")
        return y

    async def execute_kernel_async(
        self,
        artifact: Artifact,
        x: Any,
        *,
        params: Mapping[str, Any] | None = None,
        check: bool = False,
    ) -> Any:
        """`execute_kernel` in an event loop: loading does not hold it up.

        The kernel itself runs in the loop's thread, because whether torch records gradients is
        a matter of the thread.
        """
        if self._loader.kept(artifact.kernel_id) is None:
            await asyncio.to_thread(self.load, artifact)
        return self.execute_kernel(artifact, x, params=params, check=check)

    def profile(
        self, artifact: Artifact, batch: int = 32, *, repeats: int = 100
    ) -> KernelMeasurement:
        """Measure what a kernel costs.

        Its calls are in none of this executor's statistics; that it was loaded for them is,
        where it was not at hand.

        Raises:
            InputError: for a batch or repeats that are no whole number from 1.
            ArtifactError: see `load`.
            KernelExecutionError: where it raised.
        """
        require("batch of a profile", batch, 1, whole=True)
        require("repeats of a profile", repeats, 1, whole=True)
        ready = self._loader.ready(artifact)
        try:
            return measure(
                artifact, self._backend, ready.loaded.route, ready.loaded.run, ready.params,
                batch=batch, repeats=repeats, clock=self._clock,
            )  # fmt: skip
        except Exception as error:
            what = f"could not be measured on {self._where(ready)}"
            raise self._incidents.failed(error, artifact, what) from error

    def get_performance_stats(self) -> dict[str, Any]:
        """What was loaded, run, kept and failed so far; JSON-able.

        `compilation` is making programs ready: each that was loaded, and the first call of jax
        for each shape, which compiles. `execution` is all other calls. Percentiles are of the
        last 1,024; `memory_mb` counts parameters and the bytes of programs, and not what a
        framework makes of them.
        """
        return {
            "compilation": self._compilation.stats("ms", 1e3),
            "execution": self._execution.stats("us", 1e6),
            **self._loader.stats(),
            "device": self.device,
            "backend": self._backend.name,
            "errors": self._incidents.stats(),
        }

    def clear(self) -> None:
        """Let go of all programs and parameters."""
        self._loader.clear()

    def _check_input(self, ready: Ready, x: Any, kernel_id: str) -> None:
        lead = x.ndim - len(ready.shape)
        fits = lead >= 0 and tuple(x.shape[lead:]) == ready.shape
        if not fits or str(x.dtype).removeprefix("torch.") != ready.dtype:
            expected = ", ".join(map(str, ("*batch", *ready.shape)))
            raise KernelMismatchError(
                f"kernel {kernel_id[:12]} takes {ready.dtype}[{expected}], got {_of(x)}: choose a"
                " kernel compiled for this signature, or reshape and cast the input"
            )

    def _in_order(self, ready: Ready, params: Mapping[str, Any], artifact: Artifact) -> Params:
        """The parameters given, on the device and in the order of the program's arguments."""
        short = artifact.kernel_id[:12]
        if params.keys() != ready.params.keys():
            raise KernelMismatchError(
                f"kernel {short} has the parameters {', '.join(ready.params)}, got"
                f" {', '.join(params) or 'none'}: give each of them by its name"
            )
        found: dict[str, Any] = {}
        for name, kept in ready.params.items():
            given = self._backend.enter(params[name], name)
            # Torch would compute with what can be broadcast.
            if given.shape != kept.shape or given.dtype != kept.dtype:
                raise KernelMismatchError(
                    f"kernel {short} takes {_of(kept)} as its parameter {name}, got {_of(given)}:"
                    " give it in the shape and dtype that it has at birth"
                )
            found[name] = given
        return found

    def _where(self, ready: Ready) -> str:
        return f"{self._backend.name} ({ready.loaded.route}, {self.device})"


def _of(x: Any) -> str:
    return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"
