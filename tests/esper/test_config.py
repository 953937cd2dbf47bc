import numpy as np
import pytest

from esper.errors import InputError
from esper.tolaria import batch_indices, initial_host, load_task, make_config, read_config_file


def test_defaults_of_a_task_stand_below_what_is_given():
    assert make_config(task="digits", backend="jax").batch_size == 64
    assert make_config(task="digits", backend="jax", batch_size=None).batch_size is None
    assert make_config(task="spirals", backend="jax").steps == 2_500


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"backend": "torhc"}, "unknown backend 'torhc'.*did you mean 'torch'"),
        ({"blueprints": ["gatde"]}, "unknown blueprint 'gatde'.*did you mean 'gated'"),
        ({"stepz": 3}, "unknown key 'stepz'; did you mean 'steps'"),
        ({"steps": 0}, "steps: .*greater than or equal to 1, got 0"),
        ({"learning_rate": -1.0}, "learning_rate: .*greater than 0, got -1.0"),
        ({"steps": "many"}, "steps: .*valid integer, got 'many'"),
        ({"steps": True}, "steps: .*valid integer, got True"),
        ({"blend": "convx"}, "blend: .*'convex', 'residual' or 'sequential', got 'convx'"),
        ({"min_worth": float("nan")}, "min_worth: .*finite number"),
        ({"learning_rate": "1e-3"}, "a string in YAML 1.1: write 0.001 or 1.0e-3"),
        ({"blueprint_sizes": {"width": 0}}, "blueprint_sizes.width: .*greater than or equal to 1"),
        ({"blueprint_sizes": {"width": 10**13}}, "blueprint_sizes.width: .*less than or equal"),
        (
            {
                "controller": "none",
                "initial_grafts": [
                    {"site": "layers.0", "seed": 0, "kernel": letter * 64} for letter in "ab"
                ],
            },
            "`initial_grafts` name one seed of one layer twice",
        ),
        ({"grow_at": []}, "`grow_at` names no layer"),
        ({"blueprints": []}, "`blueprints` names none"),
        ({"blueprints": ["gated", "gated"]}, "`blueprints` names one twice"),
        (
            {"decide_every": 40, "checkpoint_every": 500},
            "`checkpoint_every` is 500: expected a multiple of `decide_every`, 40, such as 480",
        ),
        (
            {"batch_size": 10, "accumulate": 4},
            "`accumulate` is 4, and does not divide `batch_size`, 10",
        ),
        ({"weight_decay": 0.1}, "`weight_decay` is of adamw and sgd"),
        ({"momentum": 0.9}, "`momentum` is of sgd"),
        (
            {"schedule_of_grafts": [{"step": 5, "action": "graft", "site": "layers.0"}]},
            "`schedule_of_grafts` is for runs with `controller: fixed`",
        ),
        ({"safety": {"cooldown": 5}}, "unknown key 'safety.cooldown'.*did you mean"),
        ({"ramp": "quadratic"}, "ramp: .*'linear', 'cosine' or 'sigmoid', got 'quadratic'"),
        (
            {"initial_grafts": [{"site": "layers.0", "seed": 0, "kernel": "ab" * 32}]},
            "`initial_grafts` are for runs with `controller: none`",
        ),
        ({"initial_grafts": [{"site": "layers.0", "seed": 0, "kernel": "ab"}]}, "kernel: "),
    ],
)
def test_bad_values_are_refused_with_what_was_expected(values, message):
    with pytest.raises(InputError, match=f"configuration is not valid: .*{message}"):
        make_config(**({"task": "spirals", "backend": "jax"} | values))


def test_every_problem_is_named_at_once():
    with pytest.raises(InputError, match=r"steps: .*; .*patience: "):
        make_config(task="spirals", backend="jax", steps=0, patience=0)


def test_files(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("steps: 7\ntask: digits\n")
    assert read_config_file(path) == {"steps": 7, "task": "digits"}
    path.write_text("")
    assert read_config_file(path) == {}
    for text, message in (
        ("- 1", "must be a mapping"),
        ("{", "is not YAML at line 1, column 2: expected the node content, but found"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=f"c.yaml {message}"):
            read_config_file(path)
    with pytest.raises(InputError, match=r"none.yaml cannot be read: No such file or directory$"):
        read_config_file(tmp_path / "none.yaml")
    path.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(InputError, match=r"c.yaml is not YAML: 'utf-8' codec can't decode"):
        read_config_file(path)
    path.write_text("a: \x07")
    with pytest.raises(InputError, match=r"c.yaml is not YAML: .*special characters") as caught:
        read_config_file(path)
    assert "\n" not in str(caught.value)


def test_spirals_are_the_classic_ones():
    task = load_task("spirals")
    assert len(task.train) == 194
    # The arms are each other's reflection, and no point is in two parts.
    np.testing.assert_array_equal(task.train.x[:97], -task.train.x[97:])
    together = np.concatenate([split.x for split in task.splits.values()])
    assert len(np.unique(together, axis=0)) == len(together)
    assert float(np.abs(together).max()) <= 1.0


def test_digits_are_split_once_and_without_overlap():
    task = load_task("digits")
    assert [len(split) for split in task.splits.values()] == [997, 400, 400]
    again = load_task("digits")
    np.testing.assert_array_equal(task.test.x, again.test.x)
    assert all(set(np.unique(s.y)) == set(range(10)) for s in task.splits.values())


def test_batches_are_a_function_of_seed_and_step():
    task = load_task("digits")
    epoch = [batch_indices(task, 64, 3, step) for step in range(15)]
    assert all(batch is not None and len(batch) == 64 for batch in epoch)
    seen = np.concatenate([batch for batch in epoch if batch is not None])
    assert len(np.unique(seen)) == len(seen)
    np.testing.assert_array_equal(epoch[4], batch_indices(task, 64, 3, 4))
    assert not np.array_equal(epoch[0], batch_indices(task, 64, 4, 0))
    assert not np.array_equal(epoch[0], batch_indices(task, 64, 3, 15))
    assert batch_indices(task, None, 3, 0) is None


def test_the_first_host_has_the_frameworks_distribution():
    params = initial_host((64, 8, 10), 0)
    assert {n: p.shape for n, p in params.items()} == {
        "layers.0.weight": (8, 64),
        "layers.0.bias": (8,),
        "layers.1.weight": (10, 8),
        "layers.1.bias": (10,),
    }
    assert np.abs(params["layers.0.weight"]).max() <= 1 / 8
