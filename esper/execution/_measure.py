"""What a kernel costs, measured and counted: a record beside its artifact, never inside."""

import dataclasses
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from esper.artifacts import Artifact
from esper.execution._backends import Backend, Params, Run
from esper.execution._latency import quantile
from esper.tezzeret import artifact_cost
from esper.tezzeret._programs import array_dtype

_WARM_UP = 3


@dataclasses.dataclass(frozen=True)
class KernelMeasurement:
    """What one kernel costs on one device, for one size of batch."""

    kernel_id: str
    backend: str
    route: str
    device: str
    batch: int
    repeats: int
    forward_us: float
    """Median over the repeats, in µs; the result is waited for."""
    forward_p95_us: float
    forward_backward_us: float
    """Of forward and of gradients with respect to parameters and input, together."""
    forward_backward_p95_us: float
    memory_bytes: int
    """Counted, not measured: parameters and their gradients, and for the batch the input and
    what each operation gives, all of which a backward pass may keep."""
    parameter_count: int
    flops: int
    """Of one example, forward; counted from the blueprint."""
    size_bytes: int
    """Of the artifact."""
    versions: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return dataclasses.asdict(self)


def measure(
    artifact: Artifact,
    backend: Backend,
    route: str,
    run: Run,
    params: Params,
    *,
    batch: int,
    repeats: int,
    clock: Callable[[], float],
) -> KernelMeasurement:
    """Time a program and count what it needs; see `KernelMeasurement`."""
    manifest = artifact.manifest
    signature = manifest.signature
    cost = artifact_cost(artifact)
    x = backend.random((batch, *signature.input_shape), signature.dtype)
    forward = _times(lambda: backend.wait(run(params, x)), repeats, clock)
    both = backend.gradients(run)

    def forward_backward() -> None:
        backend.wait(_last(both(params, x)))

    backward = _times(forward_backward, repeats, clock)
    return KernelMeasurement(
        kernel_id=artifact.kernel_id,
        backend=backend.name,
        route=route,
        device=backend.device,
        batch=batch,
        repeats=repeats,
        forward_us=quantile(forward, 0.5) * 1e6,
        forward_p95_us=quantile(forward, 0.95) * 1e6,
        forward_backward_us=quantile(backward, 0.5) * 1e6,
        forward_backward_p95_us=quantile(backward, 0.95) * 1e6,
        memory_bytes=array_dtype(signature.dtype).itemsize
        * (2 * cost.parameter_count + batch * cost.values),
        parameter_count=cost.parameter_count,
        flops=cost.flops,
        size_bytes=len(artifact.data),
        versions=_versions(),
    )


def _times(call: Callable[[], object], repeats: int, clock: Callable[[], float]) -> list[float]:
    for _ in range(_WARM_UP):  # the first one compiles
        call()
    seconds: list[float] = []
    for _ in range(repeats):
        begun = clock()
        call()
        seconds.append(clock() - begun)
    return sorted(seconds)


def _last(gradients: Any) -> Any:
    # That of the input: one program gives all of them together.
    return gradients[-1]


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for package in ("jax", "jaxlib", "torch", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
