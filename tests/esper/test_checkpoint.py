from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.errors import CheckpointError
from esper.tolaria._checkpoint import (
    MANIFEST,
    checkpoint_steps,
    load_checkpoint,
    save_checkpoint,
    tree_digest,
)

TREE = {
    "host": {"layers.0.weight": np.arange(6, dtype=np.float32).reshape(2, 3)},
    "kernels": {"3": {"up.bias": np.array([np.nan, -0.0, 1e-45], np.float32)}},
    "seeds": {"stage": np.array([[2, 0]], np.uint8), "fallback": np.array([[False, True]])},
    "moments": {"count": np.array(7, np.int32)},
}


@settings(max_examples=10)
@given(
    values=st.dictionaries(
        st.text("abc.", min_size=1, max_size=6),
        st.lists(st.floats(width=32), max_size=4).map(lambda v: np.array(v or [0], np.float32)),
        min_size=1,
        max_size=4,
    ),
    step=st.integers(0, 10**7),
)
def test_load_after_save_is_the_identity(tmp_path_factory, values, step):
    folder = tmp_path_factory.mktemp("checkpoints")
    save_checkpoint(folder, step, {"some": values}, {"meta": [1, "two", None]})
    tree, meta = load_checkpoint(folder, step)
    assert tree_digest(tree) == tree_digest({"some": values})
    assert meta == {"meta": [1, "two", None]}


def test_bits_and_dtypes_are_kept(tmp_path):
    save_checkpoint(tmp_path, 500, TREE, {})
    tree, _ = load_checkpoint(tmp_path, 500)
    assert tree_digest(tree) == tree_digest(TREE)
    assert tree["seeds"]["stage"].dtype == np.uint8


def _files(tmp_path: Path) -> list[Path]:
    return sorted(p for p in (tmp_path / "00000001").rglob("*") if p.is_file())


def test_one_flipped_bit_in_any_file_is_refused(tmp_path):
    save_checkpoint(tmp_path, 1, TREE, {"x": 1})
    for path in _files(tmp_path):
        whole = path.read_bytes()
        if not whole:
            continue
        damaged = bytearray(whole)
        damaged[len(damaged) // 2] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"00000001 is damaged.*delete that folder"):
            load_checkpoint(tmp_path, 1)
        path.write_bytes(whole)
    load_checkpoint(tmp_path, 1)


def test_a_missing_file_is_named(tmp_path):
    save_checkpoint(tmp_path, 1, TREE, {})
    path = next(p for p in _files(tmp_path) if p.name != MANIFEST)
    path.unlink()
    with pytest.raises(CheckpointError, match=f"{path.name} is missing"):
        load_checkpoint(tmp_path, 1)


def test_without_a_manifest_it_was_not_finished(tmp_path):
    save_checkpoint(tmp_path, 1, TREE, {})
    save_checkpoint(tmp_path, 2, TREE, {})
    (tmp_path / "00000002" / MANIFEST).unlink()
    assert checkpoint_steps(tmp_path) == [1]
    # Saving it again begins anew.
    save_checkpoint(tmp_path, 2, TREE, {})
    assert checkpoint_steps(tmp_path) == [1, 2]
    assert checkpoint_steps(tmp_path / "none") == []


def test_a_full_disk_leaves_earlier_checkpoints_whole(small_disk):
    folder = small_disk(1024)
    save_checkpoint(folder, 1, TREE, {})
    large = {"host": {"w": np.random.default_rng(0).standard_normal(200_000).astype(np.float32)}}
    with pytest.raises(CheckpointError, match="step 2 could not be written.*bytes free.*are whole"):
        save_checkpoint(folder, 2, large, {})
    assert checkpoint_steps(folder) == [1]
    assert tree_digest(load_checkpoint(folder, 1)[0]) == tree_digest(TREE)
