"""What initialisations refuse, and what they say then."""

import dataclasses

import numpy as np
import pytest

from esper.artifacts import write_artifact
from esper.contracts import KernelSignature
from esper.errors import InputError
from esper.tamiyo import Probe
from esper.tolaria.initialisations import INITIALISATIONS, initialise
from esper_functional import BlendError
from tests.esper.initialisation_kernels import described, of_library, probe_of

FROM_PROBES = [n for n in INITIALISATIONS if n not in ("as_compiled", "zero_output")]


def start(name, artifact, probe=None, **options):
    return initialise(name, artifact, probe, random=np.random.default_rng(0), **options)


def test_an_unknown_name_is_refused_with_the_nearest_one():
    with pytest.raises(
        InputError, match=r"unknown initialisation 'gradmx'.*did you mean 'gradmax'"
    ):
        start("gradmx", of_library("gated"))


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf"), "1"])
def test_a_scale_that_is_none_is_refused(scale):
    with pytest.raises(InputError, match=r"`scale` must be a finite number greater than 0"):
        start("as_compiled", of_library("gated"), scale=scale)


def test_an_unknown_blend_is_refused():
    with pytest.raises(BlendError, match="unknown blend 'convx'"):
        start("as_compiled", of_library("gated"), blend="convx")


@pytest.mark.parametrize("name", FROM_PROBES)
def test_a_probe_is_asked_for(name):
    with pytest.raises(InputError, match=f"'{name}' needs a probe of the layer: give what"):
        start(name, of_library("gated"))


@pytest.mark.parametrize("name", FROM_PROBES)
@pytest.mark.parametrize("part", ["inputs", "outputs", "gradients"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(name, part, bad):
    artifact = of_library("gated")
    probe, _ = probe_of(artifact)
    values = np.array(getattr(probe, part))
    values.flat[3] = bad
    with pytest.raises(InputError, match=f"1 of {values.size} values of its {part} are not finite"):
        start(name, artifact, dataclasses.replace(probe, **{part: values}))


@pytest.mark.parametrize("name", FROM_PROBES)
def test_a_loss_that_is_not_finite_is_refused(name):
    artifact = of_library("gated")
    probe, _ = probe_of(artifact)
    with pytest.raises(InputError, match=r"a probe whose loss is nan.*diverged"):
        start(name, artifact, dataclasses.replace(probe, loss=float("nan")))


def test_a_probe_of_another_layer_and_one_of_no_example_are_refused():
    artifact = of_library("gated", kind="vector")
    other, _ = probe_of(of_library("low_rank"))
    with pytest.raises(InputError, match=r"inputs have shape \(32, 4, 6\).*needs \(32, 6\).*probe"):
        start("gradmax", artifact, other)
    none = Probe(np.zeros((0, 6), np.float32), *(np.zeros((0, 5), np.float32),) * 2, 1.0)
    with pytest.raises(InputError, match="at least one example, got none"):
        start("gradmax", artifact, none)


def test_a_probe_too_large_for_float32_gives_no_infinite_parameters():
    artifact = of_library("low_rank", kind="vector")
    probe, _ = probe_of(artifact)
    huge = dataclasses.replace(probe, outputs=probe.outputs * np.float32(1e37))
    with pytest.raises(InputError, match=r"not finite for parameter 'up.weight'.*smaller `scale`"):
        start("variance_transfer", artifact, huge, scale=1e6)


@pytest.mark.parametrize(
    ("kernel", "why"),
    [
        ("bottleneck", "node 'bend' is a relu, whose derivative at 0 is 0"),
        ("dilated_context", "node 'bend' is a relu"),
        ("depthwise", "node 'local' is a convolution in 3 groups"),
        ("dense_concat", "node 'beside' is a concat, behind 'grow'"),
        ("conv_identity", "its last map 'conv' is its only one"),
        ("norm", "nothing before its last map 'map' has weights"),
        ("feature_scale", "its last map 'scaled', a layer_scale, is one of each feature"),
        ("conv_bottleneck", "its last map 'norm3', a group_norm, is one of each feature"),
    ],
)
def test_gradmax_says_of_which_graphs_it_can_make_nothing_and_what_would_do(kernel, why):
    artifact = of_library(kernel)
    probe, _ = probe_of(artifact)
    with pytest.raises(InputError, match=f"{why}.*Take 'zero_output' or 'residual_fit'"):
        start("gradmax", artifact, probe)


GRAPHS = {
    "not 0 at 0": "{name: bend, op: sigmoid, inputs: [up]}",
    "multiplies 'up' by itself": "{name: bend, op: multiply, inputs: [up, up]}",
    "adds what is not zero with 'up'": "{name: bend, op: add, inputs: [up, x]}",
    "is a layer_norm, behind 'up'": "{name: bend, op: layer_norm, inputs: [up]}",
    "compares by what 'up' gives": "{name: bend, op: attention, inputs: [up, x, x]}",
}


@pytest.mark.parametrize("why", GRAPHS)
def test_gradmax_says_what_stands_between(why):
    artifact = described(
        f"""
schema_version: 2
name: between
summary: One hidden layer.
takes: [sequence]
birth: free
nodes:
  - {{name: up, op: linear, inputs: [x], features: in}}
  - {GRAPHS[why]}
  - {{name: down, op: linear, inputs: [bend], features: out}}
output: down
""",
        "3x4->3x4",
    )
    probe, _ = probe_of(artifact)
    with pytest.raises(InputError, match=f"blueprint 'between' has none: .*{why}"):
        start("gradmax", artifact, probe)


UP = "  - {name: up, op: conv1d, inputs: [x], features: 6}\n"
DOWN = "  - {name: down, op: conv1d, inputs: [mid]"
MID = "  - {name: mid, op: linear, inputs: [up], features: 8}\n"


@pytest.mark.parametrize(
    ("nodes", "why"),
    [
        (UP + MID + "conv1d, inputs: [mid], features: out", "'mid' and its last map 'down' do not"),
        (UP + MID + "conv1d, inputs: [mid], features: out, groups: 2", "convolution in 2 groups"),
        (
            UP + MID + "conv1d, inputs: [mid], features: out",
            "'mid' does not map the axis that 'up'",
        ),
    ],
)
def test_gradmax_knows_which_axis_a_map_is_of(nodes, why):
    artifact = described(
        "schema_version: 2\nname: axes\nsummary: Maps of two axes.\ntakes: [signal]\nbirth: free\n"
        f"nodes:\n{nodes.replace('conv1d, inputs: [mid]', DOWN)}}}\noutput: down\n",
        "3x8->4x8",
    )
    probe, _ = probe_of(artifact)
    with pytest.raises(InputError, match=why):
        start("gradmax", artifact, probe)


def test_a_gate_and_another_map_between_are_refused():
    artifact = described(
        """
schema_version: 2
name: both
summary: A gate, and a map behind it.
birth: free
nodes:
  - {name: gate, op: linear, inputs: [x], features: 3}
  - {name: value, op: linear, inputs: [x], features: 3}
  - {name: mixed, op: multiply, inputs: [gate, value]}
  - {name: again, op: linear, inputs: [mixed], features: 3}
  - {name: add, op: add, inputs: [mixed, again]}
  - {name: down, op: linear, inputs: [add], features: out}
output: down
""",
        "2->2",
    )
    probe, _ = probe_of(artifact)
    with pytest.raises(InputError, match="both a gate and another linear map"):
        start("gradmax", artifact, probe)


@pytest.mark.parametrize("name", [n for n in INITIALISATIONS if n != "as_compiled"])
@pytest.mark.parametrize(
    ("kernel", "why"),
    [
        ("highway", "comes out of node 'carried', a residual"),
        ("squeeze_excite", "comes out of node 'gated', a squeeze_excite"),
    ],
)
def test_a_kernel_whose_output_is_no_linear_map_takes_as_compiled_alone(name, kernel, why):
    artifact = of_library(kernel)
    probe, _ = probe_of(artifact)
    assert start("as_compiled", artifact).keys() == artifact.params.keys()
    with pytest.raises(InputError, match=f"'{kernel}' {why}: take 'as_compiled'"):
        start(name, artifact, probe)


def test_a_kernel_that_cannot_be_the_layer_is_refused_under_convex():
    # One number of the input is all that it passes on, and the layer gives all of them.
    artifact = described(
        """
schema_version: 2
name: narrow
summary: A map of rank 1.
birth: free
nodes:
  - {name: down, op: linear, inputs: [x], features: 1, bias: false}
  - {name: up, op: linear, inputs: [down], features: out, bias: false}
output: up
""",
        "6->5",
    )
    probe, _ = probe_of(artifact)
    # The loss falls along the layer's own output: to give less of it, raises it.
    gradients = (-probe.outputs + 0.1 * probe.gradients).astype(np.float32)
    probe = dataclasses.replace(probe, gradients=gradients, loss=1e-6)
    with pytest.raises(InputError, match=r"would raise the loss: under blend 'convex'.*Take blend"):
        start("residual_fit", artifact, probe, blend="convex", scale=0.1)
    assert start("residual_fit", artifact, probe)["up.weight"].any()


def test_a_users_own_function_takes_as_compiled_and_nothing_else():
    # What an artifact of a function is to whoever reads it: no blueprint.
    artifact = write_artifact(
        blueprint_name="own", origin="function", recipe="0" * 64, blueprint=None,
        signature=KernelSignature.parse("3->3"), sizes={}, birth="free", confidence=0.5,
        init_seed=0, params={"w": np.eye(3, dtype=np.float32)}, stablehlo=b"none",
        torchscript=None, versions={},
    )  # fmt: skip
    probe, _ = probe_of(artifact)
    np.testing.assert_array_equal(start("as_compiled", artifact, probe)["w"], np.eye(3))
    for name in INITIALISATIONS:
        if name != "as_compiled":
            with pytest.raises(InputError, match=r"made of a function and has none: take 'as_comp"):
                start(name, artifact, probe)
