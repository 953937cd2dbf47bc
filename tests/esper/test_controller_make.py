import pytest

from esper import tamiyo
from esper.errors import InputError
from esper.tamiyo import (
    CONTROLLERS,
    TRIGGERS,
    BanditController,
    FixedController,
    HeuristicController,
    RandomController,
    make_controller,
    make_trigger,
)
from tests.esper.controlled import A, observe


def test_the_public_names():
    assert tamiyo.__all__ == sorted(tamiyo.__all__, key=lambda name: (not name.isupper(), name))
    assert all(hasattr(tamiyo, name) for name in tamiyo.__all__)


@pytest.mark.parametrize(
    ("kind", "values", "made"),
    [
        ("fixed", {"every": 100}, FixedController),
        ("random", {}, RandomController),
        ("heuristic", {}, HeuristicController),
        ("bandit", {"trigger": {"kind": "held_out_gain", "window": 3}}, BanditController),
    ],
)
def test_every_kind_is_made_from_plain_values(kind, values, made):
    assert type(make_controller(kind, **values)) is made


def test_none_is_no_controller():
    assert make_controller("none") is None
    assert set(CONTROLLERS) == {
        "none",
        "fixed",
        "random",
        "heuristic",
        "bandit",
        "learned",
        "service",
    }


@pytest.mark.parametrize("kind", sorted(TRIGGERS))
def test_every_trigger_has_defaults_and_goes_with_the_controllers_that_take_one(kind):
    assert type(make_trigger(kind)) is TRIGGERS[kind]
    for controller in ("heuristic", "bandit"):
        assert make_controller(controller, trigger=kind) is not None


def test_values_reach_what_they_are_for():
    made = make_controller("heuristic", trigger={"kind": "schedule", "first": 100}, offset=1)
    assert made.decide(observe(50)) == []
    (decision,) = made.decide(observe(100))
    assert decision.reason == "step 100 of every 500 from 100"
    schedule = [{"step": 0, "action": "graft", "layer": 0, "kernel": A.kernel_id}]
    (decision,) = make_controller("fixed", schedule=schedule).decide(observe(0))
    assert decision.kernel_id == A.kernel_id


GRAFT = {"step": 0, "action": "graft", "layer": 0}


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("heuristics", {}, r"kind of a controller must be one of none, .* 'heuristic'\?"),
        ("none", {"trials": 1}, r"none controller does not take 'trials': it takes nothing"),
        ("heuristic", {"trail_steps": 1}, r"heuristic controller does not take 'trail_steps'"),
        ("heuristic", {"trigger": 3}, r"a trigger is a kind, .* got 3"),
        ("heuristic", {"trigger": {"patience": 3}}, r"a mapping with its kind, .* got \{'pat"),
        ("heuristic", {"trigger": {"kind": "plateau", 1: 2}}, r"plateau trigger .* take '1'"),
        ("bandit", {"trigger": "never"}, r"kind of a trigger must be one of .* got 'never'"),
        ("fixed", {}, r"either `schedule`, .* or `every`, .* got neither"),
        ("fixed", {"every": 5, "schedule": []}, r"`schedule`, .* or `every`, .* got both"),
        ("fixed", {"every": 0}, r"every must be a whole number of at least 1, got 0"),
        ("fixed", {"every": 1, "first": -1}, r"first must be a whole number of at least 0"),
        ("fixed", {"every": 1, "offset": -1}, r"offset must be a whole number of at least 0"),
        ("fixed", {"schedule": "graft"}, r"a schedule is a list of decisions, got 'graft'"),
        ("fixed", {"schedule": [GRAFT, 3]}, r"decision 1 of the schedule must be a mapping"),
        ("fixed", {"schedule": [{"step": 0}]}, r"decision 0 of the schedule lacks action, layer"),
        ("fixed", {"schedule": [GRAFT | {"x": 1}]}, r"decision 0 .* does not take 'x': it takes"),
        ("fixed", {"schedule": [GRAFT | {"action": "grow"}]}, r"action of decision 0 .* 'grow'"),
        ("fixed", {"schedule": [GRAFT | {"action": "reset"}]}, r"reset at once by every"),
        ("fixed", {"schedule": [GRAFT | {"step": -1}]}, r"its step must be a whole number"),
        ("fixed", {"schedule": [GRAFT | {"layer": -1}]}, r"its layer must be a whole number"),
        ("fixed", {"schedule": [GRAFT | {"seed": 0.5}]}, r"its seed must be a whole number"),
        ("fixed", {"schedule": [GRAFT | {"alpha": 2}]}, r"its alpha must be .* at most 1, got 2"),
        ("fixed", {"schedule": [GRAFT | {"kernel": -1}]}, r"its kernel, where it is no id, must"),
        ("fixed", {"schedule": [GRAFT | {"kernel": "a"}]}, r"64 lower-case .* got 'a'"),
    ],
)
def test_what_is_not_known_is_refused(kind, values, message):
    with pytest.raises(InputError, match=message):
        make_controller(kind, **values)
