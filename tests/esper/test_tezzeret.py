import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from esper.contracts import KernelSignature
from esper.errors import BlueprintError, InputError, KernelCompilationError
from esper.tezzeret import (
    blueprint_names,
    compile_blueprint,
    kernel_from_blueprint,
    kernel_recipe,
    load_blueprint,
    parse_blueprint,
    resolve,
)
from esper.tezzeret._parity import check_parity, compare_results
from esper.tezzeret._programs import jax_program, torch_program

SIGNATURES = [
    KernelSignature(input_shape=(2,), output_shape=(8,)),
    KernelSignature(input_shape=(6,), output_shape=(6,)),
    KernelSignature(input_shape=(5,), output_shape=(1,)),
]


def test_parameter_count_and_flops_worked_by_hand():
    graph = resolve(load_blueprint("low_rank"), SIGNATURES[0], {"rank": 3})
    assert graph.parameter_count == 2 * 3 + 3 * 8
    assert graph.multiply_adds == 2 * 3 + 3 * 8
    assert graph.flops == 2 * graph.multiply_adds
    hidden = resolve(load_blueprint("bottleneck"), SIGNATURES[0], {"width": 4})
    # Two layers with biases, and four ReLUs.
    assert hidden.flops == 2 * (2 * 4 + 4 * 8) + (4 + 8) + 4


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
        "  - {name: b, op: linear, inputs: [a], features: out, init: zeros, bias: false}",
        birth="zero",
    )
    with pytest.raises(KernelCompilationError, match="would never learn"):
        compile_blueprint(parse_blueprint(text, "the test"), SIGNATURES[0])


# Bytes


def test_no_path_is_in_the_bytes():
    # That they are the same in another process is shown by a worker's; see test_compile_pool.py.
    made = compile_blueprint(load_blueprint("gated"), SIGNATURES[0], init_seed=7)
    for path in (str(Path(__file__).parents[2]), sys.prefix):
        assert path.encode() not in made.data


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
        ("  - {name: b, op: relu, inputs: [c]}", "node 'b' reads 'c', which no node makes"),
        ("  - {name: b, op: relu, inputs: [b]}", "the graph has a cycle: 'b' reads 'b'"),
        ("  - {name: x, op: relu, inputs: [x]}", "two nodes are called 'x'"),
        ("  - {name: b, op: add, inputs: [x]}", "node 'b': add takes two or more inputs, got 1"),
        ("  - {name: b, op: linear, inputs: [x]}", "nodes.0.linear.features: Field required"),
        (
            "  - {name: b, op: relu, inputs: [x], features: 3}",
            "nodes.0.relu.features: Extra inputs",
        ),
        ("  - {name: b, op: relu, inputs: [x], colour: 3}", "nodes.0.relu.colour: Extra inputs"),
        ("  - {name: a, op: relu, inputs: [x]}", "the output 'b' is no node"),
        (
            """  - {name: a, op: relu, inputs: [c]}
  - {name: b, op: relu, inputs: [a]}
  - {name: c, op: relu, inputs: [b]}""",
            "the graph has a cycle: '[abc]' reads '[abc]' reads '[abc]' reads '[abc]'",
        ),
        (
            "  - {name: a, op: relu, inputs: [x]}\n  - {name: b, op: relu, inputs: [x]}",
            "node 'a' is read by no other node and is not the output",
        ),
        ("  - {name: b, op: linear, inputs: [x], features: in+1}", "features.*match pattern"),
        ("  - {name: b, op: scale, inputs: [x], factor: .nan}", "factor"),
    ],
)
def test_malformed_blueprints(nodes, message):
    with pytest.raises(BlueprintError, match=f"the test is not a blueprint.*{message}"):
        parse_blueprint(_blueprint(nodes), "the test")


def test_text_that_is_not_yaml():
    with pytest.raises(BlueprintError, match="the test is not YAML"):
        parse_blueprint("{", "the test")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a: &a [x]\nb: *a",
            "YAML that a blueprint may be: found the alias .a: write it out",
        ),
        ("a: &a [*a]", "found the alias .a: write it out"),
        ("[" * 10_000, "YAML that a blueprint may be: maximum recursion depth"),
        ("x" * ((1 << 20) + 1), "it has 1,048,577 characters, and a blueprint has at most 1,048,5"),
        ("a: 2001-01-01", r"a value that JSON has not.*date.* Write texts, numbers, lists and map"),
        ("a: 2001-99-99", r"a value that JSON has not, or .* \(ValueError: month must be"),
        (f"a: {'9' * 5_000}", r"a value that JSON has not, or .* \(ValueError: Exceeds the limit"),
        ("a: !!float x", r"a value that JSON has not, or .* \(ValueError: could not convert"),
        ("a: !!bool x", r"a value that JSON has not, or .* \(KeyError: 'x'\)"),
        ("a: !!int ''", r"a value that JSON has not, or .* \(IndexError: "),
        ("a: !!timestamp x", r"a value that JSON has not, or .* \(AttributeError: "),
        ("a: !!binary aGk=", r"a value that JSON has not, or .* \(TypeError: .*bytes"),
    ],
    ids=lambda text: text[:16],
)
def test_texts_that_no_blueprint_needs(text, message):
    with pytest.raises(BlueprintError, match=f"the test is not .*{message}"):
        parse_blueprint(text, "the test")


def test_aliases_that_stand_for_gigabytes_are_refused_at_the_first():
    nine = [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    with pytest.raises(BlueprintError, match="found the alias .a0: write it out"):
        parse_blueprint("\n".join(["a0: &a0 [x]", *nine]), "the test")


def test_unknown_blueprint_names_the_nearest():
    with pytest.raises(BlueprintError, match="'low_rnk'.*did you mean 'low_rank'"):
        load_blueprint("low_rnk")


def test_unknown_sizes():
    with pytest.raises(BlueprintError, match="has no size widht: it has width"):
        resolve(load_blueprint("gated"), SIGNATURES[0], {"widht": 3})
    with pytest.raises(BlueprintError, match="width must be an integer from 1 to 1048576, got 0"):
        resolve(load_blueprint("gated"), SIGNATURES[0], {"width": 0})
    for size in ("3", 2.5, True, None, [3]):
        sizes: Any = {"width": size}
        with pytest.raises(BlueprintError, match=r"must be an integer from 1 .*, got .") as refused:
            compile_blueprint(load_blueprint("gated"), SIGNATURES[0], sizes=sizes)
        assert str(refused.value).endswith(f"got {size!r}")
    unnamed: Any = {"a": 1, 2: 1}
    with pytest.raises(BlueprintError, match="has no size 2, a: it has width"):
        resolve(load_blueprint("gated"), SIGNATURES[0], unnamed)
    with pytest.raises(BlueprintError, match=r"1,099,.* parameters, more than the 268,435,456"):
        resolve(load_blueprint("residual_mlp"), SIGNATURES[0], {"width": 1 << 20})
    text = _blueprint("  - {name: b, op: linear, inputs: [x], features: wide}")
    with pytest.raises(BlueprintError, match="node 'b': unknown size 'wide'; there are in, out"):
        resolve(parse_blueprint(text, "the test"), SIGNATURES[0])


@pytest.mark.parametrize("seed", [-1, 1.0, "1", None, True])
@pytest.mark.parametrize(
    "make", [compile_blueprint, kernel_from_blueprint], ids=lambda f: f.__name__
)
def test_seeds_that_are_none(make, seed):
    with pytest.raises(InputError, match="`init_seed` must be an integer from 0 on, got ") as told:
        make(load_blueprint("gated"), SIGNATURES[0], init_seed=seed)
    assert str(told.value).endswith(repr(seed))


@pytest.mark.parametrize("make", [compile_blueprint, resolve], ids=lambda f: f.__name__)
def test_a_text_is_no_signature(make):
    with pytest.raises(InputError, match=r"must be a KernelSignature, got '2->8': make one by"):
        make(load_blueprint("gated"), "2->8")


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


def test_nodes_in_any_order_are_one_blueprint():
    nodes = [
        "  - {name: a, op: linear, inputs: [x], features: 4}",
        "  - {name: c, op: relu, inputs: [a]}",
        "  - {name: b, op: linear, inputs: [c], features: out}",
    ]
    graphs = {
        parse_blueprint(_blueprint("\n".join(order)), "the test").digest()
        for order in (nodes, nodes[::-1], [nodes[1], nodes[2], nodes[0]])
    }
    assert len(graphs) == 1


@given(
    blueprint=st.sampled_from([load_blueprint(name) for name in blueprint_names()]),
)
def test_a_blueprint_is_what_its_json_and_yaml_say(blueprint):
    assert parse_blueprint(blueprint.canonical_json().decode(), "its JSON") == blueprint
    text = yaml.safe_dump(json.loads(blueprint.canonical_json()), sort_keys=False)
    assert parse_blueprint(text, "its YAML").digest() == blueprint.digest()


def test_a_blueprint_of_the_first_schema_version_is_read():
    old = {
        "schema_version": 1,
        "name": "old",
        "summary": "as they were written",
        "paper": None,
        "sizes": {"width": 4},
        "birth": "zero",
        "confidence": 0.5,
        "nodes": [
            {"name": "a", "op": "linear", "inputs": ["x"], "features": "width", "bias": False,
             "init": "fan_in"},
            {"name": "c", "op": "relu", "inputs": ["a"], "features": None, "bias": True,
             "init": "fan_in"},
            {"name": "b", "op": "linear", "inputs": ["c"], "features": "out", "bias": True,
             "init": "zeros"},
        ],
        "output": "b",
    }  # fmt: skip
    read = parse_blueprint(json.dumps(old), "the test")
    assert read.schema_version == 2
    assert resolve(read, SIGNATURES[0]).parameter_count == 2 * 4 + 4 * 8 + 8
    with pytest.raises(BlueprintError, match="schema_version"):
        parse_blueprint(json.dumps(old | {"schema_version": 3}), "the test")


@pytest.mark.parametrize("text", ["2->8", "3x32x32->8x16x16 bfloat16", "16x64->16x64 float32"])
def test_a_signature_is_what_its_text_says(text):
    signature = KernelSignature.parse(text)
    assert KernelSignature.parse(str(signature)) == signature
    assert str(signature).startswith(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2-8", "is no signature: expected the shapes of one example"),
        ("2->8 float64", "is no signature"),
        ("2->0", "sizes are from 1 to 1048576, got 0"),
        ("x2->3", "is no signature"),
    ],
)
def test_texts_that_are_no_signature(text, message):
    with pytest.raises(ValueError, match=message):
        KernelSignature.parse(text)


def test_sizes_may_be_multiples_and_fractions():
    text = _blueprint(
        "  - {name: a, op: linear, inputs: [x], features: in*4, bias: false}\n"
        "  - {name: c, op: linear, inputs: [a], features: in/4, bias: false}\n"
        "  - {name: b, op: linear, inputs: [c], features: out, bias: false}"
    )
    graph = resolve(parse_blueprint(text, "the test"), SIGNATURES[1])
    assert [node.output_shape for node in graph.nodes] == [(24,), (2,), (6,)]


def test_a_size_that_the_signature_does_not_give():
    text = _blueprint("  - {name: b, op: linear, inputs: [x], features: length}")
    with pytest.raises(BlueprintError, match="'length' .this signature gives none.; there are"):
        resolve(parse_blueprint(text, "the test"), SIGNATURES[0])
    named = _blueprint("  - {name: b, op: relu, inputs: [x]}").replace(
        "birth:", "sizes: {stride: 2}\nbirth:"
    )
    with pytest.raises(BlueprintError, match="`sizes` names stride, which the signature gives"):
        parse_blueprint(named, "the test")


def test_a_false_claim_to_be_the_identity_is_refused():
    text = _blueprint("  - {name: b, op: tanh, inputs: [x]}", birth="identity").replace(
        "birth:", "fits: same\nbirth:"
    )
    with pytest.raises(KernelCompilationError, match="born the identity.*differs from its input"):
        compile_blueprint(parse_blueprint(text, "the test"), SIGNATURES[1])


def test_a_false_claim_to_be_free_is_refused():
    text = _blueprint("  - {name: b, op: linear, inputs: [x], features: out, init: zeros}")
    with pytest.raises(KernelCompilationError, match="zero everywhere, and it claims 'free'"):
        compile_blueprint(parse_blueprint(text, "the test"), SIGNATURES[0])


def test_a_disagreement_says_how_large_it_is_and_where():
    ours = {"output": np.zeros((2, 3), np.float32)}
    theirs = {"output": np.array([[0, 0, 0], [0, 0.5, 0]], np.float32)}
    with pytest.raises(KernelCompilationError, match=r"differs by 0\.5 at \[1, 1\]; at most 1e-06"):
        compare_results(ours, theirs, 2)
