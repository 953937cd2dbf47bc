"""The gym's families as tasks: what the gym draws, on hosts that it would draw."""

import numpy as np
import pytest

from esper.errors import InputError
from esper.tamiyo.gym import FAMILIES, HELD_OUT, Environment
from esper.tolaria._config import make_config, sizes_of
from esper.tolaria.comparison import make_comparison
from esper.tolaria.comparison._arm_config import treatment_config
from esper.tolaria.tasks import DRAWN_BY_SEED, check_task_name, load_task, task_of_seed


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_a_task_of_its_own_shape(name):
    task, again = load_task(f"gym:{name}"), load_task(f"gym:{name}?draw=0")
    assert task.digest == again.digest
    assert task.name == again.name == f"gym:{name}"
    assert {part: len(split) for part, split in task.splits.items()} == {
        "train": 512,
        "validation": 256,
        "test": 512,
    }
    assert task.train.x.shape[1] == FAMILIES[name].inputs == task.host_sizes[0]
    assert set(np.unique(task.train.y)) == {0, 1}
    shapes = Environment()
    hidden = task.host_sizes[1:-1]
    assert 1 <= len(hidden) <= shapes.depth
    assert set(hidden) <= set(shapes.widths)
    assert task.host.grow_at == tuple(f"layers.{i}" for i in range(len(hidden)))


def test_draws_differ_in_data_and_in_hosts():
    tasks = [load_task(f"gym:moons?draw={draw}") for draw in range(8)]
    assert len({task.digest for task in tasks}) == 8
    assert len({task.host_sizes for task in tasks}) > 2


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gym:moon", r"no family 'moon': expected gym:FAMILY .* did you mean 'gym:moons'\?"),
        ("gym:", "no family ''"),
        ("gym:moons?draw=x", r"whole number from 0, such as gym:moons\?draw=3; got 'x'"),
        ("gym:moons?draw=-1", "whole number from 0"),
        ("gym", "unknown task 'gym': expected one of .*gym:FAMILY"),
    ],
)
def test_what_is_no_family_is_refused_by_name(name, says):
    with pytest.raises(InputError, match=says):
        check_task_name(name)


def test_runs_in_them_are_as_the_gym_has_them():
    config, gym = make_config(task=f"gym:{HELD_OUT[0]}?draw=2", backend="jax"), Environment()
    assert config.steps == gym.boundaries * gym.steps
    assert config.decide_every == gym.steps
    assert config.ramp_steps == gym.ramp
    assert config.batch_size == gym.batch
    assert config.seeds_per_layer == gym.seeds
    offered = {(offer.blueprint, offer.width) for offer in gym.offers}
    sizes = {(name, next(iter(sizes_of(config, name).values()))) for name in config.blueprints}
    assert sizes <= offered


def test_sizes_are_of_all_blueprints_or_of_one():
    config = make_config(
        task="spirals",
        backend="jax",
        blueprints=["residual_mlp", "bottleneck"],
        blueprint_sizes={"width": 4, "residual_mlp.width": 16},
    )
    assert sizes_of(config, "bottleneck") == {"width": 4}
    assert sizes_of(config, "residual_mlp") == {"width": 16}
    says = "'low_rank.rank', and 'low_rank' is none of `blueprints`, residual_mlp"
    with pytest.raises(InputError, match=says):
        make_config(task="spirals", backend="jax", blueprint_sizes={"low_rank.rank": 2})


def test_seeds_of_a_comparison_draw_tasks_of_their_own(tmp_path):
    assert task_of_seed("spirals", 3) == "spirals"
    assert task_of_seed("gym:moons", 3) == "gym:moons"
    name = f"gym:moons{DRAWN_BY_SEED}"
    assert [task_of_seed(name, seed) for seed in (0, 3)] == ["gym:moons", "gym:moons?draw=3"]
    asked = make_comparison(task=name, controls=("static-small",))
    assert asked.design("steps").task_by_seed
    assert not make_comparison(task="gym:moons", controls=("fixed",)).design("steps").task_by_seed
    assert treatment_config(asked, 3, tmp_path).task == "gym:moons?draw=3"
