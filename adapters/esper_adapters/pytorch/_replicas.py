"""Kernels that are replicated over the processes of a group, and stay equal.

Data parallelism of torch knows the parameters that a model has when it is made, and kernels come
and go. So theirs are Esper's affair: at the end of every backward pass all of them are averaged, in
the order of their seeds, on a process group of their own. By then every collective of DDP and FSDP
has been launched, so that the order of all is the same on every rank, whatever the order in which
gradients were ready.
"""

import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from esper_adapters.pytorch._grafted import GraftedKernel
from esper_adapters.pytorch._kernel import TorchKernel
from esper_adapters.pytorch._model import MorphableModel, check_wrapped
from esper_functional import (
    FAILURES_TO_RECOVERY,
    KasminaException,
    KernelMismatchError,
    state_digest,
)

if TYPE_CHECKING:
    from esper_adapters.pytorch._layer import SeededLayer
    from esper_adapters.pytorch._table import SeedTable


def replicate_kernels(
    model: MorphableModel, group: Any = None, *, timeout: timedelta | None = None
) -> None:
    """Keep the kernels of a wrapped model equal on all ranks, those there are and those to come.

    Collective; comes before `DistributedDataParallel(model)`, and before or after `fully_shard`.
    From then on

    - a kernel's parameters are those of the group's first rank when it is grafted;
    - their gradients are averaged at the end of every backward pass, and DDP leaves them alone
      (averaging what was averaged before changes nothing, so gradients may be accumulated);
    - a kernel's consecutive failures are counted as for the whole batch: a step in which it fails
      on any rank is a failure on all;
    - `absorb` and `observe_health` are collective, and give the same events on all ranks.

    Whatever changes a seed has to be called on all ranks before the same step: alike on each, or by
    `share_events`. And while kernels run, a backward pass that reaches parameters of the model is
    one of all ranks, whichever module they are reached by.

    Args:
        group: the processes, of `torch.distributed`; all by default.
        timeout: how long a rank waits for others; torch's default where none is given.

    Raises:
        KasminaException: for a model that is not wrapped, without a process group, or where seeds
            or kernels differ between ranks; nothing is changed.
    """
    check_group("replicate_kernels")
    check_wrapped("replicate_kernels", model)
    kernels = [module for module in model.modules() if isinstance(module, GraftedKernel)]
    own = [model.seed_table.step, state_digest(model.seeds), list(map(structure_of, kernels))]
    compare(own, group, "replicate_kernels: step, seeds or kernels of")
    members = dist.get_process_group_ranks(group)
    kept = dist.new_group(members, timeout=timeout, use_local_synchronization=True)
    replicas = Replicas(model, kept)
    for kernel in kernels:
        replicas.join(kernel)
    replicas.watch()
    model.seed_table.replicas = replicas


class Replicas:
    """The ranks on which a model's kernels are equal. Its methods, but `watch`, are collective."""

    def __init__(self, model: MorphableModel, group: Any) -> None:
        self.group = group
        self._model = weakref.ref(model)
        self._layers = [weakref.ref(layer) for layer in model.kasmina_layers.values()]
        self._watched: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()
        self._task = -1

    # Kernels that come.

    def find(self, find: Callable[[], TorchKernel]) -> TorchKernel:
        """What `find` finds, if it finds it on all ranks.

        Raises:
            LookupError: on all ranks, where some have no such kernel.
            KasminaException: on all ranks, where some cannot read it.
        """
        kernel: TorchKernel | None = None
        error: Exception | None = None
        try:
            kernel = find()
        except Exception as raised:  # whatever it was: the others must not wait
            error = raised
        found = gather((described(error), isinstance(error, LookupError)), self.group)
        if kernel is not None and not any(reason for reason, _ in found):
            return kernel
        unread = any(reason and not lacks for reason, lacks in found)
        kind = KasminaException if unread else LookupError
        raise kind(f"load_kernel: {by_rank([reason for reason, _ in found])}") from error

    def check_kernel(self, kernel: TorchKernel, where: str) -> None:
        """Refuse a kernel that is another, or of another structure, than that of the first rank.

        Raises:
            KernelMismatchError: on all ranks.
        """
        try:
            compare(structure_of(kernel), self.group, f"the kernels that {where} gets on")
        except KasminaException as error:
            raise KernelMismatchError(str(error)) from None

    def join(self, kernel: GraftedKernel) -> None:
        """Give a kernel the parameters that it has on the first rank, and keep them equal."""
        for p in kernel.parameters():
            dist.broadcast(p.data, group=self.group, group_src=0)
        self.watch()

    # Gradients.

    def watch(self) -> None:
        """Average after every backward pass that reaches any parameter that the model has now.

        The host's count too: a pass may reach kernels on one rank, and none on another.
        """
        model, own = self._model(), weakref.ref(self)

        def reached(_: Tensor) -> None:
            replicas = own()
            if replicas is not None:
                replicas._reached()

        for p in () if model is None else model.parameters():
            if p.requires_grad and self._watched.get(id(p)) is not p:
                p.register_post_accumulate_grad_hook(reached)
                self._watched[id(p)] = p

    def _reached(self) -> None:
        task = torch._C._current_graph_task_id()
        if task != self._task:
            self._task = task
            # As DDP and FSDP do; there is no public way.
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(self.average)

    @torch.no_grad()
    def average(self) -> None:
        """Average the gradients of the running kernels, and bring their failures together."""
        kernels = [k for own in self._layers if (layer := own()) for k in layer.running.values()]
        if not kernels:
            return
        errors = torch.stack([kernel.errors for kernel in kernels])
        # What FSDP has sharded it reduces itself.
        params = [p for k in kernels for p in k.parameters() if p.requires_grad]
        params = [p for p in params if type(p.data) is Tensor]
        reached = torch.tensor([p.grad is not None for p in params], dtype=torch.int32)
        seen = self.largest(torch.cat([errors, reached.to(errors.device)]))
        for kernel, count in zip(kernels, seen, strict=False):
            kernel.errors.copy_(count)
            kernel.working.copy_(count < FAILURES_TO_RECOVERY)
        anywhere = {id(p): flag for p, flag in zip(params, seen[len(kernels) :], strict=True)}
        for kind in dict.fromkeys((p.device, p.dtype) for p in params):
            self._average([p for p in params if (p.device, p.dtype) == kind], anywhere)

    def _average(self, params: Sequence[nn.Parameter], anywhere: dict[int, Tensor]) -> None:
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        dist.all_reduce(flat, group=self.group)
        flat /= dist.get_world_size(self.group)
        means = flat.split([p.numel() for p in params])
        for p, grad, mean in zip(params, grads, means, strict=True):
            grad.copy_(mean.view_as(p))
            # What no rank has reached keeps no gradient, and optimisers pass it by. The device is
            # waited for where this rank has not reached it, and nowhere else.
            if p.grad is None and bool(anywhere[id(p)]):
                p.grad = grad

    # What is absorbed.

    def same_everywhere(
        self, table: "SeedTable", step: int, idle: Sequence["SeededLayer"]
    ) -> list["SeededLayer"]:
        """The layers that are idle on all ranks, which have the same seeds at the same step.

        Raises:
            KasminaException: on all ranks, where they have not.
        """
        compare([step, state_digest(table.state)], self.group, "absorb: step or seeds of")
        ranks = gather([layer.row for layer in idle], self.group)
        return [layer for layer in idle if all(layer.row in rows for rows in ranks)]

    def largest(self, counts: Tensor) -> Tensor:
        """The largest of each count, of all ranks; in place."""
        dist.all_reduce(counts, dist.ReduceOp.MAX, self.group)
        return counts

    def mean_of_measured(self, measured: np.ndarray, seen: Sequence[int]) -> np.ndarray:
        """The mean over those ranks that have measured a kernel; NaN where none has.

        Args:
            measured: f32 `[kernels, statistics]`.
            seen: the rows that this rank has measured.
        """
        ranks = gather((measured, list(seen)), self.group)
        means = np.full_like(measured, np.nan)
        for row in range(len(means)):
            rows = [theirs[row] for theirs, known in ranks if row in known]
            if rows:
                means[row] = np.mean(rows, axis=0, dtype=np.float32)
        return means


def structure_of(kernel: TorchKernel | GraftedKernel) -> list[Any]:
    """What has to be the same of a kernel on all ranks: its id, and its parameters' shapes."""
    held = kernel.params.values() if isinstance(kernel, TorchKernel) else kernel.parameters()
    tensors = map(torch.as_tensor, held)
    return [
        kernel.kernel_id,
        kernel.example_rank,
        [(str(t.dtype), tuple(t.shape)) for t in tensors],
    ]


# What ranks tell each other.


def check_group(what: str) -> None:
    """Refuse to go on without a process group."""
    if not (dist.is_available() and dist.is_initialized()):
        raise KasminaException(
            f"{what}: there is no process group: call torch.distributed.init_process_group first,"
            " in every process that torchrun starts"
        )


def compare(own: Any, group: Any, what: str) -> None:
    """Refuse what is not equal on all ranks of a group; collective.

    Raises:
        KasminaException: on all of them.
    """
    found = gather(own, group)
    unlike = [rank for rank, other in enumerate(found) if other != found[0]]
    if unlike:
        raise KasminaException(
            f"{what} ranks {unlike} are not those of rank 0: make every change on all ranks before"
            " the same step, as share_events does"
        )


def gather(own: Any, group: Any) -> list[Any]:
    """What every rank of a group gives, by rank: plain data."""
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, own, group)
    return found


def described(error: Exception | None) -> str:
    """An error in one line; nothing for none."""
    return "" if error is None else f"{type(error).__name__}: {error}"


def by_rank(reasons: Sequence[str]) -> str:
    """The reasons of those ranks that have one."""
    return "; ".join(f"rank {rank}: {reason}" for rank, reason in enumerate(reasons) if reason)
