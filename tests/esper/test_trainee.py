"""Laws of a host in training, on both backends."""

import numpy as np
import pytest

from esper.checkpoints._names import nested
from esper.checkpoints._tree import named_leaves
from esper.tolaria import load_task, make_config, make_trainee
from esper.tolaria._jax_programs import PROGRAMS
from esper_functional import (
    Event,
    EventKind,
    SeedLifecycleState,
    difference,
    state_digest,
)
from tests.functional.networks import compilations

BACKENDS = ["jax", "torch"]


def trainee(backend, **changes):
    config = make_config(**({"task": "spirals", "backend": backend} | changes))
    return make_trainee(load_task(config.task), config)


def graft(own, artifact, step=0, seed=0, alpha=0.0, ramp=None):
    slot = own.seeds.shape[1] * 0 + seed
    own.apply(Event(step, 0, seed, EventKind.LOAD, artifact.kernel_id, float(slot)))
    own.apply(Event(step, 0, seed, EventKind.ACTIVATE, artifact.kernel_id, alpha), artifact)
    if ramp:
        own.apply(Event(step, 0, seed, EventKind.RAMP, value=1.0, span=ramp))


def flat(tree, prefix=""):
    out = {}
    for name, value in tree.items():
        out |= (
            flat(value, f"{prefix}{name}/") if isinstance(value, dict) else {prefix + name: value}
        )
    return out


def test_both_backends_agree_step_by_step_through_a_graft_and_a_ramp(artifact):
    ours, theirs = (trainee(b, optimizer="sgd", learning_rate=0.1) for b in BACKENDS)
    for step in range(50):
        losses = []
        for own in (ours, theirs):
            if step == 5:
                own.apply(Event(5, 0, 2, EventKind.LOAD, artifact.kernel_id, 2.0))
            if step == 10:
                own.apply(Event(10, 0, 2, EventKind.ACTIVATE, artifact.kernel_id, 0.0), artifact)
                own.apply(Event(10, 0, 2, EventKind.RAMP, value=1.0, span=25))
            own.advance(step)
            losses.append(own.read_losses([own.step(None)]))
        assert difference(losses[1], losses[0]).within, step
        assert state_digest(ours.seeds) == state_digest(theirs.seeds)
        a, b = ours.snapshot(), theirs.snapshot()
        for part in ("host", "kernels"):
            left, right = flat(a[part]), flat(b[part])
            right = {n.replace("_weight", ".weight").replace("_bias", ".bias"): v
                     for n, v in right.items()}  # fmt: skip
            assert left.keys() == right.keys()
            for name, value in left.items():
                assert difference(right[name], value).within, (step, name)
    assert float(ours.seeds.alpha[0, 2]) == 1.0
    for split in ("validation", "test"):
        one, other = ours.evaluate(split), theirs.evaluate(split)
        assert difference(np.float32(other.loss), np.float32(one.loss)).within
        assert other.health.keys() == one.health.keys()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_kernel_born_zero_changes_nothing_at_alpha_one(backend, artifact):
    own = trainee(backend)
    before = own.evaluate("test")
    graft(own, artifact, alpha=1.0)
    after = own.evaluate("test")
    assert (after.loss, after.accuracy) == (before.loss, before.accuracy)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_muted_kernel_counts_for_nothing_and_is_not_changed(backend, artifact):
    own = trainee(backend)
    for _ in range(3):
        own.step(None)
    host = own.evaluate("validation")
    graft(own, artifact, alpha=1.0)
    kept = own.snapshot()["host"]
    for _ in range(20):
        own.step(None)
    grown = own.snapshot()
    digest = state_digest(own.seeds)
    with_it, without = own.evaluate("validation"), own.evaluate("validation", [(0, 0)])
    assert with_it.loss != without.loss
    assert state_digest(own.seeds) == digest
    assert own.evaluate("validation") == with_it
    # The host alone, with the weights it has now: the muted kernel adds nothing.
    bare = trainee(backend)
    bare.restore({**bare.snapshot(), "host": grown["host"]}, {})
    assert difference(np.float32(without.loss), np.float32(bare.evaluate("validation").loss)).within
    assert host.loss != without.loss
    assert any((kept[n] != grown["host"][n]).any() for n in kept)


@pytest.mark.parametrize("backend", BACKENDS)
def test_grafting_and_unloading_leave_every_other_moment_bitwise(backend, artifact):
    own = trainee(backend)

    def moments():
        shot = own.snapshot()
        return flat({"host": shot["host_moments"], "kernels": shot["moments"]})

    def unchanged(before, after):
        common = before.keys() & after.keys()
        return all(before[n].tobytes() == after[n].tobytes() for n in common)

    for _ in range(3):
        own.step(None)
    first = moments()
    graft(own, artifact, seed=1, alpha=0.5)
    assert first.keys() <= moments().keys()
    assert unchanged(first, moments())
    for _ in range(3):
        own.step(None)
    graft(own, artifact, seed=3, alpha=0.5)
    own.step(None)
    held = moments()
    # Kernel 3's are younger than kernel 1's.
    own.apply(Event(9, 0, 1, EventKind.UNLOAD))
    after = moments()
    assert unchanged(held, after)
    assert {n for n in held if n not in after} == {n for n in held if n.startswith("kernels/1/")}
    own.apply(Event(9, 0, 3, EventKind.FOSSILIZE))
    assert not [n for n in moments() if n.startswith("kernels/")]
    assert unchanged(after, moments())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_fossil_is_frozen_and_its_host_is_not(backend, artifact):
    own = trainee(backend)
    graft(own, artifact, alpha=1.0)
    for _ in range(3):
        own.step(None)
    own.apply(Event(3, 0, 0, EventKind.FOSSILIZE))
    before = own.snapshot()
    own.step(None)
    after = own.snapshot()
    fossil = flat(before["kernels"])
    assert all(
        value.tobytes() == flat(after["kernels"])[n].tobytes() for n, value in fossil.items()
    )
    assert any((before["host"][n] != after["host"][n]).any() for n in before["host"])


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_restore_after_snapshot_is_the_identity(backend, optimizer, artifact):
    own = trainee(backend, optimizer=optimizer)
    graft(own, artifact, seed=1, alpha=0.25, ramp=10)
    graft(own, artifact, seed=2, alpha=1.0)
    for step in range(4):
        own.advance(step)
        own.step(None)
    own.apply(Event(4, 0, 2, EventKind.FOSSILIZE))
    # What a checkpoint holds: mappings that are empty are lost.
    shot = nested(named_leaves(own.snapshot()))
    again = trainee(backend, seed=99, optimizer=optimizer)
    again.restore(shot, {1: artifact, 2: artifact})
    for step in range(4, 12):
        losses = []
        for each in (own, again):
            each.advance(step)
            losses.append(each.read_losses([each.step(None)]).tobytes())
        assert losses[0] == losses[1]
    ours, theirs = flat(own.snapshot()), flat(again.snapshot())
    assert ours.keys() == theirs.keys()
    assert all(ours[n].tobytes() == theirs[n].tobytes() for n in ours)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_kernel_that_fails_is_contained_counted_and_stopped(backend, artifact):
    own = trainee(backend)
    graft(own, artifact, alpha=1.0)
    shot = dict(own.snapshot())
    shot["kernels"] = {"0": {n: np.full_like(p, np.nan) for n, p in shot["kernels"]["0"].items()}}
    own.restore(shot, {0: artifact})
    twin = trainee(backend)
    for step in range(1, 4):
        losses = [own.read_losses([own.step(None)]), twin.read_losses([twin.step(None)])]
        # The host trains as if it were alone.
        assert difference(losses[0], losses[1]).within
        if step == 2:
            (event,) = own.absorb(step)
            assert (event.kind, event.value) == (EventKind.ERRORS, 2.0)
    own.absorb(3)
    assert own.seeds.stage[0, 0] == SeedLifecycleState.ERROR_RECOVERY
    assert bool(own.seeds.fallback[0, 0])
    host = flat(own.snapshot()["host"])
    assert all(np.isfinite(value).all() for value in host.values())
    own.apply(Event(4, 0, 0, EventKind.RESET))
    graft(own, artifact, step=4, alpha=1.0)
    assert np.isfinite(own.read_losses([own.step(None)])).all()
    assert own.absorb(5) == []


def test_a_hundred_steps_of_alpha_compile_nothing(artifact):
    own = trainee("jax", learning_rate=0.0321)  # so that the counter has something to count
    alphas = set()
    with compilations() as all_of_them:
        graft(own, artifact, ramp=100)
        own.advance(0)
        own.step(None)
        before = all_of_them()
        for step in range(1, 102):
            own.advance(step)
            own.step(None)
            alphas.add(float(own.seeds.alpha[0, 0]))
        assert len(alphas) == 100
        assert all_of_them() == before
        assert before > 0


def test_a_life_compiles_three_steps_and_a_second_one_none(artifact):
    own = trainee("jax", learning_rate=0.0123)  # a program of its own

    def programs():
        return sum(
            1 for key in PROGRAMS.known if key[0] == "step" and key[1].learning_rate == 0.0123
        )

    own.step(None)
    for seed in (0, 2):
        graft(own, artifact, seed=seed, ramp=2)
        for step in range(4):
            own.advance(step)
            own.step(None)
        if seed == 0:
            own.apply(Event(4, 0, seed, EventKind.FOSSILIZE))
            own.step(None)
            assert programs() == 3
            # A life in another seed runs the same programs.
            own = trainee("jax", learning_rate=0.0123)
    own.apply(Event(4, 0, 2, EventKind.FOSSILIZE))
    own.step(None)
    assert programs() == 3
