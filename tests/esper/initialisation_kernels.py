"""Kernels and probes for the laws of initialisations."""

import jax
import numpy as np

from esper.artifacts import Artifact, write_artifact
from esper.contracts import KernelSignature
from esper.tamiyo import Probe
from esper.tezzeret import jax_program, load_blueprint, parse_blueprint, read_blueprint, resolve
from esper.tezzeret._programs import initial_params

SIGNATURES = {
    "vector": "6->5",
    "sequence": "4x6->4x5",
    "signal": "3x8->4x8",
    "image": "3x6x6->4x6x6",
}


def described(text, signature, **sizes):
    """An artifact of a blueprint that is written out here."""
    return bare(
        parse_blueprint(text, "the test's blueprint"), KernelSignature.parse(signature), sizes
    )


def of_library(name, seed=0, kind=None):
    """An artifact of a blueprint of the library, for a small layer of a kind that it takes."""
    blueprint = load_blueprint(name)
    text = SIGNATURES[kind or blueprint.takes[-1]]
    if blueprint.fits == "same":
        text = "->".join([text.split("->")[0]] * 2)
    return bare(blueprint, KernelSignature.parse(text), {}, seed)


def bare(blueprint, signature, sizes, seed=0) -> Artifact:
    """An artifact without programs: compiling takes seconds, and nothing here runs it."""
    graph = resolve(blueprint, signature, sizes)
    return write_artifact(
        blueprint_name=blueprint.name, recipe="0" * 64, blueprint=blueprint.canonical_json(),
        signature=signature, sizes={**blueprint.sizes, **sizes}, birth=blueprint.birth,
        confidence=0.5, init_seed=seed, params=initial_params(graph, seed), stablehlo=b"none",
        torchscript=None, versions={},
    )  # fmt: skip


def program(artifact):
    """What the kernel computes, as the compiler would trace it."""
    ir = read_blueprint(artifact.blueprint, "the artifact's blueprint")
    return jax.jit(jax_program(resolve(ir, artifact.manifest.signature, artifact.manifest.sizes)))


def probe_of(artifact, seed=0, examples=32):
    """A layer that is linear, a target that is another linear map, and half the squared error."""
    random = np.random.default_rng(seed)
    signature = artifact.manifest.signature
    x = inputs_of(artifact, random, examples)
    size_in, size_out = np.prod(signature.input_shape), np.prod(signature.output_shape)
    layer, wanted = random.standard_normal((2, size_in, size_out)) / np.sqrt(size_in)
    flat = x.reshape(examples, -1).astype(np.float64)
    outputs = (flat @ layer).reshape(examples, *signature.output_shape)
    target = (flat @ wanted).reshape(outputs.shape)
    loss = 0.5 * ((outputs - target) ** 2).sum() / examples
    gradients = (outputs - target) / examples
    return Probe(x, outputs.astype(np.float32), gradients.astype(np.float32), float(loss)), target


def inputs_of(artifact, random, examples):
    """Inputs of which some directions vary more than others, as those of trained layers do."""
    shape = (examples, *artifact.manifest.signature.input_shape)
    axis = 1 if len(shape) == 4 else len(shape) - 1
    factors = (0.6 ** np.arange(shape[axis])).reshape(-1, *(1,) * (len(shape) - 1 - axis))
    return (random.standard_normal(shape) * factors).astype(np.float32)


def squared_error(outputs, target):
    """Half the squared error, mean over examples."""
    return 0.5 * ((np.asarray(outputs, np.float64) - target) ** 2).sum() / len(target)
