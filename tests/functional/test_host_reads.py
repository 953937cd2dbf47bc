"""No step makes the host wait for the device: it reads nothing until a boundary."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esper_functional import (
    Event,
    EventKind,
    advance,
    apply_event,
    execute,
    gather,
    make_bank,
    plan,
    reweigh,
)
from tests.functional.host_reads import KERNELS, train_step
from tests.functional.networks import SITES, batch, grafted_state, host_params, mlp

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def counted() -> Any:
    """What `host_reads` counted in its process."""
    paths = [ROOT, ROOT / "functional", os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "JAX_NUM_CPU_DEVICES": "2",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(str(path) for path in paths if path),
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.functional.host_reads"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_counter_sees_every_way_of_reading_and_nothing_else(counted):
    for way, reads in counted["ways"].items():
        assert reads == (0 if way.startswith("nothing") else 1), way
    assert {"np.asarray", "float()", "bool()", ".tolist()", "device_get"} <= set(counted["ways"])


def test_a_planned_training_loop_with_a_ramp_reads_nothing(counted):
    assert counted["loops"]["planned"] == 0


def test_dynamic_steps_read_nothing_though_a_seed_fails_for_good(counted):
    assert counted["loops"]["dynamic"] == 0


def test_absorbing_reads_one_array(counted):
    assert counted["loops"]["boundary"] == 1


@pytest.mark.skipif(
    jax.default_backend() == "cpu", reason="jax's transfer guard never triggers on the CPU"
)
def test_the_transfer_guard_of_a_gpu_agrees():
    state = grafted_state((0, 0, 0, 0.0), (1, 0, 2, 0.5))
    state = apply_event(state, Event(0, 0, 0, EventKind.RAMP, value=1.0, span=4))
    own, params = plan(state, KERNELS, SITES), host_params()
    live, bank = gather(state, KERNELS, own), make_bank(KERNELS)
    on_device = jax.tree.map(jnp.asarray, state)
    dynamic = jax.jit(lambda p, s, b, x: execute(mlp, p, s, b, x, sites=SITES))
    with jax.transfer_guard_device_to_host("disallow"):
        value: Any = None
        for step in range(4):
            live = reweigh(live, advance(state, step), own)
            value, params, live = train_step(own, params, live, batch(step))
            _, on_device = dynamic(params, on_device, bank, batch(step))
        with pytest.raises(RuntimeError, match="transfer"):
            float(value)
    assert np.isfinite(float(value))
