"""Initialisations of grafted kernels: each by hand once, and its laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.artifacts import write_artifact
from esper.tamiyo import Probe
from esper.tezzeret import blueprint_names
from esper.tolaria.initialisations import INITIALISATIONS, initialise
from esper.tolaria.initialisations._anatomy import anatomy_of
from esper.tolaria.initialisations._gradmax import _responses
from esper.tolaria.initialisations._vanishing import find_branch
from tests.esper.initialisation_kernels import (
    described,
    inputs_of,
    of_library,
    probe_of,
    program,
    squared_error,
)

TWO_MAPS = """
schema_version: 2
name: two_maps
summary: Two linear maps.
sizes: {width: 2}
birth: free
nodes:
  - {name: down, op: linear, inputs: [x], features: width, bias: false}
  - {name: up, op: linear, inputs: [down], features: out, bias: false}
output: up
"""
ONE_MAP = """
schema_version: 2
name: one_map
summary: One linear map.
birth: free
nodes:
  - {name: map, op: linear, inputs: [x], features: out, bias: false}
output: map
"""
GROWN_BY_GRADMAX = [
    "residual_mlp", "low_rank", "norm_mlp", "gated", "geglu", "attention", "causal_attention",
    "token_mixer", "conv_low_rank", "convnext",
]  # fmt: skip
WITHOUT_LAST_MAP = ["highway", "squeeze_excite"]
WITH_LAST_MAP = [name for name in blueprint_names() if name not in WITHOUT_LAST_MAP]
# One for each kind of last map and of example: every blueprint would take a minute.
SOME = [
    "bottleneck", "residual_mlp", "gated", "parallel_adapter", "dense_concat", "feature_scale",
    "token_mixer", "temporal_conv", "dilated_context", "conv_bottleneck", "convnext",
]  # fmt: skip


def start(name, artifact, probe=None, seed=0, **options):
    return initialise(name, artifact, probe, random=np.random.default_rng(seed), **options)


def f32(rows):
    return np.array(rows, np.float32)


# --- worked by hand -----------------------------------------------------------------------------


def test_as_compiled_is_the_artifact_itself_and_a_copy_of_it():
    artifact = of_library("bottleneck")
    params = start("as_compiled", artifact)
    assert list(params) == list(artifact.params)
    for name, value in params.items():
        assert value.tobytes() == artifact.params[name].tobytes()
        assert not np.shares_memory(value, artifact.params[name])


def test_zero_output_by_hand():
    artifact = of_library("bottleneck")
    params = start("zero_output", artifact)
    assert not params["expand.weight"].any()
    assert not params["expand.bias"].any()
    for name in ("squeeze.weight", "squeeze.bias"):
        assert params[name].tobytes() == artifact.params[name].tobytes()


def test_gradmax_by_hand():
    # M = Σ g x^T = (0,3)^T (1,0) + (2,0)^T (0,1) = [[0, 2], [3, 0]], whose singular values are 3
    # with u = (0,1) and v = (1,0), and 2 with u = (1,0) and v = (0,1). So the first unit goes to
    # (0, 3) and the second to (2, 0), times a factor that makes the norm scale·√(2/3).
    artifact = described(TWO_MAPS, "2->2")
    probe = Probe(f32([[1, 0], [0, 1]]), f32([[5, 5], [6, 6]]), f32([[0, 3], [2, 0]]), 1.0)
    params = start("gradmax", artifact, probe, scale=np.sqrt(13 / (2 / 3)))  # √13 = |(3, 2)|
    np.testing.assert_array_equal(params["down.weight"], np.zeros((2, 2)))
    np.testing.assert_allclose(params["up.weight"], [[0, 2], [3, 0]], rtol=1e-6)
    # The gradient by the hidden map is Ω^T M = [[9, 0], [0, 4]].
    run = program(artifact)
    gradient = jax.grad(lambda p: (probe.gradients * run(p, probe.inputs)).sum())(params)
    np.testing.assert_allclose(gradient["down.weight"], [[9, 0], [0, 4]], rtol=1e-6)


def test_gradmax_uses_a_direction_again_with_the_other_sign_and_then_with_half():
    artifact = described(TWO_MAPS, "1->1", width=5)
    probe = Probe(f32([[2]]), f32([[1]]), f32([[1]]), 1.0)
    weight = start("gradmax", artifact, probe)["up.weight"][0]
    np.testing.assert_allclose(weight / weight[0], [1, -1, 0.5, -0.5, 1 / 3], rtol=1e-6)
    assert np.linalg.norm(weight) == pytest.approx(np.sqrt(1 / 3))


def test_residual_fit_by_hand():
    # The examples are (1,0) and (0,1), so least squares is solved by W = T^T with T the negative
    # gradients of each example's own loss, (2,0) and (0,4); the ridge makes it T/1.001. The loss
    # falls by 10/1.001 a unit of it, and is 10: the step is 1.001 long.
    artifact = described(ONE_MAP, "2->2")
    probe = Probe(f32([[1, 0], [0, 1]]), f32([[0, 0], [99, 99]]), f32([[-1, 0], [0, -2]]), 10.0)
    params = start("residual_fit", artifact, probe)
    np.testing.assert_allclose(params["map.weight"], [[2, 0], [0, 4]], rtol=1e-6)
    # Half of the loss is half of the step.
    params = start("residual_fit", artifact, probe, scale=0.5)
    np.testing.assert_allclose(params["map.weight"], [[1, 0], [0, 2]], rtol=1e-6)


def test_residual_fit_is_no_longer_than_the_layer_varies():
    # As above, but the layer varies by 1 about its means: so the output's mean square is 1.
    artifact = described(ONE_MAP, "2->2")
    probe = Probe(f32([[1, 0], [0, 1]]), f32([[7, 3], [9, 5]]), f32([[-1, 0], [0, -2]]), 10.0)
    weight = start("residual_fit", artifact, probe)["map.weight"]
    np.testing.assert_allclose(weight, np.array([[2, 0], [0, 4]]) / np.sqrt(5), rtol=1e-6)


def test_residual_fit_takes_the_layer_over_under_convex():
    # Of one example for each direction the layer itself can be computed: W = (h + T)^T, but for the
    # ridge, by which h is computed as h/1.001.
    artifact = described(ONE_MAP, "2->2")
    probe = Probe(f32([[1, 0], [0, 1]]), f32([[0, 0], [99, 99]]), f32([[-1, 0], [0, -2]]), 10.0)
    weight = start("residual_fit", artifact, probe, blend="convex")["map.weight"]
    np.testing.assert_allclose(weight[0], [2, 99 / 1.001], rtol=0.1)
    k = probe.inputs @ weight.T
    fall = -(probe.gradients * (k - probe.outputs)).sum()
    assert fall == pytest.approx(10.0, rel=1e-4)


def test_variance_transfer_by_hand():
    # The input varies by 1 and the layer by 9 (its standard deviation is 3), so x becomes ±3x,
    # whatever was drawn.
    artifact = described(ONE_MAP, "1->1")
    probe = Probe(f32([[1], [-1]]), f32([[8], [2]]), f32([[0], [0]]), 1.0)
    weight = start("variance_transfer", artifact, probe)["map.weight"]
    assert abs(float(weight[0, 0])) == pytest.approx(3.0)
    weight = start("variance_transfer", artifact, probe, scale=2.0)["map.weight"]
    assert abs(float(weight[0, 0])) == pytest.approx(6.0)


# --- laws ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WITH_LAST_MAP)
def test_zero_output_is_zero_for_any_input(name):
    artifact = of_library(name)
    params = start("zero_output", artifact)
    x = inputs_of(artifact, np.random.default_rng(1), 3) * np.float32(100)
    assert not np.asarray(program(artifact)(params, x)).any()


def gradient_of_hidden(artifact, probe, hidden, last):
    """Norm of the gradient by the hidden map's weights, for many last maps."""
    run = program(artifact)
    params = start("gradmax", artifact, probe)

    def loss(own, weights):
        k = run({**params, f"{hidden}.weight": own, f"{last}.weight": weights}, probe.inputs)
        return (probe.gradients * k).sum()

    # With the hidden map zero the output is linear in it and in the last map, and so this gradient
    # is linear in the last map: those of maps with a single 1 tell that of any.
    shape = params[f"{last}.weight"].shape
    single = np.eye(np.prod(shape), dtype=np.float32).reshape(-1, *shape)
    hidden_map = jnp.asarray(params[f"{hidden}.weight"])
    each = np.asarray(
        jax.jit(lambda w: jax.lax.map(lambda o: jax.grad(loss)(hidden_map, o), w))(single)
    )

    def norms(many):
        flat = many.reshape(len(many), -1).astype(np.float64)
        return np.linalg.norm(flat @ each.reshape(len(each), -1), axis=1)

    return params, norms


MAPS = {
    "residual_mlp": ("up", "down"), "low_rank": ("down", "up"), "norm_mlp": ("up", "down"),
    "gated": ("value", "down"), "geglu": ("value", "down"), "attention": ("value", "out"),
    "causal_attention": ("value", "out"), "token_mixer": ("up", "down"),
    "conv_low_rank": ("down", "up"), "convnext": ("up", "down"),
}  # fmt: skip


@pytest.mark.parametrize("name", GROWN_BY_GRADMAX)
def test_gradmax_is_silent_and_its_gradient_the_largest_of_a_thousand(name):
    artifact = of_library(name)
    probe, _ = probe_of(artifact)
    hidden, last = MAPS[name]
    params, norms = gradient_of_hidden(artifact, probe, hidden, last)
    x = inputs_of(artifact, np.random.default_rng(1), 3) * np.float32(100)
    assert not np.asarray(program(artifact)(params, x)).any()

    random = np.random.default_rng(0)
    own = params[f"{last}.weight"]
    many = random.standard_normal((1000, *own.shape)).astype(np.float32)
    many *= np.linalg.norm(own) / np.sqrt((many**2).sum(tuple(range(1, many.ndim)), keepdims=True))
    best = float(norms(own[None])[0])
    assert best > 0
    if name != "conv_low_rank":  # its gradient matrix is flat here: see the next test
        assert best >= norms(many).max()
    # All of it is in the hidden map: the last one's own gradient waits for it.
    gradient = jax.grad(lambda p: (probe.gradients * program(artifact)(p, probe.inputs)).sum())(
        params
    )
    assert not np.asarray(gradient[f"{last}.weight"]).any()


@given(st.integers(0, 2**32 - 1), st.integers(1, 4))
def test_one_unit_has_the_largest_gradient_of_all_and_more_have_less_for_being_different(
    seed, width
):
    # Of the norm alone, the largest gradient is that of all units on the first singular vector,
    # where they are copies of each other. So for several units a random map may do better, where
    # the singular values are nearly equal; for one unit none does.
    random = np.random.default_rng(seed)
    artifact = described(TWO_MAPS, "5->4", width=width)
    x, gradients = (random.standard_normal((3, n)).astype(np.float32) for n in (5, 4))
    moment = gradients.T.astype(np.float64) @ x
    largest = np.linalg.norm(moment, 2)
    up = start("gradmax", artifact, Probe(x, gradients, gradients, 1.0))["up.weight"]
    own = np.linalg.norm(up.T @ moment) / np.linalg.norm(up)
    assert own <= largest * (1 + 1e-5)
    if width == 1:
        many = random.standard_normal((1000, 4))
        many /= np.linalg.norm(many, axis=1, keepdims=True)
        assert own >= np.linalg.norm(many @ moment, axis=1).max() * (1 - 1e-5)
        assert own == pytest.approx(largest, rel=1e-5)
    else:
        assert np.linalg.matrix_rank(up) == min(width, 3)


@pytest.mark.parametrize(
    ("name", "seed"), [("low_rank", 0), ("low_rank", 1), ("norm_mlp", 2), ("conv_low_rank", 3)]
)
def test_gradmax_is_the_largest_of_all_maps_with_its_singular_values(name, seed):
    # Von Neumann's trace inequality, for whatever spectrum: turned, no map does better.
    artifact = of_library(name, seed)
    probe, _ = probe_of(artifact, seed)
    hidden, last = MAPS[name]
    params, norms = gradient_of_hidden(artifact, probe, hidden, last)
    own = params[f"{last}.weight"]
    random = np.random.default_rng(seed)
    turns, _ = np.linalg.qr(random.standard_normal((1000, len(own), len(own))))
    turned = np.einsum("nab,b...->na...", turns, own).astype(np.float32)
    best, others = float(norms(own[None])[0]), norms(turned)
    assert (others <= best * (1 + 1e-5)).all()


def test_a_wide_layer_has_a_few_directions_computed_and_they_are_the_first():
    random = np.random.default_rng(0)
    artifact = described(TWO_MAPS, "270->260", width=4)
    x, gradients = (random.standard_normal((400, n)).astype(np.float32) for n in (270, 260))
    up = start("gradmax", artifact, Probe(x, gradients, gradients, 1.0))["up.weight"]
    left, sizes, _ = np.linalg.svd(gradients.T.astype(np.float64) @ x)
    expected = left[:, :4] * sizes[:4]
    expected *= np.sign((expected * up).sum(0)) * np.linalg.norm(up) / np.linalg.norm(expected)
    np.testing.assert_allclose(up, expected, atol=1e-6)
    assert (up[np.abs(up).argmax(0), range(4)] > 0).all()


def test_units_with_gates_are_the_same_in_whatever_lots_they_are_computed():
    artifact = of_library("gated")
    probe, _ = probe_of(artifact, examples=3)
    anatomy = anatomy_of(artifact, "gradmax")
    branch = find_branch(anatomy, "gated")
    lots = [
        list(_responses(anatomy, branch, artifact.params, probe.inputs, probe.inputs, at_once))
        for at_once in (1 << 26, probe.inputs.size * 5, 1)
    ]
    for own, other, single in zip(*lots, strict=True):
        assert own.shape == probe.inputs.shape
        assert own.tobytes() == other.tobytes() == single.tobytes()


@pytest.mark.parametrize("blend", ["residual", "convex"])
@pytest.mark.parametrize("name", SOME)
def test_residual_fit_lowers_the_loss_at_a_small_alpha(name, blend):
    artifact = of_library(name)
    probe, target = probe_of(artifact, examples=64)
    params = start("residual_fit", artifact, probe, blend=blend)
    k = np.asarray(program(artifact)(params, probe.inputs), np.float64)
    change = k if blend == "residual" else k - probe.outputs
    fall = -(probe.gradients * change).sum()
    assert fall > 0
    if blend == "residual":
        assert np.corrcoef(k.ravel(), -probe.gradients.ravel())[0, 1] > 0
    # The step is computed in float32 from sums that nearly cancel.
    assert fall <= probe.loss * 1.01
    losses = [squared_error(probe.outputs + a * change, target) for a in (0.0, 0.001, 0.01, 0.05)]
    assert sorted(losses, reverse=True) == losses


@pytest.mark.parametrize("name", SOME)
def test_variance_transfer_holds_on_fresh_data(name):
    artifact = of_library(name)
    random = np.random.default_rng(3)
    signature = artifact.manifest.signature
    layer = random.standard_normal(
        (np.prod(signature.input_shape), np.prod(signature.output_shape))
    )

    def seen(examples):
        x = inputs_of(artifact, random, examples)
        outputs = (x.reshape(examples, -1) @ layer).reshape(examples, *signature.output_shape)
        return x, outputs.astype(np.float32)

    x, outputs = seen(512)
    params = start("variance_transfer", artifact, Probe(x, outputs, 0 * outputs, 1.0))
    x, outputs = seen(512)
    k = np.asarray(program(artifact)(params, x))
    axis = -1 if k.ndim == 2 or "sequence" in str(artifact.blueprint) else 1
    rest = tuple(i for i in range(k.ndim) if i != axis % k.ndim)
    assert k.var(rest).mean() == pytest.approx(outputs.var(rest).mean(), rel=0.3)


@pytest.mark.parametrize("name", INITIALISATIONS)
def test_equal_arguments_give_equal_bits_and_leave_the_artifact_alone(name):
    artifact = of_library("gated")
    probe, _ = probe_of(artifact)
    before = {n: p.tobytes() for n, p in artifact.params.items()}
    one, other = (start(name, artifact, probe, seed=5) for _ in range(2))
    assert {n: p.tobytes() for n, p in one.items()} == {n: p.tobytes() for n, p in other.items()}
    assert {n: p.tobytes() for n, p in artifact.params.items()} == before
    assert {n: (p.shape, p.dtype) for n, p in one.items()} == {
        n: (p.shape, p.dtype) for n, p in artifact.params.items()
    }


def test_variance_transfer_draws_by_random_what_was_compiled_as_zeros():
    artifact = of_library("gated")
    probe, _ = probe_of(artifact)
    one, other = (start("variance_transfer", artifact, probe, seed=s) for s in (0, 1))
    assert (one["down.weight"] != other["down.weight"]).any()
    # What was drawn by the compiler is kept, but for its size.
    artifact = of_library("bottleneck")
    probe, _ = probe_of(artifact)
    params = start("variance_transfer", artifact, probe)
    ratio = params["expand.weight"] / artifact.params["expand.weight"]
    np.testing.assert_allclose(ratio, ratio.flat[0], rtol=1e-5)


def test_bfloat16_kernels_get_bfloat16_parameters():
    artifact = described(TWO_MAPS, "2->2 bfloat16")
    probe = Probe(f32([[1, 0], [0, 1]]), f32([[5, 5], [6, 7]]), f32([[0, 3], [2, 0]]), 1.0)
    for name in INITIALISATIONS:
        params = start(name, artifact, probe)
        assert {p.dtype.name for p in params.values()} == {"bfloat16"}


# --- probes that tell little --------------------------------------------------------------------


@pytest.mark.parametrize("name", INITIALISATIONS)
@pytest.mark.parametrize("kernel", ["gated", "norm_mlp"])
def test_one_example_is_enough(name, kernel):
    artifact = of_library(kernel, kind="vector")
    probe, _ = probe_of(artifact, examples=1)
    params = start(name, artifact, probe)
    k = np.asarray(program(artifact)(params, probe.inputs))
    assert np.isfinite(k).all()
    if name == "variance_transfer":  # one example does not vary, and neither does the kernel then
        assert not k.any()
    if name == "residual_fit":
        assert -(probe.gradients * k).sum() > 0


@pytest.mark.parametrize("kernel", ["gated", "low_rank", "conv_low_rank"])
@pytest.mark.parametrize("name", ["gradmax", "residual_fit"])
def test_without_a_gradient_both_answer_as_zero_output_does(name, kernel):
    artifact = of_library(kernel)
    probe, _ = probe_of(artifact)
    still = Probe(probe.inputs, probe.outputs, 0 * probe.gradients, 0.0)
    params, expected = start(name, artifact, still), start("zero_output", artifact)
    for parameter, value in params.items():
        assert value.tobytes() == expected[parameter].tobytes(), parameter


@pytest.mark.parametrize("name", INITIALISATIONS)
def test_constant_inputs_have_an_answer(name):
    artifact = of_library("residual_mlp", kind="vector")
    probe, _ = probe_of(artifact)
    same = np.repeat(probe.inputs[:1], probe.examples, 0)
    probe = Probe(same, np.repeat(probe.outputs[:1], probe.examples, 0), probe.gradients, 1.0)
    params = start(name, artifact, probe)
    k = np.asarray(program(artifact)(params, same))
    assert np.isfinite(k).all()
    assert np.ptp(k, axis=0).max() < 1e-5
    if name == "residual_fit":  # the mean of what each example asks for is all that it can give
        assert -(probe.gradients * k).sum() > 0
    if name in ("variance_transfer", "gradmax", "zero_output"):
        assert not k.any()


def test_an_artifact_with_these_parameters_is_an_artifact():
    artifact = of_library("gated")
    probe, _ = probe_of(artifact)
    params = start("gradmax", artifact, probe)
    again = write_artifact(
        blueprint_name="gated", recipe="0" * 64, blueprint=artifact.blueprint,
        signature=artifact.manifest.signature, sizes=artifact.manifest.sizes, birth="zero",
        confidence=0.5, init_seed=0, params=params, stablehlo=b"none", torchscript=None,
        versions={},
    )  # fmt: skip
    assert start("as_compiled", again)["down.weight"].tobytes() == params["down.weight"].tobytes()
