"""What is learned while models train: laws of the learner, on reports as models tell them."""

import dataclasses
import itertools
import json
import math

import equinox as eqx
import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file
from typer.testing import CliRunner

from esper.cli._app import app
from esper.errors import InputError
from esper.execution import count_compilations
from esper.tamiyo import Action, Decision
from esper.tamiyo.learning import (
    LEARNING,
    POLICY,
    OnlineLearner,
    OnlineSettings,
    Refusal,
    choice_kl,
)
from esper.tamiyo.learning._experienced import Experienced, experienced
from esper.tamiyo.learning._online_bucket import _DOUBTED, Bucket
from esper.tamiyo.policy import (
    SUMMARY,
    Choice,
    Familiar,
    Kind,
    LoadedPolicy,
    Logits,
    load_policy,
    log_prob,
    make_effects,
    make_policy,
    save_policy,
)
from esper.tamiyo.service import Experience, PolicyAdvisor, Report, Tamiyo
from tests.esper.tamiyo_reports import ACTIVE, KERNEL, placed, report
from tests.esper.test_tamiyo_service_policy import news

OTHER = "b" * 64
SETTINGS = OnlineSettings(
    batch=8, least=4, replays=8.0, rate=3e-2, exchange_every=2, save_every=10**6, most_kl=None,
    kl_weight=0.0,
)  # fmt: skip
NEAR = dataclasses.replace(SETTINGS, most_kl=0.05, kl_weight=1.0)
OFFERS = {
    "kernel_ids": (KERNEL, OTHER),
    "kernel_parameters": (7, 9),
    "kernel_flops": (9, 11),
    "descriptions": ((0.5,) * 14, (1.0,) * 14),
    "fits": ((0, 1), (0, None), (0, 1)),
}


@pytest.fixture(scope="module")
def first():
    keys = jax.random.split(jax.random.key(3))
    zeros = np.zeros(len(SUMMARY), np.float32)
    return LoadedPolicy(
        policy=make_policy(keys[0], width=8, rounds=1, heads=2),
        effects=make_effects(keys[1], 8, members=2),
        familiar=Familiar(zeros, zeros + 1.0, np.float32(1e9)),
        max_epistemic=math.inf,
        min_confidence=0.0,
        card={"about": "a test"},
    )


def graft(site=1, seed=0, kernel=KERNEL, **changes):
    return Decision(Action.GRAFT, site, seed, "to see", kernel, **changes)


def came(*decisions, reward=0.1, before=None, after=None):
    before = report(10, **OFFERS) if before is None else before
    after = report(20, **OFFERS) if after is None else after
    return Experience("m", Report(before), decisions, Report(after), reward)


def played(count=24):
    """Grafting at the second site pays; nothing else does."""
    some = (((), -0.1), ((graft(0),), -0.1), ((graft(1),), 0.3), ((graft(2),), -0.1))
    return [
        came(*decisions, reward=reward)
        for decisions, reward in itertools.islice(itertools.cycle(some), count)
    ]


def graph_of(experience):
    found = experienced(experience)
    assert isinstance(found, Experienced)
    return found.transition.graph


@eqx.filter_jit
def logits_of(policy, graph):
    return policy(graph)[0]


def played_transition():
    found = experienced(came())
    assert isinstance(found, Experienced)
    return found.transition


def probability(loaded, choice, graph):
    found = [np.asarray(own) for own in logits_of(loaded.policy, graph)]
    return float(np.exp(log_prob(Logits(*found), choice)))


def same(one, other):
    left, right = jax.tree.leaves(one), jax.tree.leaves(other)
    return len(left) == len(right) and all(
        np.array_equal(a, b) for a, b in zip(left, right, strict=True) if not callable(a)
    )


# What teaches.


def test_what_came_of_a_decision_is_a_step_from_graph_to_graph():
    asked = graft(2, 0, OTHER)
    after = report(20, stage=placed(ACTIVE, (2, 0), 0), **OFFERS)
    found = experienced(came(asked, reward=0.25, after=after))
    assert isinstance(found, Experienced)
    own = found.transition
    assert [int(part) for part in own.choice] == [Kind.GRAFT, 2, 0, 1, 0]
    assert (float(own.reward), bool(own.done)) == (0.25, False)
    assert own.graph.legal.graft[2, 1]
    assert not own.graph.legal.graft[1, 1]
    assert own.next_graph.legal.unload[2, 0]
    assert {leaf.dtype for leaf in jax.tree.leaves(own.graph)} <= {
        np.dtype(name) for name in ("float32", "int32", "bool")
    }
    ended = experienced(came(after=report(1_000, **OFFERS)))
    assert isinstance(ended, Experienced)
    assert bool(ended.transition.done)
    assert [int(part) for part in ended.transition.choice] == [0] * 5


@pytest.mark.parametrize(
    ("action", "alpha", "wanted"),
    [
        (Action.UNLOAD, 1.0, (Kind.UNLOAD, 1, 1, 0, 0)),
        (Action.FOSSILIZE, 1.0, (Kind.FOSSILIZE, 1, 1, 0, 0)),
        (Action.RETARGET, 0.5, (Kind.RETARGET, 1, 1, 0, 2)),
    ],
)
def test_what_is_done_to_a_seed_is_the_choice_that_leads_to_it(action, alpha, wanted):
    before = report(10, stage=placed(ACTIVE, (1, 1), 0), **OFFERS)
    found = experienced(came(Decision(action, 1, 1, "", alpha=alpha), before=before))
    assert isinstance(found, Experienced)
    assert tuple(int(part) for part in found.transition.choice) == wanted


REFUSED = {
    Refusal.SEVERAL: came(graft(0), graft(1)),
    Refusal.UNCHOOSABLE: came(Decision(Action.RESET, 1, 0, "")),
    Refusal.NOT_OFFERED: came(graft(1, kernel=OTHER)),
    Refusal.ILLEGAL: came(Decision(Action.UNLOAD, 1, 0, "")),
    Refusal.NOT_FINITE: came(reward=math.nan),
    Refusal.RESHAPED: came(
        after=report(20, descriptions=((0.5,) * 14,) * 5, fits=((0, None, None, None, None),) * 3)
    ),
    Refusal.UNREADABLE: came(before=report(10, descriptions=((0.5,) * 3,))),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_no_policy_can_learn_from_is_refused_by_reason(reason):
    assert experienced(REFUSED[reason]) is reason


@pytest.mark.parametrize(
    ("decision", "reason"),
    [
        (graft(1, alpha=0.5), Refusal.UNCHOOSABLE),
        (Decision(Action.RETARGET, 1, 1, "", alpha=0.3), Refusal.UNCHOOSABLE),
        (graft(1, kernel="c" * 64), Refusal.NOT_OFFERED),
        (graft(1, seed=1), Refusal.ILLEGAL),
    ],
)
def test_what_a_policy_would_not_have_done_so_is_refused(decision, reason):
    assert experienced(came(decision)) is reason


def test_refusals_are_counted_and_nothing_of_them_is_kept(first):
    learner = OnlineLearner(first, dataclasses.replace(SETTINGS, buckets=1, waiting=100))
    wide = came(before=report(10, count=12), after=report(20, count=12))
    learner.update([*REFUSED.values(), came(graft(1), reward=0.5), came(), wide], 60.0)
    counts = learner.counts
    assert counts.refused == {**dict.fromkeys(REFUSED, 1), Refusal.CROWDED: 1}
    assert (counts.taken, counts.reward) == (2, pytest.approx(0.3))
    assert counts.updates == 0
    small = OnlineLearner(first, dataclasses.replace(SETTINGS, most_bytes=1, waiting=1))
    small.update([came(), came()], 60.0)
    assert small.counts.refused == {Refusal.LOST: 1, Refusal.TOO_LARGE: 1}


# How it learns.


def test_what_pays_becomes_likelier(first):
    learner = OnlineLearner(first, SETTINGS)
    learner.update(played(240), 600.0)
    graph = graph_of(came())
    pays, costs = Choice(Kind.GRAFT, 1, 0, 0, 0), Choice(Kind.GRAFT, 0, 0, 0, 0)
    assert probability(learner.policy, pays, graph) > 2.0 * probability(first, pays, graph)
    lead, before = (
        probability(own, pays, graph) / probability(own, costs, graph)
        for own in (learner.policy, first)
    )
    assert lead > 1.5 * before
    counts = learner.counts
    # Each of the 240 is learned from 8 times on average, in batches of 8.
    assert (counts.updates, counts.skipped, counts.held_back) == (240, 0, 0)
    assert counts.taken == 240
    assert counts.kl > 0.0
    assert learner.policy.card == {
        "about": "a test", "online": {"updates": 240, "experiences": 240}
    }  # fmt: skip


def test_without_time_nothing_is_changed(first):
    learner = OnlineLearner(first, SETTINGS)
    learner.update(played(), 0.0)
    assert same(learner.policy.policy, first.policy)
    assert (learner.counts.taken, learner.counts.updates) == (0, 0)
    # It has waited, and is not lost.
    learner.update([], 600.0)
    assert learner.counts.taken == 24


def test_an_update_is_begun_only_where_there_is_the_time(first):
    now = itertools.count()
    learner = OnlineLearner(first, SETTINGS, clock=lambda: float(next(now)))
    learner.update(played(), 60.0)
    assert learner.counts.taken == 24
    done = learner.counts.updates
    assert 0 < done < 24
    learner.update([], 1.5)
    assert learner.counts.updates == done
    assert learner.counts.put_off == 1


def test_a_single_measurement_is_not_believed_for_ever():
    bucket = Bucket(played_transition(), SETTINGS, 0)
    bucket.took(0.2)
    for _ in range(_DOUBTED - 1):
        bucket.put_off()
    assert bucket.seconds == 0.2
    bucket.put_off()
    assert bucket.seconds == 0.0
    # Of several the longest goes at once.
    bucket.took(0.2)
    bucket.took(0.01)
    bucket.put_off()
    assert bucket.seconds == 0.01


def test_it_stays_near_the_policy_that_it_began_with(first):
    learner = OnlineLearner(first, NEAR)
    learner.update(played(), 600.0)
    counts, graph = learner.counts, graph_of(came())
    assert counts.updates + counts.held_back == 24
    assert NEAR.most_kl is not None
    assert 0.0 < counts.kl <= NEAR.most_kl
    before, after = (logits_of(own.policy, graph) for own in (first, learner.policy))
    assert float(choice_kl(before, after)) <= NEAR.most_kl + 1e-6
    pays = Choice(Kind.GRAFT, 1, 0, 0, 0)
    assert probability(learner.policy, pays, graph) > probability(first, pays, graph)


def test_where_it_may_go_nowhere_it_stays(first):
    learner = OnlineLearner(first, dataclasses.replace(NEAR, most_kl=0.0))
    learner.update(played(), 600.0)
    assert (learner.counts.updates, learner.counts.held_back) == (0, 24)
    assert same(learner.policy.policy, first.policy)


def test_only_heads_learn_so_that_estimates_stay_what_they_were(first):
    learner = OnlineLearner(first, SETTINGS)
    learner.update(played(), 600.0)
    graph, own = graph_of(came()), learner.policy
    assert not same(own.policy, first.policy)
    embed = eqx.filter_jit(lambda policy: policy.embed(graph))
    assert same(embed(own.policy), embed(first.policy))
    assert same((own.effects, own.familiar), (first.effects, first.familiar))


def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(first):
    learner = OnlineLearner(first, SETTINGS)
    learner.update(played(4), 600.0)
    own = learner.policy.policy
    bad = OnlineLearner(first, dataclasses.replace(SETTINGS, most_reward=1e38))
    bad.update([came(reward=1e38, after=report(1_000, **OFFERS)) for _ in range(4)], 600.0)
    assert (bad.counts.updates, bad.counts.skipped) == (0, 4)
    assert same(bad.policy.policy, first.policy)
    assert not same(own, first.policy)


def test_a_run_that_diverges_counts_no_more_than_the_bound(first):
    bounded, beyond = (OnlineLearner(first, SETTINGS) for _ in range(2))
    bounded.update([came(reward=-1.0), *played(7)], 600.0)
    beyond.update([came(reward=-1e6), *played(7)], 600.0)
    assert same(bounded.policy.policy, beyond.policy.policy)
    assert beyond.counts == bounded.counts


def test_another_model_of_a_known_bucket_compiles_nothing(first):
    learner = OnlineLearner(first, SETTINGS)
    learner.update(played(), 600.0)
    larger = came(before=report(10, count=5), after=report(20, count=5))
    with count_compilations() as count:
        learner.update([larger, *played(8)], 600.0)
    assert count() == 0
    assert learner.counts.updates == 24 + 9


def test_the_next_decision_is_of_the_newest_weights_and_compiles_nothing(first):
    advisor = PolicyAdvisor(first)
    own = news("m", report(10, **OFFERS))
    advisor.advise([own])
    advisor.exchange(first)
    learner = OnlineLearner(first, SETTINGS, exchanged=advisor.exchange)
    learner.update(played(), 600.0)
    assert same(advisor.policy.policy, learner.policy.policy)
    (asked,) = advisor.advise([own])
    assert asked is not None
    (decision,) = asked
    assert (decision.action, decision.layer) == (Action.GRAFT, 1)
    learner.update(played(8), 600.0)
    with count_compilations() as count:
        advisor.advise([own])
    assert count() == 0


def test_programs_are_compiled_aside_and_nothing_waits_for_them(first, tmp_path):
    settings = dataclasses.replace(SETTINGS, save_every=10)
    learner = OnlineLearner(first, settings, folder=tmp_path, compile_aside=True)
    learner.update(played(), 600.0)
    (program,) = learner._programs.values()
    program.result()
    learner.update([], 600.0)
    assert learner.counts.updates == 24
    learner.close()
    assert load_policy(tmp_path / POLICY).card["online"]["updates"] == 24


def test_it_learns_from_what_tamiyo_hands_over(first):
    advisor = PolicyAdvisor(first)
    learner = OnlineLearner(first, SETTINGS, exchanged=advisor.exchange)
    tamiyo = Tamiyo(advisor, learn=True, learner=learner)
    for step in range(10, 80, 10):
        tamiyo.report("m", report(step, grows=(False,) * 3, validation_loss=(5.0 / step,)))
        tamiyo.decide(float(step))
        tamiyo.learn(600.0)
    assert tamiyo.learner is learner
    assert tamiyo.counts.failures == {}
    assert learner.counts.taken == tamiyo.counts.experiences == 6
    assert learner.counts.updates > 0


# What is kept.


def test_what_was_saved_goes_on_to_the_same_bits(first, tmp_path):
    alone = OnlineLearner(first, NEAR)
    alone.update(played(), 600.0)
    alone.save(tmp_path / "kept")
    gone_on, shown = OnlineLearner(first, NEAR, exchanged=lambda own: shown.append(own)), []
    gone_on.load(tmp_path / "kept")
    assert same(shown[-1].policy, alone.policy.policy)
    more = [*played(13), came(reward=math.nan)]
    alone.update(more, 600.0)
    gone_on.update(more, 600.0)
    assert same(gone_on.policy.policy, alone.policy.policy)
    assert gone_on.counts == alone.counts
    alone.save(tmp_path / "one")
    gone_on.save(tmp_path / "other")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


def test_a_folder_holds_a_policy_as_any_other_and_what_it_goes_on_from(first, tmp_path):
    folder = tmp_path / "new" / "folder"
    settings = dataclasses.replace(SETTINGS, save_every=10)
    learner = OnlineLearner(first, settings, folder=folder)
    learner.update(played(), 600.0)
    written = load_policy(folder / POLICY)
    assert same(written.policy, learner.policy.policy)
    assert written.card["online"] == {"updates": 24, "experiences": 24}
    with pytest.raises(InputError, match=f"in {folder}: another service that learns .* stop it"):
        OnlineLearner(first, settings, folder=folder)
    learner.update(played(1), 0.0)
    learner.close()
    again = OnlineLearner(first, settings, folder=folder)
    # What waited when it was closed was taken in.
    assert again.counts.taken == 25
    assert same(again.policy.policy, learner.policy.policy)


def test_what_is_known_of_a_policy_says_that_it_learned_since(tmp_path):
    card = load_policy().card | {"online": {"updates": 24, "experiences": 1_234}}
    save_policy(tmp_path / "own", dataclasses.replace(load_policy(), card=card))
    told = CliRunner().invoke(app, ["tamiyo", "explain", "--policy", str(tmp_path / "own")])
    assert "since then it learned from 1,234 decisions of a service, in 24 updates" in told.stdout


def test_what_it_cannot_go_on_from_is_refused(first, tmp_path):
    learner = OnlineLearner(first, SETTINGS)
    learner.update(played(1), 60.0)
    learner.save(tmp_path / "kept")
    with safe_open(tmp_path / "kept", framework="numpy") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = json.loads(file.metadata()["esper"])
    for lacking, changed, message in (
        ("bucket 0 generator", {}, r"damaged, or holds nothing learned \('bucket 0 generator'\)"),
        ("", {"schema_version": 9}, "was written by a newer Esper, schema 9; this one reads up to"),
    ):
        own = {name: array for name, array in arrays.items() if name != lacking}
        save_file(own, tmp_path / "bad", {"esper": json.dumps(about | changed)})
        with pytest.raises(InputError, match=message):
            learner.load(tmp_path / "bad")
    own = arrays | {".params.kind.bias": np.zeros(3, np.float32)}
    save_file(own, tmp_path / "bad", {"esper": json.dumps(about)})
    with pytest.raises(InputError, match=r"bias is float32\[3\], and expected is float32\[5\]"):
        learner.load(tmp_path / "bad")
    other = dataclasses.replace(
        first, policy=make_policy(jax.random.key(9), width=16, rounds=1, heads=2)
    )
    with pytest.raises(InputError, match="holds what another policy has learned: go on with"):
        OnlineLearner(other, SETTINGS).load(tmp_path / "kept")
    with pytest.raises(InputError, match="was learned with layers 'heads', and asked for is 'all'"):
        OnlineLearner(first, OnlineSettings(layers="all")).load(tmp_path / "kept")
    with pytest.raises(InputError, match="there is no .*none: expected a file that a learner"):
        learner.load(tmp_path / "none")
    (tmp_path / LEARNING).write_bytes(b"something")
    with pytest.raises(InputError, match="is damaged, or holds nothing learned"):
        OnlineLearner(first, SETTINGS, folder=tmp_path)
    save_policy(tmp_path / "policy", first)
    with pytest.raises(InputError, match="holds nothing learned: expected a file that a learner"):
        learner.load(tmp_path / "policy")
    with pytest.raises(InputError, match="cannot be kept in .*; name another folder"):
        OnlineLearner(first, SETTINGS, folder=tmp_path / "policy")


@pytest.mark.parametrize(
    "options",
    [{"batch": 0}, {"temperature": 0.0}, {"most": 0.5}, {"most_kl": -1.0}, {"layers": "some"},
     {"discount": 1.5}, {"seed": -1}, {"capacity": 0}, {"replays": -1.0}],
    ids=lambda options: next(iter(options)),
)  # fmt: skip
def test_settings_out_of_range_are_refused(options):
    (name,) = options
    with pytest.raises(InputError, match=f"{name} of learning"):
        OnlineSettings(**options)
