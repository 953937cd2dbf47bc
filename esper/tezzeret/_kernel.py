"""From a blueprint to a kernel of jax, without an artifact between them."""

import hashlib
import json

import jax.numpy as jnp

from esper.contracts import KernelSignature
from esper.tezzeret._blueprint import BlueprintIR
from esper.tezzeret._programs import initial_params, jax_program
from esper.tezzeret._resolve import resolve
from esper_functional import Kernel, Program


def kernel_from_blueprint(
    blueprint: BlueprintIR,
    signature: KernelSignature,
    *,
    sizes: dict[str, int] | None = None,
    init_seed: int = 0,
) -> Kernel:
    """The kernel that a blueprint describes, with its parameters at birth.

    Its program is a function like any other, which jax can map, export and differentiate in
    every way. It has no identity beyond that of its computation, and no gate has run it: a
    kernel that is to be kept, or to run in PyTorch too, is compiled by `compile_blueprint`.
    Its parameters are those of the artifact of equal arguments, bit by bit. Kernels that
    differ in `init_seed` alone share one program.

    Args:
        signature: shapes of one example.
        sizes: values for some of the blueprint's named sizes.
        init_seed: seed of the first parameters.

    Raises:
        InputError: for a signature or a seed that is none.
        BlueprintError: for a blueprint that does not fit the signature, or an unknown size.
    """
    graph = resolve(blueprint, signature, sizes)
    content = {
        "blueprint": blueprint.digest(),
        "signature": str(signature),
        "sizes": {**blueprint.sizes, **(sizes or {})},
    }
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    key = f"blueprint:{blueprint.name}:{digest}"
    params = {name: jnp.asarray(p) for name, p in initial_params(graph, init_seed).items()}
    program = Program(
        key, jax_program(graph), len(signature.input_shape), independent=not graph.mixes_batch
    )
    return Kernel(program, params)
