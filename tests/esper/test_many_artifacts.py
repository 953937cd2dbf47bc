"""A thousand compiled kernels, kept, found and loaded again by another process's eyes."""

import numpy as np
import torch

from esper.execution import load_jax_kernel, load_torch_kernel
from esper.tezzeret import compile_blueprint, load_blueprint
from esper.urza import Library
from tests.esper.claims import claimed

NAMES = ("low_rank", "gated", "highway", "feature_scale", "conv_identity", "squeeze_excite",
         "token_mixer", "temporal_conv", "parallel_adapter", "norm")  # fmt: skip
EACH = 100


def test_a_thousand_artifacts_are_compiled_kept_and_loaded_again(tmp_path):
    store = Library(tmp_path / "library")
    made = {}
    for name in NAMES:
        blueprint, signature = load_blueprint(name), claimed(name)[0]
        for seed in range(EACH):
            artifact = compile_blueprint(blueprint, signature, init_seed=seed)
            made[store.put(artifact)] = artifact.manifest
    # Kernels without drawn parameters are one kernel, whatever the seed is; the manifest has it.
    assert len(made) == len(NAMES) * EACH
    store.close()

    again = Library(tmp_path / "library", create=False)
    rows = again.find()
    assert {row.kernel_id for row in rows} == set(made)
    programs = set()
    for row in rows:
        artifact = again.get(row.kernel_id)
        assert artifact.manifest == made[row.kernel_id]
        ours, theirs = load_jax_kernel(artifact), load_torch_kernel(artifact)
        programs.add((ours.program, id(theirs.program)))
        for name, value in artifact.params.items():
            np.testing.assert_array_equal(np.asarray(ours.params[name]), value)
            assert torch.equal(torch.as_tensor(theirs.params[name]), torch.tensor(value))
    # Kernels that differ in parameters alone share their programs.
    assert len(programs) == len(NAMES)
