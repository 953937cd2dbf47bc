import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from esper.artifacts import load_stablehlo, load_torchscript
from esper.contracts import KernelSignature
from esper.errors import BlueprintError, KernelCompilationError
from esper.tezzeret import (
    blueprint_names,
    compile_blueprint,
    kernel_recipe,
    load_blueprint,
    parse_blueprint,
    resolve,
)
from esper.tezzeret._parity import check_parity
from esper.tezzeret._programs import jax_program, torch_program
from esper_functional import difference

SIGNATURES = [
    KernelSignature(input_shape=(2,), output_shape=(8,)),
    KernelSignature(input_shape=(6,), output_shape=(6,)),
    KernelSignature(input_shape=(5,), output_shape=(1,)),
]


def test_the_library_holds_the_four_blueprints():
    assert set(blueprint_names()) == {"bottleneck", "gated", "low_rank", "residual_mlp"}


# The contract of every blueprint, for every signature


@pytest.mark.parametrize("signature", SIGNATURES, ids=str)
@pytest.mark.parametrize("name", blueprint_names())
def test_contract(name, signature):
    blueprint = load_blueprint(name)
    artifact = compile_blueprint(blueprint, signature)
    x = np.random.default_rng(3).standard_normal((4, *signature.input_shape)).astype(np.float32)
    apply = load_stablehlo(artifact.stablehlo).call

    def loss(params, x):
        y = apply(params, x)
        # A slope that is not zero where the output is.
        return jnp.sum(y * jnp.arange(1.0, 1.0 + y.size).reshape(y.shape)), y

    (_, y), gradient = jax.value_and_grad(loss, has_aux=True)(artifact.params, jnp.asarray(x))
    assert y.shape == (4, *signature.output_shape)
    if blueprint.birth == "zero":
        assert not np.asarray(y).any()
    else:
        assert np.asarray(y).any()
    assert any(np.asarray(g).any() for g in gradient.values())
    graph = resolve(blueprint, signature)
    assert graph.parameter_count == sum(p.size for p in artifact.params.values())
    assert graph.flops > 2 * graph.parameter_count * 0.5


@pytest.mark.parametrize("name", blueprint_names())
def test_both_programs_of_an_artifact_agree_at_three_batch_sizes(name):
    artifact = compile_blueprint(load_blueprint(name), SIGNATURES[0])
    random = np.random.default_rng(0)
    params = {
        n: random.standard_normal(p.shape).astype(np.float32) for n, p in artifact.params.items()
    }
    scripted = load_torchscript(artifact.torchscript)
    exported = jax.jit(load_stablehlo(artifact.stablehlo).call)
    for batch in (1, 3, 32):
        x = random.standard_normal((batch, 2)).astype(np.float32)
        theirs = scripted(*map(torch.tensor, params.values()), torch.tensor(x))
        assert difference(theirs.numpy(), exported(params, x)).within


def test_parameter_count_and_flops_worked_by_hand():
    graph = resolve(load_blueprint("low_rank"), SIGNATURES[0], {"rank": 3})
    assert graph.parameter_count == 2 * 3 + 3 * 8
    assert graph.flops == (2 * 2 + 1) * 3 + (2 * 3 + 1) * 8


# The gates


def test_programs_that_disagree_are_refused():
    one = resolve(load_blueprint("residual_mlp"), SIGNATURES[0])
    text = load_blueprint("residual_mlp").canonical_json().decode().replace('"gelu"', '"tanh"')
    other = resolve(parse_blueprint(text, "the test"), SIGNATURES[0])
    check_parity(one, jax_program(one), torch_program(one))
    with pytest.raises(KernelCompilationError, match=r"disagree at batch 1: output differs by"):
        check_parity(one, jax_program(one), torch_program(other))


def _blueprint(nodes: str, birth: str = "free", output: str = "b") -> str:
    return f"""
schema_version: 1
name: tested
summary: for a test
birth: {birth}
nodes:
{nodes}
output: {output}
"""


def test_a_false_claim_of_birth_is_refused():
    text = _blueprint("  - {name: b, op: linear, inputs: [x], features: out}", birth="zero")
    with pytest.raises(KernelCompilationError, match="claims to be born zero.*as large as"):
        compile_blueprint(parse_blueprint(text, "the test"), SIGNATURES[0])


def test_a_kernel_born_dead_is_refused():
    # Zero after zero: neither layer's gradient is other than zero, for ever.
    text = _blueprint(
        "  - {name: a, op: linear, inputs: [x], features: 4, init: zeros}\n"
        "  - {name: b, op: linear, inputs: [a], features: out, init: zeros, bias: false}"
    )
    with pytest.raises(KernelCompilationError, match="would never learn"):
        compile_blueprint(parse_blueprint(text, "the test"), SIGNATURES[0])


# Bytes


def test_equal_input_gives_equal_bytes_in_another_process(tmp_path: Path):
    blueprint = load_blueprint("gated")
    ours = compile_blueprint(blueprint, SIGNATURES[0], init_seed=7)
    script = (
        "from esper.tezzeret import *; from esper.contracts import KernelSignature\n"
        # Something else is compiled and scripted first.
        "s = KernelSignature(input_shape=(3,), output_shape=(3,))\n"
        "compile_blueprint(load_blueprint('low_rank'), s)\n"
        "s = KernelSignature(input_shape=(2,), output_shape=(8,))\n"
        "print(compile_blueprint(load_blueprint('gated'), s, init_seed=7).kernel_id)\n"
    )
    theirs = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert theirs.stdout.strip() == ours.kernel_id
    assert str(Path(__file__).parents[2]).encode() not in ours.data


def test_another_seed_is_another_kernel_with_the_same_programs():
    one = compile_blueprint(load_blueprint("low_rank"), SIGNATURES[0], init_seed=1)
    two = compile_blueprint(load_blueprint("low_rank"), SIGNATURES[0], init_seed=2)
    assert one.kernel_id != two.kernel_id
    assert one.stablehlo == two.stablehlo
    assert one.torchscript == two.torchscript
    recipes = {
        kernel_recipe(load_blueprint("low_rank"), SIGNATURES[0], init_seed=s) for s in (1, 2, 1)
    }
    assert recipes == {one.manifest.recipe, two.manifest.recipe}


# Bad input


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        (
            "  - {name: b, op: lineer, inputs: [x], features: out}",
            "'lineer'.*did you mean 'linear'",
        ),
        ("  - {name: b, op: relu, inputs: [c]}", "node 'b' reads 'c', which no earlier node makes"),
        ("  - {name: b, op: relu, inputs: [b]}", "node 'b' reads 'b'"),
        ("  - {name: x, op: relu, inputs: [x]}", "two nodes are called 'x'"),
        ("  - {name: b, op: add, inputs: [x]}", "add takes two or more inputs, got 1"),
        ("  - {name: b, op: linear, inputs: [x]}", "linear needs `features`"),
        ("  - {name: b, op: relu, inputs: [x], features: 3}", "relu takes no `features`"),
        ("  - {name: b, op: relu, inputs: [x], colour: 3}", "nodes.0.colour: Extra inputs"),
        ("  - {name: a, op: relu, inputs: [x]}", "the output 'b' is no node"),
    ],
)
def test_malformed_blueprints(nodes, message):
    with pytest.raises(BlueprintError, match=f"the test is not a blueprint.*{message}"):
        parse_blueprint(_blueprint(nodes), "the test")


def test_text_that_is_not_yaml():
    with pytest.raises(BlueprintError, match="the test is not YAML"):
        parse_blueprint("{", "the test")


def test_unknown_blueprint_names_the_nearest():
    with pytest.raises(BlueprintError, match="'low_rnk'.*did you mean 'low_rank'"):
        load_blueprint("low_rnk")


def test_unknown_sizes():
    with pytest.raises(BlueprintError, match="has no size widht: it has width"):
        resolve(load_blueprint("gated"), SIGNATURES[0], {"widht": 3})
    with pytest.raises(BlueprintError, match="width must be from 1 to 1048576, got 0"):
        resolve(load_blueprint("gated"), SIGNATURES[0], {"width": 0})
    with pytest.raises(BlueprintError, match=r"1,099,.* parameters, more than the 268,435,456"):
        resolve(load_blueprint("residual_mlp"), SIGNATURES[0], {"width": 1 << 20})
    text = _blueprint("  - {name: b, op: linear, inputs: [x], features: wide}")
    with pytest.raises(BlueprintError, match="node 'b': unknown size 'wide'; there are in, out"):
        resolve(parse_blueprint(text, "the test"), SIGNATURES[0])


def test_shapes_that_conflict_name_both_nodes():
    text = _blueprint(
        "  - {name: a, op: linear, inputs: [x], features: 4}\n"
        "  - {name: b, op: add, inputs: [a, x]}"
    )
    with pytest.raises(BlueprintError, match=r"'a' gives \(4,\) where 'x' gives \(2,\)"):
        resolve(parse_blueprint(text, "the test"), SIGNATURES[0])


def test_a_blueprint_that_does_not_fit_its_signature():
    text = _blueprint("  - {name: b, op: relu, inputs: [x]}")
    with pytest.raises(BlueprintError, match=r"does not fit 2->8 float32.*'b' gives \(2,\)"):
        resolve(parse_blueprint(text, "the test"), SIGNATURES[0])


def test_signatures_of_one_vector_only():
    images = KernelSignature(input_shape=(3, 4), output_shape=(8,))
    with pytest.raises(BlueprintError, match="one vector in and one out, got 3x4->8"):
        compile_blueprint(load_blueprint("gated"), images)
