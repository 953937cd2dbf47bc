"""Many compiled kernels, kept, and found and loaded again by another process."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from esper.execution import load_jax_kernel, load_torch_kernel
from esper.tezzeret import compile_blueprint, load_blueprint
from esper.urza import Library
from tests.depth import depth
from tests.esper.claims import claimed

NAMES = ("low_rank", "gated", "highway", "feature_scale", "conv_identity", "squeeze_excite",
         "token_mixer", "temporal_conv", "parallel_adapter", "norm")  # fmt: skip
EACH = depth(2, 100)


def load_all(folder: Path) -> tuple[list[str], int]:
    """The ids of a library's kernels, each loaded for both backends, and how many programs ran."""
    store = Library(folder, create=False)
    ids, programs = [], set()
    for row in store.find():
        artifact = store.get(row.kernel_id)
        assert artifact.kernel_id == row.kernel_id
        ours, theirs = load_jax_kernel(artifact), load_torch_kernel(artifact)
        programs.add((ours.program, id(theirs.program)))
        for name, value in artifact.params.items():
            np.testing.assert_array_equal(np.asarray(ours.params[name]), value)
            assert torch.equal(torch.as_tensor(theirs.params[name]), torch.tensor(value))
        ids.append(artifact.kernel_id)
    return ids, len(programs)


def test_many_artifacts_are_compiled_kept_and_loaded_again(tmp_path):
    made, store = set(), Library(tmp_path / "library")
    for name in NAMES:
        blueprint, signature = load_blueprint(name), claimed(name)[0]
        for seed in range(EACH):
            made.add(store.put(compile_blueprint(blueprint, signature, init_seed=seed)))
    # Kernels without drawn parameters are one kernel, whatever the seed is; the manifest has it.
    assert len(made) == len(NAMES) * EACH
    store.close()

    # Ids are digests of the files, so that equal ones are equal kernels. The other process has
    # compiled none of them: it trusts their programs by what the library's owner remembers.
    script = (
        f"import sys; sys.path[:0] = {sys.path!r}\n"
        "import json, pathlib\n"
        "from tests.esper.test_many_artifacts import load_all\n"
        f"print(json.dumps(load_all(pathlib.Path({str(tmp_path / 'library')!r}))))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    ids, programs = json.loads(done.stdout)
    assert len(ids) == len(made)
    assert set(ids) == made
    # Kernels that differ in parameters alone share their programs.
    assert programs == len(NAMES)
