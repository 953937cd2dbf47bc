"""A network of numpy that kernels are added to, and another backend behind the same protocol."""

from collections.abc import Collection, Sequence

import numpy as np

from esper.tamiyo import Cost
from esper.tolaria._trainee import part_means
from esper_functional import Event, EventKind, fold_events, init_seeds


class Additive:
    """Regression by the host's map and kernels' outputs added to it, each times its alpha.

    The part of `Trainee` that measuring takes, and nothing that is recorded beforehand.
    """

    def __init__(self, kernels, *, examples=60, noise=0.3, seed=0, alphas=None):
        """kernels: `[n, features]`, each a linear map to one output, by seed of the one layer."""
        random = np.random.default_rng(seed)
        kernels = np.asarray(kernels, np.float64)
        self.x = random.standard_normal((examples, kernels.shape[1])).astype(np.float32)
        self.y = self.x @ np.arange(1, kernels.shape[1] + 1) + noise * random.standard_normal(
            examples
        )
        self.kernels = kernels
        self.passes = 0
        alphas = np.ones(len(kernels)) if alphas is None else alphas
        events = []
        for i, alpha in enumerate(alphas):
            events += [
                Event(0, 0, i, EventKind.LOAD, "ab" * 32, float(i)),
                Event(0, 0, i, EventKind.ACTIVATE, "ab" * 32, float(alpha)),
            ]
        self.seeds = fold_events(init_seeds(1, max(1, len(kernels))), events)
        self.sites = ("layer",)

    def predict(self, x, muted: Collection = ()):
        alpha = np.array([0.0 if (0, i) in muted else self.seeds.alpha[0, i]
                          for i in range(len(self.kernels))])  # fmt: skip
        return x @ (0.5 + self.kernels.T @ alpha) if len(alpha) else x @ np.full(x.shape[1], 0.5)

    def losses_without(self, split, variants: Sequence[Collection], *, parts=1):
        assert split == "validation"
        self.passes += 1
        each = [(self.predict(self.x, muted) - self.y) ** 2 for muted in variants]
        return part_means(np.array(each).reshape(len(variants), len(self.x)), parts)

    def cost(self, kernels=()):
        width = self.x.shape[1]
        return Cost(width * (1 + len(self.kernels)), 2.0 * width * (1 + len(self.kernels)))

    def snapshot(self, held=None):
        moments = {"mu": np.zeros_like(self.kernels), "nu": np.zeros_like(self.kernels)}
        return {
            "host": {"weight": np.full(self.x.shape[1], 0.5)},
            "kernels": {"0": {"weight": self.kernels}},
            "moments": moments,
            "seeds": {"alpha": np.asarray(self.seeds.alpha)},
        }


class OneByOne:
    """A trainee whose backend evaluates one variant at a time, on the whole split."""

    def __init__(self, trainee):
        self.trainee, self.seeds = trainee, trainee.seeds

    def losses_without(self, split, variants, *, parts=1):
        return np.array(
            [[self.trainee.evaluate(split, muted).loss] for muted in variants], np.float32
        )
