"""Estimates of effects, what is familiar, and a policy as a file."""

import dataclasses
import json
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import save

from esper.errors import InputError
from esper.tamiyo.policy import (
    Choice,
    Effects,
    Kind,
    LoadedPolicy,
    Reliability,
    effect_loss,
    explain,
    learn_familiar,
    load_policy,
    make_effects,
    make_policy,
    platt,
    reliability,
    save_policy,
    summary,
)
from tests.esper.model_graphs import drawn_graph

WIDTH = 16
POLICY = make_policy(jax.random.key(0), width=WIDTH, rounds=1, heads=2)
GRAPHS = [drawn_graph(seed) for seed in range(24)]
SUMMARIES = np.stack([np.asarray(summary(graph)) for graph in GRAPHS])
GRAFT = Choice(Kind.GRAFT, 1, 0, 2, 0)


def eager(policy=POLICY, thresholds=(10.0, 0.0), method="ensemble", limit=1.25):
    # Eager to do something: it waits only where it must.
    policy = eqx.tree_at(lambda own: own.kind.bias, policy, jnp.array([-9.0, 3.0, 2.0, 1.0, 0.0]))
    effects = make_effects(jax.random.key(1), WIDTH, method=method)
    familiar = learn_familiar(SUMMARIES, SUMMARIES, margin=limit)
    return LoadedPolicy(policy, effects, familiar, *thresholds, {"task": "tests"})


@pytest.mark.parametrize("method", ["ensemble", "dropout"])
def test_estimates_are_the_same_each_time_and_waiting_does_nothing(method):
    effects = make_effects(jax.random.key(1), WIDTH, method=method)
    embedded = POLICY.embed(GRAPHS[0])
    ask = eqx.filter_jit(effects)
    first, again = ask(embedded, GRAFT), ask(embedded, GRAFT)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert float(first.epistemic) > 0.0
    assert float(first.aleatoric) > 0.0
    assert 0.0 < float(first.probability) < 1.0
    still = ask(embedded, Choice(0, 0, 0, 0, 0))
    assert [float(own) for own in still] == [0.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize("method", ["ensemble", "dropout"])
def test_what_there_were_data_for_is_learned_and_elsewhere_it_is_less_sure(method):
    """One number decides the effect, up to noise that differs from side to side."""
    random = np.random.default_rng(0)
    count = 512
    side = random.choice([-1.0, 1.0], count).astype(np.float32)
    noise = np.where(side > 0, 0.1, 0.5) * random.standard_normal(count)
    effect = (0.6 * side + noise).astype(np.float32)
    embedded = jax.tree.map(lambda leaf: jnp.zeros((count, *leaf.shape)), POLICY.embed(GRAPHS[0]))
    embedded = embedded._replace(whole=embedded.whole.at[:, 0].set(side))
    choices = Choice(*(np.full(count, own, np.int32) for own in GRAFT))
    effects = make_effects(jax.random.key(2), WIDTH, method=method)
    effects = eqx.tree_at(lambda own: own.scale, effects, jnp.float32(effect.std()))
    networks = len(effects.members.last.weight)
    weights = random.poisson(1.0, (count, networks)).astype(np.float32)
    adam = optax.adam(3e-3)
    params, static = eqx.partition(effects.members, eqx.is_array)

    def loss(params, key):
        own = eqx.tree_at(lambda tree: tree.members, effects, eqx.combine(params, static))
        keys = jax.random.split(key, count) if method == "dropout" else None
        if keys is None:
            each = jax.vmap(lambda *a: effect_loss(own, *a))
            return each(embedded, choices, effect, weights).mean()
        each = jax.vmap(lambda *a: effect_loss(own, *a))
        return each(embedded, choices, effect, jnp.ones((count, 1)), keys).mean()

    @jax.jit
    def step(params, moments, key):
        gradient = jax.grad(loss)(params, key)
        with jax.numpy_dtype_promotion("standard"):  # optax counts in integers
            updates, moments = adam.update(gradient, moments)
        return optax.apply_updates(params, updates), moments

    moments = adam.init(params)
    for key in jax.random.split(jax.random.key(3), 250):
        params, moments = step(params, moments, key)
    learned = eqx.tree_at(lambda tree: tree.members, effects, eqx.combine(params, static))
    one = jax.tree.map(lambda leaf: leaf[0], embedded)

    def ask(value) -> Effects:
        return learned(one._replace(whole=one.whole.at[0].set(value)), GRAFT)

    good, bad, far = ask(1.0), ask(-1.0), ask(12.0)
    assert float(good.effect) == pytest.approx(0.6, abs=0.15)
    assert float(bad.effect) == pytest.approx(-0.6, abs=0.2)
    assert float(good.probability) > 0.95
    assert float(bad.probability) < 0.3
    assert float(bad.aleatoric) > 2.0 * float(good.aleatoric)
    if method == "ensemble":
        assert float(far.epistemic) > 2.0 * float(good.epistemic)


def test_reliability_by_hand_and_the_calibration_that_mends_it():
    said = np.array([0.05, 0.05, 0.95, 0.95])
    curve = reliability(said, np.array([False, True, True, True]))
    assert isinstance(curve, Reliability)
    assert curve.counts.tolist() == [2, 0, 0, 0, 0, 0, 0, 0, 0, 2]
    assert curve.ece == pytest.approx((2 * 0.45 + 2 * 0.05) / 4)
    random = np.random.default_rng(0)
    logits = random.normal(0.0, 1.0, 20_000)
    came = random.random(20_000) < 1 / (1 + np.exp(-logits))
    boasting = 1 / (1 + np.exp(-(3.0 * logits + 1.0)))
    slope, shift = platt(boasting, came)
    assert slope == pytest.approx(1 / 3, abs=0.03)
    mended = 1 / (1 + np.exp(-(slope * (3.0 * logits + 1.0) + shift)))
    assert reliability(mended, came).ece < 0.02 < reliability(boasting, came).ece


def test_calibration_refuses_what_is_no_prediction():
    with pytest.raises(InputError, match="as many outcomes as probabilities, at least one: got 0"):
        reliability(np.zeros(0), np.zeros(0, bool))
    with pytest.raises(InputError, match=r"probabilities are in \[0, 1\], got 1.5"):
        reliability(np.array([1.5]), np.array([True]))


def test_advice_is_deterministic_and_of_many_as_of_each():
    loaded = eager()
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *GRAPHS[:4])
    many = loaded.decide_many(stacked)
    for graph, found in zip(GRAPHS[:4], many, strict=True):
        one = loaded.decide(graph)
        assert one == loaded.decide(graph)
        assert one.wanted == found.wanted
        assert one.effect[0] == pytest.approx(found.effect[0], abs=1e-5)
        assert one.effect[1] <= one.effect[0] <= one.effect[2]
        assert one.wanted.kind != Kind.WAIT
        assert len(one.reasons) == 3


def filled(tree, value):
    dynamic, static = eqx.partition(tree, eqx.is_inexact_array)
    return eqx.combine(jax.tree.map(lambda own: jnp.full_like(own, value), dynamic), static)


def test_it_waits_and_says_so_where_it_does_not_know():
    graph = GRAPHS[0]
    sure_policy = eager()
    sure = sure_policy.decide(graph)
    assert sure.remark == ""
    assert sure.choice == sure.wanted
    for thresholds, told in [
        ((1e-6, 0.0), "the effect is not known: estimates are .* apart, and may be 1e-06"),
        ((10.0, 1.0), "its probability to be is .*, and must be 1"),
    ]:
        unsure = eager(thresholds=thresholds).decide(graph)
        assert unsure.choice.kind == Kind.WAIT
        assert unsure.wanted == sure.wanted
        assert re.search(told, unsure.remark)
    # Comparisons with what is no number are false, whichever way they are asked.
    no_number = np.float32("nan")
    for wrong in (
        dataclasses.replace(sure_policy, effects=filled(sure_policy.effects, no_number)),
        dataclasses.replace(
            sure_policy, familiar=sure_policy.familiar._replace(threshold=no_number)
        ),
    ):
        lost = wrong.decide(graph)
        assert (lost.choice.kind, lost.wanted) == (Kind.WAIT, sure.wanted)
        assert "nan" in lost.remark
    nodes = np.array(graph.nodes)
    nodes[:5, 1] = 8.0
    strange = eager().decide(graph._replace(nodes=nodes))
    assert strange.choice.kind == Kind.WAIT
    assert strange.distance > 1.0
    assert re.search(r"unlike any that .* trained on: its m\w+_is_convolution", strange.remark)


def test_reasons_are_the_gradient_times_the_feature():
    graph = GRAPHS[2]
    loaded = eager()
    wanted = loaded.decide(graph).wanted
    every = dict(explain(loaded.policy, graph, wanted, count=1_000))
    top = loaded.decide(graph).reasons
    assert [abs(value) for _, value in top] == sorted(map(abs, every.values()), reverse=True)[:3]
    assert "progress" in every
    assert "site_depth" in every


@pytest.mark.parametrize("method", ["ensemble", "dropout"])
def test_saved_and_loaded_it_gives_the_same_advice(tmp_path, method):
    loaded = eager(method=method)
    save_policy(tmp_path / "own.safetensors", loaded)
    again = load_policy(tmp_path / "own.safetensors")
    assert again.card == loaded.card
    for graph in GRAPHS[:3]:
        assert again.decide(graph) == loaded.decide(graph)


def rewritten(path, change):
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        about = json.loads(file.metadata()["esper"])
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(about, arrays)
    path.write_bytes(save(arrays, {"esper": json.dumps(about)}))


CHANGES = {
    "was written by a newer Esper, schema 99": lambda about, _: about.update(schema_version=99),
    "sees other node features .*shininess": lambda about, _: about["features"]["node"].append(
        "shininess"
    ),
    "is no policy of Esper's": lambda about, _: about.update(kind="cake"),
    "is damaged: it lacks or has too many": lambda _, arrays: arrays.pop(sorted(arrays)[3]),
    "is damaged: .* has the shape": lambda _, arrays: arrays.update(
        {sorted(arrays)[0]: np.zeros((2, 2, 2), np.float32)}
    ),
    "is damaged: .* holds what is no finite number": lambda _, arrays: arrays.update(
        {name: np.full_like(own, np.nan) for name, own in arrays.items()}
    ),
    "its schema_version is None, and expected is": lambda about, _: about.pop("schema_version"),
    "is damaged: policy: Field required": lambda about, _: about.pop("policy"),
    r"policy.width: .* valid integer \(got 'eight'": lambda about, _: about["policy"].update(
        width="eight"
    ),
    r"min_confidence: .* valid number \(got '0.5'": lambda about, _: about.update(
        min_confidence="0.5"
    ),
    "features: .* valid dictionary": lambda about, _: about.update(features=["node"]),
    "is damaged: .*3 heads": lambda about, _: about["policy"].update(heads=3),
}


@pytest.mark.parametrize("told", CHANGES)
def test_another_file_is_refused(tmp_path, told):
    path = tmp_path / "own.safetensors"
    save_policy(path, eager())
    rewritten(path, CHANGES[told])
    with pytest.raises(InputError, match=told):
        load_policy(path)


def test_no_file_and_a_torn_one_are_refused(tmp_path):
    with pytest.raises(InputError, match="there is no policy .*: expected a file that"):
        load_policy(tmp_path / "none.safetensors")
    path = tmp_path / "own.safetensors"
    save_policy(path, eager())
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match="is damaged or no policy"):
        load_policy(path)


def test_an_unknown_method_and_an_ensemble_of_one_are_refused():
    with pytest.raises(InputError, match="unknown method 'guess'"):
        make_effects(jax.random.key(0), 8, method="guess")
    with pytest.raises(InputError, match="at least 2 members, got 1"):
        make_effects(jax.random.key(0), 8, members=1)
