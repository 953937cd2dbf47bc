"""Layers that carry seeds: each a subclass of the layer that it is.

    y = blend(layer(x), k_1(x), …, k_n(x))

over the seeds that run; with none it is its base class and one attribute test.
What carries the seeds is `SeededLayer`, for every class of layer alike; all
life-cycle code is the core's, called on numpy.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cache, wraps
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from esper_adapters._errors import tied_weights
from esper_adapters._naming import check_alpha, first_alpha, load_events
from esper_adapters.pytorch._kernel import (
    GraftedKernel,
    LayerShapes,
    TorchKernel,
    check_torch_kernel,
)
from esper_adapters.pytorch._table import SeedTable
from esper_functional import (
    FAILURES_TO_RECOVERY,
    Blend,
    Event,
    EventKind,
    FoldError,
    KasminaException,
    KernelMismatchError,
    SeedIndexError,
    SeedLifecycleState,
    SeedState,
    advance,
    affine_of,
    apply_event,
    blend_weights,
    check_blend,
    fault_events,
    fold_linear,
    mix,
    running,
)

EXTRA = "_extra_state"
"""Under this key, torch's own for such things, a state_dict has a layer's seeds."""


def is_seeds(extra: Any) -> bool:
    """Whether an extra state of a module is that of seeds."""
    return isinstance(extra, Mapping) and extra.get("esper_seeds") == 1


class Counter(NamedTuple):
    """What is counted of a running kernel, on the device."""

    kernel: GraftedKernel
    errors: Tensor
    """i32: consecutive failures."""
    working: Tensor
    """bool: fewer than three."""

    def note(self, ok: Tensor) -> None:
        """Count a call: no forward pass waits for it."""
        counted = torch.where(ok.all(), 0, self.errors + 1)
        self.errors.copy_(torch.where(self.working, counted, self.errors))
        self.working.copy_(self.errors < FAILURES_TO_RECOVERY)

    def to(self, device: torch.device) -> "Counter":
        """On another device."""
        return Counter(self.kernel, self.errors.to(device), self.working.to(device))


class SeededLayer(nn.Module):
    """What a layer with seeds has beyond its base class.

    A stand-alone layer holds a seed state of one row. In a wrapped model the layers share
    one state, and each refers to its row. In training mode every call counts as a step of
    its kernels' consecutive failures.
    """

    _esper_base: ClassVar[type[nn.Module]]
    """By which the class is found again: itself, or the class that it was made from."""
    _esper_kind: ClassVar[str | None]
    """None where the class can be found by its name."""
    _esper_linear: ClassVar[bool]
    """Whether it computes what `nn.Linear` does."""
    _esper_input: ClassVar[str]
    """The name of the argument that kernels see."""
    _table: SeedTable
    _row: int
    blend: Blend
    isolate: bool
    _runs: tuple[GraftedKernel, ...] = ()
    """The kernels that are blended, in seed order; without those that incubate."""
    _counters: dict[int, Counter] = {}  # noqa: RUF012 (never changed in place)
    """By seed, of all kernels that run."""
    _blended: tuple[Counter, ...] = ()
    """Of `_runs`."""
    _weights: tuple[Tensor, ...] = ()
    _host_weight: Tensor
    _shadowed: int | None = None
    """The seed that a shadow of the forward pass shows at alpha 1."""
    _fused: tuple[nn.Module, ...] = ()
    """What it lies in that has a fused path, which would pass it by."""
    _tied = False
    """Whether another layer has its weights too."""
    _hook: Any = None
    """What keeps that path off while kernels run."""
    _returns_several: bool | None = None
    """Whether it returns more than a tensor; None until kernels have run on it."""
    _called: bool | None = None
    """Whether a forward pass has called it since it was last asked; None for new kernels."""

    def __init__(
        self,
        *args: Any,
        num_seeds: int = 4,
        layer_name: str | None = None,
        blend: str = "convex",
        isolate: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        name = type(self).__name__ if layer_name is None else layer_name
        self._plant(SeedTable((name,), num_seeds), 0, check_blend(blend), isolate)

    def _plant(self, table: SeedTable, row: int, blend: Blend, isolate: bool) -> None:
        self._table = table
        self._row = row
        self.blend = blend
        self.isolate = isolate

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Classes that were made for a host's cannot be found by their names.
        return _fresh, (type(self)._esper_base, type(self)._esper_kind), self.__getstate__()

    @property
    def layer_name(self) -> str:
        """The layer's name in its model."""
        return self._table.names[self._row]

    @property
    def num_seeds(self) -> int:
        """How many kernels the layer can carry."""
        return self._table.state.shape[1]

    @property
    def seeds(self) -> SeedState:
        """The model's seed state (this layer's row is `row`), in numpy."""
        return self._table.state

    @property
    def row(self) -> int:
        """The layer's row in the seed state."""
        return self._row

    @property
    def shapes(self) -> LayerShapes:
        """What is known of the layer's examples before it is called."""
        dtype = _dtype_of(self)
        for kind, known in _SHAPES.items():
            if isinstance(self, kind):
                return LayerShapes(*known(self), dtype)
        return LayerShapes(dtype=dtype)

    def _grafted(self, result: Any, args: Sequence[Any], options: dict[str, Any]) -> Any:
        """What the layer returned, its kernels blended into the first tensor of it."""
        self._called = True
        self._returns_several = isinstance(result, tuple | list) and bool(result)
        x = args[0] if args else options.get(type(self)._esper_input)
        several = isinstance(result, tuple | list) and bool(result)
        h: Any = result[0] if several else result
        if not isinstance(h, Tensor) or not isinstance(x, Tensor):
            raise KernelMismatchError(
                f"layer {self.layer_name!r} carries kernels, so it must take and return a tensor,"
                f" or several of which the first is one; it takes {type(x).__name__} and returns"
                f" {type(h).__name__}. Unload its kernels, or choose another layer"
            )
        y = self._blend(h, x)
        if not several:
            return y
        kind: Any = type(result)
        return kind(y, *result[1:]) if hasattr(result, "_fields") else kind((y, *result[1:]))

    def _blend(self, h: Tensor, x: Tensor) -> Tensor:
        if self._shadowed is not None:
            return self._shadow(h, x, self._shadowed)
        return self._mixed(h, x, self._blended, self._host_weight, self._weights)

    def _shadow(self, h: Tensor, x: Tensor, seed: int) -> Tensor:
        """The blend with one incubating kernel at alpha 1."""
        state, row = self._table.state, self._row
        alpha, own = np.array(state.alpha[row]), np.asarray(running(state))[row]
        shown = own & (~np.asarray(state.incubating)[row] | (np.arange(len(own)) == seed))
        alpha[seed] = 1.0
        host, kernels = blend_weights(self.blend, alpha, own)
        counters = [self._counters[int(i)] for i in np.flatnonzero(shown)]
        weights = [float(weight) for weight in kernels[shown]]
        return self._mixed(h, x, counters, float(host), weights, only=self._counters[seed])

    def _mixed(
        self,
        h: Tensor,
        x: Tensor,
        counters: Sequence[Counter],
        host_weight: Any,
        weights: Sequence[Any],
        only: Counter | None = None,
    ) -> Tensor:
        source = x.detach() if self.isolate else x
        outputs: list[Tensor] = []
        finite: list[Tensor] = []
        for counter in counters:
            kernel = counter.kernel
            k, ok = kernel(source)
            if k.dtype != h.dtype and torch.is_autocast_enabled(h.device.type):
                k = k.to(h.dtype)
            if k.shape != h.shape or k.dtype != h.dtype:
                raise KernelMismatchError(
                    f"kernel {kernel.kernel_id[:12]} of layer {self.layer_name!r} returned"
                    f" {_words(k)} where the layer returns {_words(h)}, for an input {_words(x)}:"
                    " unload it, and choose a kernel of the layer's signature"
                )
            outputs.append(k)
            # A copy: counting changes the flag in place, and the select's gradient needs it.
            finite.append(ok & counter.working)
            if self.training and (only is None or only is counter):
                counter.note(ok)
        return mix(self.blend, h, outputs, finite, host_weight, weights, torch.where)

    @property
    def incubating(self) -> tuple[int, ...]:
        """The seeds whose kernels incubate."""
        own = np.asarray(self._table.state.incubating)[self._row]
        return tuple(seed for seed in self._counters if own[seed])

    def kernel(self, seed: int) -> GraftedKernel | None:
        """The kernel that a seed carries, or None."""
        return self._modules.get(f"kernel_{seed}")  # pyright: ignore[reportReturnType]

    def capture(self, x: Tensor) -> list[Tensor]:
        """The outputs of the running kernels on a layer input, without gradients."""
        with torch.no_grad():
            # TorchScript that has run with gradients keeps recording them.
            return [kernel(x.detach())[0].detach() for kernel in self._runs]

    def apply_event(self, event: Event, kernel: TorchKernel | None = None) -> None:
        """Change a seed by an event; ACTIVATE needs the `kernel` that it grafts.

        Raises:
            KernelMismatchError: for a kernel that does not fit; nothing is changed.
            SeedLifecycleError: for an event that the seed's stage does not allow.
            FoldError: for a kernel that cannot be folded into this layer's weights.
        """
        if event.kind is EventKind.ACTIVATE:
            if kernel is None:
                raise ValueError("an ACTIVATE event needs the kernel that it grafts")
            self._check(kernel)
        folded = self._folded(event) if event.kind is EventKind.FOLD else None
        self._table.apply(event)
        if folded is not None:
            self._take_weights(*folded)
            self._remove(event.seed)
        if event.kind is EventKind.ACTIVATE and kernel is not None:
            self.place(event.seed, kernel)
        self.refresh()

    def _check(self, kernel: TorchKernel) -> None:
        where = f"layer {self.layer_name!r}"
        check_torch_kernel(kernel, self.shapes, where)

    def _folded(self, event: Event) -> tuple[np.ndarray, np.ndarray | None]:
        """The layer's weights with a kernel folded into them; nothing is changed."""
        # Refused as the state refuses it, before anything is run.
        apply_event(self._table.state, event, layers=self._table.names)
        where = f"layer {self.layer_name!r}"
        plain = isinstance(self, nn.Linear) and type(self)._esper_linear
        if not plain or not isinstance(getattr(self, "weight", None), nn.Parameter):
            raise FoldError(
                f"fold: {where} is not a linear layer, and only into those kernels can be folded:"
                " fossilise the kernel instead"
            )
        if self._tied:
            raise tied_weights(self.layer_name)
        if event.seed not in self._counters:
            raise FoldError(
                f"fold: seed {event.seed} of {where} has stopped at its third failure, so it has no"
                " part in the output that could be folded"
            )
        kernel, weight = self._counters[event.seed].kernel, self.get_parameter("weight")
        name = str(weight.dtype).removeprefix("torch.")

        def evaluate(rows: np.ndarray) -> np.ndarray:
            with torch.no_grad():
                x = torch.as_tensor(rows).to(weight)
                return kernel(x)[0].double().cpu().numpy()

        form = affine_of(
            evaluate, kernel.kernel_id[:12], kernel.example_rank, weight.shape[1], name
        )
        bias = getattr(self, "bias", None)
        state = advance(self._table.state, event.step)
        places = sorted(self._counters)
        own = weight.detach().float().cpu().numpy()
        return fold_linear(
            own,
            None if bias is None else bias.detach().float().cpu().numpy(),
            form,
            self.blend,
            np.asarray(state.alpha)[self._row, places],
            places.index(event.seed),
        )

    def _take_weights(self, weight: np.ndarray, bias: np.ndarray | None) -> None:
        with torch.no_grad():
            self.get_parameter("weight").copy_(torch.as_tensor(weight))
            if bias is not None:
                self.get_parameter("bias").copy_(torch.as_tensor(bias))

    def place(self, seed: int, kernel: TorchKernel) -> GraftedKernel:
        """Register a kernel's parameters for a seed whose state says that it holds one.

        Call `refresh` after the last: a graft is an event (`apply_event`), and this is
        for restoring what events have led to.
        """
        grafted = GraftedKernel(kernel, _device_of(self))
        grafted.train(self.training)
        self.add_module(f"kernel_{seed}", grafted)
        return grafted

    def _remove(self, seed: int) -> None:
        kernel = self.kernel(seed)
        if kernel is not None:
            kernel.leave()
            delattr(self, f"kernel_{seed}")

    def refresh(self) -> None:
        """Bring what forward reads up to the seed state, after the state has changed."""
        state, row = self._table.state, self._row
        for seed in range(self.num_seeds):
            stage = SeedLifecycleState(int(state.stage[row, seed]))
            kernel = self.kernel(seed)
            if kernel is None:
                continue
            if stage in (SeedLifecycleState.DORMANT, SeedLifecycleState.LOADING):
                self._remove(seed)
            elif stage is SeedLifecycleState.FOSSILIZED:
                kernel.frozen = True
                kernel.requires_grad_(False)
        own = np.asarray(running(state))[row]
        device = _device_of(self)
        # What runs on does so with failures that the state has not absorbed yet.
        held = {id(counter.kernel): counter for counter in self._counters.values()}
        counters: dict[int, Counter] = {}
        for seed in np.flatnonzero(own).tolist():
            kernel = self.kernel(seed)
            if kernel is None:
                continue
            count = int(state.error_count[row, seed])
            counters[seed] = held.get(id(kernel)) or Counter(
                kernel,
                torch.tensor(count, dtype=torch.int32, device=device),
                torch.tensor(count < FAILURES_TO_RECOVERY, device=device),
            )
        self._counters = counters
        incubating = np.asarray(state.incubating)[row]
        self._blended = tuple(c for seed, c in counters.items() if not incubating[seed])
        runs = tuple(counter.kernel for counter in self._blended)
        if runs != self._runs:
            self._host_weight = torch.ones((), device=device)
            self._weights = tuple(torch.zeros((), device=device) for _ in runs)
            self._runs = runs
            self._called = None
            self.lift_fused_path()
        self.refresh_alpha()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # Dormant, the keys are the base layer's.
        if np.asarray(self._table.state.stage)[self._row].any():
            destination[prefix + EXTRA] = self.seeds_to_save()

    def seeds_to_save(self) -> dict[str, Any]:
        """The layer's row of the seed state, and its kernels' ids; all of it plain data."""
        state = self._table.state
        row = {
            field.name: torch.tensor(np.asarray(getattr(state, field.name))[self._row])
            for field in dataclasses.fields(state)
        }
        held = {seed: k.kernel_id for seed in range(self.num_seeds) if (k := self.kernel(seed))}
        return {
            "esper_seeds": 1,
            "step": self._table.step,
            "blend": self.blend,
            "isolate": self.isolate,
            "state": row,
            "kernels": held,
        }

    def find_kernels(self, extra: Mapping[str, Any]) -> dict[int, TorchKernel | None]:
        """The kernels that saved seeds hold; None for one that the layer holds already.

        Raises:
            KasminaException: for seeds of another wrapping, or a kernel that is nowhere.
        """
        where = f"load_state_dict: layer {self.layer_name!r}"
        seeds = int(extra["state"]["stage"].shape[0])
        saved = (seeds, extra["blend"], extra["isolate"])
        if saved != (self.num_seeds, self.blend, self.isolate):
            raise KasminaException(
                f"{where} has {self.num_seeds} seeds, blend {self.blend!r} and isolate="
                f"{self.isolate}, and was saved with {seeds}, {saved[1]!r} and isolate={saved[2]}:"
                " wrap with what it was saved with"
            )
        found: dict[int, TorchKernel | None] = {}
        for seed, kernel_id in extra["kernels"].items():
            held = self.kernel(int(seed))
            if held is not None and held.kernel_id == kernel_id:
                found[int(seed)] = None
                continue
            try:
                if self._table.resolve is None or not kernel_id:
                    raise LookupError
                found[int(seed)] = self._table.resolve(kernel_id)
            except LookupError:
                raise KasminaException(
                    f"{where} was saved with kernel {kernel_id or 'without an id'!r} in seed"
                    f" {seed}, which cannot be found: wrap with the `library` that has it, or with"
                    " `resolve`, a function from ids to kernels"
                ) from None
        return found

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        extra = state_dict.get(prefix + EXTRA)
        if extra is not None and is_seeds(extra):
            self._take_seeds(extra)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if prefix + EXTRA in unexpected_keys:
            unexpected_keys.remove(prefix + EXTRA)

    def _take_seeds(self, extra: Mapping[str, Any]) -> None:
        """The saved row, and places for its kernels' parameters, which are loaded after."""
        kernels = self.find_kernels(extra)
        state = self._table.state
        arrays: dict[str, np.ndarray] = {}
        for name, row in extra["state"].items():
            arrays[name] = np.array(getattr(state, name))
            arrays[name][self._row] = row.cpu().numpy()
        for seed in range(self.num_seeds):
            if kernels.get(seed, 0) is not None and self.kernel(seed) is not None:
                self._remove(seed)
        for seed, kernel in kernels.items():
            if kernel is not None:
                self.place(seed, kernel)
        self._table.state = SeedState(**arrays)
        self._table.step = max(self._table.step, int(extra["step"]))
        # The counts on the device are those of the state that was saved.
        self._counters = {}
        self.refresh()

    def lift_fused_path(self) -> None:
        """Turn fused paths around the layer off while kernels run, and on again after."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if self._fused and self._runs:
            # Any hook in an encoder's layer turns its path off.
            self._hook = self.register_forward_pre_hook(_do_nothing)
        for host in self._fused:
            if isinstance(host, nn.TransformerEncoder):
                busy = any(isinstance(m, SeededLayer) and m._runs for m in host.modules())
                own: Any = host.__dict__
                nested = own.setdefault("_esper_nested", getattr(host, "use_nested_tensor", False))
                host.use_nested_tensor = nested and not busy
                if not busy:
                    del own["_esper_nested"]

    def refresh_alpha(self) -> None:
        """Bring the blend weights alone up to the seed state, along a ramp."""
        state, row = self._table.state, self._row
        alpha = np.asarray(state.alpha)[row]
        self._table.shown[row] = alpha
        if not self._runs:
            return
        own = np.asarray(running(state) & ~state.incubating)[row]
        host, kernels = blend_weights(self.blend, alpha, own)
        # In place: a compiled forward keeps reading the same tensors.
        self._host_weight.fill_(float(host))
        for tensor, weight in zip(self._weights, kernels[own], strict=True):
            tensor.fill_(float(weight))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        # Only where they lie changes: blend weights and counts keep their dtypes.
        device = _device_of(self)
        self._counters = {seed: c.to(device) for seed, c in self._counters.items()}
        own = {id(kernel) for kernel in self._runs}
        self._blended = tuple(c for c in self._counters.values() if id(c.kernel) in own)
        if self._runs:
            self._host_weight = self._host_weight.to(device)
            self._weights = tuple(t.to(device) for t in self._weights)
        return self

    def passed_by(self, others: bool) -> bool:
        """Whether forward passes use the layer's weights, or other layers, and not its kernels.

        Args:
            others: whether other layers with kernels were called.
        """
        if not self._runs or self._called:
            return False
        own = [p for name, p in self.named_parameters() if not name.startswith("kernel_")]
        used = any(p.grad is not None for p in own)
        learnt = any(p.grad is not None for kernel in self._runs for p in kernel.parameters())
        return (used and not learnt) or (others and self._called is not None)

    def error_counts(self) -> np.ndarray:
        """Consecutive failures of the running seeds, in seed order; waits for the device."""
        errors = [counter.errors for counter in self._counters.values()]
        return torch.stack(errors).cpu().numpy() if errors else np.zeros(0, np.int32)

    def load_kernel_sync(
        self,
        seed_idx: int,
        kernel: TorchKernel,
        *,
        step: int | None = None,
        alpha: float | None = None,
    ) -> bool:
        """Graft a kernel that is at hand into a DORMANT seed.

        Args:
            step: the step before which it takes effect; by default the one reached.
            alpha: its first alpha; by default min(0.6 · confidence, 0.5).

        Raises:
            SeedIndexError, SeedLifecycleError, KernelMismatchError, BlendError: nothing is
                changed.
        """
        if not 0 <= seed_idx < self.num_seeds:
            raise SeedIndexError(
                f"no seed {seed_idx} in layer {self.layer_name!r}: it has {self.num_seeds},"
                " counted from 0"
            )
        self._check(kernel)
        value = check_alpha(first_alpha(kernel.confidence) if alpha is None else alpha)
        slot = self._row * self.num_seeds + seed_idx
        now = self._table.at(step)
        load, activate = load_events(now, self._row, seed_idx, slot, kernel.kernel_id, value)
        self.apply_event(load)
        self.apply_event(activate, kernel)
        return True

    def _event(self, kind: EventKind, seed_idx: int, step: int | None, **more: Any) -> None:
        self.apply_event(Event(self._table.at(step), self._row, seed_idx, kind, **more))

    def unload_kernel_sync(self, seed_idx: int, *, step: int | None = None) -> None:
        """Empty an ACTIVE seed; a FOSSILIZED one refuses."""
        self._event(EventKind.UNLOAD, seed_idx, step)

    def set_seed_alpha(self, seed_idx: int, alpha: float, *, step: int | None = None) -> None:
        """Set the alpha, in [0, 1], of an ACTIVE seed."""
        self._event(EventKind.ALPHA, seed_idx, step, value=alpha)

    def ramp_seed_alpha(
        self, seed_idx: int, alpha: float, span: int, *, step: int | None = None
    ) -> None:
        """Let the alpha of an ACTIVE seed run to `alpha` over `span` steps."""
        self._event(EventKind.RAMP, seed_idx, step, value=alpha, span=span)

    def incubate(self, seed_idx: int, *, step: int | None = None) -> None:
        """Let an ACTIVE seed at alpha 0 train in shadow forwards alone."""
        self._event(EventKind.INCUBATE, seed_idx, step)

    def fold(self, seed_idx: int, *, step: int | None = None) -> None:
        """Fold an affine kernel into the weights of this linear layer, and free its slot.

        Raises:
            FoldError: for a kernel that is not affine, another layer, or a blend that forbids it.
        """
        self._event(EventKind.FOLD, seed_idx, step)

    def fossilize(self, seed_idx: int, *, step: int | None = None) -> None:
        """Freeze an ACTIVE seed into the network for good: alpha and parameters."""
        self._event(EventKind.FOSSILIZE, seed_idx, step)


def _do_nothing(module: nn.Module, args: Any) -> None:
    """A hook whose presence is what matters."""


def _words(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _own_tensors(layer: nn.Module) -> list[Tensor]:
    """The tensors of a layer that are not its kernels'."""
    inner = [m for name, m in layer.named_children() if not name.startswith("kernel_")]
    tensors = [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
    return tensors + [t for module in inner for t in (*module.parameters(), *module.buffers())]


def _device_of(layer: nn.Module) -> torch.device:
    tensors = _own_tensors(layer)
    return tensors[0].device if tensors else torch.get_default_device()


def _dtype_of(layer: nn.Module) -> str | None:
    kinds = {t.dtype for t in _own_tensors(layer) if t.is_floating_point()}
    return str(kinds.pop()).removeprefix("torch.") if len(kinds) == 1 else None


_SHAPES: dict[type, Callable[[Any], tuple[Any, Any]]] = {
    nn.Linear: lambda layer: ((layer.in_features,), (layer.out_features,)),
    nn.MultiheadAttention: lambda layer: ((layer.embed_dim,), (layer.embed_dim,)),
    nn.LayerNorm: lambda layer: (
        (layer.normalized_shape[-1:],) * 2 if len(layer.normalized_shape) == 1 else (None, None)
    ),
}
"""The shapes of one example where a layer's own attributes say them."""


def _forward_of(base: type[nn.Module]) -> tuple[Callable[..., Any], str]:
    """`base`'s forward with seeds, and the name of the argument that kernels see."""
    plain: Any = base.forward
    parameters = list(inspect.signature(plain).parameters.values())[1:]
    first = parameters[0].name if parameters else ""
    if len(parameters) == 1 and first == "input" and parameters[0].kind.name.startswith("POS"):
        # A call with packed arguments costs a dormant layer 0.1 µs more.
        @wraps(plain)
        def of_one(self: Any, input: Tensor) -> Any:
            if not self._runs:
                return plain(self, input)
            return self._grafted(plain(self, input), (input,), {})

        return of_one, first

    @wraps(plain)
    def of_any(self: Any, *args: Any, **options: Any) -> Any:
        if not self._runs:
            return plain(self, *args, **options)
        return self._grafted(plain(self, *args, **options), args, options)

    return of_any, first


def _seeds(base: type[nn.Module]) -> Callable[[type], type]:
    """Complete a class of layers with seeds by the forward of its base."""

    def complete(cls: type) -> type:
        own: Any = cls
        own.forward, own._esper_input = _forward_of(base)
        own._esper_linear = base.forward is nn.Linear.forward
        own._esper_base, own._esper_kind = cls, None
        return cls

    return complete


@_seeds(nn.Linear)
class KasminaLayer(SeededLayer, nn.Linear):
    """`nn.Linear` with seeds.

    Args:
        args, options: as for `nn.Linear`; `input_size` and `output_size` name its sizes too.
        num_seeds: how many kernels it can carry.
        layer_name: its name in events and messages.
        blend: "convex", "residual" or "sequential".
        isolate: stop gradients from kernels to the layer's input.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        for theirs, ours in (("input_size", "in_features"), ("output_size", "out_features")):
            if theirs in options:
                options[ours] = options.pop(theirs)
        super().__init__(*args, **options)


@_seeds(nn.Conv2d)
class KasminaConv2dLayer(SeededLayer, nn.Conv2d):
    """`nn.Conv2d` with seeds; its kernels take and return images (`example_rank` 3)."""


@_seeds(nn.MultiheadAttention)
class KasminaAttentionLayer(SeededLayer, nn.MultiheadAttention):
    """`nn.MultiheadAttention` with seeds: kernels see the query, weights are the host's own."""


@_seeds(nn.LayerNorm)
class KasminaLayerNormLayer(SeededLayer, nn.LayerNorm):
    """`nn.LayerNorm` with seeds."""


@_seeds(_BatchNorm)
class KasminaBatchNormLayer(SeededLayer, _BatchNorm):
    """Batch norm with seeds; running statistics are the host's own.

    By itself it takes inputs of any rank from 2; in a wrapped model it is also the
    `nn.BatchNorm1d`, `2d` or `3d` that it was.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected an input of at least 2 axes, got {input.dim()}")


_FAMILY: tuple[type, ...] = (
    KasminaLayer,
    KasminaConv2dLayer,
    KasminaAttentionLayer,
    KasminaLayerNormLayer,
)


@cache
def seeded_class(base: type[nn.Module]) -> type[nn.Module]:
    """The class of layers with seeds whose base is `base`: the family's own, or a new one."""
    for own in _FAMILY:
        if own.__bases__[1] is base:
            return own
    carrier = KasminaBatchNormLayer if issubclass(base, _BatchNorm) else SeededLayer
    forward, first = _forward_of(base)
    # The base's own check of dimensions comes first.
    check: Any = getattr(base, "_check_input_dim", None)
    more = {"_check_input_dim": check} if carrier is not SeededLayer else {}
    body: dict[str, Any] = {
        "__module__": __name__,
        "__doc__": f"{base.__name__} with seeds.",
        "_esper_base": base,
        "_esper_kind": "seeded",
        "_esper_input": first,
        "_esper_linear": base.forward is nn.Linear.forward,
        "forward": forward,
        **more,
    }
    made: Any = type(f"Kasmina{base.__name__}", (carrier, base), body)
    return made


def base_class(cls: type) -> type:
    """The class that a class of layers with seeds was made from."""
    return cls.__bases__[1]


def _fresh(base: type[nn.Module], kind: str | None) -> nn.Module:
    """An empty layer, for copies and pickles to fill."""
    cls = base if kind is None else seeded_class(base)
    return cls.__new__(cls)


def advance_layers(table: SeedTable, layers: Sequence[SeededLayer], step: int) -> bool:
    """Bring all ramps to `step`; returns whether any layer's alphas moved.

    An event on one layer brings the ramps of all to its step, so what is compared is
    what each layer shows, not whether a ramp is under way.
    """
    table.advance(step)
    stale = (np.asarray(table.state.alpha) != table.shown).any(axis=1)
    for layer in layers:
        if stale[layer.row]:
            layer.refresh_alpha()
    return bool(stale.any())


def absorb_faults(table: SeedTable, layers: Sequence[SeededLayer], step: int) -> list[Event]:
    """Bring the failure counts of all layers into the seed state.

    One transfer for the whole model; waits for the device, so it is called at
    decision boundaries and never in a step.
    """
    on_device = [c.errors for layer in layers for c in layer._counters.values()]
    if not on_device:
        return []
    counts = torch.stack(on_device).cpu().numpy()
    events = fault_events(table.state, counts, step=step)
    for event in events:
        table.apply(event)
    if events:
        for layer in layers:
            layer.refresh()
    return events
