"""How benchmarks are asked for: what is measured, where it is written, and the exit status."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.bench import (
    active,
    cache,
    dormant,
    executor,
    graft,
    gym,
    policy,
    population,
    pytorch,
    seeds,
    state,
    training,
    trust,
)
from experiments.bench import compile as compile_bench
from experiments.bench.__main__ import BENCHMARKS, main, start_process
from experiments.bench._command import Benchmark, parse, run
from experiments.bench._paired import Sampling
from experiments.bench._results import Figure, Results

MODULES = {"active": active, "dormant": dormant, "graft": graft}
MODULES |= {"population": population, "pytorch": pytorch, "state": state}
MODULES |= {"cache": cache, "compile": compile_bench, "executor": executor, "trust": trust}
MODULES |= {"training": training, "seeds": seeds, "policy": policy, "gym": gym}


@dataclasses.dataclass(frozen=True)
class Settings:
    sampling: Sampling


def measure(settings, only):
    results = Results(only=only)
    for name in ("a forward", "a step", "b step"):
        if results.wants(name):
            results.figures.append(Figure(name, settings.sampling.rounds, "rounds"))
    return results


# Not pinned, and with whatever jax finds: the tests' process goes on after it.
TOY = Benchmark(
    name="toy", doc=None, settings=Settings, measure=measure, quick=7,
    standard=Sampling(rounds=100, builds=3), pinned=False, gpu=True,
)  # fmt: skip


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """In an empty folder, and with the environment as it was in the end."""
    monkeypatch.chdir(tmp_path)
    for name in ("XLA_FLAGS", "TORCHINDUCTOR_COMPILE_THREADS"):
        monkeypatch.setenv(name, os.environ.get(name, ""))


def figures(path):
    return [figure["name"] for figure in json.loads(Path(path).read_text())["figures"]]


# ---- what is asked for ----


def test_what_is_asked_for_reaches_the_sampling():
    assert parse(TOY, []).sampling == TOY.standard
    quick = parse(TOY, ["--quick", "--cpu-clock"])
    assert (quick.sampling.rounds, quick.sampling.clock) == (7, "cpu")
    few = parse(TOY, ["--rounds", "2", "--only", "a b"])
    assert (few.sampling.rounds, few.sampling.builds, few.only) == (2, 2, "a b")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_goes_by_its_modules_name(name, capsys):
    benchmark = MODULES[name].BENCHMARK
    assert benchmark.name == name
    assert benchmark.settings(parse(benchmark, ["--rounds", "2"]).sampling)
    with pytest.raises(SystemExit) as caught:
        run(benchmark, ["--rounds", "0"])
    assert caught.value.code == 2
    assert f"experiments.bench.{name}: error" in capsys.readouterr().err


@pytest.mark.parametrize("entry", [lambda argv: run(TOY, argv), main], ids=["one", "all"])
@pytest.mark.parametrize("rounds", ["0", "-1", "x", "1.5"])
def test_rounds_that_are_none_exit_with_2(entry, rounds, capsys):
    with pytest.raises(SystemExit) as caught:
        entry([f"--rounds={rounds}"])
    assert caught.value.code == 2
    expected = f"--rounds: must be a whole number of at least 1, got {rounds!r}"
    assert expected in capsys.readouterr().err


# ---- where it is written ----


def test_a_whole_run_writes_its_file():
    assert run(TOY, ["--quick"]) == 0
    assert figures("runs/bench/toy.json") == ["a forward", "a step", "b step"]


def test_a_partial_run_leaves_the_file_of_a_whole_one(capsys):
    assert run(TOY, []) == 0
    whole = TOY.path.read_bytes()
    assert run(TOY, ["--only", "step"]) == 0
    assert TOY.path.read_bytes() == whole
    assert figures("runs/bench/toy.only.json") == ["a step", "b step"]
    note = "Only comparisons with 'step' in their names; runs/bench/toy.json is left as it is."
    assert note in capsys.readouterr().out
    assert json.loads(TOY.partial_path.read_text())["notes"] == [note]


def test_a_file_that_is_asked_for_is_written():
    assert run(TOY, ["--only", "b", "--json", str(TOY.path)]) == 0
    assert figures(TOY.path) == ["b step"]
    assert not TOY.partial_path.exists()
    assert json.loads(TOY.path.read_text())["notes"] == [
        "Only comparisons with 'b' in their names."
    ]


@pytest.mark.parametrize("where", [[], ["--json", "runs/bench/toy.json"]])
def test_where_no_name_matches_nothing_is_written_and_the_names_are_told(where, capsys):
    assert run(TOY, []) == 0
    whole = TOY.path.read_bytes()
    capsys.readouterr()
    assert run(TOY, ["--only", "zzz", *where]) == 2
    assert [path.name for path in Path("runs/bench").iterdir()] == ["toy.json"]
    assert TOY.path.read_bytes() == whole
    first, *names = capsys.readouterr().err.splitlines()
    assert "no comparison has 'zzz' in its name" in first
    assert names == ["  a forward", "  a step", "  b step"]


def test_the_size_of_a_seed_is_a_comparison_like_others():
    results = state.measure(state.Settings(seeds=(4,)), only="zzz")
    assert results.nothing_wanted
    assert results.offered == ["a seed", "4 seeds, numpy", "4 seeds, jax, jitted"]
    assert [*results.rows, *results.figures, *results.checks] == []


# ---- Ctrl-C ----


def test_ctrl_c_exits_with_130_and_one_line(capsys):
    def interrupted(settings, only):
        raise KeyboardInterrupt

    assert run(dataclasses.replace(TOY, measure=interrupted), []) == 130
    err = capsys.readouterr().err
    assert err == "experiments.bench.toy: interrupted, nothing is written\n"
    assert not Path("runs").exists()


def test_ctrl_c_ends_all_benchmarks(capsys):
    started = []

    def start(command):
        started.append(command)
        if len(started) == 2:
            raise KeyboardInterrupt
        return 0

    assert main([], start) == 130
    assert len(started) == 2
    assert capsys.readouterr().err == f"experiments.bench: interrupted in {BENCHMARKS[1]}\n"


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups")
def test_ctrl_c_in_a_terminal_reaches_the_benchmark_only_as_its_end(tmp_path):
    """The group of the process that was started gets the signal, as from a terminal."""
    alive = tmp_path / "alive"
    benchmark = f"import time; open({str(alive)!r}, 'w').close(); time.sleep(600)"
    program = (
        "import sys; from experiments.bench.__main__ import main, start_process;"
        f"sys.exit(main([], lambda _: start_process([sys.executable, '-c', {benchmark!r}])))"
    )
    command = [sys.executable, "-c", program]
    root = Path(state.__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    with subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        while not alive.exists():
            assert process.poll() is None
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate()
    assert process.returncode == 130
    assert err == "experiments.bench: interrupted in dormant\n"


# ---- all benchmarks ----


def test_options_are_passed_on_to_every_benchmark(tmp_path):
    started = []
    argv = ["--quick", "--rounds", "3", "--cpu-clock", "--json", str(tmp_path)]
    assert main(argv, lambda command: started.append(command) or 0) == 0
    for name, command in zip(BENCHMARKS, started, strict=True):
        assert command[:3] == [sys.executable, "-m", f"experiments.bench.{name}"]
        asked = parse(MODULES[name].BENCHMARK, command[3:])
        assert (asked.sampling.rounds, asked.sampling.clock) == (3, "cpu")
        assert asked.json == tmp_path / f"{name}.json"
        assert "--quick" in command


def test_others_run_where_one_fails(capsys):
    assert main([], lambda command: 2 if command[2].endswith(("active", "graft")) else 0) == 1
    assert capsys.readouterr().err == "experiments.bench: failed: active, graft\n"


def test_a_process_gives_its_status():
    assert start_process([sys.executable, "-c", "raise SystemExit(3)"]) == 3
