"""Scaled dot-product attention, without weights of its own."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from esper.tezzeret._ops._base import Dim, Op, OpError, Outline, Shape, narrow, same_shapes, wide


class Attention(Op):
    """`softmax(q k^T / √d) v` over examples `[time, features]`, the features split into heads.

    Its inputs are queries, keys and values. Vaswani et al., Attention Is All You Need, 2017,
    arXiv:1706.03762.
    """

    op: Literal["attention"] = "attention"
    ARITY: ClassVar[tuple[int, int | None]] = (3, 3)
    SIZES: ClassVar[tuple[str, ...]] = ("heads",)
    heads: Dim = 1
    """How many; they must divide the features."""
    causal: bool = False
    """Whether a position sees itself and earlier ones alone."""

    def outline(self, inputs: Sequence[Shape]) -> Outline:
        shape = same_shapes(inputs, self.inputs, "attention")
        if len(shape) != 2:
            raise OpError(
                f"attention takes examples [time, features], and {self.inputs[0]!r} gives {shape}"
            )
        time, features = shape
        if features % int(self.heads):
            raise OpError(
                f"attention with {self.heads} heads: they must divide the features, and"
                f" {self.inputs[0]!r} gives {shape}"
            )
        scores = int(self.heads) * time * time
        return Outline(shape, {}, 2 * time * time * features, 6 * scores)

    def jax(self, inputs: Sequence[Any], params: Mapping[str, Any]) -> Any:
        heads = int(self.heads)
        batch, time, features = inputs[0].shape

        def split(x: Any) -> Any:
            return x.reshape(batch, time, heads, features // heads)

        q, k, v = map(split, inputs)
        scores = wide(jnp.einsum("bqhd,bkhd->bhqk", q, k)) * (features // heads) ** -0.5
        if self.causal:
            position = jnp.arange(time)
            scores = jnp.where(position[:, None] >= position, scores, -jnp.inf)
        weights = narrow(jax.nn.softmax(scores, -1), v)
        return jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(batch, time, features)

    def torch(
        self, inputs: Sequence[str], params: Mapping[str, str], shapes: Sequence[Shape]
    ) -> str:
        time, features = shapes[0]
        heads = int(self.heads)
        split = [-1, time, heads, features // heads]
        q, k, v = (f"torch.transpose(torch.reshape({x}, {split}), 1, 2)" for x in inputs)
        attended = (
            f"torch.nn.functional.scaled_dot_product_attention({q}, {k}, {v}, None, 0.0,"
            f" {self.causal})"
        )
        return f"torch.reshape(torch.transpose({attended}, 1, 2), {[-1, time, features]})"
