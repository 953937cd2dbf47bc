"""What is set up for dormant seeds, in every framework."""

import dataclasses

from experiments.bench._networks import TransformerShape
from experiments.bench._paired import Sampling


@dataclasses.dataclass(frozen=True)
class Settings:
    """The work, and the targets of the design (§8)."""

    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    width: int = 64
    batch: int = 32
    depth: int = 12
    seeds_per_layer: int = 4
    learning_rate: float = 0.01
    seed: int = 0
    channels: int = 8
    image: int = 16
    """Height and width of a convolution's input."""
    heads: int = 4
    length: int = 16
    """Of a sequence that attention takes; `batch_sequences` of them."""
    batch_sequences: int = 8
    transformer: TransformerShape = dataclasses.field(default_factory=TransformerShape)
    jax_target: float = 1.01
    torch_layer_target: float = 1.02
    torch_stack_target: float = 1.02
    torch_compiled_target: float = 1.01

    def shape(self, depth: int) -> str:
        """A stack of linear layers, as rows name it."""
        size = f"{self.width}×{self.width}"
        return size if depth == 1 else f"{depth} × {size}"
