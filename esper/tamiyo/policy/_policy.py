"""The network that decides: message passing over the model graph, then a head for each choice.

Nothing in it counts sites, seeds or kernels: sites and seeds are scored one by one, and kernels by
what describes them, so a policy takes models of any size and kernels that it has not seen.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from esper.tamiyo.graph import KERNEL, NODE, RUN, SEED, Held, ModelGraph
from esper.tamiyo.policy._choice import ALPHAS, Kind, Logits, masked
from esper.tamiyo.policy._linear import mapped, parameters_of, rows
from esper.tamiyo.policy._message_passing import MessagePassing

_PLACED = len(Kind) - 1
"""Kinds that are done somewhere."""
_SEEDED = _PLACED - 1
"""Of those, the ones done to a seed that holds a kernel."""


class Embedded(NamedTuple):
    """What a policy makes of a graph, before it chooses."""

    whole: Float[Array, " width"]
    nodes: Float[Array, "nodes width"]
    seeds: Float[Array, "*seeds width"]
    """By node, or in a list, as the graph's are."""
    kernels: Float[Array, "kernels width"]
    held: Held | None

    def seed(self, node: Any, seed: Any) -> Float[Array, " width"]:
        """What is known of one seed."""
        if self.held is None:
            return self.seeds[node, seed]
        return self.seeds[jnp.asarray(self.held.at)[node, seed]]


@jax.custom_vjp
def _greatest(h: Float[Array, "nodes width"], there: Any) -> Float[Array, " width"]:
    """The greatest of each column over the nodes that are there; 0 where there is none.

    Its gradient goes to the first of equals, by a place that was looked up once. That of `jnp.max`
    looks for the greatest again by comparison; a compiler may compute the nodes anew for that, with
    other rounding, and where nothing is equal then the gradient is 0/0, or another node's.
    """
    # A sum: for a choice compilers would have h computed once more.
    most = jnp.max(h + jnp.where(there, 0.0, -jnp.inf), axis=0)
    return jnp.where(jnp.isfinite(most), most, 0.0)


def _greatest_forward(h: Any, there: Any) -> tuple[Any, Any]:
    place = jnp.argmax(jnp.where(there, h, -jnp.inf), axis=0)
    most = jnp.take_along_axis(h, place[None], axis=0)[0]
    return jnp.where(jnp.any(there), most, 0.0), (place, there)


def _greatest_backward(kept: Any, gradient: Any) -> tuple[Any, None]:
    place, there = kept
    here = (jnp.arange(len(there))[:, None] == place) & there
    return jnp.where(here, gradient, 0.0), None


_greatest.defvjp(_greatest_forward, _greatest_backward)


class Policy(eqx.Module):
    """Logits of every head, and the value of the state; see the module."""

    of_run: eqx.nn.MLP
    of_seed: eqx.nn.Linear
    of_kernel: eqx.nn.MLP
    passing: MessagePassing
    whole: eqx.nn.MLP
    kind: eqx.nn.Linear
    site_query: eqx.nn.Linear
    site_bias: eqx.nn.Linear
    kernel_query: eqx.nn.Linear
    seed: eqx.nn.MLP
    value: eqx.nn.MLP
    width: int = eqx.field(static=True)

    def embed(self, graph: ModelGraph) -> Embedded:
        """What is known of the network, its sites, its seeds and the kernels to choose from."""
        there = jnp.asarray(graph.edges.there)[:, None]
        run = jax.nn.relu(self.of_run(graph.run))
        weight, bias = parameters_of(self.of_seed)
        weight = jnp.pad(weight, ((0, 0), (0, graph.seeds.shape[-1] - SEED)))
        seeds = jax.nn.relu(mapped(weight, graph.seeds) + bias)
        # Sums over seeds tell how many there are; sizes of sums are bounded by norms that follow.
        # Seed by seed, they are within what reads them, and nowhere kept.
        held = graph.held
        if held is None:
            each = [seeds[:, seed] for seed in range(seeds.shape[1])]
        else:
            each = [rows(seeds, held.at[:, seed]) for seed in range(held.at.shape[1])]
        mean = sum(each[1:], each[0]) / len(each)
        h = self.passing(jnp.concatenate([graph.nodes, mean], axis=1), graph.edges, run)
        count = jnp.maximum(jnp.sum(there.astype(jnp.float32)), 1.0)
        mean = jnp.sum(h, axis=0) / count  # nodes that only fill up are 0
        whole = jax.nn.relu(self.whole(jnp.concatenate([run, mean, _greatest(h, there)])))
        kernels = jnp.tanh(jax.vmap(self.of_kernel)(graph.kernels))
        return Embedded(whole, h, seeds, kernels, held)

    def heads(self, graph: ModelGraph, embedded: Embedded) -> tuple[Logits, Float[Array, ""]]:
        """Logits, masked by what is legal, and the value.

        What is linear in the nodes is put together before it is multiplied with them: there are
        more of them than of anything else.
        """
        whole, h, seeds, kernels, held = embedded
        scale = self.width**-0.5
        # Of a site: (q · h) / sqrt(width) + W h + b.
        queries = self.site_query(whole).reshape(_PLACED, self.width)
        of_site, site_bias = parameters_of(self.site_bias)
        # Of a kernel: (k · (W (h + whole) + b)) / sqrt(width).
        of_kernel, kernel_bias = parameters_of(self.kernel_query)
        by_kernel = kernels * scale
        maps = jnp.concatenate([queries * scale + of_site, by_kernel @ of_kernel])
        alike = jnp.concatenate([site_bias, by_kernel @ (of_kernel @ whole + kernel_bias)])
        site, kernel = jnp.split(maps @ h.T + alike[:, None], [_PLACED])
        # Of a seed: what is known of it, and of its node and the whole, which all of a node share.
        first, last = (parameters_of(layer) for layer in self.seed.layers)
        of_seed, of_node = jnp.split(first[0], 2, axis=1)
        around = mapped(of_node, h) + (of_node @ whole + first[1])
        near = around[:, None] if held is None else rows(around, held.node)
        by_seed = mapped(last[0], jax.nn.relu(mapped(of_seed, seeds) + near)) + last[1]
        if held is not None:
            # Of those that hold nothing something else than without a list, and all of it masked.
            by_seed = rows(by_seed, held.at)
        logits = Logits(
            self.kind(whole),
            site,
            kernel.T,
            jnp.moveaxis(by_seed[..., :_SEEDED], -1, 0),
            by_seed[..., _SEEDED:],
        )
        return masked(logits, graph.legal), self.value(whole)

    def __call__(self, graph: ModelGraph) -> tuple[Logits, Float[Array, ""]]:
        """Of one graph; map over many with `jax.vmap`."""
        return self.heads(graph, self.embed(graph))


def make_policy(key: jax.Array, *, width: int = 32, rounds: int = 3, heads: int = 4) -> Policy:
    """A policy with its first parameters.

    What it is asked first, the kind, starts out uniform, and so does the value at 0: scaled down
    last layers keep a new policy from being sure of anything (Andrychowicz et al., What Matters
    In On-Policy Reinforcement Learning?, ICLR 2021).

    Args:
        width: of all embeddings; a multiple of `heads`.
        rounds: of message passing, from 0.
        heads: of attention.
    """
    keys = iter(jax.random.split(key, 11))

    def mlp(inputs: int, outputs: Any) -> eqx.nn.MLP:
        return eqx.nn.MLP(inputs, outputs, width, 1, key=next(keys))

    def linear(inputs: int, outputs: int) -> eqx.nn.Linear:
        return eqx.nn.Linear(inputs, outputs, key=next(keys))

    return Policy(
        of_run=mlp(RUN, width),
        of_seed=linear(SEED, width),
        of_kernel=mlp(KERNEL, width),
        passing=MessagePassing(
            NODE + 2 * width, width, rounds=rounds, heads=heads, kinds=2, key=next(keys)
        ),
        whole=mlp(3 * width, width),
        kind=_quiet(linear(width, len(Kind))),
        site_query=linear(width, _PLACED * width),
        site_bias=linear(width, _PLACED),
        kernel_query=linear(width, width),
        seed=mlp(2 * width, _SEEDED + len(ALPHAS)),
        value=_quiet_last(mlp(width, "scalar")),
        width=width,
    )


_QUIET = 0.01


def _quiet(layer: eqx.nn.Linear) -> eqx.nn.Linear:
    return jax.tree.map(lambda leaf: leaf * _QUIET, layer)


def _quiet_last(mlp: eqx.nn.MLP) -> eqx.nn.MLP:
    return eqx.tree_at(lambda own: own.layers[-1], mlp, _quiet(mlp.layers[-1]))
