"""From a library's folder and an id to the first training step, in fresh processes."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from experiments.bench import _first_step_process as process
from experiments.bench._results import Check, Figure, Results
from experiments.bench._throughput import environment

if TYPE_CHECKING:
    from experiments.bench.compile import Settings

Stages = Mapping[str, Mapping[str, float]]

REMEMBERED, KEPT = "verdict remembered", "jax's programs kept"
BEFORE = ("start", "imports", "host", "load", "first step")
"""The stages of a process up to the first step's result."""


def session(face: str, library: Path, ids: list[str], **variables: str) -> Stages:
    """What one fresh process found.

    Raises:
        RuntimeError: where it failed, with the end of what it printed.
    """
    root = str(Path(__file__).parents[2])
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    given = {
        **inherited,
        "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))),
        "JAX_PLATFORMS": "cpu",
        "OMP_NUM_THREADS": "1",
        **variables,
    }
    command = [sys.executable, "-m", process.__name__, face, str(library), *ids]
    done = subprocess.run(
        [*command, repr(time.monotonic())], env=given, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(
            f"the process with a kernel in {face} ended with status {done.returncode}:"
            f" {done.stderr.strip()[-2000:]}"
        )
    return json.loads(done.stdout.splitlines()[-1])


def fill(library: Path, verdicts: Path) -> list[str]:
    """Two kernels that share programs, put into a library; their ids."""
    from esper.artifacts import default_verdicts
    from esper.contracts import KernelSignature
    from esper.tezzeret import compile_blueprint, load_blueprint
    from esper.urza import Library

    shape = (process.FEATURES,)
    signature = KernelSignature(input_shape=shape, output_shape=shape)
    blueprint = load_blueprint("residual_mlp")
    # What this process knows of them is not for the others, nor for the user's own cache.
    with environment(ESPER_CACHE_DIR=str(verdicts)), contextlib.closing(Library(library)) as kept:
        ids = [kept.put(compile_blueprint(blueprint, signature, init_seed=seed)) for seed in (0, 1)]
        default_verdicts().close()
    return ids


def measure_first_step(results: Results, settings: "Settings") -> None:
    """Each face, in fresh processes."""
    faces = [face for face in settings.faces if results.wants(f"first step, {face}")]
    if not faces:
        return
    with tempfile.TemporaryDirectory(prefix="esper-bench-") as folder:
        root = Path(folder)
        library = root / "library"
        ids = fill(library, root / "own")
        for face in faces:
            programs = {
                "JAX_COMPILATION_CACHE_DIR": str(root / f"jax-{face}"),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            }
            found: dict[str, list[Stages]] = {}
            for turn in range(settings.rounds):
                verdicts = {"ESPER_CACHE_DIR": str(root / f"{face}-{turn}")}
                variants = {"cold": verdicts, REMEMBERED: verdicts}
                if face == "jax":
                    variants[KEPT] = verdicts | programs
                    if not turn:
                        session(face, library, ids, ESPER_CACHE_DIR=str(root / "own"), **programs)
                # In this order: the first leaves its verdict to the others.
                for variant, variables in variants.items():
                    found.setdefault(variant, []).append(session(face, library, ids, **variables))
            report_first_step(results, face, found)


def report_first_step(results: Results, face: str, found: Mapping[str, Sequence[Stages]]) -> None:
    """Checks that each variant was what it is called, and the medians of all stages."""
    name = f"first step, {face}"
    everything = [stages for turns in found.values() for stages in turns]
    losses = {(s["first step"]["loss"], s["second step"]["loss"]) for s in everything}
    checks = [Check(f"{name}: the losses are the same in all processes", "1", str(len(losses)))]
    for variant, turns in found.items():
        verified = {turn["load"]["in children"] > 0 for turn in turns}
        expected = str({variant == "cold"})
        checks.append(Check(f"{name}, {variant}: a child verified it", expected, str(verified)))
    known = ("load, program known", "first step, program known")
    anew = sum(int(s[stage][process.PROGRAMS]) for s in everything for stage in known)
    checks.append(Check(f"{name}, program known: programs that jax compiles", "0", str(anew)))
    if face == "torch":
        every = sum(int(s.get(process.PROGRAMS, 0)) for t in everything for s in t.values())
        checks.append(Check(f"{name}: programs that jax compiles", "0", str(every)))
    else:
        for variant, turns in found.items():
            asked, hits = (
                sum(int(stage.get(event, 0)) for turn in turns for stage in turn.values())
                for event in (process.REQUESTS, process.HITS)
            )
            # Where nothing is kept, there are none to be found.
            expected = asked if variant == KEPT else 0
            checks.append(
                Check(f"{name}, {variant}: programs that jax had kept", str(expected), str(hits))
            )
        second = max(turn["second step"][process.PROGRAMS] for turn in everything)
        results.figures.append(
            Figure(f"{name}: compiled again in the second step", second, "programs", 0)
        )
    results.checks += checks

    def median(turns: Sequence[Stages], *stages: str) -> float:
        return float(np.median([sum(turn[s]["seconds"] for s in stages) for turn in turns]))

    for variant, turns in found.items():
        for label, stages in (
            ("whole, to the first result", BEFORE),
            ("start and imports", ("start", "imports")),
            ("host and data", ("host",)),
            ("open, verify and load", ("load",)),
            ("first step", ("first step",)),
            ("second step", ("second step",)),
        ):
            figure = Figure(f"{name}, {variant}: {label}", median(turns, *stages), "s")
            results.figures.append(figure)
    for label, stages in (
        ("whole, to the first result", known),
        ("load", known[:1]),
        ("first step", known[1:]),
    ):
        taken = 1e3 * median(everything, *stages)
        results.figures.append(Figure(f"{name}, program known: {label}", taken, "ms"))
