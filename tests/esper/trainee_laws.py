"""Laws of a host in training: each takes what makes a trainee, so that it holds for both backends.

See `trainee_life` for what that is.
"""

from collections.abc import Callable

import numpy as np
import pytest

from esper.artifacts import Artifact
from esper.checkpoints._names import nested
from esper.checkpoints._tree import named_leaves
from esper.tolaria._trainee import Optimisation, Rates
from esper_functional import Event, EventKind, SeedLifecycleState, difference, state_digest
from tests.esper.trainee_life import (
    BATCH,
    EVERYTHING,
    Make,
    averaged_like,
    bits,
    draw,
    flat,
    graft,
    grown,
    train,
)
from tests.tolerance import assert_close


def hold_then_take_back_is_the_identity(make: Make, artifact: Artifact) -> None:
    own = make(optimisation=EVERYTHING)
    held, before = own.hold(), bits(own.snapshot())
    train(own, 0, 2)
    own.take_back(held)
    # No step was taken, so there are no moments either.
    assert bits(own.snapshot()) == before
    own = grown(make, artifact)
    held = own.hold()
    before, digest = bits(own.snapshot()), state_digest(own.seeds)
    assert bits(own.snapshot(held)) == before

    def go_on() -> bytes:
        losses = train(own, 5, 8)
        # One kernel is gone, one is new in its place, one is frozen, one is elsewhere.
        own.apply(Event(8, 0, 2, EventKind.UNLOAD))
        graft(own, artifact, step=8, seed=2, alpha=0.7, params=draw(artifact, 9))
        own.apply(Event(8, 0, 0, EventKind.ALPHA, value=0.3))
        own.apply(Event(8, 0, 0, EventKind.FOSSILIZE))
        graft(own, artifact, step=8, seed=3, ramp=5)
        return losses + train(own, 8, 11)

    first = go_on()
    after = bits(own.snapshot())
    assert after != before
    for _ in range(2):
        own.take_back(held)
        assert bits(own.snapshot()) == before
        assert state_digest(own.seeds) == digest
        assert bits(own.snapshot(held)) == before
        assert go_on() == first
        assert bits(own.snapshot()) == after


def restore_after_snapshot_is_the_identity(make: Make, artifact: Artifact) -> None:
    own = grown(make, artifact)
    shot = own.snapshot()
    kept = bits(shot)
    again = make(seed=99, seeds_per_layer=4, optimisation=EVERYTHING)
    # What a checkpoint holds: mappings that are empty are lost.
    again.restore(nested(named_leaves(shot)), {0: artifact, 1: artifact, 2: artifact})
    assert bits(again.snapshot()) == kept
    assert state_digest(again.seeds) == state_digest(own.seeds)
    assert train(own, 5, 10) == train(again, 5, 10)
    assert bits(own.snapshot()) == bits(again.snapshot())
    assert own.evaluate("validation") == again.evaluate("validation")
    # What is written while training goes on stays what it was.
    assert bits(shot) == kept


def a_graft_at_alpha_zero_leaves_the_host_as_it_was(make: Make, artifact: Artifact) -> None:
    own, bare = (make(optimisation=EVERYTHING) for _ in range(2))
    graft(own, artifact, seed=1)
    assert train(own, 0, 8) == train(bare, 0, 8)
    assert bits(own.snapshot(), ("host/",)) == bits(bare.snapshot(), ("host/",))
    assert own.evaluate("test").loss == bare.evaluate("test").loss


def an_incubating_kernel_trains_and_its_host_knows_nothing(make: Make, artifact: Artifact) -> None:
    own, bare = (make(optimisation=EVERYTHING) for _ in range(2))
    graft(own, artifact, seed=1, incubate=True)
    before = own.snapshot()
    assert train(own, 0, 6) == train(bare, 0, 6)
    after = own.snapshot()
    assert bits(after, ("host",)) == bits(bare.snapshot(), ("host",))
    assert bits(after, ("kernels/",)) != bits(before, ("kernels/",))
    assert own.evaluate("test").loss == bare.evaluate("test").loss


def parts_of_a_batch_are_the_batch(make: Make, artifact: Artifact) -> None:
    shots, losses = [], []
    for parts in (1, 2, 4):
        own = make(optimisation=Optimisation(optimizer="sgd", momentum=0.9, accumulate=parts))
        graft(own, artifact, alpha=0.5)
        losses.append(np.frombuffer(train(own, 0, 5, Rates(0.1, {})), np.float32))
        shots.append(own.snapshot())
    for loss, shot in zip(losses[1:], shots[1:], strict=True):
        assert_close(loss, losses[0])
        for part in ("host", "kernels"):
            for path, value in flat(shots[0][part]).items():
                assert_close(flat(shot[part])[path], value)


def averages_are_their_closed_form(make: Make, artifact: Artifact) -> None:
    """a_t = d^t p_0 + (1 - d) sum of d^(t-i) p_i, by which the network is judged."""
    decay = 0.8
    own = make(optimisation=Optimisation(ema_decay=decay))
    history: dict[str, list[np.ndarray]] = {}

    def note() -> None:
        shot = own.snapshot()
        for path, value in flat({part: shot[part] for part in ("host", "kernels")}).items():
            history.setdefault(path, []).append(np.array(value))

    note()
    for step in range(6):
        if step == 2:
            graft(own, artifact, step=2, seed=1, alpha=0.6)
            # A kernel's begins with its first parameters.
            history |= {
                path: [p] for path, p in flat({"kernels": own.snapshot()["kernels"]}).items()
            }
        train(own, step, step + 1)
        note()
    shot = own.snapshot()
    averaged = {
        part: averaged_like(shot[part], f"{part}/", history, decay) for part in ("host", "kernels")
    }
    plain = make(optimisation=Optimisation())
    plain.restore({**shot, **averaged}, {1: artifact})
    for split in ("validation", "test"):
        got, wanted = own.evaluate(split), plain.evaluate(split)
        assert difference(np.float32(got.loss), np.float32(wanted.loss)).within
    plain.restore(shot, {1: artifact})
    assert plain.evaluate("test").loss != own.evaluate("test").loss


def each_group_is_clipped_by_its_own_norm(make: Make, artifact: Artifact) -> None:
    clip = 0.05
    shots = []
    for norm in (None, clip):
        own = make(optimisation=Optimisation(optimizer="sgd", clip_norm=norm))
        graft(own, artifact, seed=0, alpha=1.0)
        graft(own, artifact, seed=2, alpha=0.01)
        before = own.snapshot()
        train(own, 0, 1, Rates(1.0, {}))
        shots.append((before, own.snapshot()))

    def steps(group: str, which: int) -> dict[str, np.ndarray]:
        before, after = (flat(shot) for shot in shots[which])
        return {n: after[n] - before[n] for n in after if n.startswith(group)}

    norms = []
    for group in ("host/", "kernels/0/", "kernels/2/"):
        free, clipped = steps(group, 0), steps(group, 1)
        norm = np.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in free.values()))
        norms.append(norm)
        for name, step in free.items():
            # A step is the difference of two parameters, and as exact as they are.
            scaled = (step * min(1.0, clip / norm)).astype(np.float32)
            np.testing.assert_allclose(clipped[name], scaled, rtol=1e-4, atol=1e-6)
    # Or the law would be of one of the two cases alone.
    assert norms[0] > clip
    assert norms[2] < clip


def decay_is_decoupled_and_by_the_rate(make: Make, artifact: Artifact) -> None:
    """p <- p - rate * decay * p, besides the gradient's step (Loshchilov and Hutter, 2019)."""
    decay, rates = 0.1, Rates(0.1, {1: 0.02})
    pairs = (
        (Optimisation(optimizer="sgd"), Optimisation(optimizer="sgd", weight_decay=decay)),
        (Optimisation(optimizer="adam"), Optimisation(optimizer="adamw", weight_decay=decay)),
    )
    for pair in pairs:
        before, after = {}, []
        for chosen in pair:
            own = make(optimisation=chosen)
            graft(own, artifact, seed=1, alpha=0.5)
            before = flat(own.snapshot())
            train(own, 0, 1, rates)
            after.append(flat(own.snapshot()))
        for group, rate in (("host/", 0.1), ("kernels/1/", 0.02)):
            for name in (n for n in before if n.startswith(group)):
                lost = after[0][name] - np.float32(rate * decay) * before[name]
                np.testing.assert_allclose(after[1][name], lost, rtol=1e-5, atol=1e-6)


def a_rate_of_zero_leaves_a_kernel_as_it_was(make: Make, artifact: Artifact) -> None:
    chosen = (
        Optimisation(),
        Optimisation(optimizer="adamw", weight_decay=0.1),
        Optimisation(optimizer="sgd", momentum=0.9, weight_decay=0.1),
    )
    for optimisation in chosen:
        own = make(optimisation=optimisation)
        graft(own, artifact, seed=1, alpha=0.5)
        graft(own, artifact, seed=3, alpha=0.5)
        before = own.snapshot()
        train(own, 0, 3, Rates(0.01, {1: 0.0}))
        after = own.snapshot()
        assert bits(after, ("kernels/1/",)) == bits(before, ("kernels/1/",))
        assert bits(after, ("kernels/3/",)) != bits(before, ("kernels/3/",))
        assert bits(after, ("host/",)) != bits(before, ("host/",))


def rates_are_data(make: Make, artifact: Artifact) -> None:
    own = make(optimisation=Optimisation(optimizer="sgd"))
    graft(own, artifact, seed=1, alpha=0.5)
    train(own, 0, 2)
    known, held = own.compilations, own.hold()
    before, moves = flat(own.snapshot()), []
    for rate in (0.01, 0.02):
        own.take_back(held)
        train(own, 2, 3, Rates(rate, {1: rate / 2}))
        after = flat(own.snapshot())
        moves.append({n: after[n] - before[n] for n in before if n.startswith(("host", "kernels"))})
    assert own.compilations == known
    for name, move in moves[0].items():
        np.testing.assert_allclose(moves[1][name], 2 * move, rtol=1e-3, atol=1e-6)


def surgery_leaves_incumbents_bitwise(make: Make, artifact: Artifact) -> None:
    """Moments and averages of everyone else, whatever comes and goes."""
    own = make(optimisation=EVERYTHING)

    def unchanged(slot: int, change: Callable[[], None]) -> None:
        before = bits(own.snapshot())
        change()
        after = bits(own.snapshot())
        others = {n for n in before if f"/{slot}/" not in n and n.split("/")[-1] != str(slot)}
        others = {n for n in others if not n.startswith("seeds/") and n != "step"}
        assert others
        assert {n: after.get(n) for n in others} == {n: before[n] for n in others}

    train(own, 0, 2)
    unchanged(1, lambda: graft(own, artifact, step=2, seed=1, alpha=0.5))
    train(own, 2, 4)
    unchanged(3, lambda: graft(own, artifact, step=4, seed=3, alpha=0.5))
    train(own, 4, 6)
    unchanged(1, lambda: own.apply(Event(6, 0, 1, EventKind.UNLOAD)))
    unchanged(3, lambda: own.apply(Event(6, 0, 3, EventKind.FOSSILIZE)))
    fossil = bits(own.snapshot(), ("kernels/3/",))
    train(own, 6, 8)
    after = own.snapshot()
    assert bits(after, ("kernels/3/",)) == fossil
    kept = [name for name in flat(after) if "/3/" in name]
    assert not [name for name in kept if not name.startswith("kernels/")]


def judging_changes_nothing(make: Make, artifact: Artifact) -> None:
    own = grown(make, artifact)
    twin = grown(make, artifact)
    before, digest = bits(own.snapshot()), state_digest(own.seeds)
    judged = own.evaluate("validation")
    muted = own.evaluate("validation", [(0, 1)])
    own.evaluate("train", [(0, 1), (0, 2)])
    own.losses_without("test", [(), [(0, 1)]], parts=3)
    own.predict(np.zeros((5, 2), np.float32))
    own.probe(0, BATCH)
    own.probe(1, BATCH)
    own.norms(BATCH)
    own.cost([artifact])
    assert own.evaluate("validation") == judged
    assert muted.loss != judged.loss
    assert bits(own.snapshot()) == before
    assert state_digest(own.seeds) == digest
    assert train(own, 5, 8) == train(twin, 5, 8)


def losses_without_are_losses_muted(make: Make, artifact: Artifact) -> None:
    for blend in ("residual", "convex", "sequential"):
        own = make(blend=blend, optimisation=Optimisation(ema_decay=0.9))
        for seed, alpha in ((0, 0.5), (1, 0.8), (3, 0.3)):
            graft(own, artifact, seed=seed, alpha=alpha)
        train(own, 0, 2)
        places = [(0, 0), (0, 1), (0, 3)]
        variants = [[p for i, p in enumerate(places) if n >> i & 1] for n in range(8)]
        for split in ("validation", "test"):
            looped = [own.evaluate(split, muted).loss for muted in variants]
            batched = own.losses_without(split, variants)
            assert batched.shape == (8, 1)
            assert_close(batched[:, 0], np.asarray(looped, np.float32))
            assert len(set(looped)) == 8
        parts = own.losses_without("validation", variants, parts=5)
        count = 192
        sizes = np.asarray([len(range(part, count, 5)) for part in range(5)])
        assert parts.shape == (8, 5)
        whole = (parts * sizes).sum(1) / count
        assert_close(whole.astype(np.float32), own.losses_without("validation", variants)[:, 0])
        if blend != "residual":
            continue
        assert own.losses_without("validation", [], parts=5).shape == (0, 5)
        small = make(blend=blend, optimisation=Optimisation(ema_decay=0.9), evaluation_batch=50)
        small.restore(own.snapshot(), dict.fromkeys((0, 1, 3), artifact))
        assert_close(small.losses_without("validation", variants, parts=5), parts)
        got, wanted = small.evaluate("test"), own.evaluate("test")
        assert_close(np.float32(got.loss), np.float32(wanted.loss))
        assert (got.accuracy, got.health) == (pytest.approx(wanted.accuracy), wanted.health)


def a_probe_is_what_the_layer_sees(make: Make, artifact: Artifact) -> None:
    own = make()
    graft(own, artifact, seed=1, alpha=0.4)
    train(own, 0, 3)
    shot = own.snapshot()
    first, seen = own.probe(0, BATCH), own.probe(1, BATCH)
    for probe, fan_in, fan_out in ((first, 2, 8), (seen, 8, 2)):
        assert probe.inputs.shape == (len(BATCH), fan_in)
        assert probe.outputs.shape == probe.gradients.shape == (len(BATCH), fan_out)
        assert probe.examples == len(BATCH)
    weight, bias = shot["host"]["layers.1.weight"], shot["host"]["layers.1.bias"]
    assert_close(seen.outputs, seen.inputs @ weight.T + bias)
    # Of the mean loss: each example has an nth of what it has by itself.
    alone = own.probe(0, BATCH[:1])
    assert_close(alone.gradients[0] / np.float32(len(BATCH)), first.gradients[0])
    assert_close(alone.outputs[0], first.outputs[0])
    host = first.inputs @ shot["host"]["layers.0.weight"].T + shot["host"]["layers.0.bias"]
    assert np.abs(first.outputs - host).max() > 1e-3  # the kernel has its part in the output
    # Both layers in one pass see what each sees in its own.
    assert list(own.probed) == [0, 1]
    together = own.probes([1, 0], BATCH)
    assert list(together) == [1, 0]
    for row, probe in enumerate((first, seen)):
        for name in ("inputs", "outputs", "gradients"):
            assert_close(getattr(together[row], name), getattr(probe, name))
        assert together[row].loss == pytest.approx(probe.loss)

    # What a bias adds, it adds to the output of every example (blended residually).
    own = make(blend="residual")
    graft(own, artifact, seed=1, alpha=0.4)
    shot = own.snapshot()
    gradient = own.probe(0, BATCH).gradients.sum(0)
    for feature in range(0, 8, 3):
        losses = []
        for side in (1e-3, -1e-3):
            moved = np.array(shot["host"]["layers.0.bias"])
            moved[feature] += np.float32(side)
            own.restore({**shot, "host": {**shot["host"], "layers.0.bias": moved}}, {1: artifact})
            losses.append(own.probe(0, BATCH).loss)
        assert abs((losses[0] - losses[1]) / 2e-3 - gradient[feature]) < 5e-4
    assert np.abs(gradient).max() > 5e-3


def norms_are_those_of_each_layer(make: Make, artifact: Artifact) -> None:
    """A step of plain descent at a rate of 1 is the gradient."""
    own = make(optimisation=Optimisation(optimizer="sgd"))
    graft(own, artifact, seed=1, alpha=0.4)
    train(own, 0, 2)
    before, norms = flat(own.snapshot()["host"]), own.norms(BATCH)
    train(own, 2, 3, Rates(1.0, {}))
    after = flat(own.snapshot()["host"])
    for row, site in enumerate(own.sites):
        names = [name for name in before if name.startswith(f"{site}.")]
        assert names
        weights = np.concatenate([before[name].ravel() for name in names]).astype(np.float64)
        moved = np.concatenate([(before[n] - after[n]).ravel() for n in names]).astype(np.float64)
        assert norms.weight[row] == pytest.approx(np.linalg.norm(weights), rel=1e-5)
        assert norms.gradient[row] == pytest.approx(np.linalg.norm(moved), rel=1e-4)
    assert norms.gradient.dtype == norms.weight.dtype == np.float32
    assert norms.gradient.shape == norms.weight.shape == (len(own.sites),)
    # A kernel's parameters are none of its layer's, and the averages are what is judged.
    own = make(optimisation=Optimisation(ema_decay=0.9))
    train(own, 0, 4)
    average = flat(own.snapshot()["host_average"])
    squares = [float((p.astype(np.float64) ** 2).sum()) for p in average.values()]
    assert np.linalg.norm(own.norms(BATCH).weight) == pytest.approx(sum(squares) ** 0.5, rel=1e-5)


def norms_hand_on_what_is_not_finite(make: Make, artifact: Artifact) -> None:
    own = make()
    shot = own.snapshot()
    broken = {**shot["host"], "layers.1.bias": np.full_like(shot["host"]["layers.1.bias"], np.nan)}
    own.restore({**shot, "host": broken}, {})
    norms = own.norms(BATCH)
    assert np.isnan(norms.gradient).all()
    assert np.isnan(norms.weight).tolist() == [False, True]


def failures_are_contained_and_counted_once_a_step(make: Make, artifact: Artifact) -> None:
    broken = {n: np.full_like(p, np.nan) for n, p in draw(artifact).items()}
    for parts in (1, 4):
        own, bare = (make(optimisation=Optimisation(accumulate=parts)) for _ in range(2))
        twice = own.hold()
        graft(own, artifact, alpha=1.0, params=broken)
        for step in range(1, 4):
            ours, theirs = (
                np.frombuffer(train(each, step, step + 1), np.float32) for each in (own, bare)
            )
            assert_close(ours, theirs)
            if step == 2:
                (event,) = own.absorb(step)
                assert (event.kind, event.value) == (EventKind.ERRORS, 2.0)
                twice = own.hold()
        # Taken back, a kernel that has stopped runs again, until its third failure.
        own.take_back(twice)
        train(own, 3, 4)
        held = own.hold()
        own.absorb(4)
        assert own.seeds.stage[0, 0] == SeedLifecycleState.ERROR_RECOVERY
        assert not [name for name in flat(own.snapshot()) if name.startswith("moments/")]
        assert all(np.isfinite(p).all() for p in flat(own.snapshot()["host"]).values())
        # What was counted and not yet absorbed is held too.
        own.take_back(held)
        (event,) = own.absorb(4)
        assert (event.kind, event.value) == (EventKind.ERRORS, 3.0)
        own.apply(Event(4, 0, 0, EventKind.RESET))
        graft(own, artifact, step=4, alpha=1.0)
        assert np.isfinite(np.frombuffer(train(own, 4, 6), np.float32)).all()
        assert own.absorb(6) == []


LAWS: tuple[Callable[[Make, Artifact], None], ...] = (
    hold_then_take_back_is_the_identity,
    restore_after_snapshot_is_the_identity,
    a_graft_at_alpha_zero_leaves_the_host_as_it_was,
    an_incubating_kernel_trains_and_its_host_knows_nothing,
    parts_of_a_batch_are_the_batch,
    averages_are_their_closed_form,
    each_group_is_clipped_by_its_own_norm,
    decay_is_decoupled_and_by_the_rate,
    a_rate_of_zero_leaves_a_kernel_as_it_was,
    rates_are_data,
    surgery_leaves_incumbents_bitwise,
    judging_changes_nothing,
    losses_without_are_losses_muted,
    a_probe_is_what_the_layer_sees,
    norms_are_those_of_each_layer,
    norms_hand_on_what_is_not_finite,
    failures_are_contained_and_counted_once_a_step,
)
