"""What a layer with seeds has beyond its base class.

    y = blend(layer(x), k_1(x), …, k_n(x))

over the seeds that run; with none it is its base class and one attribute test.
All life-cycle code is the core's, called on numpy.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from esper_adapters.pytorch import _loading, _saved
from esper_adapters.pytorch._containment import Verdict
from esper_adapters.pytorch._fold import folded_weights, take_weights
from esper_adapters.pytorch._grafted import GraftedKernel
from esper_adapters.pytorch._kernel import LayerShapes, Resolve, TorchKernel, check_torch_kernel
from esper_adapters.pytorch._layout import KasminaStateLayout
from esper_adapters.pytorch._shadow import is_counted
from esper_adapters.pytorch._shapes import channels_first, layer_shapes
from esper_adapters.pytorch._sharded import is_sharded, refuse_sharded
from esper_adapters.pytorch._stats import layer_stats
from esper_adapters.pytorch._table import SeedTable
from esper_adapters.pytorch._tensors import device_of, words
from esper_functional import (
    Blend,
    Event,
    EventKind,
    KasminaException,
    KernelMismatchError,
    SeedLifecycleState,
    SeedState,
    blend_weights,
    check_blend,
    mix,
    running,
)


class Live(NamedTuple):
    """What a forward pass blends.

    It is never changed, only replaced: a pass in another thread sees the kernels and the weights
    of one moment.
    """

    kernels: tuple[GraftedKernel, ...]
    """In seed order."""
    host_weight: Tensor
    weights: tuple[Tensor, ...]


class SeededLayer(nn.Module):
    """The seeds of a layer, for every class of layer alike.

    A stand-alone layer holds a seed state of one row. In a wrapped model the layers share
    one state, and each refers to its row. In training mode every call counts as a step of
    its kernels' consecutive failures.

    Args:
        num_seeds: how many kernels the layer can carry.
        cache_size_mb: how much memory kernels may take that were loaded by their ids, and are kept
            for being loaded again.
        telemetry_enabled: whether `health_sample` measures this layer.
        layer_name: its name in events and messages.
        blend: "convex", "residual" or "sequential".
        isolate: stop gradients from kernels to the layer's input.
        contain: keep gradients that are not finite of a failed kernel out of its host's and its
            own parameters. Its outputs are contained in any case.
        resolve: finds kernels by id, for `load_kernel`.
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
    contain: bool = True
    telemetry_enabled: bool = True
    _live: Live | None = None
    """What is blended; None where nothing is."""
    _running: dict[int, GraftedKernel] = {}  # noqa: RUF012 (never changed in place)
    """By seed, the kernels that run: those that are blended, and those that incubate."""
    _fused: tuple[nn.Module, ...] = ()
    """What it lies in that has a fused path, which would pass it by."""
    _tied: bool = False
    """Whether another layer has its weights too."""
    _hook: Any = None
    """What keeps that path off while kernels run."""
    _called: bool | None = None
    """Whether a forward pass has called it since it was last asked; None for new kernels."""
    _returns: type | None = None
    """What it returns several things in, or `Tensor`; None until kernels have run on it."""

    def __init__(
        self,
        *args: Any,
        num_seeds: int = 4,
        cache_size_mb: int = 128,
        telemetry_enabled: bool = True,
        layer_name: str | None = None,
        blend: str = "convex",
        isolate: bool = False,
        contain: bool = True,
        resolve: Resolve | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        name = type(self).__name__ if layer_name is None else layer_name
        table = SeedTable((name,), num_seeds, cache_size_mb)
        table.resolve = resolve
        self.plant(table, 0, check_blend(blend), isolate, contain)
        self.telemetry_enabled = telemetry_enabled

    def plant(
        self, table: SeedTable, row: int, blend: Blend, isolate: bool, contain: bool = True
    ) -> None:
        """Make this layer the one of a row of seeds; for `wrap`."""
        self._table = table
        self._row = row
        self.blend = blend
        self.isolate = isolate
        self.contain = contain
        # In the instance from the start: what compiled programs are guarded by has one place.
        self._live = None
        self._running = {}

    def _get_name(self) -> str:
        own, made = type(self).__name__, type(self)._esper_kind is not None
        return f"Kasmina{own}" if made else own

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Classes that were made for a host's cannot be found by their names.
        from esper_adapters.pytorch._family import fresh_layer

        refuse_sharded(self, "pickle")
        return fresh_layer, (type(self)._esper_base, type(self)._esper_kind), self.__getstate__()

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
    def seed_table(self) -> SeedTable:
        """The seeds with their layers' names and listeners."""
        return self._table

    @property
    def row(self) -> int:
        """The layer's row in the seed state."""
        return self._row

    @property
    def state_layout(self) -> KasminaStateLayout:
        """This layer's seeds as torch tensors."""
        return KasminaStateLayout.of(
            self._table, self._row, lambda: device_of(self), self._apply_layout_event
        )

    def _apply_layout_event(self, event: Event) -> None:
        SeededLayer.apply_event(self, event)

    @property
    def shapes(self) -> LayerShapes:
        """What is known of the layer's examples before it is called."""
        return layer_shapes(self)

    @property
    def channels_first(self) -> bool:
        """Whether an example's features are its first axis, and not its last."""
        return channels_first(self)

    @property
    def incubating(self) -> tuple[int, ...]:
        """The seeds whose kernels incubate."""
        own = np.asarray(self._table.state.incubating)[self._row]
        return tuple(seed for seed in self._running if own[seed])

    @property
    def running(self) -> dict[int, GraftedKernel]:
        """The kernels that run, by seed: those that are blended, and those that incubate."""
        return dict(self._running)

    def kernel(self, seed: int) -> GraftedKernel | None:
        """The kernel that a seed carries, or None."""
        return self._modules.get(f"kernel_{seed}")  # pyright: ignore[reportReturnType]

    # What runs in a forward pass.

    def run_grafted(
        self,
        live: Live,
        result: Any,
        args: Sequence[Any],
        options: dict[str, Any],
        ran: Sequence[tuple[Tensor, Verdict]] | None = None,
    ) -> Any:
        """What the layer returned, its kernels blended into the first tensor of it.

        Args:
            ran: what the kernels gave, where they have run already.
        """
        several = isinstance(result, tuple | list) and bool(result)
        # Only set where it must be: setting is slow. Compiled, it must not be looked at.
        if torch.compiler.is_compiling() or not self._called:
            self._called, self._returns = True, type(result) if several else Tensor
        x = args[0] if args else options.get(type(self)._esper_input)
        h: Any = result[0] if several else result
        if not isinstance(h, Tensor) or not isinstance(x, Tensor):
            raise KernelMismatchError(
                f"layer {self.layer_name!r} carries kernels, so it must take and return a tensor,"
                f" or several of which the first is one; it takes {type(x).__name__} and returns"
                f" {type(h).__name__}. Unload its kernels, or choose another layer"
            )
        if ran is None:
            source = x.detach() if self.isolate else x
            ran = [kernel(source) for kernel in live.kernels]
        y = self._blended(live, h, x, ran)
        if not several:
            return y
        kind: Any = type(result)
        return kind(y, *result[1:]) if hasattr(result, "_fields") else kind((y, *result[1:]))

    def _blended(
        self, live: Live, h: Tensor, x: Tensor, ran: Sequence[tuple[Tensor, Verdict]]
    ) -> Tensor:
        outputs: list[Tensor] = []
        finite: list[Tensor | None] = []
        for kernel, (k, ok) in zip(live.kernels, ran, strict=True):
            if k.dtype != h.dtype and torch.is_autocast_enabled(h.device.type):
                k = k.to(h.dtype)
            if k.shape != h.shape or k.dtype != h.dtype:
                called = kernel.kernel_id[:12] or "without an id"
                raise KernelMismatchError(
                    f"kernel {called} of layer {self.layer_name!r} returned"
                    f" {words(k)} where the layer returns {words(h)}, for an input {words(x)}:"
                    " unload it, and choose a kernel of the layer's signature"
                )
            outputs.append(k)
            # An empty batch has shown nothing, and a shadow counts for its kernel alone.
            counted = self.training and k.numel() > 0 and is_counted(kernel)
            finite.append(kernel.judge(ok, counted))
        return mix(self.blend, h, outputs, finite, live.host_weight, live.weights, _select)

    def capture(self, x: Tensor) -> list[Tensor]:
        """The outputs of the running kernels on a layer input, without gradients."""
        kernels = () if self._live is None else self._live.kernels
        with torch.no_grad():
            # TorchScript that has run with gradients keeps recording them.
            return [kernel(x.detach())[0].detach() for kernel in kernels]

    # How seeds change.

    def apply_event(self, event: Event, kernel: TorchKernel | None = None) -> None:
        """Change a seed by an event; ACTIVATE needs the `kernel` that it grafts.

        Raises:
            KernelMismatchError: for a kernel that does not fit; nothing is changed.
            SeedLifecycleError: for an event that the seed's stage does not allow.
            FoldError: for a kernel that cannot be folded into this layer's weights.
        """
        with self._table.lock:
            grafted: GraftedKernel | None = None
            if event.kind is EventKind.ACTIVATE:
                if kernel is None:
                    raise ValueError(
                        "an ACTIVATE event needs the kernel that it grafts: use load_kernel"
                    )
                self.check_kernel(kernel)
                if self._table.replicas is not None:
                    self._table.replicas.check_kernel(kernel, f"layer {self.layer_name!r}")
                # Made before anything is changed: what it is made of is a user's.
                grafted = self._made(kernel, 0)
            self._stopped(event)
            folded = folded_weights(self, event) if event.kind is EventKind.FOLD else None
            self._table.change(event)
            held = self.kernel(event.seed)
            if folded is not None:
                take_weights(self, *folded)
                self.remove(event.seed)
            if grafted is not None:
                self._put(event.seed, grafted)
            if event.kind is EventKind.ERRORS and held is not None:
                held.set_errors(int(event.value))
            self.refresh()
        # When all of it is done, and others may go on.
        self._table.tell(event)

    def _stopped(self, event: Event) -> None:
        """Take note of failures before a kernel becomes a part of the network for good.

        A kernel has stopped by itself at its third failure, whether that was absorbed or not.
        """
        held = self.running.get(event.seed)
        if event.kind in (EventKind.FOSSILIZE, EventKind.FOLD) and held is not None:
            count = int(held.errors)
            if count != int(self._table.state.error_count[self._row, event.seed]):
                failed = Event(
                    self._table.at(event.step), self._row, event.seed, EventKind.ERRORS, value=count
                )
                self._table.apply(failed)
                self.refresh()

    def check_kernel(self, kernel: TorchKernel) -> None:
        """Refuse a kernel that does not fit this layer.

        Raises:
            KernelMismatchError: with what was expected and what was found.
            KasminaException: for a sharded layer of a model whose kernels nobody keeps equal.
        """
        if is_sharded(self) and self._table.replicas is None:
            raise KasminaException(
                f"layer {self.layer_name!r} is sharded by FSDP, which does not know of kernels:"
                " call replicate_kernels(model), so that they stay equal on all ranks"
            )
        check_torch_kernel(kernel, self.shapes, f"layer {self.layer_name!r}")

    def place(self, seed: int, kernel: TorchKernel) -> GraftedKernel:
        """Register a kernel's parameters for a seed whose state says that it holds one.

        Call `refresh` after the last: a graft is an event (`apply_event`), and this is
        for restoring what events have led to.
        """
        errors = int(self._table.state.error_count[self._row, seed])
        return self._put(seed, self._made(kernel, errors))

    def _made(self, kernel: TorchKernel, errors: int) -> GraftedKernel:
        with torch.inference_mode(False):
            return GraftedKernel(kernel, device_of(self), errors, self.contain)

    def _put(self, seed: int, grafted: GraftedKernel) -> GraftedKernel:
        grafted.train(self.training)
        self.add_module(f"kernel_{seed}", grafted)
        if self._table.replicas is not None:
            self._table.replicas.join(grafted)
        return grafted

    def remove(self, seed: int) -> None:
        """Take the kernel of a seed out of the module."""
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
                self.remove(seed)
            else:
                kernel.freeze(stage is SeedLifecycleState.FOSSILIZED)
        own = np.flatnonzero(np.asarray(running(state))[row]).tolist()
        self._running = {seed: k for seed in own if (k := self.kernel(seed)) is not None}
        self.refresh_alpha()

    def refresh_alpha(self) -> None:
        """Bring what is blended up to the seed state, along a ramp."""
        state, row = self._table.state, self._row
        self._table.shown[row] = np.asarray(state.alpha)[row]
        before = () if self._live is None else self._live.kernels
        self._live = self.live_at(state)
        after = () if self._live is None else self._live.kernels
        if [id(kernel) for kernel in before] != [id(kernel) for kernel in after]:
            self._called = None
            self.lift_fused_path()

    def live_at(self, state: SeedState) -> Live | None:
        """What would be blended, were the seeds in this state."""
        row = self._row
        blended = np.asarray(running(state) & ~state.incubating)[row]
        seeds = [seed for seed in self._running if blended[seed]]
        if not seeds:
            return None
        host, kernels = blend_weights(self.blend, np.asarray(state.alpha)[row], blended)
        device = device_of(self)

        def on_device(weight: Any) -> Tensor:
            # Filled where it lies, for which nobody waits; also for passes with gradients.
            with torch.inference_mode(False):
                return torch.full((), float(weight), dtype=torch.float32, device=device)

        return Live(
            tuple(self._running[seed] for seed in seeds),
            on_device(host),
            tuple(on_device(kernels[seed]) for seed in seeds),
        )

    def show(self, live: Live | None) -> None:
        """Blend something else for a while: a shadow, or nothing. `show_state` ends it."""
        self._live = live
        self.lift_fused_path()

    def show_state(self) -> None:
        """Blend again what the seeds' state says, which may have changed meanwhile."""
        called = self._called
        self.refresh_alpha()
        self._called = called

    def lift_fused_path(self) -> None:
        """Turn fused paths around the layer off while kernels run, and on again after."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if self._fused and self._live is not None:
            # Any hook in an encoder's layer turns its path off.
            self._hook = self.register_forward_pre_hook(_do_nothing)
        for host in self._fused:
            if isinstance(host, nn.TransformerEncoder):
                busy = any(isinstance(m, SeededLayer) and m._live for m in host.modules())
                own: Any = host.__dict__
                nested = own.setdefault("_esper_nested", getattr(host, "use_nested_tensor", False))
                host.use_nested_tensor = nested and not busy
                if not busy:
                    del own["_esper_nested"]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        blank = [k for k in self._running.values() if k.errors.is_meta]
        super()._apply(fn, recurse)
        # What had no memory has no count to keep.
        self.settle(blank)
        return self

    def settle(self, blank: Sequence[GraftedKernel] = ()) -> None:
        """Bring what kernels count, and their blend weights, to where the parameters lie.

        Args:
            blank: kernels whose counts are to be taken from the state in any case.
        """
        for seed, kernel in self._running.items():
            moved = any(p.device != kernel.errors.device for p in kernel.parameters())
            if moved or kernel in blank:
                kernel.set_errors(int(self._table.state.error_count[self._row, seed]))
        # In float32 whatever the layer's dtype.
        if self._live is not None and self._live.host_weight.device != device_of(self):
            self.refresh_alpha()

    def passed_by(self, others: bool) -> bool:
        """Whether forward passes use the layer's weights, or other layers, and not its kernels.

        Args:
            others: whether other layers with kernels were called.
        """
        if self._live is None or self._called:
            return False
        own = [p for name, p in self.named_parameters() if not name.startswith("kernel_")]
        used = any(p.grad is not None for p in own)
        learnt = any(p.grad is not None for k in self._live.kernels for p in k.parameters())
        return (used and not learnt) or (others and self._called is not None)

    def error_counts(self) -> np.ndarray:
        """Consecutive failures of the running seeds, in seed order; waits for the device."""
        errors = [kernel.errors for kernel in self._running.values()]
        return torch.stack(errors).cpu().numpy() if errors else np.zeros(0, np.int32)

    # What a state_dict holds of seeds.

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        _saved.save_seeds(self, destination, prefix)

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
        _saved.take_seeds(self, state_dict, prefix)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if prefix + _saved.EXTRA in unexpected_keys:
            unexpected_keys.remove(prefix + _saved.EXTRA)

    # What users ask of a stand-alone layer.

    def load_kernel_sync(
        self,
        seed_idx: int,
        kernel: Any,
        *,
        step: int | None = None,
        alpha: float | None = None,
    ) -> bool:
        """Graft a kernel into a DORMANT seed.

        Args:
            kernel: one that is at hand, or the id of one that `resolve` finds.
            step: the step before which it takes effect; by default the one reached.
            alpha: its first alpha; by default min(0.6 · confidence, 0.5).

        Returns:
            False, and the seed DORMANT, where there is no kernel of that id.

        Raises:
            SeedIndexError, SeedLifecycleError, KernelMismatchError, BlendError: the seed is
                as it was.
            KasminaException: where the kernel is there and cannot be read; the seed is
                then in ERROR_RECOVERY.
        """
        return _loading.load(self, seed_idx, kernel, alpha, step)

    async def load_kernel(
        self,
        seed_idx: int,
        kernel: Any,
        *,
        step: int | None = None,
        alpha: float | None = None,
    ) -> bool:
        """`load_kernel_sync`, finding the kernel in a thread."""
        return await _loading.load_in_thread(self, seed_idx, kernel, alpha, step)

    def _event(self, kind: EventKind, seed_idx: int, step: int | None, **more: Any) -> None:
        with self._table.lock:
            event = Event(self._table.at(step), self._row, seed_idx, kind, **more)
            SeededLayer.apply_event(self, event)

    def unload_kernel_sync(self, seed_idx: int, *, step: int | None = None) -> bool:
        """Empty an ACTIVE seed; a FOSSILIZED one refuses."""
        self._event(EventKind.UNLOAD, seed_idx, step)
        return True

    async def unload_kernel(self, seed_idx: int, *, step: int | None = None) -> bool:
        """Empty an ACTIVE seed; a FOSSILIZED one refuses."""
        return SeededLayer.unload_kernel_sync(self, seed_idx, step=step)

    def set_seed_alpha(self, seed_idx: int, alpha: float, *, step: int | None = None) -> None:
        """Set the alpha, in [0, 1], of an ACTIVE seed."""
        self._event(EventKind.ALPHA, seed_idx, step, value=alpha)

    def ramp_seed_alpha(
        self,
        seed_idx: int,
        alpha: float,
        span: int,
        *,
        shape: str = "linear",
        step: int | None = None,
    ) -> None:
        """Let the alpha of an ACTIVE seed run to `alpha` over `span` steps.

        Args:
            shape: "linear", "cosine" or "sigmoid".
        """
        self._event(EventKind.RAMP, seed_idx, step, value=alpha, span=span, shape=shape)

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

    def get_layer_stats(self) -> dict[str, Any]:
        """The layer's name, its seeds by stage, and of each kernel how it runs and fares."""
        return layer_stats(self)

    def get_stats(self) -> dict[str, Any]:
        """`get_layer_stats`."""
        return SeededLayer.get_layer_stats(self)


def _select(ok: Tensor | None, k: Tensor, instead: Any) -> Tensor:
    return k if ok is None else torch.where(ok, k, instead)


def _do_nothing(module: nn.Module, args: Any) -> None:
    """A hook whose presence is what matters."""
