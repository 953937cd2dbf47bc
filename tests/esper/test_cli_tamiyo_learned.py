"""A policy is made, held against others and explained, from the command line."""

import json

import pytest

from esper.tamiyo.gym import HELD_OUT
from esper.tamiyo.learning import LearningSettings, Recipe, quick_recipe
from esper.tamiyo.learning._recipe import RIVALS
from esper.tamiyo.policy import load_policy
from tests.esper.test_cli import esper_here


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    done = esper_here(
        "tamiyo", "train", "--quick", "--out", "own.safetensors", "--folder", "kept",
        check=0, cwd=folder,
    )  # fmt: skip
    return folder, done


def test_a_policy_is_trained_and_its_card_says_what_was_found(trained):
    folder, done = trained
    assert "written to own.safetensors" in done.stdout
    assert "it has learned next to nothing" in done.stderr
    card = load_policy(folder / "own.safetensors").card
    families = [*quick_recipe().environment.families, *HELD_OUT]
    found = {(row["family"], row["arm"]) for row in card["judged"]}
    assert found == {(family, arm) for family in families for arm in ("learned", *RIVALS)}
    waits = [row for row in card["judged"] if row["arm"] == "never-grow"]
    assert {row["mean"] for row in waits} == {0.0}
    for row in card["judged"]:
        learned = next(
            own for own in card["judged"]
            if (own["family"], own["arm"]) == (row["family"], "learned")
        )  # fmt: skip
        assert row["lead"] == pytest.approx(learned["mean"] - row["mean"])
    assert card["training"]["steps"] == 2 * 8 * 4
    assert sum(card["effects"]["reliability"]["counts"]) > 0


def test_it_is_held_against_others_and_explained(trained):
    folder, _ = trained
    done = esper_here(
        "tamiyo", "evaluate", "--quick", "--policy", "own.safetensors", "--json", "--episodes", "2",
        check=0, cwd=folder,
    )  # fmt: skip
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["arm"] for row in rows} == {"learned", *RIVALS}
    told = esper_here("tamiyo", "explain", "--policy", "own.safetensors", check=0, cwd=folder)
    assert "calibration error" in told.stdout
    assert "parity" in told.stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("train", "--out", "no/own.safetensors"), "names a file in no, which is no folder"),
        (("train", "--out", "."), "names a file, and . is a folder: name another one"),
        (("train", "--out", "x.safetensors", "--method", "guess"), "ensemble or dropout, got"),
        (("evaluate", "--policy", "none.safetensors"), "there is no policy none.safetensors"),
        (("explain", "--policy", "none.safetensors"), "there is no policy none.safetensors"),
        (("explain", "run", "--policy", "x"), "leave out --policy, or the run"),
        (("explain", "run"), "run"),
    ],
)
def test_what_cannot_be_done_is_refused(tmp_path, arguments, told):
    done = esper_here("tamiyo", *arguments, check=2, cwd=tmp_path)
    assert told in " ".join(done.stderr.split())


def test_a_recipe_out_of_range_is_refused():
    from esper.errors import InputError

    with pytest.raises(InputError, match="`min_confidence` is in .* and `evaluated` from 2 on"):
        Recipe(evaluated=1)
    with pytest.raises(InputError, match="minibatches do not divide"):
        LearningSettings(envs=3, steps=3, minibatches=2)
