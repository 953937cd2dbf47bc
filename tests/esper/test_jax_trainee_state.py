"""What hosts on jax keep and draw, in which precision, and where their examples lie."""

import equinox as eqx
import jax
import numpy as np
import pytest

from esper.tolaria._trainee import Batch, Optimisation, Rates
from esper.tolaria.tasks import CustomHost, Split, Task
from esper_functional import Event, EventKind, difference
from tests.esper.jax_hosts import (
    BATCH,
    DROPPED,
    NORMED,
    POSITIONS,
    RATES,
    TASKS,
    graft,
    kernel_for,
    make,
    make_task,
    run,
)
from tests.esper.trainee_life import bits, flat
from tests.tolerance import assert_close

# What a module keeps and draws


def rest(own):
    return own.snapshot()["rest"]


def test_running_statistics_are_of_what_was_trained_on_and_are_judged_by():
    task = make_task("normed", NORMED, (6,))
    own = make(task)
    first = own.snapshot()["host"]
    seen = task.train.x[BATCH] @ first["first.kernel.value"] + first["first.bias.value"]
    own.evaluate("test")
    own.predict(task.test.x)
    np.testing.assert_array_equal(rest(own)["norm.mean.value"], 0.0)
    run(own, 0, 1)
    assert_close(rest(own)["norm.mean.value"], np.float32(0.01) * seen.mean(0))
    # In a mean over other examples, a judged one would not be the same.
    alone, among = own.predict(task.test.x[:1]), own.predict(task.test.x)
    assert_close(alone[0], among[0])


def test_a_shadow_sees_the_state_that_its_step_began_with():
    """A kernel that incubates takes the very step that it would take at alpha 1."""
    build, site, of = TASKS["normed"]
    after, hosts = [], []
    for incubates in (True, False):
        own = make(build(), optimisation=Optimisation("sgd"))
        row = own.sites.index(site)
        graft(own, row, kernel_for(own, row, of), 0, 0.0 if incubates else 1.0)
        if incubates:
            own.apply(Event(0, row, 0, EventKind.INCUBATE))
        run(own, 0, 1)
        after.append(flat(own.snapshot()["kernels"]["0"]))
        hosts.append(bits(own.snapshot(), ("host/", "rest/")))
    for name, value in after[0].items():
        assert_close(value, after[1][name])
    bare = make(build(), optimisation=Optimisation("sgd"))
    run(bare, 0, 1)
    assert hosts[0] == bits(bare.snapshot(), ("host/", "rest/")) != hosts[1]


def test_keys_are_of_seed_step_and_example():
    task = make_task("dropped", DROPPED, (6,), (), "mean_squared_error")
    own, other = make(task), make(task, seed=1)
    held = own.hold()

    def loss(trainee, step):
        trainee.take_back(held)
        return float(trainee.step(BATCH, RATES, step))

    first = loss(own, 4)
    assert loss(own, 5) != first
    assert loss(own, 4) == first
    assert loss(other, 4) != first
    # One example many times over: a mask for each, or the loss would be one of two or three.
    same = Batch(np.repeat(task.train.x[:1], 16, 0), np.repeat(task.train.y[:1], 16, 0))
    losses = []
    for step in range(8):
        own.take_back(held)
        losses.append(float(own.step(same, RATES, step)))
    judged = np.mean((own.predict(same.x)[:, 0] - same.y) ** 2)
    assert np.std(losses) < np.mean(losses)
    assert judged not in losses


def test_parts_of_a_batch_go_through_the_state_one_after_the_other():
    own = make(make_task("normed", NORMED, (6,)), optimisation=Optimisation("sgd", accumulate=4))
    task = make_task("normed", NORMED, (6,))
    first = own.snapshot()["host"]
    seen = task.train.x[BATCH] @ first["first.kernel.value"] + first["first.bias.value"]
    run(own, 0, 1)
    mean = np.zeros(8, np.float32)
    for part in seen.reshape(4, 4, 8):
        mean = np.float32(0.99) * mean + np.float32(0.01) * part.mean(0)
    assert_close(rest(own)["norm.mean.value"], mean)


# How gradients and numbers go


def test_isolated_kernels_leave_no_gradient_before_their_layer():
    build, site, of = TASKS["grammar"]
    shots = []
    for isolate in (False, True):
        own = make(build(), isolate=isolate, optimisation=Optimisation("sgd"))
        row = own.sites.index(site)
        graft(own, row, kernel_for(own, row, of), 0, 0.7)
        run(own, 0, 1)
        shots.append(flat(own.snapshot()))
    same = {n: bool(np.allclose(shots[0][n], shots[1][n], rtol=1e-6, atol=1e-7)) for n in shots[0]}
    assert not same["host/mix.weight"]
    assert not same["host/embed.weight"]
    assert same["host/hidden.weight"]
    assert same["host/head.weight"]
    assert all(same[name] for name in same if name.startswith("kernels/"))


@pytest.mark.parametrize("name", ["normed", "grammar"])
@jax.numpy_dtype_promotion("standard")  # flax's norms mix precisions
def test_bfloat16_is_of_passes_and_float32_of_what_is_kept(name):
    build, site, of = TASKS[name]
    losses, predicted = [], []
    for precision in ("float32", "bfloat16"):
        task = build()
        own = make(task, optimisation=Optimisation(precision=precision))
        row = own.sites.index(site)
        assert own.signature(row).dtype == precision
        graft(own, row, kernel_for(own, row, of), 0, 0.5)
        losses.append(run(own, 0, 4, Rates(0.01, {})))
        predicted.append(own.predict(task.test.x))
        seen = own.probe(row, BATCH)
        assert seen.gradients.dtype == seen.outputs.dtype == np.float32
        assert np.abs(seen.gradients).max() > 0
        own.evaluate("validation")
        kept = flat({p: v for p, v in own.snapshot().items() if p not in ("seeds", "errors")})
        floats = {path: a.dtype.name for path, a in kept.items() if a.dtype.kind not in "iu"}
        assert set(floats.values()) == {"float32"}
    assert losses[0].tobytes() != losses[1].tobytes()
    for short, exact in ((losses[1], losses[0]), (predicted[1], predicted[0])):
        assert difference(short, exact, "bfloat16").within


def test_regression_has_no_accuracy_and_labels_may_lack_the_axis_of_one_value():
    task = make_task("dropped", DROPPED, (6,), (), "mean_squared_error")
    column = [Split(part.x, part.y[:, None]) for part in task.splits.values()]
    found = []
    for own in (task, Task(task.name, *column, host=task.host, loss=task.loss)):
        trainee = make(own)
        predicted = trainee.predict(own.test.x)
        assert predicted.shape == (48, 1)
        judged = trainee.evaluate("test")
        assert np.isnan(judged.accuracy)
        assert_close(np.float32(judged.loss), np.mean((predicted[:, 0] - task.test.y) ** 2))
        parts = trainee.losses_without("test", [()], parts=48)
        assert_close(parts[0], (predicted[:, 0] - task.test.y) ** 2)
        found.append((judged.loss, float(trainee.step(BATCH, RATES, 0))))
    assert found[0] == found[1]


def test_losses_are_means_over_all_labels():
    task = make_task("positions", POSITIONS, (5, 4), (5,))
    own = make(task, evaluation_batch=20)
    p = own.predict(task.validation.x).astype(np.float64)
    y = task.validation.y
    own_loss = -np.log(np.take_along_axis(p, y[..., None], -1)).mean()
    found = own.evaluate("validation")
    assert_close(np.float32(found.loss), np.float32(own_loss))
    assert found.accuracy == pytest.approx(float((p.argmax(-1) == y).mean()), abs=1e-6)


# Where examples lie


def test_examples_in_a_mapped_file_train_as_those_in_memory(tmp_path):
    whole = make_task("positions", POSITIONS, (5, 4), (5,))

    def mapped(name, split):
        np.save(tmp_path / f"{name}.npy", split.x)
        return Split(np.load(tmp_path / f"{name}.npy", mmap_mode="r"), split.y)

    parts = [mapped(name, split) for name, split in whole.splits.items()]
    streamed = Task(whole.name, *parts, host=whole.host, loss=whole.loss)
    assert streamed.train.streamed
    found = []
    for task in (whole, streamed):
        own = make(task, evaluation_batch=20)
        losses = own.read_losses([own.step(BATCH, RATES, 0), own.step(None, RATES, 1)])
        found.append(
            (losses.tobytes(), own.evaluate("test").loss, own.probe(0, BATCH).loss,
             own.losses_without("train", [()], parts=3).tobytes())
        )  # fmt: skip
    assert found[0] == found[1]


class Few(eqx.Module):
    """Of an example that is long, the first values alone."""

    last: eqx.nn.Linear

    def __init__(self, seed):
        self.last = eqx.nn.Linear(4, 2, key=jax.random.key(seed))

    def __call__(self, x):
        return self.last(x[:4])


def test_a_mapped_file_may_be_larger_than_memory(tmp_path):
    """A sparse file of a tebibyte, of which a few rows are ever read."""
    shape = (1 << 18, 1 << 20)
    x = np.memmap(tmp_path / "train.f32", np.float32, "w+", shape=shape)
    x[:4, :4] = np.arange(16).reshape(4, 4)
    few = Split(np.array(x[:4]), np.arange(4, dtype=np.int32) % 2)
    train = Split(x, np.arange(shape[0], dtype=np.int32) % 2)
    host = CustomHost("few", jax=Few)
    large, little = (make(Task("few", part, few, few, host)) for part in (train, few))
    rows = np.arange(4, dtype=np.int32)
    assert float(large.step(rows, RATES, 0)) == float(little.step(rows, RATES, 0))
    assert large.probe(0, rows).loss == little.probe(0, rows).loss
    assert bits(large.snapshot()) == bits(little.snapshot())


def test_a_mapped_part_is_judged_by_chunks_whatever_was_chosen(tmp_path):
    x = np.memmap(tmp_path / "test.f32", np.float32, "w+", shape=(1030, 4))
    x[:] = np.random.default_rng(0).normal(size=x.shape)
    y = np.arange(1030, dtype=np.int32) % 2
    host = CustomHost("few", jax=Few)
    found = []
    for part in (Split(x, y), Split(np.array(x), y)):
        own = make(Task("few", part, part, part, host))
        found.append((own.evaluate("test"), own.losses_without("test", [()], parts=7)))
    assert_close(np.float32(found[0][0].loss), np.float32(found[1][0].loss))
    assert found[0][0].accuracy == pytest.approx(found[1][0].accuracy)
    assert_close(found[0][1], found[1][1])
