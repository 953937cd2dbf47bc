"""A host on torch: an MLP wrapped with seeds."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.artifacts import Artifact
from esper.execution import load_torch_kernel
from esper.tolaria._tasks import Task, initial_host
from esper.tolaria._trainee import (
    ArrayTree,
    Evaluation,
    Place,
    muted_state,
    state_tree,
    tree_state,
)
from esper_adapters.pytorch import KasminaLayer, absorb_faults, advance_layers, wrap
from esper_functional import (
    Event,
    EventKind,
    SeedLifecycleState,
    SeedState,
    health_score,
    running_seeds,
)


class MLP(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, features]` to logits `[batch, classes]`."""
        *hidden, last = self.layers
        for layer in hidden:
            x = torch.relu(layer(x))
        return last(x)


def _arrays(named: Iterable[tuple[str, Tensor]]) -> dict[str, np.ndarray]:
    return {name: tensor.detach().cpu().numpy().copy() for name, tensor in named}


class TorchTrainee:
    """See `Trainee`."""

    def __init__(
        self,
        task: Task,
        *,
        seed: int,
        seeds_per_layer: int,
        blend: str,
        optimizer: str,
        learning_rate: float,
    ) -> None:
        host = MLP(task.host_sizes)
        first = {name: torch.tensor(v) for name, v in initial_host(task.host_sizes, seed).items()}
        host.load_state_dict(first)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = wrap(host.to(self._device), seeds_per_layer=seeds_per_layer, blend=blend)
        self._table = self._model.seed_table
        self._layers: list[KasminaLayer] = list(self._model.kasmina_layers.values())
        self.sites = tuple(self._table.names)
        self._make = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[optimizer]
        self._learning_rate = learning_rate
        self._host_params = dict(host.named_parameters())
        self._optimizer = self._make(self._host_params.values(), lr=learning_rate)
        self._splits = {
            name: (
                torch.tensor(split.x, device=self._device),
                torch.tensor(split.y.astype(np.int64), device=self._device),
            )
            for name, split in task.splits.items()
        }

    @property
    def compilations(self) -> int:
        return 0

    @property
    def seeds(self) -> SeedState:
        return self._table.state

    def layer_shape(self, row: int) -> tuple[int, int]:
        return self._layers[row].in_features, self._layers[row].out_features

    def prepare(self, event: Event, artifact: Artifact) -> None:
        load_torch_kernel(artifact)

    def _forget(self, params: Iterable[nn.Parameter]) -> None:
        """Take parameters out of the optimiser; all others keep their moments."""
        gone = {id(p) for p in params}
        self._optimizer.param_groups = [
            group
            for group in self._optimizer.param_groups
            if not any(id(p) in gone for p in group["params"])
        ]
        for p in [p for p in self._optimizer.state if id(p) in gone]:
            del self._optimizer.state[p]

    def _adopt(self, params: Iterable[nn.Parameter]) -> None:
        self._optimizer.add_param_group({"params": list(params)})

    def apply(self, event: Event, artifact: Artifact | None = None) -> None:
        layer = self._layers[event.layer]
        before = layer.kernel(event.seed)
        kernel = load_torch_kernel(artifact) if artifact is not None else None
        layer.apply_event(event, kernel)
        grafted = layer.kernel(event.seed)
        if event.kind is EventKind.ACTIVATE and grafted is not None:
            self._adopt(grafted.parameters())
            return
        stage = SeedLifecycleState(int(self.seeds.stage[event.layer, event.seed]))
        if before is not None and stage is not SeedLifecycleState.ACTIVE:
            self._forget(before.parameters())

    def advance(self, step: int) -> None:
        advance_layers(self._table, self._layers, step)

    def step(self, indices: np.ndarray | None) -> Any:
        x, y = self._splits["train"]
        if indices is not None:
            chosen = torch.from_numpy(indices).to(self._device)
            x, y = x[chosen], y[chosen]
        self._model.train()
        self._optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(self._model(x), y)
        loss.backward()
        self._optimizer.step()
        return loss.detach()

    def read_losses(self, losses: Sequence[Any]) -> np.ndarray:
        if not losses:
            return np.zeros(0, np.float32)
        rows = [torch.as_tensor(loss, device=self._device) for loss in losses]
        return torch.stack(rows).float().cpu().numpy()

    def absorb(self, step: int) -> list[Event]:
        events = absorb_faults(self._table, self._layers, step)
        for event in events:
            kernel = self._layers[event.layer].kernel(event.seed)
            stage = SeedLifecycleState(int(self.seeds.stage[event.layer, event.seed]))
            if kernel is not None and stage is not SeedLifecycleState.ACTIVE:
                self._forget(kernel.parameters())
        return events

    def evaluate(self, split: str, muted: Collection[Place] = ()) -> Evaluation:
        x, y = self._splits[split]
        held = self.seeds
        outputs: list[Tensor] = []
        hooks = [
            layer.register_forward_pre_hook(
                lambda layer, inputs: outputs.extend(layer.capture(inputs[0]))
            )
            for layer in self._layers
        ]
        self._model.eval()
        self._table.state = muted_state(held, muted)
        try:
            with torch.no_grad():
                for layer in self._layers:
                    layer.refresh_alpha()
                logits = self._model(x)
                loss = F.cross_entropy(logits, y)
                accuracy = (logits.argmax(-1) == y).float().mean()
        finally:
            self._table.state = held
            for layer in self._layers:
                layer.refresh_alpha()
            for hook in hooks:
                hook.remove()
        health = [float(health_score(k.cpu().numpy())) for k in outputs]
        return Evaluation(
            float(loss), float(accuracy), dict(zip(running_seeds(held), health, strict=True))
        )

    def predict(self, x: np.ndarray) -> np.ndarray:
        self._model.eval()
        with torch.no_grad():
            logits = self._model(torch.tensor(x, device=self._device))
            return torch.softmax(logits, -1).cpu().numpy()

    def parameter_count(self) -> int:
        return sum(p.numel() for p in self._model.parameters())

    def _kernels(self) -> dict[int, Any]:
        columns = self.seeds.shape[1]
        return {
            layer.row * columns + seed: kernel
            for layer in self._layers
            for seed in range(columns)
            if (kernel := layer.kernel(seed)) is not None
        }

    def _moments(self, params: Mapping[str, nn.Parameter]) -> dict[str, dict[str, np.ndarray]]:
        state = self._optimizer.state
        return {
            name: {key: np.asarray(value.detach().cpu()) for key, value in state[p].items()}
            for name, p in params.items()
            if state.get(p)
        }

    def snapshot(self) -> ArrayTree:
        kernels = self._kernels()
        moments = {str(s): self._moments(dict(k.named_parameters())) for s, k in kernels.items()}
        return {
            "host": _arrays(self._host_params.items()),
            "host_moments": self._moments(self._host_params),
            "kernels": {str(s): _arrays(k.named_parameters()) for s, k in kernels.items()},
            "moments": {slot: own for slot, own in moments.items() if own},
            "seeds": state_tree(self.seeds),
        }

    def _load_params(self, params: Mapping[str, nn.Parameter], arrays: Mapping[str, Any]) -> None:
        with torch.no_grad():
            for name, p in params.items():
                p.copy_(torch.tensor(np.asarray(arrays[name])))

    def _load_moments(
        self, params: Mapping[str, nn.Parameter], moments: Mapping[str, Mapping[str, Any]]
    ) -> None:
        for name, own in moments.items():
            p = params[name]
            self._optimizer.state[p] = {
                # torch keeps its step counts on the CPU whatever the device.
                key: torch.tensor(
                    np.asarray(value), device="cpu" if key == "step" else self._device
                )
                for key, value in own.items()
            }

    def restore(self, tree: ArrayTree, artifacts: Mapping[int, Artifact]) -> None:
        columns = self.seeds.shape[1]
        self._table.state = tree_state(tree["seeds"])
        for name, arrays in tree.get("kernels", {}).items():
            layer = self._layers[int(name) // columns]
            kernel = load_torch_kernel(artifacts[int(name)])
            grafted = layer.place(int(name) % columns, kernel)
            self._load_params(dict(grafted.named_parameters()), arrays)
        for layer in self._layers:
            layer.refresh()
        self._load_params(self._host_params, tree["host"])
        self._optimizer = self._make(self._host_params.values(), lr=self._learning_rate)
        self._load_moments(self._host_params, tree.get("host_moments", {}))
        for slot, kernel in sorted(self._kernels().items()):
            stage = SeedLifecycleState(int(self.seeds.stage[divmod(slot, columns)]))
            if stage is SeedLifecycleState.ACTIVE:
                own = dict(kernel.named_parameters())
                self._adopt(own.values())
                self._load_moments(own, tree.get("moments", {}).get(str(slot), {}))
