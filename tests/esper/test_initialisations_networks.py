"""Initialised kernels in real networks: what they leave as it was, and that both backends agree."""

import numpy as np
import pytest

from esper.artifacts import rewrite_artifact, trust
from esper.contracts import KernelSignature
from esper.execution import load_jax_kernel, load_torch_kernel
from esper.tensors import to_torch
from esper.tezzeret import compile_blueprint, load_blueprint
from esper.tolaria import load_task, make_config, make_trainee
from esper.tolaria.initialisations import INITIALISATIONS, initialise
from esper_functional import Event, EventKind
from tests.esper.initialisation_kernels import probe_of
from tests.tolerance import assert_close

PRESERVING = [name for name, kind in INITIALISATIONS.items() if kind.preserves]


@pytest.fixture(scope="module")
def kernel():
    """Compiled, with both of its programs; what it computes at birth is not zero."""
    artifact = compile_blueprint(
        load_blueprint("gated"), KernelSignature.parse("2->8"), sizes={"width": 6}
    )
    return artifact, probe_of(artifact)[0]


def initialised(kernel, name):
    artifact, probe = kernel
    params = initialise(name, artifact, probe, random=np.random.default_rng(0))
    changed = rewrite_artifact(artifact, params=params, birth="free")
    trust(changed)  # its programs were compiled here
    return changed


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_what_preserves_the_function_does_so_bit_for_bit(backend, kernel):
    # Alphas and parameters are data of one program: a network for each would compile it again.
    for blend, names, alphas in (
        ("residual", PRESERVING, [0.0, 0.3, 1.0]),
        ("convex", ["gradmax"], [0.0]),
    ):
        config = make_config(task="spirals", backend=backend, blend=blend)
        own = make_trainee(load_task(config.task), config)
        x = np.random.default_rng(0).standard_normal((16, 2)).astype(np.float32)
        before = own.predict(x)
        # The last one changes the output; at alpha 0 it does not yet.
        for seed, name in enumerate([*names, "variance_transfer"]):
            artifact = initialised(kernel, name)
            own.apply(Event(0, 0, seed, EventKind.LOAD, artifact.kernel_id, float(seed)))
            own.apply(Event(0, 0, seed, EventKind.ACTIVATE, artifact.kernel_id, 0.0), artifact)
        for seed, name in enumerate(names):
            for alpha in alphas:
                own.apply(Event(0, 0, seed, EventKind.ALPHA, value=alpha))
                np.testing.assert_array_equal(own.predict(x), before, f"{blend} {name} {alpha}")
        own.apply(Event(0, 0, len(names), EventKind.ALPHA, value=0.3))
        assert (own.predict(x) != before).any()


@pytest.mark.parametrize("name", INITIALISATIONS)
def test_the_programs_of_both_backends_agree_with_these_parameters(name, kernel):
    artifact = initialised(kernel, name)
    ours, theirs = load_jax_kernel(artifact), load_torch_kernel(artifact)
    x = kernel[1].inputs
    expected = np.asarray(ours.program.apply(ours.params, x))
    params = [to_torch(p) for p in artifact.params.values()]
    found = theirs.program(*params, to_torch(x)).detach().numpy()
    assert_close(found, expected)
    assert expected.any() == (name in ("residual_fit", "variance_transfer"))
