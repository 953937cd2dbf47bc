"""Hosts of many kinds, trained by the jax trainee: what it finds out, and what it keeps."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esper.checkpoints._names import nested
from esper.checkpoints._tree import named_leaves
from esper.tezzeret import artifact_cost, compile_blueprint, load_blueprint
from esper.tolaria._jax_trainee import JaxTrainee
from esper.tolaria._torch_trainee import TorchTrainee
from esper.tolaria._trainee import Batch, Optimisation, Rates
from esper.tolaria.tasks import CustomHost, load_task
from esper_functional import Event, EventKind, SeedLifecycleState
from tests.esper.jax_hosts import (
    BATCH,
    RATES,
    SGD,
    TASKS,
    graft,
    kernel_for,
    make,
    make_task,
    run,
)
from tests.esper.trainee_life import bits, draw, flat
from tests.tolerance import assert_close


@pytest.fixture(scope="module", params=list(TASKS))
def case(request):
    build, site, of = TASKS[request.param]
    task = build()
    own = make(task)
    row = own.sites.index(site)
    return task, row, kernel_for(own, row, of)


def test_any_host_is_held_measured_and_restored(case):
    task, row, kernel = case
    own = make(task, optimisation=SGD, evaluation_batch=192)
    graft(own, row, kernel, 0, 0.5)
    graft(own, row, kernel, 1, 0.0)
    own.apply(Event(0, row, 1, EventKind.INCUBATE))
    run(own, 0, 2)
    held, before = own.hold(), bits(own.snapshot())

    # Judging changes nothing, and muted losses are those of the batched pass.
    variants = [(), [(row, 0)], [(row, 0), (row, 1)]]
    looped = [own.evaluate("validation", muted).loss for muted in variants]
    assert_close(own.losses_without("validation", variants)[:, 0], np.asarray(looped, np.float32))
    assert looped[0] != looped[1]
    health = own.evaluate("validation").health
    assert list(health) == [(row, 0)]
    assert 0.0 <= health[row, 0] <= 1.0
    predicted = own.predict(task.test.x[:3])
    assert predicted.dtype == np.float32
    # What is judged draws nothing, and sees no other examples.
    assert_close(own.predict(task.test.x[:3][::-1])[::-1], predicted)
    norms = own.norms(BATCH)
    counts = [node.parameters for node in own.topology.nodes]
    assert [norm > 0 for norm in norms.weight] == [count > 0 for count in counts]
    assert np.isfinite(norms.gradient).all()
    assert bits(own.snapshot()) == before

    losses = run(own, 2, 5)
    assert np.isfinite(losses).all()
    after = bits(own.snapshot())
    own.apply(Event(5, row, 0, EventKind.UNLOAD))
    own.take_back(held)
    assert bits(own.snapshot()) == before
    # What the host draws is a function of seed and step, or of the state it was in.
    assert run(own, 2, 5).tobytes() == losses.tobytes()
    assert bits(own.snapshot()) == after
    again = make(task, seed=0, optimisation=SGD)
    # What a checkpoint holds: mappings that are empty are lost.
    shot = nested(named_leaves(own.snapshot(held)))
    again.restore(shot, {row * 2: kernel, row * 2 + 1: kernel})
    assert bits(again.snapshot()) == before
    assert run(again, 2, 5).tobytes() == losses.tobytes()
    assert bits(again.snapshot()) == after


def test_a_probe_is_the_slope_of_the_loss(case):
    """Against finite differences: what a layer's bias adds, it adds to each of its outputs."""
    task, row, kernel = case
    own = make(task, optimisation=SGD)
    graft(own, row, kernel, 0, 0.5)
    graft(own, row, kernel, 1, 0.0)
    own.apply(Event(0, row, 1, EventKind.INCUBATE))
    run(own, 0, 1)
    shot = dict(own.snapshot())
    # In the averages, by which it is judged.
    shot["host"], shot["kernels"] = shot["host_average"], {
        **shot["kernels"], **shot["averages"]
    }  # fmt: skip
    seen = own.probe(row, BATCH)
    assert seen.outputs.shape == seen.gradients.shape
    whole = {"positions": ((5, 4), (5, 8)), "shapes": ((2, 8, 8), (2, 8, 8)),
             "grammar": ((32, 32), (32, 3))}.get(task.name, ((6,), (8,)))  # fmt: skip
    assert (seen.inputs.shape, seen.outputs.shape) == tuple((16, *shape) for shape in whole)
    name = next(n for n in shot["host"] if n.startswith(f"{own.sites[row]}.bias"))
    bias = shot["host"][name]
    axis = 1 if task.name == "shapes" else -1
    slopes = np.moveaxis(seen.gradients, axis, 0).reshape(bias.size, -1).sum(1)
    direction = (slopes / np.linalg.norm(slopes)).reshape(bias.shape)
    losses = []
    for side in (0.003, -0.003):
        moved = {**shot["host"], name: (bias + side * direction).astype(np.float32)}
        average = {"host_average": moved, "averages": shot["averages"]}
        own.restore({**shot, "host": moved, **average}, {row * 2: kernel, row * 2 + 1: kernel})
        losses.append(own.probe(row, BATCH).loss)
    slope = (losses[0] - losses[1]) / 0.006
    assert slope == pytest.approx(np.linalg.norm(slopes), rel=0.03, abs=3e-4)
    assert np.linalg.norm(slopes) > 3e-3


def test_examples_of_a_step_may_come_with_it(case):
    task, _, _ = case
    losses = []
    for batch in (BATCH, Batch(task.train.x[BATCH], task.train.y[BATCH])):
        own = make(task, optimisation=SGD)
        losses.append(float(own.step(batch, RATES, 0)))
    assert losses[0] == losses[1]


def test_a_kernel_at_every_position_costs_so_often(case):
    task, row, kernel = case
    own = make(task)
    counted = artifact_cost(kernel)
    positions = {"positions": 5, "grammar": 32}.get(task.name, 1)
    bare, coming = own.cost(), own.cost([kernel])
    assert coming.flops - bare.flops == counted.flops * positions
    graft(own, row, kernel, 0, 0.5)
    assert own.cost() == coming
    assert own.cost().parameters - bare.parameters == counted.parameter_count


# Both backends


@pytest.mark.parametrize("name", ["shapes", "grammar"])
def test_both_backends_agree_on_images_and_texts(name):
    build, site, of = TASKS[name]
    task, rates = build(), Rates(0.05, {})
    how = Optimisation("sgd", momentum=0.9, clip_norm=1.0, ema_decay=0.9, accumulate=2)
    lives = []
    kernel = None
    for kind in (JaxTrainee, TorchTrainee):
        own = kind(task, seed=0, seeds_per_layer=2, blend="convex", optimisation=how)
        row = own.sites.index(site)
        signatures = [str(own.signature(i)) for i in range(len(own.sites))]
        kernel = kernel or kernel_for(own, row, of)
        losses = [run(own, 0, 2, rates)]
        graft(own, row, kernel, 1, 0.0, step=2)
        own.apply(Event(2, row, 1, EventKind.RAMP, value=0.8, span=4))
        graft(own, row, kernel, 0, 0.0, step=2)
        own.apply(Event(2, row, 0, EventKind.INCUBATE))
        losses.append(run(own, 2, 8, rates))
        judged, seen = own.evaluate("test"), own.probe(row, BATCH)
        norms = own.norms(BATCH)
        shot = own.snapshot()
        lives.append(
            {
                "sites": own.sites,
                "signatures": signatures,
                "losses": np.concatenate(losses),
                "loss": np.float32(judged.loss),
                "health": judged.health,
                "without": own.losses_without("validation", [(), [(row, 1)]], parts=3),
                "inputs": seen.inputs,
                "outputs": seen.outputs,
                "gradients": seen.gradients,
                "gradient_norms": norms.gradient,
                "weight_norms": norms.weight,
                "predictions": own.predict(task.test.x[:5]),
                "parameters": own.cost([kernel]).parameters,
                # Equinox's convolutions keep a bias as [out, 1, 1].
                **{
                    n: p.squeeze()
                    for n, p in flat({p: shot[p] for p in ("host", "kernels")}).items()
                },
            }
        )
    ours, theirs = lives
    assert ours.keys() == theirs.keys()
    for what, value in ours.items():
        if isinstance(value, (np.ndarray, np.generic)):
            assert_close(value, theirs[what])
        else:
            assert (
                value == pytest.approx(theirs[what]) if what == "health" else value == theirs[what]
            )


def test_signatures_come_from_the_layer_or_from_a_call():
    found = {}
    for name in ("shapes", "grammar", "normed", "positions"):
        own = make(TASKS[name][0]())
        found |= {f"{name} {site}": str(own.signature(i)) for i, site in enumerate(own.sites)}
    assert found == {
        "shapes blocks.0.conv": "1x16x16->2x16x16 float32",
        "shapes blocks.1.conv": "2x8x8->2x8x8 float32",
        "shapes head": "2->6 float32",
        "grammar hidden": "32->3 float32",
        "grammar head": "3->10 float32",
        "normed first": "6->8 float32",
        "normed last": "8->3 float32",
        "positions first": "4->8 float32",
        "positions last": "8->3 float32",
    }


def test_a_layer_without_parameters_has_norms_of_zero():
    class Bent(eqx.Module):
        first: eqx.nn.Linear
        bend: eqx.nn.Lambda

        def __call__(self, x):
            return self.bend(self.first(x))

    def build(seed):
        return Bent(eqx.nn.Linear(6, 3, key=jax.random.key(seed)), eqx.nn.Lambda(jax.nn.relu))

    own = make(make_task("bent", CustomHost("bent", jax=build, grow_at=("bend",)), (6,)))
    norms = own.norms(BATCH)
    assert own.sites == ("first", "bend")
    assert (norms.gradient[1], norms.weight[1]) == (0.0, 0.0)
    assert min(norms.gradient[0], norms.weight[0]) > 0


# What is counted


def test_failures_that_are_not_absorbed_outlast_events_and_checkpoints(artifact):
    def trainee():
        return make(load_task("spirals"), optimisation=Optimisation(ema_decay=0.9))

    own, again = trainee(), trainee()
    broken = {n: np.full_like(p, np.nan) for n, p in draw(artifact).items()}
    graft(own, 0, artifact, 0, 1.0, params=broken)
    run(own, 0, 2)
    # Of another seed, of this one, and of a kernel that comes.
    own.apply(Event(2, 0, 0, EventKind.HEALTH, value=0.5))
    graft(own, 0, artifact, 1, 0.3, step=2)
    shot = own.snapshot()
    assert {slot: int(count) for slot, count in shot["errors"].items()} == {"0": 2}
    again.restore(nested(named_leaves(shot)), {0: artifact, 1: artifact})
    for each in (own, again):
        run(each, 2, 3)
        (event,) = each.absorb(3)
        assert (event.kind, event.seed, event.value) == (EventKind.ERRORS, 0, 3.0)
        assert each.seeds.stage[0, 0] == SeedLifecycleState.ERROR_RECOVERY
    # Another kernel in its place begins at none.
    own.apply(Event(4, 0, 0, EventKind.RESET))
    graft(own, 0, artifact, 0, 0.3, step=4)
    assert "errors" not in own.snapshot()
    run(own, 4, 6)
    assert own.absorb(6) == []


def test_what_folds_goes_into_the_weights_that_train():
    task = load_task("spirals")
    own = make(task, optimisation=Optimisation("sgd", momentum=0.9, ema_decay=0.5))
    kernel = compile_blueprint(load_blueprint("low_rank"), own.signature(0), sizes={"rank": 2})
    graft(own, 0, kernel, 0, 0.5)
    run(own, 0, 3)
    before, shot = own.predict(task.test.x), own.snapshot()
    own.apply(Event(3, 0, 0, EventKind.FOLD))
    assert_close(own.predict(task.test.x), before)
    after = own.snapshot()
    assert bits(after, ("host_moments/",)) == bits(shot, ("host_moments/",))
    assert not after["kernels"]
    assert own.seeds.stage[0, 0] == SeedLifecycleState.DORMANT
    # Training goes on from there, and from what it was, not from the first parameters.
    gaps = [
        np.abs(after[part]["layers.0.weight"] - shot[part]["layers.0.weight"]).max()
        for part in ("host", "host_average")
    ]
    assert min(gaps) > 1e-3
    assert np.isfinite(run(own, 3, 5)).all()


def test_a_host_without_linear_layers_grows_where_it_is_told():
    class Scaled(eqx.Module):
        conv: eqx.nn.Conv2d

        def __call__(self, x):
            return self.conv(x).mean((1, 2))

    def build(seed):
        return Scaled(eqx.nn.Conv2d(1, 3, 3, padding=1, key=jax.random.key(seed)))

    host = CustomHost("scaled", jax=build, grow_at=("conv",))
    own = make(make_task("scaled", host, (1, 4, 4)))
    assert own.sites == ("conv",)
    assert str(own.signature(0)) == "1x4x4->3x4x4 float32"
    before = bits(own.snapshot(), ("host/",))
    run(own, 0, 1)
    assert bits(own.snapshot(), ("host/",)) != before
    assert jnp.isfinite(own.evaluate("test").loss)
