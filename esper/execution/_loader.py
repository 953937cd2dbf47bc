"""From artifacts to kernels that are ready to run, of which the last ones are kept."""

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Generic, NamedTuple, TypeVar

from esper.artifacts import Artifact
from esper.errors import ArtifactError
from esper.execution._backends import Backend, Params, Run
from esper.execution._incidents import Incidents
from esper.execution._latency import Latencies
from esper.execution._load import Trust
from esper.execution._seen import Seen
from esper.recovery import ErrorContext
from esper_functional import KasminaException

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Loaded(NamedTuple):
    """A program, and how it runs here."""

    program: Any
    run: Run
    route: str
    size: int
    """Bytes of the program in the artifact."""
    seen: Seen
    """Shapes and dtypes of inputs that it has run, and so was compiled for by jax."""


class Ready(NamedTuple):
    """A kernel whose parameters are on the device."""

    kernel: Any
    params: Params
    loaded: Loaded
    shape: tuple[int, ...]
    """Of one example."""
    dtype: str
    size: int
    """Bytes of the parameters."""
    seen: Seen
    """Shapes and dtypes of inputs that fit."""


class _Recent(Generic[Key, Value]):
    """The entries used last; not safe among threads by itself."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._entries: OrderedDict[Key, Value] = OrderedDict()
        self.evictions = 0

    def get(self, key: Key) -> Value | None:
        found = self._entries.get(key)
        if found is not None:
            self._entries.move_to_end(key)
        return found

    def put(self, key: Key, value: Value) -> None:
        self._entries[key] = value
        self._entries.move_to_end(key)
        while len(self._entries) > self._limit:
            self._entries.popitem(last=False)
            self.evictions += 1

    def values(self) -> list[Value]:
        return list(self._entries.values())

    def clear(self) -> None:
        self._entries.clear()


class KernelLoader:
    """Loads each program once, and keeps it by the digest of its bytes.

    Args:
        limit: programs that are kept, and kernels with their parameters.
        compilation: where the times of loading are put.
    """

    def __init__(
        self,
        backend: Backend,
        trust: Trust | None,
        incidents: Incidents,
        limit: int,
        clock: Callable[[], float],
        compilation: Latencies,
    ) -> None:
        self._backend = backend
        self._trust = trust
        self._incidents = incidents
        self._clock = clock
        self._compilation = compilation
        self._limit = limit
        self._lock = threading.Lock()
        # Whoever is told of a kernel while it is loaded may load it, or another.
        self._loading = threading.RLock()
        self._programs: _Recent[str, Loaded] = _Recent(limit)
        self._kernels: _Recent[str, Ready] = _Recent(limit)
        self._hits = self._misses = self._fallbacks = 0
        self._routes: Counter[str] = Counter()

    def kept(self, kernel_id: str) -> Ready | None:
        """The kernel, where it is at hand."""
        with self._lock:
            return self._kernels.get(kernel_id)

    def ready(self, artifact: Artifact) -> Ready:
        """The kernel, loaded where it is not at hand.

        Raises:
            ArtifactError: where it is not trusted, or holds no program that can be loaded.
            KernelExecutionError: where loading failed in another way.
        """
        with self._lock:
            found = self._kernels.get(artifact.kernel_id)
            self._hits += found is not None
            self._misses += found is None
        if found is not None:
            return found
        try:
            # It may take long, and others load meanwhile.
            if self._trust is not None:
                self._trust(artifact)
            # One at a time: what many ask for at once is loaded once.
            with self._loading:
                return self.kept(artifact.kernel_id) or self._load(artifact)
        except KasminaException as error:
            self._incidents.record(error, artifact)
            raise
        except Exception as error:
            what = f"cannot be loaded for {self._backend.name}"
            raise self._incidents.failed(error, artifact, what) from error

    def clear(self) -> None:
        """Let go of all programs and parameters."""
        with self._lock:
            self._programs.clear()
            self._kernels.clear()

    def stats(self) -> dict[str, Any]:
        """Counts, JSON-able."""
        with self._lock:
            programs, kernels = self._programs.values(), self._kernels.values()
            size = sum(p.size for p in programs) + sum(k.size for k in kernels)
            return {
                "cache": {
                    "modules_cached": len(programs),
                    "kernels_cached": len(kernels),
                    "memory_mb": size / 2**20,
                    "max_entries": self._limit,
                    "hits": self._hits,
                    "misses": self._misses,
                    "evictions": self._programs.evictions,
                },
                "routes": dict(self._routes),
                "fallbacks": self._fallbacks,
            }

    def _load(self, artifact: Artifact) -> Ready:
        kernel, loaded = self._by_first_route(artifact)
        signature = artifact.manifest.signature
        ready = Ready(
            kernel=kernel,
            params=self._backend.place(kernel.params),
            loaded=loaded,
            shape=tuple(signature.input_shape),
            dtype=signature.dtype,
            size=sum(int(p.nbytes) for p in artifact.params.values()),
            seen=Seen(),
        )
        with self._lock:
            self._kernels.put(artifact.kernel_id, ready)
            self._routes[loaded.route] += 1
        return ready

    def _by_first_route(self, artifact: Artifact) -> tuple[Any, Loaded]:
        """The kernel by the first route that works, and its program, which may be at hand."""
        first, *others = self._backend.routes(artifact)
        try:
            return self._by(artifact, first)
        except Exception as error:
            if not others:
                raise
            context = self._incidents.record(error, artifact, route=first)
            return self._by_another(artifact, others[0], error, context)

    def _by_another(
        self, artifact: Artifact, route: str, error: Exception, context: ErrorContext
    ) -> tuple[Any, Loaded]:
        try:
            found = self._by(artifact, route)
        except Exception as second:
            self._incidents.fell_back(context, False, f"{route}: {second}")
            raise ArtifactError(
                f"kernel {artifact.kernel_id[:12]} holds no program that can be loaded: {error};"
                f" and by the route {route!r}: {second}. Compile it again."
            ) from error
        with self._lock:
            self._fallbacks += 1
        self._incidents.fell_back(context, True, f"it runs by the route {route!r}")
        return found

    def _by(self, artifact: Artifact, route: str) -> tuple[Any, Loaded]:
        script = route == "torchscript"
        member = "program.torchscript" if script else "program.stablehlo"
        key = f"{route}:{artifact.manifest.digests[member]}"
        with self._lock:
            loaded = self._programs.get(key)
        begun = self._clock()
        kernel = self._backend.load(artifact, route)
        if loaded is not None:
            return self._backend.with_program(kernel, loaded.program), loaded
        size = len((artifact.torchscript if script else artifact.stablehlo) or b"")
        loaded = Loaded(kernel.program, self._backend.runner(kernel), route, size, Seen())
        self._compilation.add(self._clock() - begun)
        with self._lock:
            self._programs.put(key, loaded)
        return kernel, loaded
