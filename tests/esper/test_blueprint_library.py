"""The contract that every blueprint of the library keeps, for every signature that it claims."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from esper.artifacts import load_stablehlo, load_torchscript, read_artifact
from esper.errors import BlueprintError
from esper.tensors import from_torch, to_torch
from esper.tezzeret import (
    blueprint_names,
    compile_blueprint,
    load_blueprint,
    native_program,
    resolve,
)
from esper.tezzeret._compile import write_programs
from esper.tezzeret._parity import BATCHES, DRAWS, run_jax, run_torch
from esper_functional import difference
from tests.esper.claims import CLAIMS, claimed


def _drawn(random: np.random.Generator, shape, dtype: np.dtype, scale: float = 1.0) -> np.ndarray:
    return (scale * random.standard_normal(shape)).astype(dtype)


@pytest.mark.parametrize(
    ("name", "signature"), CLAIMS, ids=[f"{name} {signature}" for name, signature in CLAIMS]
)
def test_contract(name, signature):
    blueprint = load_blueprint(name)
    artifact = compile_blueprint(blueprint, signature)
    graph = resolve(blueprint, signature)
    random = np.random.default_rng(3)
    exported = load_stablehlo(artifact.stablehlo).call
    scripted = load_torchscript(artifact.torchscript)
    dtype = artifact.params[graph.parameters[0].name].dtype
    assert dtype.name == signature.dtype

    # Birth: its effect is as claimed, and it can learn.
    x = _drawn(random, (32, *signature.input_shape), dtype)
    cotangent = _drawn(random, (32, *signature.output_shape), dtype)
    born = run_jax(exported, artifact.params, x, cotangent)
    output = born["output"]
    assert np.isfinite(output.astype(np.float32)).all()
    if blueprint.birth == "zero":
        assert not output.any()
    elif blueprint.birth == "identity":
        np.testing.assert_array_equal(output, x)
    else:
        assert output.any()
    assert any(born[f"gradient of {parameter}"].any() for parameter in artifact.params)

    # Both programs agree, forward and in every gradient, at a third batch size: the compiler, whose
    # gate ran what it had written, has held them against each other at 1 and 7.
    params = {
        spec.name: _drawn(random, spec.shape, dtype, spec.fan_in**-0.5) for spec in graph.parameters
    }
    assert BATCHES == (1, 7)
    gaps = {}
    for _ in range(DRAWS):
        x = _drawn(random, (32, *signature.input_shape), dtype)
        ours = run_jax(exported, params, x, cotangent)
        theirs = run_torch(scripted, params, x, cotangent)
        assert ours.keys() == theirs.keys()
        gaps = {what: difference(theirs[what], value) for what, value in ours.items()}
        if all(gap.within for gap in gaps.values()):
            break
    assert all(gap.within for gap in gaps.values()), gaps

    # The programs are written in the same bytes again (in another process, by another test) ...
    if signature == claimed(name)[0]:
        written = write_programs(graph)
        assert written == (artifact.stablehlo, artifact.torchscript, artifact.manifest.vjp_order)

    # ... and the round trip is the identity.
    again = read_artifact(artifact.data, artifact.kernel_id)
    assert again.manifest == artifact.manifest
    for parameter, value in artifact.params.items():
        np.testing.assert_array_equal(again.params[parameter], value)

    # Size and cost are what they are, not what somebody wrote down.
    assert graph.parameter_count == sum(p.size for p in artifact.params.values())
    tensors = [to_torch(params[spec.name]) for spec in graph.parameters]
    native = native_program(graph)(*tensors, to_torch(x))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        native_program(graph)(*tensors, to_torch(x))
    assert 2 * graph.multiply_adds * 32 == counter.get_total_flops()
    assert graph.flops >= 2 * graph.multiply_adds

    # The native form in torch is the same program.
    np.testing.assert_array_equal(from_torch(native), from_torch(scripted(*tensors, to_torch(x))))


def test_there_are_blueprints_for_every_kind_of_layer():
    names = blueprint_names()
    assert len(names) >= 16
    kinds = [kind for name in names for kind in load_blueprint(name).takes]
    assert {kind: kinds.count(kind) >= 1 for kind in ("vector", "sequence", "signal", "image")} == {
        "vector": True, "sequence": True, "signal": True, "image": True
    }  # fmt: skip


@pytest.mark.parametrize("name", blueprint_names())
def test_every_blueprint_says_what_it_is_and_where_it_comes_from(name):
    blueprint = load_blueprint(name)
    assert blueprint.name == name
    assert len(blueprint.summary) > 30
    assert blueprint.paper is not None
    assert re.search(r"\b(19|20)\d\d\b", blueprint.paper)


@pytest.mark.parametrize("name", blueprint_names())
def test_what_a_blueprint_does_not_claim_it_refuses(name):
    blueprint = load_blueprint(name)
    ranks = {len(s.input_shape) for s in claimed(name)}
    for text in ("6->6", "4x6->4x6", "4x6x6->4x6x6"):
        signature = type(claimed(name)[0]).parse(text)
        if len(signature.input_shape) not in ranks:
            with pytest.raises(BlueprintError, match=r"takes one .*choose another blueprint"):
                resolve(blueprint, signature)
    if blueprint.fits == "same":
        like = claimed(name)[0]
        other = like.model_copy(update={"output_shape": (like.output_shape[0] + 1,)})
        with pytest.raises(BlueprintError, match="gives what it takes, one shape"):
            resolve(blueprint, other)


@pytest.mark.parametrize("name", ["gated", "grouped_conv", "attention", "conv_identity"])
def test_second_derivatives_are_in_the_artifact(name):
    signature = claimed(name)[0]
    artifact = compile_blueprint(load_blueprint(name), signature)
    assert artifact.manifest.vjp_order == 2
    apply = load_stablehlo(artifact.stablehlo).call
    x = jnp.ones((2, *signature.input_shape))

    def squared_slope(x):
        return jnp.sum(jax.grad(lambda x: jnp.sum(jnp.sin(apply(artifact.params, x))))(x) ** 2)

    assert np.isfinite(np.asarray(jax.grad(squared_slope)(x))).all()


def test_a_deserialised_program_runs_compiled_by_torch_and_mapped_by_func():
    blueprint, signature = load_blueprint("inverted_bottleneck"), claimed("inverted_bottleneck")[0]
    program = native_program(resolve(blueprint, signature))
    artifact = compile_blueprint(blueprint, signature)
    params = [to_torch(p) for p in artifact.params.values()]
    x = torch.randn(3, *signature.input_shape)
    jacobian = torch.func.vmap(lambda x: program(*params, x[None])[0])(x)
    torch.testing.assert_close(jacobian, program(*params, x))
