"""Studies: they run to a results file, refuse what they cannot use, and fill their page."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from matplotlib.figure import Figure

import esper_functional as ef
from esper.errors import EsperError, InputError
from esper.tamiyo.learning._recipe import RIVALS
from esper.tamiyo.policy import load_policy
from esper.tolaria import make_config, start_run
from experiments.studies import anchors, convolution, docs, incubation, policy, pruning, stall
from experiments.studies._core import Growing, make_problem, straight_through
from experiments.studies._study import Found, Study, Table, markdown, run, svg

ROOT = Path(__file__).parents[2]
STUDIES = {own.STUDY.name: own.STUDY for own in (anchors, incubation, stall, pruning, convolution)}


@dataclasses.dataclass(frozen=True)
class Settings:
    seeds: int = 3


def figure():
    own = Figure()
    own.subplots().plot([0, 1], [1, 0])
    return own


def study(measure=None, name="small"):
    def found(settings, out):
        del out
        return Found({"seeds": settings.seeds}, Table(("a",), (("1",),)), figure(), ("A note.",))

    return Study(name, "A study.", Settings(), Settings(seeds=1), measure or found)


@pytest.fixture(autouse=True)
def _promotion_as_users_have_it():
    # optax mixes integers and floats, and studies are run without the suite's strictness.
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize("name", STUDIES)
def test_a_quick_study_leaves_whole_results(name, tmp_path, capsys):
    assert run(STUDIES[name], ["--quick", "--out", str(tmp_path / name)]) == 0
    content = json.loads((tmp_path / name / "results.json").read_text())
    assert content["study"] == name
    assert content["quick"] is True
    assert content["settings"]["seeds"] == STUDIES[name].quick.seeds
    assert content["machine"]["versions"]["jax"] == jax.__version__
    assert len(content["table"]["rows"]) >= 2
    assert (tmp_path / name / "plot.svg").read_bytes().startswith(b"<?xml")
    assert content["table"]["rows"][0][0] in capsys.readouterr().out
    if name == "pruning":
        grown, pruned = content["numbers"]["grown"][0], content["numbers"]["pruned"][0]
        assert pruned["parameters"] == grown["parameters"]
        assert (pruned["removed"], pruned["kept"]) == (1, grown["kept"])
        flops = [own["training_flops"] for own in (pruned, grown)]
        # A run of 16 steps cannot be cut nearer than to one of them.
        np.testing.assert_allclose(*flops, rtol=0.05)
    if name == "convolution":
        small, grown = (content["numbers"][arm][0] for arm in ("static-small", "grown"))
        assert content["numbers"]["static-final"][0]["parameters"] == grown["parameters"]
        assert grown["parameters"] > small["parameters"]


SHORT = {
    "task": "xor-3", "backend": "jax", "controller": "none",
    "steps": 20, "decide_every": 10, "checkpoint_every": 20,
}  # fmt: skip


def test_a_large_network_that_ends_before_it_can_be_pruned_is_refused(tmp_path):
    with pytest.raises(EsperError, match="could be pruned|expected a second") as error:
        pruning.begin_large(tmp_path / "large", make_config(**SHORT), flops=1e18)
    assert str(tmp_path / "large") in str(error.value)


def test_a_pruned_run_that_began_otherwise_is_refused(tmp_path):
    runs = [start_run(tmp_path / str(seed), make_config(**SHORT, seed=seed)) for seed in (0, 1)]
    pruning.check_beginning(runs[0], runs[0], 10)
    with pytest.raises(EsperError, match="is not the one whose removal costs were measured"):
        pruning.check_beginning(runs[1], runs[0], 10)


def test_straight_through_adds_nothing_and_trains_the_kernel():
    def apply(params, x):
        return params * x

    own = straight_through(ef.kernel_from_function(apply, np.float32(2.0)).program)
    x = np.ones((3, 2), np.float32)
    np.testing.assert_array_equal(own.apply(np.float32(2.0), x), np.zeros((3, 2)))
    assert jax.grad(lambda p: own.apply(p, x).sum())(np.float32(2.0)) == 6.0


@pytest.mark.parametrize("way", ["straight_through", "shadow"])
def test_an_incubating_kernel_leaves_the_host_as_it_was(way):
    problem = make_problem("spirals", batch_size=None, width=4, slots=1, learning_rate=1e-2)
    alone, beside = Growing(problem, 0), Growing(problem, 0)
    beside.graft(0, way)
    for _ in range(5):
        alone.step()
        beside.step()
    np.testing.assert_allclose(beside.test(), alone.test(), rtol=1e-5)
    beside.blend(0)
    assert beside.test()[0] != pytest.approx(alone.test()[0], rel=1e-5)
    assert beside.parameters() > alone.parameters()


def test_intervals_meet_where_they_touch():
    assert anchors.meets((1.0, 0.5), (2.0, 0.5))
    assert not anchors.meets((1.0, 0.25), (2.0, 0.5))


def test_a_figure_is_the_same_bytes_twice():
    assert svg(figure()) == svg(figure())


def test_a_folder_in_use_is_refused_and_left(tmp_path, capsys):
    (tmp_path / "kept").write_text("mine")
    assert run(study(), ["--out", str(tmp_path)]) == 2
    assert "in use: expected a new or an empty one" in capsys.readouterr().err
    assert [own.name for own in tmp_path.iterdir()] == ["kept"]


@pytest.mark.parametrize("argv", [["--seeds", "0"], ["--seeds", "x"], ["--task", "digits"], ["-z"]])
def test_bad_usage_is_status_2(argv, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        run(study(), [*argv, "--out", str(tmp_path / "out")])
    assert ended.value.code == 2
    assert not (tmp_path / "out").exists()
    assert "small: error:" in capsys.readouterr().err


def test_a_task_without_images_is_refused(tmp_path, capsys):
    argv = ["--task", "digits", "--out", str(tmp_path / "out")]
    assert run(convolution.STUDY, argv) == 2
    assert "expected one of images, with a convolutional host" in capsys.readouterr().err


def test_ctrl_c_is_status_130_and_writes_no_results(tmp_path, capsys):
    def interrupted(settings, out):
        raise KeyboardInterrupt

    assert run(study(interrupted), ["--out", str(tmp_path / "out")]) == 130
    assert "interrupted, no results are written" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_the_page_has_a_place_for_every_study():
    page = (ROOT / "docs" / "studies.md").read_text()
    for name in STUDIES:
        assert f"<!-- results: {name} -->" in page
        assert f"python -m experiments.studies.{name}" in page
        assert f"![The results of {name}](studies/{name}.svg)" in page
    assert docs.NOT_RUN not in page


def test_the_page_is_filled_from_results_and_not_from_quick_ones(tmp_path, capsys):
    page = tmp_path / "page.md"
    empty = "Before.\n\n<!-- results: small -->\n\nNot run yet.\n\n<!-- end -->\n\nAfter.\n"
    page.write_text(empty)
    runs = tmp_path / "runs"
    assert docs.main([str(runs), "--page", str(page)]) == 0
    assert run(study(), ["--quick", "--out", str(runs / "small")]) == 0
    assert docs.main([str(runs), "--page", str(page)]) == 0
    assert page.read_text() == empty
    assert not (tmp_path / "page").exists()
    assert run(study(), ["--out", str(tmp_path / "whole" / "small")]) == 0
    for _ in range(2):
        assert docs.main([str(tmp_path / "whole"), "--page", str(page)]) == 0
        text = page.read_text()
        assert markdown(Table(("a",), (("1",),))) in text
        assert "A note." in text
        assert "Not run yet." not in text
        assert text.count("page/small.svg") == 1
    assert (tmp_path / "page" / "small.svg").exists()
    # Where the results are not, what was brought in before stays.
    assert docs.main([str(runs), "--page", str(page)]) == 0
    assert page.read_text() == text
    capsys.readouterr()


def test_results_that_are_none_are_refused_and_the_page_is_left(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("<!-- results: small -->\n<!-- end -->\n")
    (tmp_path / "small").mkdir()
    results = tmp_path / "small" / "results.json"
    results.write_text("{")
    assert docs.main([str(tmp_path), "--page", str(page)]) == 2
    assert "cannot be read as a study's results" in capsys.readouterr().err
    results.write_text(json.dumps({"schema_version": 1, "study": "other", "quick": False}))
    with pytest.raises(InputError, match="expected results of 'small' in schema version 1"):
        docs.fill(page, tmp_path)
    assert page.read_text() == "<!-- results: small -->\n<!-- end -->\n"
    page.write_text("no place")
    with pytest.raises(InputError, match="has no place for results"):
        docs.fill(page, tmp_path)
    with pytest.raises(InputError, match="cannot be read"):
        docs.fill(tmp_path / "missing.md", tmp_path)


def test_what_the_policy_was_found_to_do_is_drawn_from_its_card():
    card = load_policy().card
    table = policy.judged_table(card["judged"])
    assert {row[1] for row in table.rows} == {"learned", *RIVALS}
    page = (ROOT / "docs" / "studies.md").read_text()
    assert markdown(table) in page
    assert "python -m experiments.studies.policy" in page
    rows = [{"iteration": 0, "return": 0.0, "explained_variance": 0.0, "entropy": 1.0}]
    assert svg(policy.draw(rows, card)).startswith(b"<?xml")
    assert policy.STUDY.quick.quick
