"""Checkpoints of any pytree of arrays, verified to the last bit and placed as asked.

>>> save_checkpoint("checkpoints", step, (params, opt_state, seeds, key), {"loss": 0.3})
>>> like = (params, opt_state, seeds, key)  # or jax.ShapeDtypeStructs with shardings
>>> (params, opt_state, seeds, key), meta = load_checkpoint("checkpoints", step, like)
"""

from esper.checkpoints._manifest import (
    MANIFEST,
    checkpoint_steps,
    read_manifest,
    verify_checkpoint,
)
from esper.checkpoints._match import CheckpointMismatchError
from esper.checkpoints._store import load_checkpoint, save_checkpoint
from esper.checkpoints._tree import tree_digest
from esper.checkpoints._writer import CheckpointWriter
from esper.errors import CheckpointError

__all__ = [
    "MANIFEST",
    "CheckpointError",
    "CheckpointMismatchError",
    "CheckpointWriter",
    "checkpoint_steps",
    "load_checkpoint",
    "read_manifest",
    "save_checkpoint",
    "tree_digest",
    "verify_checkpoint",
]
