"""`esper replay`: what was, the same once more, and what if."""

import hashlib
import json
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from esper.errors import Interrupted, LedgerError
from esper.nissa import read_run, write_report
from esper.tolaria import Hooks, open_run, retrain_run, start_run
from esper.tolaria._ledger import Ledger
from tests.esper.runs import entries, measured
from tests.esper.test_cli import end_of, esper_here, tree

CONFIG = """
steps: 60
decide_every: 10
loading_steps: 3
ramp_steps: 5
trial_steps: 10
patience: 1
min_improvement: 0.5
checkpoint_every: 20
variants: 2
seeds_per_layer: 2
blueprint_sizes: {width: 8}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A whole run, with its library beside it."""
    place = tmp_path_factory.mktemp("runs")
    (place / "short.yaml").write_text(CONFIG)
    esper_here("grow", "--task", "spirals", "--backend", "torch", "--config",
               place / "short.yaml", "--out", place / "run", check=0)  # fmt: skip
    return place / "run"


@pytest.fixture
def run(made, tmp_path) -> Path:
    """A copy of it, with a library of its own."""
    shutil.copytree(made.parent / "library", tmp_path / "library")
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


def refused(*arguments: object, message: str, check: int = 2) -> None:
    done = esper_here(*arguments, check=check)
    told = done.stderr.replace("\n", " ")
    assert re.search(message, told), told


# What was.


def test_replay_shows_the_seeds_before_a_step(made):
    first = next(e for e in entries(made) if e["kind"] == "activate")
    assert "all seeds are DORMANT" in esper_here("replay", made, "--to", 0, check=0).stdout
    before = esper_here("replay", made, "--to", first["step"] - 1, check=0).stdout
    after = esper_here("replay", made, "--to", first["step"], check=0).stdout
    name = open_run(made).host.sites[first["layer"]]
    assert re.search(rf"{name} +{first['seed']} +LOADING +0\.0000", before)
    assert re.search(rf"{name} +{first['seed']} +ACTIVE +0\.0000", after)
    last = esper_here("replay", made, "--to", 60, check=0).stdout
    assert f"folded to step 60; digest {end_of(made)['seeds']}" in last


@pytest.mark.parametrize("step", [61, -1])
def test_a_step_beyond_the_end_is_refused(made, step):
    refused("replay", made, f"--to={step}", message=f"has the steps 0 to 60, and not {step}")


def test_a_run_of_a_newer_schema_is_refused_by_every_command(run):
    content = json.loads((run / "run.json").read_bytes())
    (run / "run.json").write_text(json.dumps(content | {"schema_version": 3}))
    before = tree(run)
    for command in (["replay", run], ["grow", "--resume", run]):
        refused(*command, message=r"has schema version 3, .* up to 2: use the Esper that wrote it")
    assert tree(run) == before


# The same once more.


def test_a_stretch_is_trained_again_and_is_equal(made):
    before = tree(made)
    done = esper_here("replay", made, "--retrain", "25..50", check=0)
    assert "trained again from step 20 to 50" in done.stdout
    assert done.stdout.rstrip().endswith("checkpoints equal to the last bit: 40")
    whole = esper_here("replay", made, "--retrain", "0..60", check=0)
    assert "trained again from step 0 to 60" in whole.stdout
    assert whole.stdout.rstrip().endswith("20, 40, 60")
    assert tree(made) == before


@pytest.mark.parametrize(
    ("stretch", "message"),
    [
        ("20", r"--retrain takes FROM\.\.TO, such as 500\.\.1000; got '20'"),
        ("a..b", "got 'a..b'"),
        ("-5..20", "got '-5..20'"),
        ("0..999999999", "got '0..999999999'"),
        ("40..20", r"40\.\.20 cannot be trained again: expected .* steps 0 to 60"),
        ("20..20", r"20\.\.20 cannot be trained again"),
        ("20..61", r"20\.\.61 cannot be trained again"),
    ],
)
def test_a_bad_stretch_is_refused(made, stretch, message):
    refused("replay", made, f"--retrain={stretch}", message=message)


def edit_measurement(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows[3]["test_loss"] += 1e-9
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("options", [(), ("--retrain", "40..60")])
def test_a_measurement_that_was_changed_is_found(run, options):
    edit_measurement(run)
    message = r"metrics\.jsonl was changed after the run had ended: the SHA-256 .* restore the file"
    refused("replay", run, *options, message=message, check=1)


def test_before_a_runs_end_it_is_found_by_training_again(run, tmp_path):
    asked, path = iter([*[False] * 55, True]), tmp_path / "stopped"
    with pytest.raises(Interrupted):
        start_run(path, open_run(run).config, hooks=Hooks(stop=lambda: next(asked)))
    edit_measurement(path)
    assert retrain_run(path, 40, 50).began == 40
    with pytest.raises(LedgerError, match=r"at step 30: test_loss was [\d.]+, and is now"):
        retrain_run(path, 20, 40)


# What if.


def asked(place: Path, text: str) -> Path:
    (place / "what.yaml").write_text(text)
    return place / "what.yaml"


def test_what_if_is_a_run_of_its_own_beside_the_record(run, tmp_path):
    before = tree(run)
    file = asked(tmp_path, "from: 20\ndecisions: []\n")
    done = esper_here("replay", run, "--what-if", file, check=0)
    branch = tmp_path / "run-what-if"
    assert f"report: {branch / 'report.html'}" in done.stdout
    assert re.search(r"at the end +recorded +what if", done.stdout)
    assert re.search(r"parameters +\d+ +\d+", done.stdout)
    assert "what if" in (branch / "report.html").read_text()
    assert measured(branch)[:2] == measured(run)[:2]
    late = [e for e in entries(branch) if e["kind"] == "load" and e["step"] >= 20]
    assert late == []
    esper_here("replay", branch, "--retrain", "30..60", check=0)
    assert tree(run) == before
    # A second one wants another folder.
    refused("replay", run, "--what-if", file, message=f"holds another run.*--resume {branch}, or")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("from: 10\ndecisions: []\n", "has none up to step 10: its first is of step 20"),
        ("from: 60\ndecisions: []\n", "begins at step 60 and ends at 60"),
        ("from: 20\n", "changes nothing: give `decisions:`"),
        ("from: 20\ndecisions: [{step: 30, action: graft, site: layers.9}]\n",
         "name 'layers.9', and the host has the layers layers.0, layers.1"),
        ("from: 20\ndecisions: [{step: 30, action: graft, site: layers.0, seed: 2}]\n",
         "name seed 2, and a layer has 2"),
        ("from: 20\ndecisions: [{step: 30, action: graft, site: layers.0, candidate: 2}]\n",
         "grafts candidate 2 into layers.0, and the run .* has 2 kernels for it"),
        (f"from: 20\ndecisions: [{{step: 30, action: graft, site: layers.0, kernel: {'ab' * 32}}}]",
         "holds no kernel abababababab.*esper kernels fetch ID --from FOLDER"),
        ("from: 20\ndecisions: [{step: 30, action: reset, site: layers.0}]\n", "action is RESET"),
        ("from: 20\nchange: {variants: 5}\n",
         "cannot change 'variants': it chooses from the kernels"),
        ("from: 20\nchange: {batch_size: 1000}\n", "batch_size is 1000, and the training part"),
        ("from: 20\ndecisions: []\nchange: {controller: bandit}\n",
         "has `decisions:` and changes 'controller'"),
        ("from: twenty\ndecisions: []\n", "what.yaml is not valid: from: Input should be"),
        ("from: [\n", r"what\.yaml is not YAML at line 2, column 1: expected the node content"),
    ],
)  # fmt: skip
def test_a_branch_that_cannot_be_is_refused_and_leaves_nothing(made, tmp_path, text, message):
    before = tree(made)
    out = tmp_path / "branch"
    status = 1 if "holds no kernel" in message else 2
    refused("replay", made, "--what-if", asked(tmp_path, text), "--out", out,
            message=message, check=status)  # fmt: skip
    assert not out.exists()
    assert tree(made) == before


def test_the_folder_of_a_branch_must_be_free(made, tmp_path):
    file = asked(tmp_path, "from: 20\ndecisions: []\n")
    (tmp_path / "thesis.tex").write_text("years of work")
    refused("replay", made, "--what-if", file, "--out", made, message="holds another run")
    refused("replay", made, "--what-if", file, "--out", tmp_path, message="is not empty and holds")
    refused("replay", made, "--what-if", file, "--out", tmp_path / "thesis.tex",
            message="is a file")  # fmt: skip
    refused("replay", made, "--out", tmp_path / "x", message="give --what-if FILE with it")
    refused("replay", made, "--what-if", tmp_path / "none.yaml", message="none.yaml cannot be read")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_branch_that_was_stopped_goes_on_as_a_run(made, tmp_path):
    longer = "{steps: 2000, decide_every: 500, checkpoint_every: 500}"
    file = asked(tmp_path, f"from: 20\ndecisions: []\nchange: {longer}\n")
    branch = tmp_path / "branch"

    def stop() -> None:
        # The command answers signals before it makes the folder.
        while not (branch / "metrics.jsonl").exists():
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    asking = threading.Thread(target=stop)
    asking.start()
    refused("replay", made, "--what-if", file, "--out", branch, check=130,
            message=f"stopped; the branch goes on with esper grow --resume {branch}")  # fmt: skip
    asking.join()
    esper_here("replay", branch, check=0)
    esper_here("grow", "--resume", branch, check=0)
    assert end_of(branch)["step"] == 2000


# What is not there any more.


def test_a_kernel_that_is_gone_is_named_with_how_to_fetch_it(run, tmp_path):
    [kernel, *_] = [e["kernel"] for e in entries(run) if e["kind"] == "load"]
    shutil.copytree(tmp_path / "library", tmp_path / "other")
    for file in (tmp_path / "library").rglob(f"{kernel}.kernel"):
        file.unlink()
    before = tree(run)
    message = (
        f"{tmp_path / 'library'} holds no kernel {kernel[:12]}.*esper kernels fetch ID --from"
        f" FOLDER --library {tmp_path / 'library'}"
    )
    what = asked(tmp_path, "from: 20\ndecisions: []\n")
    refused("replay", run, "--retrain", "20..40", message=message, check=1)
    refused("replay", run, "--what-if", what, "--out", tmp_path / "out", message=message, check=1)
    refused("grow", "--resume", run, message=message, check=1)
    assert not (tmp_path / "out").exists()
    assert tree(run) == before
    # The record alone needs none.
    esper_here("replay", run, check=0)
    # And it is as the message says.
    esper_here("kernels", "fetch", kernel[:12], "--from", tmp_path / "other",
               "--library", tmp_path / "library", check=0)  # fmt: skip
    esper_here("replay", run, "--retrain", "20..40", check=0)


def test_a_library_that_is_gone_is_named(run, tmp_path):
    shutil.rmtree(tmp_path / "library")
    refused("replay", run, "--retrain", "20..40",
            message=f"there is no library in {tmp_path / 'library'}")  # fmt: skip


# Runs of old.

OLD_KEYS = (
    "task", "backend", "seed", "steps", "batch_size", "optimizer", "learning_rate",
    "seeds_per_layer", "blend", "blueprint_sizes", "variants", "controller", "initial_grafts",
    "decide_every", "loading_steps", "ramp_steps", "trial_steps", "patience", "min_improvement",
    "enough_loss", "min_worth", "threads", "checkpoint_every", "library",
)  # fmt: skip
OLD_MEASUREMENTS = (
    "step", "train_loss", "validation_loss", "validation_accuracy", "test_loss", "test_accuracy",
    "stages", "alphas", "parameters", "compilations", "seconds",
)  # fmt: skip


def written_of_old(run: Path, out: Path) -> Path:
    """A run's record in the words of schema version 1, which had no rest of it."""
    content: dict[str, Any] = json.loads((run / "run.json").read_bytes())
    config = {key: content["config"][key] for key in OLD_KEYS}
    config |= {"blueprint": "residual_mlp", "grow_at": ["layers.0"]}
    old = {
        "schema_version": 1,
        "config": config,
        "kernels": content["kernels"],
        "versions": content["versions"],
    }
    out.mkdir()
    (out / "run.json").write_text(json.dumps(old, sort_keys=True, indent=1))
    hashed = {**old, "config": {key: value for key, value in config.items() if key != "library"}}
    genesis = hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()
    ledger = Ledger(out / "events.jsonl", genesis)
    known = [entry for entry in entries(run) if entry["kind"] not in ("worth", "veto")]
    new = ("shape", "measurements")
    ledger.append([{k: v for k, v in entry.items() if k not in new} for entry in known])
    ledger.close()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (out / "metrics.jsonl").write_text(
        "".join(json.dumps({k: row[k] for k in OLD_MEASUREMENTS}) + "\n" for row in rows)
    )
    return out


def test_a_run_of_old_is_replayed_and_shown_and_not_trained(made, tmp_path):
    old = written_of_old(made, tmp_path / "old")
    before = tree(old)
    done = esper_here("replay", old, check=0)
    assert f"folded to step 60; digest {end_of(made)['seeds']}" in done.stdout
    assert re.search(r"0 +\d +(FOSSILIZED|ACTIVE)", esper_here("replay", old, "--to", 60,
                                                                check=0).stdout)  # fmt: skip
    write_report(tmp_path / "report.html", {"old": {"grown": [read_run(old)]}}, title="Old")
    assert "grown" in (tmp_path / "report.html").read_text()
    what = asked(tmp_path, "from: 20\ndecisions: []\n")
    message = "begun by an older Esper.* begin a new run; its record can be replayed and shown"
    refused("grow", "--resume", old, message=message)
    refused("replay", old, "--retrain", "20..40", message=message)
    refused("replay", old, "--what-if", what, "--out", tmp_path / "out", message=message)
    assert not (tmp_path / "out").exists()
    assert tree(old) == before
