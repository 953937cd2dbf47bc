"""Kernels that outlive the libraries they were compiled with."""

import numpy as np
import pytest

from esper.artifacts import rewrite_artifact
from esper.contracts import KernelSignature
from esper.errors import InputError
from esper.tezzeret import compile_blueprint, is_due, load_blueprint, recompile

SIGNATURE = KernelSignature(input_shape=(3,), output_shape=(4,))


def _written_by(jaxlib: str, origin: str = "blueprint"):
    made = compile_blueprint(load_blueprint("gated"), SIGNATURE, sizes={"width": 3}, init_seed=4)
    return rewrite_artifact(
        made,
        versions=made.manifest.versions | {"jaxlib": jaxlib},
        origin=origin,
        blueprint=made.blueprint if origin == "blueprint" else None,
    )


@pytest.mark.parametrize(
    ("written", "read", "due"),
    [
        ("0.10.2", "0.10.2", False),
        ("0.10.0", "0.10.9", False),
        ("0.9.1", "0.10.2", False),
        ("0.8.3", "0.10.2", True),
        ("0.10.2", "0.9.0", True),
        ("0.10.2", "1.0.0", True),
        ("0.10.2.dev20260101", "0.11.0", False),
    ],
)
def test_a_program_is_due_two_minor_versions_later(written, read, due):
    assert is_due(_written_by(written), jaxlib=read) is due


@pytest.mark.parametrize("versions", [{}, {"jaxlib": "banana"}, {"jaxlib": "9" * 5_000 + ".1"}])
def test_a_program_of_an_unknown_jaxlib_is_due(versions):
    assert is_due(rewrite_artifact(_written_by("0.10.2"), versions=versions))


def test_what_is_compiled_anew_is_the_same_kernel_and_names_its_ancestor():
    old = _written_by("0.6.0")
    assert is_due(old)
    new = recompile(old)
    assert not is_due(new)
    assert new.manifest.ancestor == old.kernel_id
    assert new.manifest.signature == old.manifest.signature
    assert new.manifest.sizes == old.manifest.sizes
    assert new.blueprint == old.blueprint
    for name, value in old.params.items():
        np.testing.assert_array_equal(new.params[name], value)
    assert recompile(old).kernel_id == new.kernel_id
    # And on, from the new one.
    assert recompile(new).manifest.ancestor == new.kernel_id


def test_a_kernel_without_a_blueprint_is_made_anew_by_its_maker():
    with pytest.raises(InputError, match="was made of a function and holds no blueprint"):
        recompile(_written_by("0.6.0", origin="function"))


def test_a_version_that_is_none():
    with pytest.raises(InputError, match="'new' is no version of jaxlib"):
        is_due(_written_by("0.6.0"), jaxlib="new")
