"""An advisor by a policy: many models in one pass, each as if it were alone."""

import dataclasses
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from esper.contracts import ModelReport
from esper.errors import InputError
from esper.execution import count_compilations
from esper.tamiyo import Action, LearnedController, ReadingsRecorder, Worth
from esper.tamiyo.graph import (
    KERNEL,
    Flow,
    Node,
    Readings,
    make_topology,
    model_graph,
    pad_topology,
)
from esper.tamiyo.policy import SUMMARY, Familiar, LoadedPolicy, make_effects, make_policy
from esper.tamiyo.service import (
    News,
    PolicyAdvisor,
    Report,
    Tamiyo,
    observation_of,
    report_of,
    seeds_now,
)
from esper.tamiyo.service._readings import edges_of, readings_of
from esper_functional import Event, EventKind, apply_event, init_seeds
from tests.esper.contract_values import data_of
from tests.esper.controlled import boundary, observe
from tests.esper.tamiyo_reports import ACTIVE, FAILED, placed, report, signals
from tests.esper.tamiyo_reports import KERNEL as KERNEL_ID
from tests.esper.test_learned import CANDIDATES
from tests.esper.test_tamiyo_service import no_health, seen


@pytest.fixture(scope="module")
def advisor():
    keys = jax.random.split(jax.random.key(3))
    made = make_policy(keys[0], width=8, rounds=1, heads=2)
    # A new policy is sure of nothing; this one never waits where it need not.
    first = made.kind
    kind = eqx.tree_at(
        lambda own: (own.weight, own.bias),
        first,
        (first.weight * 1_000.0, jnp.array([-1e4, 0.0, 0.0, 0.0, 0.0])),
    )
    zeros = np.zeros(len(SUMMARY), np.float32)
    everything = Familiar(zeros, zeros + 1.0, np.float32(1e9))
    return PolicyAdvisor(
        LoadedPolicy(
            policy=eqx.tree_at(lambda own: own.kind, made, kind),
            effects=make_effects(keys[1], 8, members=2),
            familiar=everything,
            max_epistemic=math.inf,
            min_confidence=0.0,
            card={},
        )
    )


def news(name, own, health=None):
    return News(name, (Report(own),), no_health() if health is None else health)


def models():
    """Of two buckets, in several states."""
    random = np.random.default_rng(0)
    made = []
    for index in range(6):
        count = 12 if index % 3 == 2 else 3
        stages = [0, 0] if index % 4 == 0 else [0, ACTIVE]
        stage = tuple(tuple(row) for row in random.choice(stages, (count, 2)).tolist())
        loss = float(random.uniform(0.1, 3.0))
        own = report(10 * index, count=count, stage=stage, alpha=0.5, validation_loss=(loss,))
        made.append(news(f"m{index}", own))
    return made


def test_many_models_in_one_call_are_decided_upon_as_each_by_itself(advisor):
    own = models()
    together = advisor.advise(own)
    alone = [advisor.advise([each])[0] for each in own]
    kinds = {decision.action for asked in together for decision in asked}
    assert len(kinds) >= 2, kinds
    for first, second in zip(together, alone, strict=True):
        assert [(d.action, d.layer, d.seed, d.kernel_id, d.alpha) for d in first] == [
            (d.action, d.layer, d.seed, d.kernel_id, d.alpha) for d in second
        ]
        for one, other in zip(first, second, strict=True):
            assert one.confidence == pytest.approx(other.confidence, rel=1e-4)
            assert 0.0 <= one.confidence <= 1.0
    order = [4, 0, 5, 2]
    assert [[d.layer for d in asked] for asked in advisor.advise([own[at] for at in order])] == [
        [d.layer for d in together[at]] for at in order
    ]


def test_models_that_come_and_go_compile_nothing(advisor):
    own = models()
    small = [each for each in own if each.report.shape[0] == 3]
    advisor.advise(small[:4])
    with count_compilations() as count:
        advisor.advise(small[:3])
        advisor.advise(small[1:4])
        advisor.policy = dataclasses.replace(advisor.policy, card={"trained": "again"})
        advisor.advise(small[:2])
    assert count() == 0


def test_models_of_a_new_size_wait_for_their_program_and_no_others_do(advisor):
    (own, *_) = models()
    aside = PolicyAdvisor(advisor.policy, compile_aside=True)
    assert aside.advise([own]) == [None]
    (program,) = aside._programs.values()
    program.result()
    assert aside.advise([own]) == advisor.advise([own])


def test_who_decides_compiles_nothing_however_many_act(advisor):
    small = [own for own in models() if own.report.shape[0] == 3]
    # Of a structure that no program was compiled for.
    fresh = make_policy(jax.random.key(5), width=4, rounds=1, heads=2)
    waits, acts = (
        eqx.tree_at(
            lambda own: (own.kind.weight, own.kind.bias),
            fresh,
            (fresh.kind.weight * 0.0, fresh.kind.bias.at[0].set(bias)),
        )
        for bias in (1e4, -1e4)
    )
    loaded = dataclasses.replace(
        advisor.policy, policy=waits, effects=make_effects(jax.random.key(6), 4, members=2)
    )
    aside = PolicyAdvisor(loaded, compile_aside=True)
    assert aside.advise(small) == [None] * 4
    (program,) = aside._programs.values()
    program.result()
    with count_compilations() as count:
        assert aside.advise(small) == [[]] * 4
        aside.exchange(dataclasses.replace(loaded, policy=acts))
        assert all(aside.advise(small))
    assert count() == 0


def test_what_it_asks_for_is_legal(advisor):
    for own in models():
        stage = own.report.stage
        for decision in advisor.advise([own])[0]:
            if decision.action is Action.GRAFT:
                assert stage[decision.layer, decision.seed] == 0
                assert decision.kernel_id == KERNEL_ID
            else:
                assert stage[decision.layer, decision.seed] == ACTIVE
    nothing = report(stage=0, grows=(False,) * 3)
    # Of nothing but waiting it is sure.
    assert advisor.advise([news("m", nothing)]) == [[]]


def test_a_policy_that_knows_no_such_network_waits(advisor):
    (own, *_) = models()
    assert advisor.advise([own]) != [[]]
    strict = dataclasses.replace(
        advisor.policy, familiar=advisor.policy.familiar._replace(threshold=np.float32(1e-6))
    )
    assert PolicyAdvisor(strict).advise([own]) == [[]]


def test_it_sees_what_was_seen_since_the_report_and_resets_what_failed(advisor):
    health = seen(signals(1, layer_id=1, step=(20,), stage=FAILED, error_count=3))
    own = news("m", report(stage=placed(ACTIVE, (1, 0), 0), grows=(False,) * 3), health)
    (decision,) = advisor.advise([own])[0]
    assert (decision.action, decision.layer, decision.seed) == (Action.RESET, 1, 0)


def test_a_policy_makes_one_choice_at_a_boundary(advisor):
    own = models()[0]
    assert advisor.advise([News(own.model, own.reports, own.health, fresh=False)]) == [[]]


def test_readings_are_the_report_filled_up_to_buckets():
    own = report(
        250, stage=placed(ACTIVE, (2, 1), 0), alpha=0.25, health=placed(0.5, (2, 1), None),
        worth=placed(0.125, (2, 1), None), worth_half=placed(0.0625, (2, 1), None),
        held=placed(0, (2, 1), None), rollbacks=(5, 9), parameters=150, flops=300.0,
        train_loss=(1.0, 2.0), senders=(0, 1, 1), receivers=(1, 2, 1),
    )  # fmt: skip
    each = news("m", own)
    edges = edges_of(each.report)
    found = readings_of(each, len(edges.there))
    assert edges.there.tolist() == [True] * 3 + [False] * 5
    # The site that feeds itself has no edge for it.
    assert int(edges.taken.sum()) == 4
    assert (found.progress, found.rollbacks) == (0.25, 2.0)
    assert (found.parameters, found.flops) == (1.5, 1.5)
    np.testing.assert_array_equal(found.train_loss, np.float32([1, 2, np.nan, np.nan]))
    assert found.health[2, 1] == 0.5
    assert np.isnan(found.health[0, 0])
    assert found.held.shape == (8, 2, KERNEL)
    assert (found.held[2, 1] == 0.5).all()
    assert not found.held[0].any()
    assert found.kernels.shape == (4, KERNEL)
    assert found.fits[:3, 0].all()
    assert not found.fits[:3, 1:].any()
    assert not found.fits[3:].any()
    assert np.isnan(found.worth[3:]).all()
    graph = model_graph(found, edges, np)
    assert all(np.isfinite(part).all() for part in graph[:4])
    assert graph.legal.unload.sum() == 1


def test_descriptions_of_another_version_are_refused_and_keep_no_other_from_advice(advisor):
    odd = report(descriptions=((0.5,) * 3,))
    with pytest.raises(InputError, match="'odd' describes kernels by 3 numbers, .* read 14"):
        advisor.advise([news("odd", odd)])
    own = Tamiyo(advisor)
    own.report("odd", odd)
    own.report("fine", report(validation_loss=(0.5,)))
    assert len(own.decide(0.0)) == 2
    assert own.counts.failures == {"advisor": 2}


def test_of_a_report_that_does_not_say_what_maps_follow_nothing_is_known_of_it():
    told, silent = (
        readings_of(news("m", report(10, **more)), 8).follows for more in ({}, {"follows": ()})
    )
    np.testing.assert_array_equal(told[:3], np.float32([(0.1, 0.4)] * 3))
    assert np.isnan(told[3:]).all()
    assert silent.shape == (8, 2)
    assert np.isnan(silent).all()


def test_readings_that_are_reported_are_read_again_as_they_were():
    random = np.random.default_rng(5)
    nodes = tuple(Node(f"s{row}", "linear", (3,), (4,), 12) for row in range(3))
    topology = make_topology(nodes, Flow((0, 1, 2), frozenset({(0, 1), (1, 2)})))
    described = np.zeros((4, KERNEL), np.float32)
    described[:2] = random.normal(size=(2, KERNEL))
    stage = np.zeros((8, 2), np.uint8)
    stage[1] = ACTIVE
    held = np.zeros((8, 2, KERNEL), np.float32)
    held[1] = random.normal(size=KERNEL)
    held[2, 0] = described[1]
    by_seed = random.random((5, 8, 2)).astype(np.float32)
    by_seed[0, 3:] = 0.0
    by_seed[1:, 0] = by_seed[1:, 3:] = np.nan
    fits = np.zeros((8, 4), np.bool_)
    fits[:3, 0] = fits[2, 1] = True

    def filled(values, dtype=np.float32):
        return np.concatenate([np.asarray(values, dtype), np.zeros(5, dtype)])

    sizes = np.zeros((8, 3), np.float32)
    sizes[:3] = (12, 3, 4)
    follows = np.full((8, 2), np.nan, np.float32)
    follows[:3] = [(-0.5, 0.25), (np.nan, 0.5), (0.0, 1.0)]
    own = Readings(
        progress=np.float32(0.25), train_loss=np.float32([1, 2, np.nan, np.nan]),
        validation_loss=np.float32([0.3, 0.7, 0.9, np.nan]), validation_accuracy=np.float32(0.1),
        first_loss=np.float32(2.0), loss_spread=np.float32(0.3), rollbacks=np.float32(1),
        parameters=np.float32(1.5), flops=np.float32(2.0), kind=np.zeros(8, np.int32),
        sizes=sizes, depth=filled([0, 1, 2]), grows=filled([1, 1, 1], np.bool_),
        gradient_norm=filled([0.1, np.nan, 0.3]), weight_norm=filled([1.1, 1.2, 1.3]),
        follows=follows,
        stage=stage, alpha=np.nan_to_num(by_seed[0]), health=by_seed[1],
        health_before=by_seed[2], worth=by_seed[3], worth_half=by_seed[4],
        age=np.where(stage > 0, np.float32(7), np.float32(0)), held=held, kernels=described,
        fits=fits,
    )  # fmt: skip
    first = Report(report(250, rollbacks=(5,), parameters=150, flops=400.0))
    observation = observation_of(first, seeds_now(first, no_health()))
    record = first.kernels[0]
    other = record.model_copy(update={"kernel_id": "b" * 64})
    taken = {(0, row): record for row in range(3)} | {(1, 2): other}
    told = ModelReport.model_validate_json(
        report_of(observation, topology, own, lambda *at: taken[at]).model_dump_json()
    )
    assert told.kernel_ids == ("a" * 64, "b" * 64)
    assert told.fits == ((0, None, None), (0, None, None), (0, 1, None))
    each = news("m", told)
    edges = edges_of(each.report)
    assert [part.tolist() for part in edges] == [part.tolist() for part in pad_topology(topology)]
    found = readings_of(each, len(edges.there))
    # A kernel that is held and not offered has a row too, and fits nowhere.
    np.testing.assert_array_equal(found.kernels[:2], described[:2])
    np.testing.assert_array_equal(found.kernels[2], held[1, 0])
    for name, wanted in own._asdict().items():
        if name != "kernels":
            np.testing.assert_array_equal(getattr(found, name), wanted, err_msg=name)
            assert np.asarray(getattr(found, name)).dtype == np.asarray(wanted).dtype, name


@given(data_of(ModelReport))
@settings(max_examples=30)
def test_whatever_a_contract_allows_becomes_features_that_are_finite(own):
    described = tuple((float(row[0]) if row else 0.5,) * KERNEL for row in own.descriptions)
    each = news("m", own.model_copy(update={"descriptions": described}))
    edges = edges_of(each.report)
    found = readings_of(each, len(edges.there))
    # jax, with which it is computed for an advisor, warns of nothing.
    with np.errstate(all="ignore"):
        graph = model_graph(found, edges, np)
    assert all(np.isfinite(part).all() for part in graph[:4])


def test_a_run_that_asks_tamiyo_does_what_it_does_by_itself(advisor):
    alone = LearnedController(policy=advisor.policy, offset=1)
    recorder, asked = ReadingsRecorder(offset=1), Tamiyo(advisor)
    seeds, kinds = init_seeds(2, 2), set()
    for step in range(50, 350, 50):
        observation = observe(
            step, 60.0 / step, 50.0 / step, seeds=seeds, candidates=CANDIDATES,
            worth=lambda *_: Worth(0.1, 0.05, 0.2),
        )  # fmt: skip
        wanted = boundary(alone, observation)
        assert observation.topology is not None
        readings = recorder.read(observation)
        told = report_of(
            observation, observation.topology(), readings,
            lambda row, layer, seen=observation: recorder.kernel(seen, row, layer),
        )  # fmt: skip
        asked.report("run", told)
        (advice,) = asked.decide(float(step))
        recorder.told(advice.decisions)
        assert [(d.action, d.layer, d.seed, d.kernel_id, d.alpha) for d in advice.decisions] == [
            (d.action, d.layer, d.seed, d.kernel_id, d.alpha) for d in wanted
        ]
        assert [d.confidence for d in advice.decisions] == pytest.approx(
            [d.confidence for d in wanted], abs=1e-5
        )
        for decision in advice.decisions:
            kinds.add(decision.action)
            if decision.action is Action.GRAFT:
                at = decision.layer, decision.seed
                seeds = apply_event(seeds, Event(step, *at, EventKind.LOAD))
                seeds = apply_event(seeds, Event(step, *at, EventKind.ACTIVATE, value=0.5))
    assert kinds
    assert asked.counts.failures == {}
