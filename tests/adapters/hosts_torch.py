"""Hosts of plain torch, as people write them: tiny, with random weights."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

VOCAB, TIME = 32, 6


def ids(*shape: int, low: int = 4) -> Tensor:
    """Token ids; the first few are special in most vocabularies."""
    return torch.randint(low, VOCAB, shape)


def padded(batch: int, time: int) -> Tensor:
    """An attention mask whose last row ends early."""
    mask = torch.ones(batch, time, dtype=torch.long)
    mask[-1, time // 2 :] = 0
    return mask


class Translator(nn.Module):
    """`nn.Transformer`, with masks, between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 8, padding_idx=0)
        self.transformer = nn.Transformer(8, 2, 1, 1, 16, 0.1, batch_first=True)
        self.head = nn.Linear(8, VOCAB)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        padding = source == 0
        h = self.transformer(
            self.embed(source),
            self.embed(target),
            tgt_mask=causal.isinf(),
            src_key_padding_mask=padding,
            memory_key_padding_mask=padding,
            tgt_is_causal=True,
        )
        return self.head(h)


class SentenceEncoder(nn.Module):
    """`nn.TransformerEncoder` on sequences of several lengths, whose means are classified."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor, padding: Tensor) -> Tensor:
        h = self.encoder(self.embed(tokens), src_key_padding_mask=padding)
        h = h.masked_fill(padding[..., None], 0.0)
        return self.head(h.sum(1) / (~padding).sum(1, keepdim=True))


class Recurrent(nn.Module):
    """A recurrent network with a linear head; returns its state too."""

    def __init__(self, kind: Any, **options: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 6)
        self.rnn = kind(6, 8, batch_first=True, **options)
        self.head = nn.Linear(16 if options.get("bidirectional") else 8, 3)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Any]:
        h, state = self.rnn(self.embed(tokens))
        return self.head(h[:, -1]), state


class TiedLanguageModel(nn.Module):
    """A causal convolution whose head is its embedding, and is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 8)
        self.mix = nn.Conv1d(8, 8, 2)
        self.block = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Dropout(0.1))
        self.head = nn.Linear(8, VOCAB, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.mix(nn.functional.pad(self.embed(tokens).mT, (1, 0))).mT
        h = h + self.block(h)
        h = h + self.block(h)
        return self.head(h)


class NormedConvs(nn.Module):
    """Convolutions with normed weights, one of them transposed, as vocoders and critics have."""

    def __init__(self) -> None:
        super().__init__()
        self.first = weight_norm(nn.Conv1d(2, 6, 3, padding=1))
        self.up = weight_norm(nn.ConvTranspose1d(6, 4, 4, stride=2, padding=1))
        self.critic = spectral_norm(nn.Conv1d(4, 4, 3, padding=2, dilation=2))
        self.score = spectral_norm(nn.Linear(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.leaky_relu(self.up(nn.functional.leaky_relu(self.first(x), 0.1)), 0.1)
        return self.score(self.critic(h).mean(-1))


class Critic(nn.Module):
    """Spectral norms by hooks, and a penalty that is kept as an attribute, as GANs have."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.utils.spectral_norm(nn.Conv2d(2, 4, 3))
        self.score = nn.utils.spectral_norm(nn.Linear(4, 1))
        self.penalty: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.leaky_relu(self.first(x), 0.1).mean((2, 3))
        self.penalty = h.square().mean()
        return self.score(h)


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, padding=1, groups=2, padding_mode="reflect"),
        nn.BatchNorm2d(8, momentum=None),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    )


class Recommender(nn.Module):
    """Bags of items and a vector of numbers, scored."""

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.EmbeddingBag(VOCAB, 6, mode="mean")
        self.bottom = nn.Linear(3, 6)
        self.cross = nn.Bilinear(6, 6, 4)
        self.top = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, bags: Tensor, numbers: Tensor) -> Tensor:
        items, vector = self.items(bags), self.bottom(numbers)
        return self.top(self.cross(items, vector)).sigmoid()


class MessagePassing(nn.Module):
    """h_i ← tanh(U h_i + Σ_j V h_j over the edges (j, i))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.own, self.message = nn.Linear(width, width), nn.Linear(width, width, bias=False)

    def forward(self, h: Tensor, edges: Tensor) -> Tensor:
        sent = self.message(h)[edges[0]]
        return torch.tanh(self.own(h).index_add(0, edges[1], sent))


class GraphNet(nn.Module):
    """Two rounds of messages, and the mean of each graph."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.rounds = nn.ModuleList(MessagePassing(8) for _ in range(2))
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 2)

    def forward(self, nodes: Tensor, edges: Tensor, graph: Tensor, *, graphs: int) -> Tensor:
        h = self.embed(nodes)
        for layer in self.rounds:
            h = self.norm(layer(h, edges=edges))
        sums = torch.zeros(graphs, h.shape[1]).index_add(0, graph, h)
        return self.head(sums / torch.bincount(graph, minlength=graphs)[:, None])


def video_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(2, 4, 3, stride=2, padding=1),
        nn.InstanceNorm3d(4, affine=True),
        nn.SiLU(),
        nn.Dropout3d(0.1),
        nn.Conv3d(4, 4, 1),
        nn.BatchNorm3d(4),
        nn.AdaptiveMaxPool3d(1),
        nn.Flatten(),
        nn.Linear(4, 2),
    )


class TimedBlock(nn.Module):
    """A residual block of a diffusion model, shifted by an embedding of the time."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm_1, self.conv_1 = nn.GroupNorm(2, inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm_2, self.conv_2 = (
            nn.GroupNorm(2, outputs),
            nn.Conv2d(outputs, outputs, 3, padding=1),
        )
        self.time = nn.Linear(8, outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.conv_1(nn.functional.silu(self.norm_1(x)))
        h = h + self.time(t)[..., None, None]
        return self.skip(x) + self.conv_2(nn.functional.silu(self.norm_2(h)))


class DiffusionUNet(nn.Module):
    """Predicts the noise in images, at two resolutions with attention at the lower."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 8))
        self.entry = nn.Conv2d(1, 4, 3, padding=1)
        self.down, self.pool = TimedBlock(4, 4), nn.Conv2d(4, 8, 2, stride=2)
        self.middle = TimedBlock(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.grow = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.up, self.exit = TimedBlock(8, 4), nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        phase = timestep[:, None] / 2.0 ** torch.arange(4)
        t = self.time(torch.cat([phase.sin(), phase.cos()], 1))
        high = self.down(self.entry(x), t)
        low = self.middle(self.pool(high), t)
        flat = low.flatten(2).mT
        low = low + self.attention(flat, flat, flat, need_weights=False)[0].mT.view_as(low)
        return self.exit(self.up(torch.cat([self.grow(low), high], 1), t))


@dataclasses.dataclass
class Prediction:
    """What `Tabular` returns."""

    mean: Tensor
    spread: Tensor
    parts: dict[str, Tensor]
    scale: float


class KeywordBlock(nn.Module):
    """Takes its input by keyword alone, and returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, *, x: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        h = self.inner(x)
        return torch.relu(h) * scale, h


class Tabular(nn.Module):
    """Takes a dictionary and a flag, by keyword alone; returns a dataclass."""

    def __init__(self) -> None:
        super().__init__()
        self.columns = nn.ModuleDict({"age": nn.Linear(1, 6), "place": nn.Linear(2, 6)})
        self.block = KeywordBlock()
        self.mean, self.spread = nn.Linear(6, 1), nn.Linear(in_features=6, out_features=1)

    def forward(self, *, batch: dict[str, Tensor], scale: float = 1.0) -> Prediction:
        parts = {name: layer(input=batch[name]) for name, layer in self.columns.items()}
        h, raw = self.block(x=torch.stack(list(parts.values())).sum(0), scale=scale)
        parts["raw"] = raw
        return Prediction(self.mean(h), self.spread(h).exp(), parts, scale)


def translator_options() -> dict[str, Any]:
    source = ids(2, TIME)
    source[1, 4:] = 0
    return {"source": source, "target": ids(2, 4)}


def sentence_options() -> dict[str, Any]:
    return {"tokens": ids(3, TIME), "padding": padded(3, TIME) == 0}


def graph_options() -> dict[str, Any]:
    return {
        "nodes": torch.randn(7, 3),
        "edges": torch.randint(0, 7, (2, 12)),
        "graph": torch.tensor([0, 0, 0, 1, 1, 2, 2]),
        "graphs": 3,
    }


def tabular_options() -> dict[str, Any]:
    return {"batch": {"age": torch.randn(4, 1), "place": torch.randn(4, 2)}, "scale": 2.0}


def tokens_options() -> dict[str, Any]:
    return {"tokens": ids(3, TIME)}


def inputs(name: str, *shape: int) -> Callable[[], dict[str, Any]]:
    return lambda: {name: torch.randn(*shape)}
