"""Each operation: its shape rule, its cost, and its two programs, which are one function."""

import jax
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from esper.contracts import KernelSignature
from esper.errors import BlueprintError
from esper.tensors import to_torch
from esper.tezzeret import native_program, parse_blueprint, resolve
from esper.tezzeret._ops import OPS, OpError
from esper.tezzeret._parity import run_jax, run_torch
from esper.tezzeret._programs import array_dtype, jax_program, torch_program
from esper_functional import difference

KINDS = {1: "vector", 2: "sequence", 3: "image"}


def _graph(node: str, shape: tuple[int, ...], dtype: str = "float32", takes: str | None = None):
    """A graph of one operation for inputs of a shape; its output is whatever it gives."""
    text = f"""
schema_version: 2
name: tested
summary: for a test
takes: [{takes or KINDS[len(shape)]}]
birth: free
nodes:
  - {{name: y, {node}}}
output: y
"""
    blueprint = parse_blueprint(text, "the test")
    (op,) = blueprint.nodes
    features = shape[-1] if takes is None and len(shape) < 3 else shape[0]
    sized = op.sized(lambda text: {"in": features, "in/4": -(-features // 4)}[text])
    made = sized.outline([shape] * len(op.inputs)).shape
    signature = KernelSignature.model_validate(
        {"input_shape": shape, "output_shape": made, "dtype": dtype}
    )
    return resolve(blueprint, signature)


CASES = [
    ("op: linear, inputs: [x], features: 5", (3,)),
    ("op: linear, inputs: [x], features: 5, bias: false", (4, 3)),
    ("op: linear, inputs: [x], features: 3, init: identity", (3,)),
    *((f"op: {name}, inputs: [x]", (2, 5)) for name in (
        "relu", "elu", "gelu", "gelu_tanh", "silu", "sigmoid", "softplus", "tanh",
    )),
    ("op: softmax, inputs: [x]", (4, 5)),
    ("op: softmax, inputs: [x], axis: 0", (4, 5)),
    ("op: scale, inputs: [x], factor: 0.3", (5,)),
    ("op: layer_scale, inputs: [x]", (4, 5)),
    ("op: layer_scale, inputs: [x], axis: 0, value: 0.1", (3, 4, 4)),
    ("op: dropout, inputs: [x], rate: 0.5", (5,)),
    ("op: add, inputs: [x, x, x]", (5,)),
    ("op: multiply, inputs: [x, x]", (5,)),
    ("op: residual, inputs: [x, x]", (5,)),
    ("op: residual, inputs: [x, x], factor: -0.7", (5,)),
    ("op: concat, inputs: [x, x]", (4, 5)),
    ("op: concat, inputs: [x, x, x], axis: 0", (3, 4, 4)),
    ("op: reshape, inputs: [x], shape: [2, 10]", (4, 5)),
    ("op: transpose, inputs: [x]", (4, 5)),
    ("op: mean, inputs: [x], axes: [0]", (4, 5)),
    ("op: mean, inputs: [x], axes: [-1, -2]", (3, 4, 4)),
    ("op: layer_norm, inputs: [x]", (4, 6)),
    ("op: rms_norm, inputs: [x], epsilon: 1.0e-3", (4, 6)),
    ("op: group_norm, inputs: [x], groups: 2", (4, 5, 5)),
    ("op: group_norm, inputs: [x]", (4, 9)),
    ("op: batch_norm, inputs: [x]", (6,)),
    ("op: batch_norm, inputs: [x]", (4, 5, 5)),
    ("op: conv1d, inputs: [x], features: 5", (4, 9)),
    ("op: conv1d, inputs: [x], features: 4, groups: in, window: 5, stride: 2", (4, 9)),
    ("op: conv2d, inputs: [x], features: 5", (4, 6, 5)),
    ("op: conv2d, inputs: [x], features: 6, groups: 2, window: 2, padding: 1", (4, 6, 5)),
    ("op: conv2d, inputs: [x], features: 4, groups: in, dilation: 2, stride: 2", (4, 7, 7)),
    ("op: conv2d, inputs: [x], features: 4, init: identity", (4, 6, 5)),
    ("op: max_pool, inputs: [x]", (3, 6, 5)),
    ("op: max_pool, inputs: [x], window: 3, stride: 2, padding: 1", (3, 9)),
    ("op: avg_pool, inputs: [x], window: 3, stride: 1, padding: 1", (3, 6, 5)),
    ("op: avg_pool, inputs: [x]", (3, 8)),
    ("op: squeeze_excite, inputs: [x], features: 2", (4, 5, 5)),
    ("op: squeeze_excite, inputs: [x], features: in/4", (4, 9)),
    ("op: attention, inputs: [x, x, x]", (5, 6)),
    ("op: attention, inputs: [x, x, x], heads: 3, causal: true", (5, 6)),
]  # fmt: skip


def _takes(node: str, shape: tuple[int, ...]) -> str | None:
    channels_first = any(word in node for word in ("conv1d", "pool", "excite"))
    return "signal" if len(shape) == 2 and channels_first else None


def test_every_operation_has_a_case():
    tested = {node.split(",")[0].removeprefix("op: ") for node, _ in CASES}
    assert tested == set(OPS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("node", "shape"), CASES, ids=[f"{n} {s}" for n, s in CASES])
def test_both_programs_are_one_function(node, shape, dtype):
    graph = _graph(node, shape, dtype, _takes(node, shape))
    kind = array_dtype(dtype)
    random = np.random.default_rng(0)
    params = {
        p.name: (random.standard_normal(p.shape) * p.fan_in**-0.5).astype(kind)
        for p in graph.parameters
    }
    pools = "max_pool" in node
    batch = 2 if pools else 7
    x = random.standard_normal((batch, *shape)).astype(kind)
    if pools:
        # No two values are equal, also in bfloat16: of two maxima it is open which one gets the
        # gradient.
        assert x.size <= 250
        x = random.permuted(np.arange(x.size) / 32 - 3).astype(kind).reshape(x.shape)
    cotangent = random.standard_normal((batch, *graph.signature.output_shape)).astype(kind)
    ours = run_jax(jax_program(graph), params, x, cotangent)
    theirs = run_torch(torch_program(graph), params, x, cotangent)
    assert ours["output"].shape == cotangent.shape
    for what, value in ours.items():
        gap = difference(theirs[what], value)
        assert gap.within, f"{what}: {gap}"


@pytest.mark.parametrize(("node", "shape"), CASES, ids=[f"{n} {s}" for n, s in CASES])
def test_multiply_adds_are_those_that_torch_counts(node, shape):
    graph = _graph(node, shape, takes=_takes(node, shape))
    params = [torch.zeros(p.shape) for p in graph.parameters]
    # Attention by its own operations: torch does not count the CPU's fused one.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        native_program(graph)(*params, torch.zeros(2, *shape))
    assert counter.get_total_flops() == 2 * 2 * graph.multiply_adds


def test_the_two_gelus_are_kept_apart():
    x = np.linspace(-4, 4, 101, dtype=np.float32)[None]
    exact, tanh = (
        run_jax(jax_program(_graph(f"op: {name}, inputs: [x]", (101,))), {}, x, x)["output"]
        for name in ("gelu", "gelu_tanh")
    )
    assert 3e-4 < np.abs(exact - tanh).max() < 6e-4


def test_no_two_parameters_of_a_program_are_carried_by_one_argument():
    text = """
schema_version: 2
name: tested
summary: for a test
takes: [image]
birth: free
nodes:
  - {name: a, op: squeeze_excite, inputs: [x], features: 2}
  - {name: a_squeeze, op: conv2d, inputs: [a], features: out}
output: a_squeeze
"""
    signature = KernelSignature.parse("4x3x3->4x3x3")
    graph = resolve(parse_blueprint(text, "the test"), signature)
    names = [p.name for p in graph.parameters]
    assert {"a.squeeze_weight", "a_squeeze.weight"} < set(names)
    random = np.random.default_rng(0)
    params, x = (
        {p.name: random.standard_normal(p.shape).astype(np.float32) for p in graph.parameters},
        random.standard_normal((2, 4, 3, 3)).astype(np.float32),
    )
    ours = run_jax(jax_program(graph), params, x, x)
    for program in (torch_program(graph), native_program(graph)):
        theirs = run_torch(program, params, x, x)
        assert all(difference(theirs[what], value).within for what, value in ours.items())


def test_a_batch_norm_sees_its_batch_and_says_so():
    graph = _graph("op: batch_norm, inputs: [x]", (3,))
    assert graph.mixes_batch
    x = np.random.default_rng(0).normal(3.0, 2.0, (64, 3)).astype(np.float32)
    params = {"y.weight": np.ones(3, np.float32), "y.bias": np.zeros(3, np.float32)}
    y = np.asarray(jax_program(graph)(params, x))
    np.testing.assert_allclose(y.mean(0), 0.0, atol=1e-5)
    np.testing.assert_allclose(y.std(0), 1.0, atol=1e-4)


# Shape rules


@given(
    size=st.integers(1, 12), window=st.integers(1, 7), stride=st.integers(1, 4),
    dilation=st.integers(1, 3), padding=st.one_of(st.just("same"), st.integers(0, 12)),
    groups=st.sampled_from([1, 2]), axes=st.sampled_from([1, 2]),
)  # fmt: skip
def test_the_shapes_of_convolutions_are_what_jax_makes(
    size, window, stride, dilation, padding, groups, axes
):
    shape = (4, *(size,) * axes)
    node = (
        f"op: conv{axes}d, inputs: [x], features: 6, window: {window}, stride: {stride},"
        f" dilation: {dilation}, padding: {padding}, groups: {groups}"
    )
    reach = dilation * (window - 1) + 1
    zeros = (reach - 1) // 2 if padding == "same" else padding
    fits = zeros < reach <= size + 2 * zeros and (window % 2 == 1 or padding != "same")
    if not fits:
        with pytest.raises(OpError):
            _graph(node, shape, takes="signal" if axes == 1 else "image")
        return
    graph = _graph(node, shape, takes="signal" if axes == 1 else "image")
    params = {p.name: jax.ShapeDtypeStruct(p.shape, "float32") for p in graph.parameters}
    made = jax.eval_shape(jax_program(graph), params, jax.ShapeDtypeStruct((2, *shape), "float32"))
    assert made.shape == (2, *graph.signature.output_shape)
    tensors = [torch.zeros(p.shape) for p in graph.parameters]
    assert native_program(graph)(*tensors, torch.zeros(2, *shape)).shape == made.shape


@given(
    size=st.integers(1, 12), window=st.integers(1, 5), stride=st.integers(1, 4),
    padding=st.integers(0, 3), kind=st.sampled_from(["max_pool", "avg_pool"]),
)  # fmt: skip
def test_the_shapes_of_pools_are_what_both_make(size, window, stride, padding, kind):
    node = f"op: {kind}, inputs: [x], window: {window}, stride: {stride}, padding: {padding}"
    if 2 * padding > window or window > size + 2 * padding:
        with pytest.raises(OpError):
            _graph(node, (3, size, size), takes="image")
        return
    graph = _graph(node, (3, size, size), takes="image")
    x = np.zeros((2, 3, size, size), np.float32)
    assert jax_program(graph)({}, x).shape[1:] == graph.signature.output_shape
    assert native_program(graph)(to_torch(x)).shape[1:] == graph.signature.output_shape


REFUSED = [
    ("op: linear, inputs: [x], features: 4, init: identity", (3,), "as many features"),
    ("op: conv2d, inputs: [x], features: 4", (3, 4), r"takes examples \[channels, height, width\]"),
    ("op: conv2d, inputs: [x], features: 4, groups: 2", (3, 4, 4), r"2 groups.*\(3\) and gives"),
    ("op: conv2d, inputs: [x], features: 3, window: 2", (3, 4, 4), "needs an odd window, got 2"),
    ("op: conv2d, inputs: [x], features: 3, padding: 9", (3, 4, 4), "from 0 to 2.*got 9"),
    ("op: conv2d, inputs: [x], features: 3, window: 5, padding: 0", (3, 4, 4), "reaches over 5"),
    ("op: conv2d, inputs: [x], features: 4, init: identity", (3, 4, 4), "as many channels"),
    ("op: group_norm, inputs: [x], groups: 2", (3, 4, 4), "must divide the channels"),
    ("op: attention, inputs: [x, x, x], heads: 4", (5, 6), "must divide the features"),
    ("op: attention, inputs: [x, x, x]", (6,), r"\[time, features\].*'x' gives \(6,\)"),
    ("op: softmax, inputs: [x], axis: 1", (6,), "`axis` must be from -1 to 0"),
    ("op: mean, inputs: [x], axes: [0, -1]", (4, 5), "name each once, and leave one"),
    ("op: reshape, inputs: [x], shape: [7]", (6,), r"needs 7 elements.*which has 6"),
    ("op: transpose, inputs: [x]", (6,), "examples of two axes"),
    ("op: max_pool, inputs: [x], padding: 2", (3, 4, 4), "at most half of the window"),
    ("op: max_pool, inputs: [x], window: 5", (3, 4, 4), "its window is 5"),
    ("op: max_pool, inputs: [x]", (6,), r"takes examples \[channels, length\] or"),
    ("op: squeeze_excite, inputs: [x], features: 2", (6,), r"\[channels, \*space\]"),
]


@pytest.mark.parametrize(("node", "shape", "message"), REFUSED)
def test_what_an_operation_cannot_be_applied_to(node, shape, message):
    text = f"""
schema_version: 2
name: tested
summary: for a test
takes: [{KINDS[len(shape)]}]
birth: free
nodes:
  - {{name: y, {node}}}
output: y
"""
    signature = KernelSignature.model_validate({"input_shape": shape, "output_shape": shape})
    with pytest.raises(BlueprintError, match=rf"blueprint 'tested', node 'y': .*{message}"):
        resolve(parse_blueprint(text, "the test"), signature)


@pytest.mark.parametrize("op", ["add", "residual", "concat"])
def test_shapes_that_conflict_name_both_nodes(op):
    text = f"""
schema_version: 2
name: tested
summary: for a test
birth: free
nodes:
  - {{name: a, op: linear, inputs: [x], features: 4}}
  - {{name: b, op: {op}, inputs: [a, x]{", axis: 0" if op == "concat" else ""}}}
output: b
"""
    signature = KernelSignature(input_shape=(3, 2), output_shape=(3, 4))
    with pytest.raises(BlueprintError, match=r"'a' gives \(3, 4\) where 'x' gives \(3, 2\)"):
        resolve(parse_blueprint(text, "the test"), signature)
