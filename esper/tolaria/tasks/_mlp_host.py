"""The multilayer perceptron: linear layers with ReLU between them."""

import dataclasses
from itertools import pairwise
from typing import Any

import numpy as np

from esper.errors import InputError
from esper.tolaria.tasks._host import Interface


def initial_host(sizes: tuple[int, ...], seed: int) -> dict[str, np.ndarray]:
    """An MLP's first parameters by name, the same for both backends.

    Weights `[out, in]` and biases uniform in ±1/√in, as torch and Equinox do.
    """
    random = np.random.default_rng([seed, 0])
    params: dict[str, np.ndarray] = {}
    for i, (fan_in, fan_out) in enumerate(pairwise(sizes)):
        bound = fan_in**-0.5
        for role, shape in (("weight", (fan_out, fan_in)), ("bias", (fan_out,))):
            draw = random.uniform(-bound, bound, shape)
            params[f"layers.{i}.{role}"] = draw.astype(np.float32)
    return params


@dataclasses.dataclass(frozen=True)
class MLPHost:
    """Linear layers `layers.0`, `layers.1` and so on, with ReLU between them.

    Args:
        sizes: of the layers, input first; at least 2, each at least 1.
        grow_at: where kernels are grafted by default: at `layers.0`, which alone sees the input.

    Raises:
        InputError: for sizes that make no network.
    """

    sizes: tuple[int, ...]
    grow_at: tuple[str, ...] = ("layers.0",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", tuple(self.sizes))
        if len(self.sizes) < 2 or min(self.sizes) < 1:
            raise InputError(
                f"an MLPHost of sizes {self.sizes} is no network: expected at least the size of"
                " the input and that of the output, each at least 1"
            )

    @property
    def name(self) -> str:
        """Such as mlp-2-8-2."""
        return "-".join(["mlp", *map(str, self.sizes)])

    def interface(self) -> Interface:
        """Vectors to logits or values."""
        return Interface((self.sizes[0],), tokens=False, outputs=self.sizes[-1])

    def params(self, seed: int) -> dict[str, np.ndarray]:
        """See `initial_host`."""
        return initial_host(self.sizes, seed)

    def jax(self, seed: int) -> Any:
        """An Equinox module, `[features]` to `[outputs]`."""
        from esper.tolaria.tasks._equinox_hosts import MLP, filled

        return filled(lambda key: MLP(self.sizes, key), self.params(seed))

    def torch(self, seed: int) -> Any:
        """An `nn.Module`, `[batch, features]` to `[batch, outputs]`."""
        from esper.tolaria.tasks._torch_hosts import MLP, filled

        return filled(lambda: MLP(self.sizes), self.params(seed))
