"""A linear layer with the kernels that run on it."""

import equinox as eqx
import jax
from jaxtyping import Array, Float, Float32, Int32, PRNGKeyArray

from esper_functional import Blend, Run, run_site


class GraftedLinear(eqx.Module):
    """`eqx.nn.Linear` whose output is blended with its running kernels'.

    Takes one example, as its host does; use `jax.vmap` for a batch. Blend
    weights and failure counts are data that no gradient reaches; `trainable`
    tells them from parameters.
    """

    host: eqx.nn.Linear
    kernels: tuple[object, ...]
    """Parameters of the running kernels, in seed order."""
    host_weight: Float32[Array, ""]
    weights: Float32[Array, " runs"]
    errors: Int32[Array, " runs"]
    runs: tuple[Run, ...] = eqx.field(static=True)
    blend: Blend = eqx.field(static=True)
    isolate: bool = eqx.field(static=True)

    @property
    def weight(self) -> Float[Array, "out in"]:
        """The host's weight."""
        return self.host.weight

    @property
    def bias(self) -> Float[Array, " out"] | None:
        """The host's bias."""
        return self.host.bias

    def __call__(
        self, x: Float[Array, " in"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, " out"]:
        h = self.host(x, key=key)
        grafted = run_site(
            self.runs,
            self.kernels,
            self.host_weight,
            self.weights,
            self.errors,
            h,
            x,
            blend=self.blend,
            isolate=self.isolate,
        )
        return grafted.output


def is_linear(leaf: object) -> bool:
    """Whether a node of a pytree is a bare linear layer."""
    return isinstance(leaf, eqx.nn.Linear)


def is_site(leaf: object) -> bool:
    """Whether a node is a linear layer, bare or grafted."""
    return isinstance(leaf, eqx.nn.Linear | GraftedLinear)


def path_name(path: jax.tree_util.KeyPath) -> str:
    """A pytree path as a dotted name, such as `layers.0`."""
    return jax.tree_util.keystr(path, simple=True, separator=".")
