"""One meaning on both backends, for every kind of layer, in float32 and bfloat16.

Random seeds, stages, alphas, blends and kernels, failing ones among them: outputs, all gradients
and the next seed state of a torch layer are those of the core's layer.
"""

import dataclasses
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_adapters.pytorch import (
    KasminaAttentionLayer,
    KasminaBatchNormLayer,
    KasminaConv2dLayer,
    KasminaLayer,
    KasminaLayerNormLayer,
    absorb_faults,
)
from esper_adapters.pytorch import kernel_from_function as torch_kernel
from esper_functional import (
    BLENDS,
    BatchStats,
    Kernel,
    Program,
    absorb,
    attention,
    batch_norm,
    conv2d,
    count_faults,
    difference,
    forward,
    gather,
    layer_norm,
    linear,
    plan,
)
from tests.tolerance import assert_tree_close

NUM_SEEDS = 3
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of layer, as both frameworks have it."""

    torch: Any
    """`(options) -> layer`."""
    jax: Any
    """`(params, x) -> y`, or a tuple that starts with it."""
    params: Any
    """`(layer, of) -> tree`: what `of` gives of the host's parameters, as the core has them."""
    shape: tuple[int, ...]
    features: tuple[int, int]
    rank: int = 1


def plain(layer: Any, of: Any) -> Any:
    return {"weight": of(layer.weight), "bias": of(layer.bias)}


def of_attention(layer: Any, of: Any) -> Any:
    weights = np.split(of(layer.in_proj_weight), 3)
    biases = np.split(of(layer.in_proj_bias), 3)
    own = {
        name: {"weight": w, "bias": b}
        for name, w, b in zip(("query", "key", "value"), weights, biases, strict=True)
    }
    return own | {"out": plain(layer.out_proj, of)}


STATS = BatchStats(jnp.zeros(4), jnp.ones(4), jnp.zeros((), jnp.int32))

KINDS = {
    "linear": Kind(
        lambda **options: KasminaLayer(4, 5, **options), linear, plain, (3, 4), (4, 5)
    ),
    "conv2d": Kind(
        lambda **options: KasminaConv2dLayer(4, 6, 3, padding=1, **options),
        partial(conv2d, padding=1),
        plain,
        (3, 4, 3, 2),
        (4, 6),
        3,
    ),
    "attention": Kind(
        lambda **options: KasminaAttentionLayer(4, 2, batch_first=True, **options),
        lambda params, x: attention(params, x, num_heads=2),
        of_attention,
        (3, 2, 4),
        (4, 4),
        2,
    ),
    "layer norm": Kind(
        lambda **options: KasminaLayerNormLayer(4, **options), layer_norm, plain, (3, 4), (4, 4)
    ),
    "batch norm": Kind(
        lambda **options: KasminaBatchNormLayer(4, **options),
        lambda params, x: batch_norm(params, x, STATS, train=True),
        plain,
        (3, 4, 3, 2),
        (4, 4),
        3,
    ),
}  # fmt: skip


def mixing(xp: Any, kind: str) -> Any:
    """Two maps of the features with a tanh between; `xp` is torch or jax.numpy."""
    axis = "...chw,dc->...dhw" if KINDS[kind].rank == 3 else "...c,dc->...d"
    return lambda a, b, x: xp.einsum(axis, xp.tanh(xp.einsum(axis, x, a)), b)


def root(xp: Any, kind: str) -> Any:
    """Not finite where the first feature of an example is negative somewhere."""
    first = (lambda x: x[..., :1, :, :]) if KINDS[kind].rank == 3 else (lambda x: x[..., :1])
    axis = "...chw,dc->...dhw" if KINDS[kind].rank == 3 else "...c,dc->...d"
    return lambda a, b, x: xp.sqrt(first(x)) + xp.einsum(axis, xp.einsum(axis, x, a), b)


FORMS = {"mixing": mixing, "root": root}


def draw(seed: int, dtype: str, *shape: int) -> np.ndarray:
    values = np.random.default_rng([seed, *shape]).normal(size=shape, scale=0.7)
    return np.asarray(jnp.asarray(values, jnp.float32).astype(dtype).astype(jnp.float32))


def to_torch(values: np.ndarray, dtype: str) -> torch.Tensor:
    return torch.tensor(values, dtype=getattr(torch, dtype))


def numbers(tensor: Any) -> np.ndarray:
    if isinstance(tensor, torch.Tensor):
        return tensor.detach().float().numpy()
    return np.asarray(tensor.astype(jnp.float32))


def kernel_params(seed: int, kind: str, dtype: str) -> dict[str, np.ndarray]:
    inputs, outputs = KINDS[kind].features
    return {"a": draw(seed, dtype, 2, inputs), "b": draw(seed + 1, dtype, outputs, 2)}


@cache
def jax_program(kind: str, form: str) -> Program:
    run = FORMS[form](jnp, kind)
    return Program(f"{kind} {form}", lambda p, x: run(p["a"], p["b"], x), KINDS[kind].rank)


@cache
def net_of(kind: str) -> Any:
    def net(params: Any, site: Any, x: Any) -> Any:
        result = site("layer", KINDS[kind].jax, params, x)
        return result[0] if isinstance(result, tuple) else result

    return net


@cache
def compiled(kind: str, planned: Any) -> Any:
    def both(host, live, x, cotangent):
        def value(host, kernels, x):
            own = live and dataclasses.replace(live, params=kernels)
            y, observed = forward(net_of(kind), planned, host, own, x)
            return y, count_faults(live, observed.faults)

        y, pull_back, after = jax.vjp(value, host, live.params if live else (), x, has_aux=True)
        return y, pull_back(cotangent), after

    return jax.jit(both)


rows = st.lists(
    st.tuples(
        st.sampled_from(["DORMANT", "ACTIVE", "FOSSILIZED"]),
        st.sampled_from(list(FORMS)),
        st.floats(0.0, 1.0, width=32),
    ),
    min_size=NUM_SEEDS,
    max_size=NUM_SEEDS,
)


def close(ours: Any, theirs: Any, dtype: str, what: str) -> None:
    a, b = numbers(ours), numbers(theirs)
    gap = difference(a, b, dtype)
    assert gap.within, f"{what} differs by {gap.largest:.3g}, allowed {gap.allowed:.3g}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8)
@given(
    seed=st.integers(0, 1000),
    chosen=rows,
    blend=st.sampled_from(BLENDS),
    isolate=st.booleans(),
    positive=st.booleans(),
)
def test_outputs_gradients_and_the_next_state_agree(
    kind, dtype, seed, chosen, blend, isolate, positive
):
    own = KINDS[kind]
    torch.manual_seed(seed)
    layer = own.torch(
        num_seeds=NUM_SEEDS, layer_name="layer", blend=blend, isolate=isolate
    ).to(getattr(torch, dtype))  # fmt: skip
    kernels: dict[int, Kernel] = {}
    for i, (stage, form, alpha) in enumerate(chosen):
        if stage == "DORMANT":
            continue
        params = kernel_params(seed + i, kind, dtype)
        theirs = {name: to_torch(p, dtype) for name, p in params.items()}
        given_kernel = torch_kernel(FORMS[form](torch, kind), theirs, example_rank=own.rank)
        layer.load_kernel_sync(i, given_kernel, alpha=alpha)
        if stage == "FOSSILIZED":
            layer.fossilize(i)
        mine = {name: jnp.asarray(p, dtype) for name, p in params.items()}
        kernels[i] = Kernel(jax_program(kind, form), mine)

    x = np.array(draw(seed + 7, dtype, *own.shape))
    # One bad example at most, or none.
    x[1:] = np.abs(x[1:])
    x = np.abs(x) if positive else x
    source = to_torch(x, dtype).requires_grad_()
    result = layer(source, source, source) if kind == "attention" else layer(source)
    theirs = result[0] if isinstance(result, tuple) else result
    cotangent = draw(seed + 8, dtype, *theirs.shape)
    theirs.backward(to_torch(cotangent, dtype))

    state = layer.seeds
    planned = plan(state, kernels, ("layer",), blend=blend, isolate=isolate)
    live = gather(state, kernels, planned)
    host = jax.tree.map(lambda p: jnp.asarray(p, dtype), own.params(layer, numbers))
    ours, (to_host, to_kernels, to_x), after = compiled(kind, planned)(
        host, live, jnp.asarray(x, dtype), jnp.asarray(cotangent, dtype)
    )
    close(theirs, ours, dtype, "the output")
    close(source.grad, to_x, dtype, "the input's gradient")
    found = own.params(layer, lambda p: numbers(p.grad))
    jax.tree.map(
        lambda a, b: close(jnp.asarray(a), b, dtype, "a parameter's gradient"), found, to_host
    )
    running = [i for i, row in enumerate(chosen) if row[0] != "DORMANT"]
    for i, gradient in zip(running, to_kernels, strict=True):
        for name, p in layer.kernel(i).named_parameters():
            if chosen[i][0] == "FOSSILIZED":
                assert p.grad is None
                assert not np.asarray(gradient[name].astype(jnp.float32)).any()
            else:
                close(p.grad, gradient[name], dtype, f"the gradient of kernel {i}'s {name}")
    absorb_faults(layer.seed_table, [layer], 5)
    expected = absorb(state, after, step=5) if after is not None else state
    assert_tree_close(layer.seeds, expected)
