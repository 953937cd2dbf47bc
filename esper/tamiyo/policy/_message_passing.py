"""Message passing over a graph with edge-aware attention, in Equinox."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from esper.tamiyo.graph import Edges
from esper.tamiyo.policy._linear import mapped, parameters_of, rows

_SLOPE = 0.2
_LEAST = -1e30


class GraphAttention(eqx.Module):
    """One round of messages: a graph attention layer (Veličković et al., 2018).

    Of a node i with the incoming edges (j, i) of kinds k, and per head, with v = W x:

        score_ij = LeakyReLU(a · v_j + b · v_i + c_k)
        y_i = sum_j softmax_j(score_ij) v_j + U x_i + bias

    W is applied to nodes, before anything is gathered along edges: there are fewer of them.
    """

    values: Float[Array, "inputs outputs"]
    own: Float[Array, "inputs outputs"]
    of_sender: Float[Array, "heads channels"]
    of_receiver: Float[Array, "heads channels"]
    of_kind: Float[Array, "kinds heads"]
    bias: Float[Array, " outputs"]

    def __init__(
        self, inputs: int, outputs: int, *, heads: int, kinds: int, key: jax.Array
    ) -> None:
        """Draw the first parameters (Glorot and Bengio, 2010).

        Args:
            inputs: features of a node.
            outputs: features that it has then; a multiple of `heads`.
            heads: from 1.
            kinds: of edges, from 1.
            key: by which they are drawn.

        Raises:
            ValueError: where the heads cannot share the outputs.
        """
        if heads < 1 or outputs % heads:
            raise ValueError(f"{heads} heads cannot share {outputs} outputs equally")
        glorot = jax.nn.initializers.glorot_uniform()
        keys = jax.random.split(key, 4)
        self.values = glorot(keys[0], (inputs, outputs), jnp.float32)
        self.own = glorot(keys[1], (inputs, outputs), jnp.float32)
        self.of_sender = glorot(keys[2], (heads, outputs // heads), jnp.float32)
        self.of_receiver = glorot(keys[3], (heads, outputs // heads), jnp.float32)
        self.of_kind = jnp.zeros((kinds, heads), jnp.float32)
        self.bias = jnp.zeros((outputs,), jnp.float32)

    def __call__(
        self, x: Float[Array, "nodes inputs"], edges: Edges
    ) -> Float[Array, "nodes outputs"]:
        """What the nodes are after the round."""
        heads, channels = self.of_sender.shape
        by_head = self.values.reshape(-1, heads, channels)
        to_scores = [
            jnp.einsum("ihc,hc->ih", by_head, own) for own in (self.of_sender, self.of_receiver)
        ]
        # One product is faster than four, and scores are products of x too.
        product = x @ jnp.concatenate([self.values, self.own, *to_scores], axis=1)
        ends = (heads * channels, 2 * heads * channels)
        v, own, scores = jnp.split(product, ends, axis=1)
        # By head, then by node: exponentials of a long row are computed side by side.
        sent, taken = jnp.split(scores.T, 2)
        slots = self._score(_columns(sent, edges.slots), taken[:, None], edges.slot_kinds)
        slots = jnp.where(jnp.asarray(edges.taken), slots, -jnp.inf)
        # Of a node without a neighbour something finite, so that no weight is NaN.
        most = jnp.max(slots, axis=1, initial=_LEAST)
        listed = None
        if len(edges.senders):
            of_receivers = _at(taken, edges.receivers)
            listed = self._score(_columns(sent, edges.senders), of_receivers, edges.kinds)
            most = jnp.maximum(most, _gathered(jax.ops.segment_max, listed.T, edges, len(x)).T)
        most = jax.lax.stop_gradient(most)
        weights = jnp.exp(slots - most[:, None])
        total = jnp.sum(weights, axis=1)
        # Slot by slot, so that what is gathered is nowhere kept.
        messages = sum(
            self._spread(weight) * rows(v, senders)
            for weight, senders in zip(weights.transpose(1, 2, 0), edges.slots, strict=True)
        )
        if listed is not None:
            weight = jnp.exp(listed - _at(most, edges.receivers)).T
            total += _gathered(jax.ops.segment_sum, weight, edges, len(x)).T
            more = self._spread(weight) * rows(v, edges.senders)
            messages += _gathered(jax.ops.segment_sum, more, edges, len(x))
        return messages * self._spread((1.0 / jnp.where(total > 0, total, 1.0)).T) + own + self.bias

    def _score(self, sent: jax.Array, taken: jax.Array, kinds: Any) -> jax.Array:
        return jax.nn.leaky_relu(sent + taken + _columns(self.of_kind.T, kinds), _SLOPE)

    def _spread(self, by_head: jax.Array) -> jax.Array:
        """A number of each head, for each of its channels."""
        shape = (*by_head.shape, self.of_sender.shape[1])
        # As jnp.repeat, which would gather.
        return jax.lax.broadcast_in_dim(by_head, shape, (0, 1)).reshape(len(by_head), -1)


def _columns(nodes: jax.Array, columns: Any) -> jax.Array:
    return nodes.at[:, columns].get(mode="promise_in_bounds")


def _at(nodes: jax.Array, columns: Any) -> jax.Array:
    return nodes.at[:, columns].get(mode="fill", fill_value=0)


def _gathered(how: Callable[..., jax.Array], values: jax.Array, edges: Edges, n: int) -> jax.Array:
    return how(values, edges.receivers, n, indices_are_sorted=True)


def _normalised(norm: eqx.nn.LayerNorm, h: Float[Array, "nodes width"]) -> jax.Array:
    """Each row by itself, as the layer does.

    The variance is the mean square less the square of the mean, as Flax computes it too: both
    means are products with one vector, and nothing has to wait for the other.
    """
    assert norm.weight is not None
    assert norm.bias is not None
    each = jnp.full((h.shape[1], 1), 1.0 / h.shape[1], jnp.float32)
    mean, square = h @ each, (h * h) @ each
    variance = jnp.maximum(square - mean * mean, 0.0)
    return (h - mean) * jax.lax.rsqrt(variance + norm.eps) * norm.weight + norm.bias


class MessagePassing(eqx.Module):
    """Nodes that know what lies around them, by rounds of `GraphAttention` with skips between.

    Before each round nodes are normalised by themselves (Ba et al., 2016), so that a graph's size
    changes no node.
    """

    embed: eqx.nn.Linear
    norms: tuple[eqx.nn.LayerNorm, ...]
    rounds: tuple[GraphAttention, ...]

    def __init__(
        self,
        features: int,
        width: int,
        *,
        rounds: int,
        heads: int,
        kinds: int,
        key: jax.Array,
    ) -> None:
        """Draw the first parameters; see `GraphAttention`."""
        first, *keys = jax.random.split(key, rounds + 1)
        self.embed = eqx.nn.Linear(features, width, key=first)
        self.norms = tuple(eqx.nn.LayerNorm(width) for _ in keys)
        self.rounds = tuple(
            GraphAttention(width, width, heads=heads, kinds=kinds, key=own) for own in keys
        )

    def __call__(
        self,
        nodes: Float[Array, "nodes features"],
        edges: Edges,
        shared: Float[Array, " shared"] | None = None,
    ) -> Float[Array, "nodes width"]:
        """What is known of each node, from its features; 0 for those that only fill up.

        Args:
            nodes: features of each.
            shared: features that all nodes have alike, after those of their own; None for none.
        """
        there = jnp.asarray(edges.there)[:, None]
        weight, bias = parameters_of(self.embed)
        if shared is not None:
            weight, of_shared = jnp.split(weight, [nodes.shape[1]], axis=1)
            bias = bias + of_shared @ shared
        h = mapped(weight, jnp.where(there, nodes, 0.0)) + bias
        for norm, own in zip(self.norms, self.rounds, strict=True):
            h = h + jax.nn.relu(own(_normalised(norm, h), edges))
        return jnp.where(there, h, 0.0)
