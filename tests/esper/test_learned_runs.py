"""A policy file decides in real runs: what it is shown is measured, and the same when resumed."""

import re

import equinox as eqx
import jax
import numpy as np
import pytest

from esper.errors import InputError, Interrupted
from esper.nissa._entries import describe_entry, explain_entry
from esper.tamiyo.policy import SUMMARY, Familiar, LoadedPolicy, make_effects, save_policy
from esper.tolaria import Hooks, decisions_of, make_config, replay_run, resume_run, start_run
from esper.urza import Library
from tests.esper.advisors import small_advisor
from tests.esper.runs import EVENTFUL, config, entries
from tests.esper.test_cli import esper_here


def save_small_policy(path, leanings):
    """One that has seen no network late in its run."""
    policy = small_advisor(leanings).policy
    own = np.where([name == "progress" for name in SUMMARY], 1.0, 1e6).astype(np.float32)
    save_policy(
        path,
        LoadedPolicy(
            policy=policy,
            effects=eqx.filter_jit(lambda key: make_effects(key, policy.width, members=2))(
                jax.random.key(0)
            ),
            familiar=Familiar(np.zeros_like(own), own, np.float32(0.8)),
            max_epistemic=1e6,
            min_confidence=0.0,
            card={},
        ),
    )


@pytest.fixture
def asked(tmp_path, artifact):
    library = Library(tmp_path / "library")
    library.put(artifact)
    library.close()
    save_small_policy(tmp_path / "small.policy", {"graft": 1.5, "unload": 1.0})
    values = {
        **EVENTFUL, "controller": "learned", "policy": tmp_path / "small.policy", "safety": {},
        "steps": 120, "grow_at": ["layers.0"], "initialisation": "as_compiled", "variants": 1,
        "blueprint_sizes": {"width": 8},
    }  # fmt: skip
    return config(tmp_path, "torch", values)


def test_a_policy_decides_in_a_run_and_goes_on_where_it_stopped(asked, tmp_path):
    shown = []
    start_run(tmp_path / "whole", asked, hooks=Hooks(on_boundary=shown.append))
    found = entries(tmp_path / "whole")
    loads = [entry for entry in found if entry["kind"] == "load"]
    assert {"load", "activate", "worth", "note"} <= {entry["kind"] for entry in found}
    assert all(entry["reason"].startswith("the policy expects") for entry in loads)
    decided = [own.decision for own in decisions_of(found)]
    assert len(decided) >= len(loads)
    assert all(own["low"] <= own["value"] <= own["high"] for own in decided)
    notes = [entry for entry in found if entry["kind"] == "note"]
    # Nothing was grafted late, and why not was said.
    assert [entry["step"] for entry in notes] == [100]
    assert max(entry["step"] for entry in loads) < 100
    assert "its progress is 1.04 times as far off as anything that was" in explain_entry(notes[0])
    assert describe_entry(notes[0]) == "the controller notes"
    assert replay_run(tmp_path / "whole").lines == len(found)
    told = esper_here("tamiyo", "explain", tmp_path / "whole", check=0).output
    assert "What was decided, expected, and measured" in told
    assert re.search(r"100 .* its progress is 1.04 times as far off", told)

    now = -1

    def count(step, _):
        nonlocal now
        now = step

    with pytest.raises(Interrupted):
        start_run(
            tmp_path / "halved", asked, hooks=Hooks(on_step=count, stop=lambda: now + 1 >= 69)
        )
    resume_run(tmp_path / "halved")
    assert entries(tmp_path / "halved") == found


def test_a_run_in_which_nothing_was_wanted_is_explained_too(asked, tmp_path):
    save_small_policy(tmp_path / "small.policy", {"wait": 100.0})
    start_run(tmp_path / "run", asked.model_copy(update={"steps": 40}))
    told = esper_here("tamiyo", "explain", tmp_path / "run", check=0).output
    assert told == "it waited at every boundary: nothing else was likelier to it\n"


def test_a_run_that_no_policy_decided_is_not_explained(asked, tmp_path):
    bare = asked.model_copy(update={"steps": 20, "controller": "none", "policy": None})
    start_run(tmp_path / "run", bare)
    told = esper_here("tamiyo", "explain", tmp_path / "run", check=2).output
    assert "nothing was decided of which an effect was expected: expected one that was" in told


def test_a_policy_is_asked_of_learned_runs_alone(tmp_path):
    with pytest.raises(InputError, match="`policy` is for runs with `controller: learned`"):
        make_config(task="spirals", backend="jax", policy=tmp_path / "some.policy")
    made = make_config(
        task="spirals", backend="jax", policy=tmp_path / "some.policy", controller="learned"
    )
    assert made.policy == tmp_path / "some.policy"


def test_a_policy_that_is_not_there_is_refused_before_anything_is_trained(asked, tmp_path):
    missing = asked.model_copy(update={"policy": tmp_path / "none.policy"})
    with pytest.raises(InputError, match="there is no policy"):
        start_run(tmp_path / "run", missing)
    assert not (tmp_path / "run").exists()
