"""Tamiyo's policy in torch, its message passing by torch-geometric: what ours is held against.

The layers, their parameters and their results are those of `esper.tamiyo.policy`; each is what a
user of the two packages would write for it. A kind of edge is a one-hot feature of edges, for
which `GATConv` has a product and an attention vector: with that vector at 1 the product's columns
give the score of a kind, shared out among a head's channels.
"""

import importlib
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from esper.tamiyo.graph import KERNEL, NODE, RUN, SEED, ModelGraph
from esper.tamiyo.policy import ALPHAS, MASKED, Kind, Policy

_PLACED = len(Kind) - 1
_SEEDED = _PLACED - 1


class TorchGraph(NamedTuple):
    """As `ModelGraph`, without nodes that only fill up."""

    run: Tensor
    nodes: Tensor
    seeds: Tensor
    kernels: Tensor
    edges: Tensor
    """i64 `[2, edges]`: senders and receivers."""
    kinds: Tensor
    """f32 `[edges, 2]`: one-hot."""
    legal: tuple[Tensor, Tensor, Tensor, Tensor]


class TorchLogits(NamedTuple):
    """As `Logits`."""

    kind: Tensor
    site: Tensor
    kernel: Tensor
    seed: Tensor
    alpha: Tensor


class TorchPolicy(nn.Module):
    """As `Policy`, for the sites of a graph alone: nodes that only fill up are not computed."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        # An extra, which need not be installed where types are checked.
        geometric: Any = importlib.import_module("torch_geometric.nn")
        width, rounds = policy.width, policy.passing.rounds
        heads = rounds[0].of_sender.shape[0]
        self.width = width
        self.of_run = _mlp(RUN, width, width)
        self.of_seed = nn.Linear(SEED, width)
        self.of_kernel = _mlp(KERNEL, width, width)
        self.embed = nn.Linear(NODE + 2 * width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in rounds)
        self.rounds = nn.ModuleList(
            geometric.GATConv(
                width,
                width // heads,
                heads,
                concat=True,
                add_self_loops=False,
                edge_dim=2,
                residual=True,
            )
            for _ in rounds
        )
        self.whole = _mlp(3 * width, width, width)
        self.kind = nn.Linear(width, len(Kind))
        self.site_query = nn.Linear(width, _PLACED * width)
        self.site_bias = nn.Linear(width, _PLACED)
        self.kernel_query = nn.Linear(width, width)
        self.seed = _mlp(2 * width, width, _SEEDED + len(ALPHAS))
        self.value = _mlp(width, width, 1)
        self._take(policy)

    @torch.no_grad()
    def _take(self, policy: Policy) -> None:
        """Copy all parameters."""
        linear = ("of_seed", "kind", "site_query", "site_bias", "kernel_query")
        pairs: list[tuple[Any, Any]] = [
            (getattr(self, own), getattr(policy, own)) for own in linear
        ]
        pairs += [(self.embed, policy.passing.embed)]
        pairs += list(zip(self.norms, policy.passing.norms, strict=True))
        for name in ("of_run", "of_kernel", "whole", "seed", "value"):
            layers = getattr(self, name)
            pairs += list(zip((layers[0], layers[2]), getattr(policy, name).layers, strict=True))
        for module, ours in pairs:
            module.weight.copy_(_tensor(ours.weight))
            module.bias.copy_(_tensor(ours.bias))
        convolutions: Any = self.rounds
        for conv, ours in zip(convolutions, policy.passing.rounds, strict=True):
            channels = ours.of_sender.shape[1]
            kinds = _tensor(ours.of_kind).T.repeat_interleave(channels, 0)
            for parameter, value in (
                (conv.lin.weight, _tensor(ours.values).T),
                (conv.res.weight, _tensor(ours.own).T),
                (conv.att_src, _tensor(ours.of_sender)[None]),
                (conv.att_dst, _tensor(ours.of_receiver)[None]),
                (conv.lin_edge.weight, kinds / channels),
                (conv.att_edge, torch.ones(())),
                (conv.bias, _tensor(ours.bias)),
            ):
                parameter.copy_(value.expand_as(parameter))

    def forward(self, graph: TorchGraph) -> tuple[TorchLogits, Tensor]:
        """Masked logits of every head, and the value."""
        nodes = graph.nodes
        run = torch.relu(self.of_run(graph.run))
        seeds = torch.relu(self.of_seed(graph.seeds))
        spread = run.expand(len(nodes), -1)
        h = self.embed(torch.cat([nodes, seeds.mean(1), spread], 1))
        for norm, conv in zip(self.norms, self.rounds, strict=True):
            h = h + torch.relu(conv(norm(h), graph.edges, graph.kinds))
        whole = torch.relu(self.whole(torch.cat([run, h.mean(0), h.amax(0)])))
        kernels = torch.tanh(self.of_kernel(graph.kernels))
        scale = self.width**-0.5
        site = self.site_query(whole).view(_PLACED, self.width) @ h.T * scale
        site = site + self.site_bias(h).T
        around = h + whole
        kernel = self.kernel_query(around) @ kernels.T * scale
        around = around[:, None].expand_as(seeds)
        by_seed = self.seed(torch.cat([seeds, around], -1))
        graft, *on_seeds = graph.legal
        sites = torch.stack([own.any(1) for own in (graft, *on_seeds)])
        kinds = torch.cat([torch.ones(1, dtype=torch.bool), sites.any(1)])
        logits = TorchLogits(
            self.kind(whole).masked_fill(~kinds, MASKED),
            site.masked_fill(~sites, MASKED),
            kernel.masked_fill(~graft, MASKED),
            by_seed[..., :_SEEDED].movedim(-1, 0).masked_fill(~torch.stack(on_seeds), MASKED),
            by_seed[..., _SEEDED:].masked_fill(~on_seeds[2][..., None], MASKED),
        )
        return logits, self.value(whole)[0]


def torch_graph(graph: ModelGraph) -> TorchGraph:
    """The same graph, of its sites alone, and its edges as torch-geometric wants them."""
    edges = graph.edges
    count = int(np.sum(edges.there))
    slots, receivers = np.nonzero(edges.taken)
    pairs = [
        np.concatenate([edges.slots[slots, receivers], edges.senders[edges.receivers < count]]),
        np.concatenate([receivers, edges.receivers[edges.receivers < count]]),
    ]
    kinds = [edges.slot_kinds[slots, receivers], edges.kinds[edges.receivers < count]]
    legal = (_tensor(own[:count]) for own in graph.legal[:4])
    return TorchGraph(
        _tensor(graph.run),
        _tensor(graph.nodes[:count]),
        _tensor(graph.seeds[:count]),
        _tensor(graph.kernels),
        torch.as_tensor(np.stack(pairs).astype(np.int64)),
        nn.functional.one_hot(torch.as_tensor(np.concatenate(kinds)).long(), 2).float(),
        (next(legal), next(legal), next(legal), next(legal)),
    )


def torch_best(logits: TorchLogits) -> list[int]:
    """As `esper.tamiyo.policy.best`."""
    kind = int(logits.kind.argmax())
    node = int(logits.site[kind - 1].argmax()) if kind > Kind.WAIT else 0
    kernel = int(logits.kernel[node].argmax()) if kind == Kind.GRAFT else 0
    seed = int(logits.seed[kind - Kind.UNLOAD, node].argmax()) if kind >= Kind.UNLOAD else 0
    alpha = int(logits.alpha[node, seed].argmax()) if kind == Kind.RETARGET else 0
    return [kind, node, seed, kernel, alpha]


def _mlp(inputs: int, width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, outputs))


def _tensor(values: Any) -> Tensor:
    return torch.from_numpy(np.array(values))
