"""The hosts as torch modules of a batch."""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def filled(build: Callable[[], nn.Module], params: Mapping[str, np.ndarray]) -> nn.Module:
    """What `build()` gives, holding `params`; torch's random numbers stay as they were."""
    with torch.random.fork_rng(devices=[]):
        module = build()
    module.load_state_dict({name: torch.tensor(value) for name, value in params.items()})
    return module


class MLP(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, features]` to `[batch, outputs]`."""
        *hidden, last = self.layers
        for layer in hidden:
            x = torch.relu(layer(x))
        return last(x)


class ConvBlock(nn.Module):
    """A convolution, a group norm, ReLU."""

    def __init__(self, before: int, width: int, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, width, 3, padding=1)
        self.norm = nn.GroupNorm(groups, width)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, channels, height, width]`, places kept."""
        return torch.relu(self.norm(self.conv(x)))


class ConvNet(nn.Module):
    """Blocks with 2×2 means between them, the mean over places, and a linear layer."""

    def __init__(self, sizes: Sequence[int], classes: int, groups: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ConvBlock(a, b, groups) for a, b in pairwise(sizes))
        self.head = nn.Linear(sizes[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, channels, height, width]` to `[batch, classes]`."""
        for i, block in enumerate(self.blocks):
            x = block(F.avg_pool2d(x, 2) if i else x)
        return self.head(x.mean(dim=(2, 3)))


class TextNet(nn.Module):
    """An embedding, a causal convolution, and an MLP at every position."""

    def __init__(
        self, vocabulary: int, embedding: int, window: int, channels: int, hidden: int
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, embedding)
        self.mix = nn.Conv1d(embedding, channels, window)
        self.hidden = nn.Linear(channels, hidden)
        self.head = nn.Linear(hidden, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """`[batch, time]` integers to `[batch, time, vocabulary]`."""
        vectors = self.embed(tokens).transpose(1, 2)
        # Zeros before the text and none after it: a position sees no later one.
        past = F.pad(vectors, (self.mix.kernel_size[0] - 1, 0))
        return self.head(torch.relu(self.hidden(self.mix(past).transpose(1, 2))))
