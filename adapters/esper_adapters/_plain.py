"""A grown model without Esper in it.

Affine kernels are folded into their hosts. Any other grafted layer becomes a
function of one array that carries the layer's and its kernels' parameters and the
traced computation itself: jax's, with no class or function of Esper's.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from esper_adapters._graft import Blending, Graft, plan_grafts, run_graft
from esper_adapters._seeded import SeededModel
from esper_adapters._surgery import Signature
from esper_functional import FoldError, KasminaException, difference, running_seeds

Evaluate = Callable[..., Any]
"""`evaluate(*arrays, x)`, made of jax alone."""

_SEED = 20


def export_plain(model: SeededModel) -> Any:
    """The trained network as a model of its framework, which needs no Esper to run.

    Affine kernels are folded into linear hosts, where the blend allows it; other grafted
    layers become functions that carry their parameters (`eqx.nn.Lambda`, `nnx.Sequential`
    around a `jax.tree_util.Partial`), which train and compile like any layer: fossils are not
    frozen and kernels not isolated any more, and gradients not contained; outputs that are not
    finite are still replaced. Kernels that incubate are left out. Such a function takes arrays
    of the shape that its layer was called with in `example`, with any axes before it; a Flax
    layer that treats the examples of its batch alike takes batches of any size.

    Raises:
        KasminaException: for a grafted layer that is called with more than one array, that
            changes its own state, that `eqx.nn.Shared` ties to others, or of which it is not
            known what it takes (wrap with `example`).
    """
    model = _fold_all(_without_incubating(model.with_module(model.module)))
    grafts = plan_grafts(model.plan, model.live, running_seeds(model.seeds))
    layers = model.surgery.layers(model.host)
    signatures = {
        name: _check(name, graft, model.surgery.signature(layers[name]), model.signatures.get(name))
        for name, graft in grafts.items()
    }
    return model.surgery.plain(model.host, grafts, signatures)


def _without_incubating(model: SeededModel) -> SeededModel:
    for row, seed in np.argwhere(np.asarray(model.seeds.incubating)):
        model = model.unload_kernel(model.sites[row], int(seed))
    return model


def _fold_all(model: SeededModel) -> SeededModel:
    for row, seed in running_seeds(model.seeds):
        name = model.sites[row]
        if model.surgery.linear(model.surgery.layers(model.host)[name]) is None:
            continue
        try:
            model = model.fold(name, seed)
        except FoldError:
            continue
    return model


PLAIN_ADVICE = "unload its kernels, or export the function that calls it by jax.export"


def _check(name: str, graft: Graft, *known: Signature | None) -> Signature:
    """The first signature that serves the kernels of a layer."""
    rank = _rank(graft)
    serving = (s for s in known if s is not None and (s.whole or len(s.inputs) >= rank))
    signature = next(serving, None)
    if signature is None:
        raise KasminaException(
            f"export_plain: it is not known what layer {name!r} takes: wrap the model with"
            " `example`, the arguments of one call"
        )
    if not signature.alone:
        raise KasminaException(
            f"export_plain: layer {name!r} is called with more than one array, or returns more, and"
            f" its kernels cannot be folded: {PLAIN_ADVICE}"
        )
    for run in graft.anatomy.runs:
        if run.program.mappable is None:
            raise KasminaException(
                f"export_plain: kernel {run.program.key} of layer {name!r} has no form that jax"
                f" can map: {PLAIN_ADVICE}"
            )
    return signature


def _rank(graft: Graft) -> int:
    return max(run.program.example_rank for run in graft.anatomy.runs)


def check_stateless(where: str, changed: Sequence[str]) -> None:
    """Refuse a layer that changes its own state when it is called.

    Raises:
        KasminaException: if there is any name in `changed`.
    """
    if changed:
        raise KasminaException(
            f"export_plain: {where} changes its state when it is called ({', '.join(changed)}), and"
            f" a function has none: put the model into eval mode, or {PLAIN_ADVICE}"
        )


def plain_function(
    call: Callable[[Sequence[Any], Any], Any],
    host: Sequence[Any],
    graft: Graft,
    signature: Signature,
    *,
    batched: bool,
) -> tuple[Evaluate, list[Any]]:
    """One grafted layer as a function of jax alone, and the kernels' arrays that it needs.

    Args:
        call: `call(host, x)`, the layer's own call.
        host: the layer's arrays.
        batched: whether the layer is called with a batch, as Flax layers are.

    Returns:
        `evaluate(*host, *kernels, x)` and the kernels' arrays.
    """
    anatomy = dataclasses.replace(
        graft.anatomy,
        runs=tuple(dataclasses.replace(run, frozen=False) for run in graft.anatomy.runs),
        isolate=False,
        contain=False,
    )
    kernels, structure = jax.tree.flatten(dict(graft.kernels))
    blending = Blending(*map(np.asarray, graft.blending))

    def grafted(*arrays: Any) -> Any:
        own, (*rest, x) = arrays[: len(host)], arrays[len(host) :]
        params: Mapping[int, Any] = jax.tree.unflatten(structure, rest)
        return run_graft(anatomy, params, blending, call(own, x), (x,), {})

    def one(*arrays: Any) -> Any:
        """Of an example by itself."""
        return grafted(*arrays[:-1], arrays[-1][None])[0]

    arrays = [*host, *kernels]
    x = _random(signature)
    if batched and signature.whole and x.ndim > _rank(graft):
        mapped = _over_any_axes(one, arrays, x[0])
        # Some layers mix the examples of a batch, or take none.
        if _alike(jax.jit(mapped)(*arrays, x), jax.jit(grafted)(*arrays, x)):
            return mapped, kernels
    return _over_any_axes(grafted, arrays, x), kernels


def _random(signature: Signature) -> jax.Array:
    random = np.random.default_rng(_SEED)
    kind = jnp.issubdtype(signature.input_dtype, jnp.inexact)
    draw = random.normal(size=signature.inputs) if kind else np.zeros(signature.inputs)
    return jnp.asarray(draw, signature.input_dtype)


def _alike(a: Any, b: Any) -> bool:
    own, other = (np.asarray(leaf).astype(np.float64) for leaf in (a, b))
    finite = np.isfinite(own)
    if not np.array_equal(finite, np.isfinite(other)):
        return False
    return difference(own[finite], other[finite], np.dtype(b.dtype).name).within


def _over_any_axes(function: Callable[..., Any], arrays: Sequence[Any], x: jax.Array) -> Evaluate:
    """`function(*arrays, x)` as traced, over any axes that come before those of x."""
    # What jax returns here evaluates a jaxpr: the function itself is no part of it.
    traced, _ = jax.closure_convert(function, *arrays, x)
    names = itertools.count()

    def core(ndim: int) -> str:
        return "(" + ",".join(f"a{next(names)}" for _ in range(ndim)) + ")"

    y = jax.eval_shape(traced, *arrays, x)
    taken = ",".join(core(np.ndim(leaf)) for leaf in (*arrays, x))
    return jnp.vectorize(traced, signature=f"{taken}->{core(len(y.shape))}")
