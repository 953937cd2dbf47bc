"""A small causal model of characters."""

import dataclasses
from typing import Any

import numpy as np

from esper.errors import InputError
from esper.tolaria.tasks._draws import draw_layer
from esper.tolaria.tasks._host import Interface


@dataclasses.dataclass(frozen=True)
class TextHost:
    """An embedding, a causal convolution, and an MLP at every position.

    `embed` gives each token a vector, `mix` convolves the last `window` of them into
    `channels`, and `hidden` and `head`, with a ReLU between them, give logits of the next
    token: a neural language model over a fixed window (Bengio et al., JMLR 3, 2003), its
    first layer in two parts.

    Kernels are grafted at `hidden`, which sees all that `mix` has gathered.

    Args:
        vocabulary: how many tokens there are.
        embedding: size of a token's vector.
        window: tokens that a position sees, its own included.
        channels: outputs of `mix`.
        hidden: outputs of `hidden`.

    Raises:
        InputError: for sizes that make no network.
    """

    vocabulary: int
    embedding: int
    window: int
    channels: int
    hidden: int

    def __post_init__(self) -> None:
        if min(dataclasses.astuple(self)) < 1:
            raise InputError(f"{self} is no network: expected all sizes to be at least 1")

    @property
    def name(self) -> str:
        """Such as text-8-8x10-32-6: vocabulary, embedding and window, channels, hidden."""
        context = f"{self.embedding}x{self.window}"
        return f"text-{self.vocabulary}-{context}-{self.channels}-{self.hidden}"

    @property
    def grow_at(self) -> tuple[str, ...]:
        """The hidden layer, then the last."""
        return ("hidden", "head")

    @property
    def _sizes(self) -> tuple[int, int, int, int, int]:
        return self.vocabulary, self.embedding, self.window, self.channels, self.hidden

    def interface(self) -> Interface:
        """Tokens of any length to logits at every position."""
        return Interface((None,), tokens=True, outputs=self.vocabulary, vocabulary=self.vocabulary)

    def params(self, seed: int) -> dict[str, np.ndarray]:
        """The embedding normal, layers uniform in ±1/√fan-in."""
        random = np.random.default_rng([seed, 0])
        table = random.standard_normal((self.vocabulary, self.embedding))
        return {
            "embed.weight": table.astype(np.float32),
            **draw_layer(random, "mix", (self.channels, self.embedding, self.window)),
            **draw_layer(random, "hidden", (self.hidden, self.channels)),
            **draw_layer(random, "head", (self.vocabulary, self.hidden)),
        }

    def jax(self, seed: int) -> Any:
        """An Equinox module, `[time]` i32 to `[time, vocabulary]`."""
        from esper.tolaria.tasks._equinox_hosts import TextNet, filled

        return filled(lambda key: TextNet(*self._sizes, key), self.params(seed))

    def torch(self, seed: int) -> Any:
        """An `nn.Module`, `[batch, time]` integers to `[batch, time, vocabulary]`."""
        from esper.tolaria.tasks._torch_hosts import TextNet, filled

        return filled(lambda: TextNet(*self._sizes), self.params(seed))
