"""Hosts of many kinds, trained by the torch trainee: what it finds out, and what it keeps."""

import numpy as np
import pytest
import torch
from torch import nn

from esper.tezzeret import artifact_cost, compile_blueprint, load_blueprint
from esper.tolaria._torch_trainee import TorchTrainee
from esper.tolaria._trainee import Batch, Optimisation, Rates
from esper.tolaria.tasks import CustomHost, Loss, Split, Task, load_task
from esper_functional import Event, EventKind
from tests.esper.trainee_life import bits, draw
from tests.tolerance import assert_close

RATES = Rates(0.01, {})
BATCH = np.arange(16, dtype=np.int32)
BATCH.setflags(write=False)  # as loaders give them


class Normed(nn.Module):
    """Running statistics, dropout, and a layer that is frozen."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.3)
        self.fixed = nn.Linear(8, 8).requires_grad_(False)
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        x = self.drop(torch.relu(self.norm(self.first(x))))
        return self.last(torch.relu(self.fixed(x)))


class TimeFirst(nn.Module):
    """A recurrent layer with the batch as its second axis, as torch has it by default."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.recur = nn.GRU(8, 8)
        self.hidden = nn.Linear(8, 8)
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        y, _ = self.recur(torch.relu(self.embed(x.transpose(0, 1))))
        return self.last(torch.relu(self.hidden(y)))[-1]


class Encoder(nn.Module):
    """An encoder with fused paths, dropout, and logits at every position."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.encode = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        return self.last(self.encode(x))


class InPlace(nn.Module):
    """Writes into what it has made, which cannot be mapped."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.last = nn.Linear(8, 1)

    def forward(self, x):
        kept = torch.zeros(len(x), 8, device=x.device)
        kept.add_(self.first(x))
        return self.last(torch.relu(kept))


def make_task(host, example, labels=(), loss: Loss = "cross_entropy", grow_at=()):
    random = np.random.default_rng(0)

    def split():
        x = random.normal(size=(48, *example)).astype(np.float32)
        if loss == "cross_entropy":
            return Split(x, random.integers(0, 3, (48, *labels)).astype(np.int32))
        return Split(x, random.normal(size=(48, *labels)).astype(np.float32))

    custom = CustomHost(host.__name__, torch=lambda seed: host(), grow_at=grow_at)
    return Task(host.__name__, split(), split(), split(), custom, loss)


TASKS = {
    "normed": (lambda: make_task(Normed, (6,)), "first", "residual_mlp", {"width": 4}),
    "time_first": (lambda: make_task(TimeFirst, (7, 4)), "hidden", "residual_mlp", {"width": 4}),
    "encoder": (lambda: make_task(Encoder, (5, 8), (5,)), "encode.layers.0.linear1",
                "residual_mlp", {"width": 4}),
    "in_place": (lambda: make_task(InPlace, (6,), (), "mean_squared_error"), "first",
                 "residual_mlp", {"width": 4}),
    "shapes": (lambda: load_task("shapes"), "blocks.1.conv", "conv_low_rank", {"rank": 2}),
    "grammar": (lambda: load_task("grammar"), "hidden", "residual_mlp", {"width": 4}),
}  # fmt: skip
"""By name: a task, the layer that kernels are grafted into, and what they are compiled from."""


@pytest.fixture(scope="module", params=list(TASKS))
def case(request):
    build, site, blueprint, sizes = TASKS[request.param]
    task = build()
    own = TorchTrainee(task, seed=0, seeds_per_layer=2, blend="residual")
    row = own.sites.index(site)
    kernel = compile_blueprint(load_blueprint(blueprint), own.signature(row), sizes=sizes)
    return task, row, kernel


def graft(own, row, kernel, seed, alpha, step=0):
    slot = row * own.seeds.shape[1] + seed
    own.apply(Event(step, row, seed, EventKind.LOAD, kernel.kernel_id, float(slot)))
    active = Event(step, row, seed, EventKind.ACTIVATE, kernel.kernel_id, alpha)
    own.apply(active, kernel, draw(kernel, seed, 0.3))


def run(own, begin, end):
    losses = []
    for step in range(begin, end):
        own.advance(step)
        losses.append(own.step(BATCH, RATES, step))
    return own.read_losses(losses).tobytes()


def test_any_host_is_held_measured_and_restored(case):
    task, row, kernel = case
    options = {"seeds_per_layer": 2, "blend": "residual"}
    chosen = Optimisation(optimizer="sgd", momentum=0.9, ema_decay=0.9)
    own = TorchTrainee(task, seed=0, optimisation=chosen, evaluation_batch=150, **options)
    outside = torch.get_rng_state()
    graft(own, row, kernel, 0, 0.5)
    graft(own, row, kernel, 1, 0.0)
    own.apply(Event(0, row, 1, EventKind.INCUBATE))
    run(own, 0, 3)
    held, before = own.hold(), bits(own.snapshot())

    # Judging changes nothing, and muted losses are those of the batched pass.
    variants = [(), [(row, 0)], [(row, 0), (row, 1)]]
    looped = [own.evaluate("validation", muted).loss for muted in variants]
    assert_close(own.losses_without("validation", variants)[:, 0], np.asarray(looped, np.float32))
    assert looped[0] != looped[1]
    health = own.evaluate("validation").health
    assert list(health) == [(row, 0)]
    assert 0.0 <= health[row, 0] <= 1.0
    seen = own.probe(row, BATCH)
    assert len(seen.inputs) == len(seen.outputs) == len(seen.gradients) == 16
    assert seen.outputs.shape == seen.gradients.shape
    assert np.abs(seen.gradients).max() > 0
    norms = own.norms(BATCH)
    assert np.isfinite(norms.gradient).all()
    assert (norms.weight > 0).all()
    # What is frozen has no gradient.
    assert [bool(norm > 0) for norm in norms.gradient] == [site != "fixed" for site in own.sites]
    predicted = own.predict(task.test.x[:3])
    assert predicted.dtype == np.float32
    assert bits(own.snapshot()) == before

    losses = run(own, 3, 6)
    after = bits(own.snapshot())
    own.apply(Event(6, row, 0, EventKind.UNLOAD))
    for _ in range(2):
        own.take_back(held)
        assert bits(own.snapshot()) == before
        # What the host draws is a function of seed and step.
        assert run(own, 3, 6) == losses
        assert bits(own.snapshot()) == after
    again = TorchTrainee(task, seed=0, optimisation=chosen, **options)
    slots = {row * 2: kernel, row * 2 + 1: kernel}
    again.restore(own.snapshot(held), slots)
    torch.rand(3)
    assert run(again, 3, 6) == losses
    torch.set_rng_state(outside)


def test_examples_of_a_step_may_come_with_it(case):
    task, _, _ = case
    losses = []
    for batch in (BATCH, Batch(task.train.x[BATCH], task.train.y[BATCH])):
        own = TorchTrainee(task, seed=0, seeds_per_layer=1, blend="convex")
        losses.append(own.read_losses([own.step(batch, RATES, 0)]).tobytes())
    assert losses[0] == losses[1]


def test_random_numbers_are_of_seed_and_step_and_torch_s_own_are_left_alone():
    task = make_task(Normed, (6,))
    outside = torch.get_rng_state()
    options = {"seeds_per_layer": 1, "blend": "residual"}
    own = TorchTrainee(task, seed=0, **options)
    held = own.hold()

    def loss(trainee, step):
        trainee.take_back(held if trainee is own else kept)
        return float(trainee.step(BATCH, RATES, step))

    first = loss(own, 4)
    assert loss(own, 5) != first
    torch.rand(7)
    assert loss(own, 4) == first
    other = TorchTrainee(task, seed=1, **options)
    other.restore(own.snapshot(held), {})
    kept = other.hold()
    assert loss(other, 4) != first
    torch.set_rng_state(outside)
    loss(own, 4)
    own.evaluate("test")
    TorchTrainee(task, seed=2, **options)
    assert torch.equal(torch.get_rng_state(), outside)


def test_a_frozen_parameter_stays_and_running_statistics_are_kept():
    chosen = Optimisation("adamw", weight_decay=0.1, ema_decay=0.5)
    options = {"seeds_per_layer": 1, "blend": "residual", "optimisation": chosen}
    own = TorchTrainee(make_task(Normed, (6,)), seed=0, **options)
    before = own.snapshot()
    run(own, 0, 3)
    after = own.snapshot()
    assert bits(after, ("host/fixed.",)) == bits(before, ("host/fixed.",))
    assert bits(after, ("buffers/norm.running_mean",)) != bits(
        before, ("buffers/norm.running_mean",)
    )
    assert int(after["buffers"]["norm.num_batches_tracked"]) == 3
    assert "fixed.weight" not in after["host_average"]


def forwards(own):
    """Counts the forward passes of the host."""
    count = []
    own._network.model.register_forward_hook(lambda *_: count.append(1))
    return count


@pytest.mark.parametrize(
    ("name", "size", "calls"),
    [("grammar", None, 1), ("shapes", None, 1), ("encoder", None, 1), ("time_first", None, 1),
     # 48 examples and 4 variants, 60 at most: 15 examples at a time, or one variant at a time.
     ("normed", None, 1), ("normed", 60, 4), ("normed", 2, 2 * 48), ("in_place", None, 4)],
)  # fmt: skip
def test_all_variants_are_measured_in_one_pass(name, size, calls):
    build, site, blueprint, sizes = TASKS[name]
    own = TorchTrainee(build(), seed=0, seeds_per_layer=2, blend="convex", evaluation_batch=size)
    row = own.sites.index(site)
    kernel = compile_blueprint(load_blueprint(blueprint), own.signature(row), sizes=sizes)
    graft(own, row, kernel, 0, 0.5)
    graft(own, row, kernel, 1, 0.2)
    variants = [(), [(row, 0)], [(row, 1)], [(row, 0), (row, 1)]]
    count = forwards(own)
    losses = own.losses_without("validation", variants)[:, 0]
    assert len(count) == calls
    looped = [own.evaluate("validation", muted).loss for muted in variants]
    assert_close(losses, np.asarray(looped, np.float32))
    assert len(set(looped)) == 4


def test_signatures_come_from_the_layer_or_from_a_call():
    own = TorchTrainee(load_task("shapes"), seed=0, seeds_per_layer=1, blend="convex")
    found = {name: str(own.signature(row)) for row, name in enumerate(own.sites)}
    assert found == {
        "blocks.0.conv": "1x16x16->2x16x16 float32",
        "blocks.1.conv": "2x8x8->2x8x8 float32",
        "head": "2->6 float32",
    }
    # A layer at every position takes kernels of vectors.
    own = TorchTrainee(load_task("grammar"), seed=0, seeds_per_layer=1, blend="convex")
    assert str(own.signature(own.sites.index("hidden"))) == "32->3 float32"


def test_a_kernel_at_every_position_costs_so_often(case):
    task, row, kernel = case
    own = TorchTrainee(task, seed=0, seeds_per_layer=1, blend="residual")
    counted = artifact_cost(kernel)
    positions = {"Encoder": 5, "TimeFirst": 7, "grammar": 32}.get(task.name, 1)
    bare, coming = own.cost(), own.cost([kernel])
    assert coming.flops - bare.flops == counted.flops * positions
    graft(own, row, kernel, 0, 0.5)
    assert own.cost() == coming
    assert own.cost().parameters - bare.parameters == counted.parameter_count


def test_flops_are_those_of_unfused_paths():
    """Of an encoder's layer: four projections and an MLP at 5 positions, attention, the last."""
    own = TorchTrainee(make_task(Encoder, (5, 8), (5,)), seed=0, seeds_per_layer=1, blend="convex")
    linear = 5 * (4 * 8 * 8 + 2 * 8 * 16 + 8 * 3)
    attention = 2 * 5 * 5 * 8
    assert own.cost().flops == 2 * (linear + attention)


def test_losses_are_means_over_all_labels():
    task = load_task("grammar")
    own = TorchTrainee(task, seed=0, seeds_per_layer=1, blend="convex", evaluation_batch=900)
    p = own.predict(task.validation.x).astype(np.float64)
    y = task.validation.y
    own_loss = -np.log(np.take_along_axis(p, y[..., None], -1)).mean()
    found = own.evaluate("validation")
    assert_close(np.float32(found.loss), np.float32(own_loss))
    assert found.accuracy == pytest.approx(float((p.argmax(-1) == y).mean()), abs=1e-6)


def test_regression_has_no_accuracy_and_predicts_values():
    task = make_task(InPlace, (6,), (1,), "mean_squared_error")
    own = TorchTrainee(task, seed=0, seeds_per_layer=1, blend="convex")
    predicted = own.predict(task.test.x)
    assert predicted.shape == (48, 1)
    found = own.evaluate("test")
    assert np.isnan(found.accuracy)
    assert_close(np.float32(found.loss), np.mean((predicted - task.test.y) ** 2))


def test_examples_in_a_mapped_file_are_read_as_they_are_needed(tmp_path):
    whole = make_task(InPlace, (6,), (), "mean_squared_error")

    def mapped(name, split):
        np.save(tmp_path / f"{name}.npy", split.x)
        return Split(np.load(tmp_path / f"{name}.npy", mmap_mode="r"), split.y)

    parts = [mapped(name, split) for name, split in whole.splits.items()]
    streamed = Task(whole.name, *parts, host=whole.host, loss=whole.loss)
    assert streamed.train.streamed
    found = []
    for task in (whole, streamed):
        own = TorchTrainee(task, seed=0, seeds_per_layer=1, blend="convex", evaluation_batch=20)
        losses = [own.step(batch, RATES, i) for i, batch in enumerate((BATCH, None))]
        seen = own.probe(0, BATCH)
        found.append((own.read_losses(losses).tobytes(), own.evaluate("test").loss, seen.loss))
    assert found[0] == found[1]
