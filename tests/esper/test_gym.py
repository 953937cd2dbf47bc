"""The gym: episodes are pure, twins exact, and what is filled up changes nothing."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esper.contracts import KernelSignature
from esper.errors import InputError
from esper.execution import count_compilations
from esper.tamiyo import make_controller
from esper.tamiyo.gym import FAMILIES, HELD_OUT, TRAINING, Environment, Offered
from esper.tamiyo.gym._controlled import Controlled, play, waiting
from esper.tamiyo.gym._families import draw_examples
from esper.tamiyo.gym._host import WIDTH
from esper.tamiyo.gym._kernels import KernelTable
from esper.tamiyo.policy import ALPHAS, Choice, Kind
from esper.tezzeret import kernel_from_blueprint, load_blueprint
from esper.tolaria.worth import REWARD_COMPONENTS
from esper_functional import SeedLifecycleState

OFFERS = (Offered("low_rank", 2), Offered("bottleneck", 3))
ENV = Environment(
    families=("blobs", "noise", "parity"), offers=OFFERS, depth=2, widths=(3, 8), seeds=2,
    boundaries=4, steps=2, ramp=2, batch=8, examples=16, validation=16,
)  # fmt: skip
COUNT = 8
reset = jax.jit(jax.vmap(ENV.reset))
step = jax.jit(jax.vmap(ENV.step))
act = jax.jit(jax.vmap(ENV.act))
advance = jax.jit(jax.vmap(lambda state: ENV.advance(state)[0]))
STATES, GRAPHS = reset(jax.random.split(jax.random.key(0), COUNT))
HELD = int(SeedLifecycleState.ACTIVE)


def chosen(kind, node=0, seed=0, kernel=0, alpha=0):
    return Choice(*(jnp.full(COUNT, own, jnp.int32) for own in (kind, node, seed, kernel, alpha)))


WAIT = chosen(Kind.WAIT)


def leaves_equal(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def close(found, expected, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def test_who_waits_earns_exactly_nothing_and_its_twin_is_itself():
    states, total = STATES, np.zeros(COUNT)
    for _ in range(ENV.boundaries):
        states, found = step(states, WAIT)
        total += np.asarray(found.reward)
        np.testing.assert_array_equal(found.info["loss"], found.info["twin_loss"])
        np.testing.assert_array_equal(found.reward, 0.0)
    assert found.done.all()
    np.testing.assert_array_equal(found.info["returned"], 0.0)


def test_what_failed_is_emptied_also_where_nothing_is_chosen():
    grafted, _ = step(STATES, chosen(Kind.GRAFT))
    seeds = grafted.growing.seeds
    failed = int(SeedLifecycleState.ERROR_RECOVERY)
    stage = jnp.where(seeds.stage == HELD, failed, seeds.stage).astype(seeds.stage.dtype)
    assert (stage == failed).any()
    broken = grafted._replace(
        growing=grafted.growing._replace(seeds=dataclasses.replace(seeds, stage=stage))
    )
    left = advance(broken)
    leaves_equal(left, advance(act(broken, WAIT)))
    assert not (np.asarray(left.growing.seeds.stage) == failed).any()
    np.testing.assert_array_equal(left.faults, broken.faults)


def test_the_twin_trains_as_the_network_does():
    world = ENV.world

    @jax.jit
    @jax.vmap
    def both(state):
        own = state.episode
        rest = (own.data, own.shape, own.rate, own.key, 0)
        growing, losses, _ = world.train(state.growing, *rest)
        twin, _, twins = world.train_host(state.twin, state.twin_moments, *rest)
        return (growing.trained.host, losses), (twin, twins)

    close(*both(STATES))


def test_steps_of_any_state_compile_nothing_and_are_pure():
    grown, _ = step(STATES, chosen(Kind.GRAFT, kernel=1))
    with count_compilations() as count:
        once = step(grown, chosen(Kind.UNLOAD))
        again = step(grown, chosen(Kind.UNLOAD))
        step(once[0], chosen(Kind.GRAFT, node=1))
    assert count() == 0
    leaves_equal(once, again)


def test_mapped_is_alone():
    choice = chosen(Kind.GRAFT, kernel=1)
    mapped, found = step(STATES, choice)
    alone = jax.jit(ENV.step)
    for i in (0, 3):
        own, other = alone(*jax.tree.map(lambda leaf, i=i: leaf[i], (STATES, choice)))
        close(own.readings.train_loss, mapped.readings.train_loss[i])
        close(other.graph, jax.tree.map(lambda leaf, i=i: leaf[i], found.graph), 1e-4)
        close(other.reward, found.reward[i])


def test_an_episode_ends_with_a_fresh_one_and_its_parts_add_up():
    states, parts, graft = STATES, np.zeros(COUNT), chosen(Kind.GRAFT, kernel=1)
    for boundary in range(ENV.boundaries):
        key = states.key
        states, found = step(states, graft if boundary == 1 else WAIT)
        named = [*REWARD_COMPONENTS, "rent"]
        close(sum(found.info[name] for name in named), found.reward)
        parts += np.asarray(found.reward)
        assert (np.asarray(found.info["rent"]) <= 0.0).all()
        assert bool(found.done.all()) == (boundary == ENV.boundaries - 1)
    close(found.info["returned"], parts, 1e-4)
    fresh, graphs = reset(key)
    close(states.episode.data, fresh.episode.data)
    close(found.graph, graphs, 1e-4)
    np.testing.assert_array_equal(states.boundary, 0)


@pytest.mark.parametrize("kind", list(Kind))
def test_what_a_choice_does_is_the_lifecycle_and_what_it_forbids_changes_nothing(kind):
    grafted = act(STATES, chosen(Kind.GRAFT, kernel=1))
    frozen = act(grafted, chosen(Kind.FOSSILIZE))
    for before in (STATES, grafted, frozen):
        stage = np.asarray(before.growing.seeds.stage)
        after = act(before, chosen(kind, kernel=1, alpha=2))
        now = np.asarray(after.growing.seeds.stage)
        held = stage[:, 0, 0]
        legal = kind in (Kind.WAIT, Kind.GRAFT) or held == HELD
        np.testing.assert_array_equal(after.illegal - before.illegal, 1.0 - np.asarray(legal))
        if kind == Kind.GRAFT:
            free = np.asarray(stage[:, 0] == 0).argmax(axis=1)
            assert (now[np.arange(COUNT), 0, free] == HELD).all()
        elif kind in (Kind.UNLOAD, Kind.FOSSILIZE):
            to = {Kind.UNLOAD: 0, Kind.FOSSILIZE: 4}[kind]
            np.testing.assert_array_equal(now[:, 0, 0], np.where(held == HELD, to, held))
        else:
            np.testing.assert_array_equal(now, stage)
        ramped = np.asarray(after.growing.seeds.ramp_to)[:, 0, 0]
        if kind == Kind.RETARGET:
            np.testing.assert_array_equal(ramped[held == HELD], ALPHAS[2])


def test_illegal_choices_are_dropped_and_counted():
    beyond = chosen(Kind.GRAFT, node=3)
    for choice in (chosen(Kind.UNLOAD), chosen(Kind.RETARGET, node=1), beyond):
        after = act(STATES, choice)
        leaves_equal(after.growing, STATES.growing)
        np.testing.assert_array_equal(after.illegal, 1.0)
    _, found = step(STATES, beyond)
    np.testing.assert_array_equal(found.info["illegal"], 1.0)
    assert (np.asarray(found.info["safety"]) < 0.0).all()


def test_a_zero_born_graft_changes_no_output_and_fossils_do_not_move():
    measure = jax.jit(jax.vmap(lambda s: ENV.world.measure(s.growing, s.episode.data,
                                                           s.episode.shape)))  # fmt: skip
    after = act(STATES, chosen(Kind.GRAFT, kernel=0))
    np.testing.assert_array_equal(measure(after).loss, measure(STATES).loss)
    for leaf in jax.tree.leaves(after.growing.trained.kernel_moments):
        np.testing.assert_array_equal(leaf, 0)
    trained, _ = step(after, WAIT)
    frozen = act(trained, chosen(Kind.FOSSILIZE))
    later, _ = step(frozen, WAIT)
    leaves_equal(later.growing.trained.kernels, frozen.growing.trained.kernels)
    pairs = zip(
        jax.tree.leaves(trained.growing.trained.kernels),
        jax.tree.leaves(after.growing.trained.kernels),
        strict=True,
    )
    assert any((np.asarray(now) != np.asarray(was)).any() for now, was in pairs)


def missing(params, shape, depth):
    """Everything of a host that is not there, by layer."""
    width, inputs = int(shape.width), int(shape.inputs)
    for i in range(ENV.depth):
        weight, bias = params[f"layers.{i}"]["weight"], params[f"layers.{i}"]["bias"]
        if i >= depth:
            yield from (weight, bias)
        yield from (weight[width:], bias[width:], weight[:, inputs if i == 0 else width :])
    yield from (params["out"]["weight"][:, width:], params["out"]["weight"][2:])


def test_what_is_not_there_stays_nothing_however_it_is_trained():
    states = STATES
    for choice in (
        chosen(Kind.GRAFT, kernel=1), chosen(Kind.GRAFT, node=1, kernel=0), WAIT,
    ):  # fmt: skip
        states, _ = step(states, choice)
    episode = states.episode._replace(key=states.boundary)
    plain = states._replace(key=states.boundary, episode=episode)
    seen = set()
    for i in range(COUNT):
        one = jax.tree.map(lambda leaf, i=i: np.asarray(leaf[i]), plain)
        shape = one.episode.shape
        seen.add((int(shape.inputs), int(shape.width), int(shape.depth)))
        for part in missing(one.growing.trained.host, shape, int(shape.depth)):
            assert not part.any()
        width = int(shape.width)
        for program, params in enumerate(one.growing.trained.kernels):
            last = {0: "up.weight", 1: "expand.weight"}[program]
            assert not params[last][:, width:].any()
    assert len(seen) > 2


@pytest.mark.parametrize("offer", [*OFFERS, Offered("residual_mlp", 3), Offered("gated", 2)])
def test_a_filled_up_kernel_is_the_blueprints(offer):
    table = KernelTable([Offered(offer.blueprint, offer.width + 2), offer], WIDTH)
    x = jax.random.normal(jax.random.key(1), (5, WIDTH))
    for inputs, outputs in ((2, 3), (8, 8), (5, 1)):
        params = table.first_params(jax.random.key(2), 1, inputs, outputs)[0]
        params = {name: jnp.where(own != 0.0, own + 0.1, 0.0) for name, own in params.items()}
        signature = KernelSignature(input_shape=(inputs,), output_shape=(outputs,))
        blueprint = load_blueprint(offer.blueprint)
        size = next(iter(blueprint.sizes))
        true = kernel_from_blueprint(blueprint, signature, sizes={size: offer.width})
        cut = {
            name: params[name][tuple(slice(axis) for axis in own.shape)]
            for name, own in true.params.items()
        }
        for name, own in params.items():
            assert np.count_nonzero(own) == np.count_nonzero(cut[name])
        seen = x.at[:, inputs:].set(0.0)
        filled = table.patterns[0].program.apply(params, seen)
        expected = true.program.apply(cut, x[:, :inputs])
        np.testing.assert_allclose(filled[:, :outputs], expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(filled[:, outputs:], 0.0)
        at = inputs - 1, outputs - 1
        assert table.parameters[1][at] == sum(own.size for own in true.params.values())


def test_worth_is_the_rise_of_the_loss_without_a_kernel():
    states, _ = step(act(STATES, chosen(Kind.GRAFT, kernel=1)), WAIT)
    worth = np.asarray(states.readings.worth)
    held = np.asarray(states.growing.seeds.stage) == HELD
    assert np.isnan(worth[:, : ENV.depth][~held]).all()
    muted = states.growing.seeds.replace(alpha=jnp.zeros_like(states.growing.seeds.alpha))
    without = states._replace(growing=states.growing._replace(seeds=muted))
    measure = jax.jit(jax.vmap(lambda s: ENV.world.measure(s.growing, s.episode.data,
                                                           s.episode.shape).loss))  # fmt: skip
    expected = measure(without) - measure(states)
    np.testing.assert_allclose(worth[:, 0, 0], expected, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_draws_both_classes_within_its_inputs(name):
    x, y = draw_examples(jnp.int32(0), (name,), jax.random.key(3), 256)
    assert x.shape == (256, WIDTH)
    assert not np.asarray(x[:, FAMILIES[name].inputs :]).any()
    assert 0.1 < float(np.mean(y)) < 0.9
    other, _ = draw_examples(jnp.int32(0), (name,), jax.random.key(4), 256)
    assert (np.asarray(other) != np.asarray(x)).any()


@pytest.mark.parametrize(("name", "right"), [("halves", (0.95, 1.0)), ("overlap", (0.78, 0.82))])
def test_a_line_is_as_good_as_anything_where_no_growth_is_needed(name, right):
    x, y = draw_examples(jnp.int32(0), (name,), jax.random.key(5), 20_000)
    inputs = np.concatenate([np.asarray(x), np.ones((len(x), 1))], axis=1)
    signs = 2.0 * np.asarray(y) - 1.0
    line, *_ = np.linalg.lstsq(inputs, signs, rcond=None)
    share = float(np.mean((inputs @ line > 0) == (signs > 0)))
    assert right[0] <= share <= right[1]


def test_held_out_families_are_in_no_training():
    assert not set(TRAINING) & set(HELD_OUT)
    assert set(Environment().families) == set(TRAINING)
    assert set(TRAINING) | set(HELD_OUT) == set(FAMILIES)


def test_edges_are_of_the_layers_that_are_there():
    for depth in (1, 2):
        edges = jax.tree.map(np.asarray, ENV.edges(depth))
        rows = [*range(depth), ENV.depth]
        assert np.flatnonzero(edges.there).tolist() == rows
        pairs = {
            (int(edges.slots[slot, node]), node)
            for slot, node in itertools.product(*map(range, edges.taken.shape))
            if edges.taken[slot, node] and edges.slot_kinds[slot, node] == 0
        }
        assert pairs == set(itertools.pairwise(rows))


def test_controllers_play_by_the_rules_and_find_their_kernels():
    def heuristic(_):
        trigger = {"kind": "schedule", "first": 2, "every": 2}
        return make_controller("heuristic", trigger=trigger, trial_steps=4)

    result = play(ENV, jax.random.key(5), 4, Controlled(ENV, heuristic), each_family=True)
    assert len(result.returned) == 12
    assert result.family.tolist() == [0, 1, 2] * 4
    assert (result.grafts > 0).all()
    alone = play(ENV, jax.random.key(5), 4, waiting, each_family=True)
    np.testing.assert_array_equal(alone.returned, 0.0)
    np.testing.assert_array_equal(alone.twin_loss, result.twin_loss)


def test_a_controller_that_probes_is_refused():
    def probing(_):
        return make_controller("heuristic", trigger={"kind": "gradient_bottleneck"})

    with pytest.raises(InputError, match="networks of the gym are not probed: give the controller"):
        play(ENV, jax.random.key(5), 4, Controlled(ENV, probing), each_family=True)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"families": ("blob",)}, "unknown family 'blob': expected some of blobs"),
        ({"families": ()}, "no family is named: expected some of blobs"),
        (
            {"depth": 5},
            "depth of an environment must be a whole number of .* at most 4",
        ),
        ({"widths": (9,)}, "widths of an environment must be .* at most 8, got 9"),
        ({"widths": ()}, "needs at least one of `widths`"),
        ({"validation": 12}, "a multiple of 8 as `validation`; got .* and 12"),
        ({"rates": (0.0, 0.01)}, r"finite and above 0, such as .*; got \(0.0, 0.01\)"),
        ({"rates": (0.02,)}, "rates of an environment are the least and the greatest"),
        ({"rates": (0.1, float("inf"))}, "rates of an environment"),
        ({"rates": (0.1, 0.01)}, "rates of an environment"),
        ({"steps": 0}, "steps of an environment must be a whole number of at least 1, got 0"),
    ],
)
def test_an_environment_that_cannot_be_is_refused(values, told):
    with pytest.raises(InputError, match=told):
        Environment(**values)


def test_kernels_that_cannot_be_filled_up_are_refused():
    for offers, told in [
        ((), "offers no kernel: name at least one"),
        ((Offered("norm_mlp", 4),), "'norm_mlp' cannot be offered by a gym: expected one named"),
    ]:
        with pytest.raises(InputError, match=told):
            assert dataclasses.replace(ENV, offers=offers).world
