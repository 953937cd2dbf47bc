"""What is known of kernels, whether or not they are at hand."""

import re
import sys
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from operator import index
from typing import Any, Literal, NamedTuple, Self

from esper.cache._tier import GRADES
from esper.contracts import KernelMetadata
from esper.errors import InputError

Backend = Literal["jax", "torch"]

_NAME = re.compile(r"([a-z]+)(?::\d+)?")

_PLATFORMS = frozenset({"cpu", "cuda", "gpu", "rocm", "tpu", "mps", "xpu", "hpu", "xla", "meta"})
"""Those that are known by their names; others are, by devices of torch or jax."""

UNMEASURED = 0.5
"""Stands in for a performance that nobody has reported."""


class Known:
    """A kernel's metadata, and what was seen of it so far."""

    __slots__ = ("accesses", "failures", "last_access", "metadata", "performance")

    UNKNOWN_GRADE = round(GRADES * UNMEASURED)
    """The grade of a kernel of which nothing is known."""

    def __init__(self, metadata: KernelMetadata) -> None:
        self.metadata = metadata
        self.performance: float | None = None
        self.accesses = 0
        self.failures = 0
        self.last_access = 0

    def grade(self) -> int:
        """Performance times the share of accesses that did not fail, in steps of 1/64."""
        performance = UNMEASURED if self.performance is None else self.performance
        failure_rate = min(1.0, self.failures / max(self.accesses, 1))
        return round(GRADES * performance * (1.0 - failure_rate))

    def seen(self) -> KernelMetadata:
        """The metadata with what was seen."""
        return self.metadata.model_copy(
            update={
                "performance": self.performance,
                "accesses": self.accesses,
                "failures": self.failures,
                "last_access": self.last_access,
            }
        )


class Requirements(NamedTuple):
    """What a kernel must fit; None is no requirement."""

    target_shape: tuple[int, ...]
    """Of an input, its batch axis first."""
    platform: str
    """Such as `cpu` or `cuda`."""
    backend: Backend | None = None
    output_shape: tuple[int, ...] | None = None
    """Of an output, its batch axis first."""
    dtype: str | None = None
    max_memory_mb: float | None = None
    """At a batch of as many examples as `target_shape` holds, or `batch_size`."""
    max_parameters: int | None = None
    batch_size: int | None = None

    @classmethod
    def of(
        cls,
        target_shape: Sequence[int],
        device: object,
        backend: Backend | None,
        dtype: str | None,
        output_shape: Sequence[int] | None,
        max_memory_mb: float | None,
        max_parameters: int | None,
        batch_size: int | None = None,
    ) -> Self:
        """Requirements as a caller gives them.

        Raises:
            InputError: for what is no shape, or no device.
        """
        platform, owner = platform_of(device)
        return cls(
            _shape("target_shape", target_shape),
            platform,
            backend or owner,
            None if output_shape is None else _shape("output_shape", output_shape),
            dtype,
            max_memory_mb,
            max_parameters,
            batch_size,
        )

    def refusal(self, known: KernelMetadata) -> str | None:
        """Why a kernel does not fit: what was expected and what it is; None where it fits."""
        if not _ends_with(self.target_shape, known.input_shape):
            return f"it takes examples of shape {known.input_shape}, got {self.target_shape}"
        if self.output_shape is not None and not _ends_with(self.output_shape, known.output_shape):
            return f"it gives examples of shape {known.output_shape}, wanted {self.output_shape}"
        if self.dtype is not None and known.dtype != self.dtype:
            return f"it computes in {known.dtype}, wanted {self.dtype}"
        if not known.runs_on(self.platform, self.backend):
            by = "" if self.backend is None else f" by {self.backend}"
            return f"it has programs for {known.platforms}, wanted {self.platform}{by}"
        if self.max_parameters is not None and known.parameter_count > self.max_parameters:
            return (
                f"it has {known.parameter_count} parameters, at most {self.max_parameters} wanted"
            )
        needed = known.memory_bytes(self._examples(known)) / (1 << 20)
        if self.max_memory_mb is not None and needed > self.max_memory_mb:
            return f"it needs {needed:.3g} MB, at most {self.max_memory_mb:.3g} wanted"
        return None

    def _examples(self, known: KernelMetadata) -> int:
        count = 1 if self.batch_size is None else self.batch_size
        lead = self.target_shape[: len(self.target_shape) - len(known.input_shape)]
        for axis in lead if self.batch_size is None else lead[1:]:
            count *= axis
        return count


def _shape(name: str, given: Sequence[int]) -> tuple[int, ...]:
    try:
        return tuple(index(axis) for axis in given)
    except TypeError as error:
        raise InputError(
            f"{name} must be whole numbers, the batch axis first, got {given!r}"
        ) from error


def _ends_with(shape: tuple[int, ...], example: tuple[int, ...]) -> bool:
    # A kernel of vectors serves each position of a sequence: any axes may lead, one must.
    return len(shape) > len(example) and shape[len(shape) - len(example) :] == example


def platform_of(device: object) -> tuple[str, Backend | None]:
    """The platform that a device is of, and whose device it is where that shows.

    Raises:
        InputError: for what is no device, or a name of none that is known.
    """
    backend: Backend | None = None
    named = _NAME.fullmatch(device) if isinstance(device, str) else None
    if named is not None and named[1] in _PLATFORMS:
        name = named[1]
    elif _is_a(device, "torch", "device"):
        name, backend = getattr(device, "type"), "torch"  # noqa: B009
    elif _is_a(device, "jax", "Device"):
        name, backend = getattr(device, "platform"), "jax"  # noqa: B009
    else:
        raise InputError(
            f"{device!r} is no device: expected a torch.device, a jax.Device or a name such as"
            f" 'cpu' or 'cuda:0', of {', '.join(sorted(_PLATFORMS))}"
        )
    return ("cuda" if name == "gpu" else name), backend


def _is_a(device: object, module: str, kind: str) -> bool:
    # Nobody has a device of what was not imported.
    found: Any = sys.modules.get(module)
    return found is not None and isinstance(device, getattr(found, kind))


class Index:
    """Kernels by id. Those in memory are known for as long; of others, so many.

    Whoever shares it among threads locks it.

    Args:
        max_others: how many kernels are known that are not in memory.
    """

    def __init__(self, max_others: int) -> None:
        self.max_others = max_others
        self.asks = 0
        """How often anything was asked for."""
        self._known: dict[str, Known] = {}
        self._others: OrderedDict[str, None] = OrderedDict()
        self._by_shape: dict[tuple[int, ...], dict[str, None]] = {}

    def __len__(self) -> int:
        return len(self._known)

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def get(self, kernel_id: str) -> Known | None:
        """What is known of a kernel; None where nothing is."""
        return self._known.get(kernel_id)

    def hold(self, metadata: KernelMetadata) -> Known:
        """Know a kernel whose artifact is in memory; see `note`."""
        known = self._learn(metadata)
        self._others.pop(metadata.kernel_id, None)
        return known

    def note(self, metadata: KernelMetadata) -> None:
        """Know a kernel that is not in memory: what it is told to be, and what was seen of it."""
        self._learn(metadata)
        self.release(metadata.kernel_id)

    def _learn(self, metadata: KernelMetadata) -> Known:
        known = self._known.get(metadata.kernel_id)
        if known is None:
            known = self._known[metadata.kernel_id] = Known(metadata)
        else:
            self._unfile(known)
            if metadata.flops is None:
                # The library counts those of a program; an artifact alone does not tell them.
                metadata = metadata.model_copy(update={"flops": known.metadata.flops})
            known.metadata = metadata
        self._by_shape.setdefault(metadata.input_shape, {})[metadata.kernel_id] = None
        return known

    def _unfile(self, known: Known) -> None:
        shape = known.metadata.input_shape
        del self._by_shape[shape][known.metadata.kernel_id]
        if not self._by_shape[shape]:
            del self._by_shape[shape]

    def note_all(self, several: Iterable[KernelMetadata]) -> int:
        """Note kernels for as long as there is room, and forget none; how many were new."""
        count = 0
        for metadata in several:
            if metadata.kernel_id not in self._known and len(self._others) < self.max_others:
                self.note(metadata)
                # Nobody has asked for it: it is the first to be forgotten.
                self._others.move_to_end(metadata.kernel_id, last=False)
                count += 1
        return count

    def release(self, kernel_id: str) -> None:
        """Its artifact is in memory no more; of those, it is the last to be forgotten."""
        if kernel_id in self._known:
            self._others[kernel_id] = None
            self._others.move_to_end(kernel_id)
            self._trim()

    def _trim(self) -> None:
        while len(self._others) > self.max_others:
            gone, _ = self._others.popitem(last=False)
            self._unfile(self._known.pop(gone))

    def asked(self, kernel_id: str) -> Known | None:
        """Count an ask for a kernel; what is known of it."""
        self.asks += 1
        known = self._known.get(kernel_id)
        if known is not None:
            known.accesses += 1
            known.last_access = self.asks
        return known

    def fitting(self, wanted: Requirements) -> list[tuple[str, KernelMetadata]]:
        """The kernels that fit: by measured score, then the last asked for first, then by id."""
        shape = wanted.target_shape
        found = [
            self._known[kernel_id]
            for first in range(1, len(shape) + 1)
            for kernel_id in self._by_shape.get(shape[first:], ())
            if wanted.refusal(self._known[kernel_id].metadata) is None
        ]
        found.sort(key=_rank)
        return [(known.metadata.kernel_id, known.seen()) for known in found]


def _rank(known: Known) -> tuple[float, int, str]:
    return -(known.performance or 0.0), -known.last_access, known.metadata.kernel_id
