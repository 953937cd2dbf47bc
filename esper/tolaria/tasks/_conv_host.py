"""A small convolutional network for images."""

import dataclasses
from typing import Any

import numpy as np

from esper.errors import InputError
from esper.tolaria.tasks._draws import draw_layer, draw_norm
from esper.tolaria.tasks._host import Interface


@dataclasses.dataclass(frozen=True)
class ConvHost:
    """Blocks of a 3×3 convolution, a group norm and ReLU, then the mean over places and `head`.

    Between blocks, 2×2 means halve the image. Group norm (Wu and He, 2018, arXiv:1803.08494)
    has no running statistics, so an example's output does not depend on its batch, and a run
    has no state beside its parameters. Modules are `blocks.0.conv`, `blocks.0.norm` and so on.

    Kernels are grafted at the last convolution first, where images are smallest and a kernel
    costs least.

    Args:
        channels: of the image.
        size: height and width of the image in pixels; a multiple of 2 for each block but one.
        widths: output channels of the blocks, at least one block.
        classes: of the output.
        groups: of the norms; divides every width.

    Raises:
        InputError: for sizes that make no network.
    """

    channels: int
    size: int
    widths: tuple[int, ...]
    classes: int
    groups: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))
        counts = (self.channels, self.size, self.classes, self.groups, len(self.widths))
        if min(*counts, *self.widths) < 1:
            raise InputError(
                f"{self} is no network: expected at least one block, and all sizes at least 1"
            )
        if self.size % 2 ** (len(self.widths) - 1):
            raise InputError(
                f"images of {self.size} pixels cannot be halved {len(self.widths) - 1} times, once"
                f" between each two of {len(self.widths)} blocks: expected a multiple of"
                f" {2 ** (len(self.widths) - 1)}"
            )
        uneven = [width for width in self.widths if width % self.groups]
        if uneven:
            raise InputError(
                f"a block of {uneven[0]} channels cannot be normed in {self.groups} groups:"
                f" expected widths that are multiples of {self.groups}"
            )

    @property
    def name(self) -> str:
        """Such as conv-1x16-4-8-6: the image, the widths, the classes."""
        groups = f"-g{self.groups}" if self.groups > 1 else ""
        image = f"{self.channels}x{self.size}"
        return "-".join(["conv", image, *map(str, self.widths), str(self.classes)]) + groups

    @property
    def grow_at(self) -> tuple[str, ...]:
        """The convolutions, the last first."""
        return tuple(f"blocks.{i}.conv" for i in reversed(range(len(self.widths))))

    def interface(self) -> Interface:
        """Images to logits."""
        example = (self.channels, self.size, self.size)
        return Interface(example, tokens=False, outputs=self.classes)

    def params(self, seed: int) -> dict[str, np.ndarray]:
        """Convolutions and `head` uniform in ±1/√fan-in, norms at 1 and 0."""
        random = np.random.default_rng([seed, 0])
        params: dict[str, np.ndarray] = {}
        before = self.channels
        for i, width in enumerate(self.widths):
            params |= draw_layer(random, f"blocks.{i}.conv", (width, before, 3, 3))
            params |= draw_norm(f"blocks.{i}.norm", width)
            before = width
        return params | draw_layer(random, "head", (self.classes, before))

    def jax(self, seed: int) -> Any:
        """An Equinox module, `[channels, size, size]` to `[classes]`."""
        from esper.tolaria.tasks._equinox_hosts import ConvNet, filled

        sizes = (self.channels, *self.widths)
        return filled(lambda key: ConvNet(sizes, self.classes, self.groups, key), self.params(seed))

    def torch(self, seed: int) -> Any:
        """An `nn.Module`, `[batch, channels, size, size]` to `[batch, classes]`."""
        from esper.tolaria.tasks._torch_hosts import ConvNet, filled

        sizes = (self.channels, *self.widths)
        return filled(lambda: ConvNet(sizes, self.classes, self.groups), self.params(seed))
