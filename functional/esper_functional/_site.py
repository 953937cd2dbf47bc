"""A site: one layer's call, into which kernels may be grafted.

Dormant, `site(name, layer, params, x)` is `layer(params, x)` and nothing else.
Grafted, the kernels take the layer's first argument, and their outputs are
blended into the first array of what it returns; all other arguments (masks,
keys, running statistics) and results concern the host alone.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from esper_functional._blend import Blend, mix
from esper_functional._containment import run_contained
from esper_functional._errors import KasminaException, KernelMismatchError
from esper_functional._kernel import Params, Program
from esper_functional._lifecycle import FAILURES_TO_RECOVERY
from esper_functional._plan import Run

Layer = Callable[..., Any]
"""`layer(params, x, ...)`; returns an array, or a tuple that starts with one."""


@runtime_checkable
class Site(Protocol):
    """A place where kernels may be grafted: one layer's call."""

    def __call__(self, name: str, layer: Layer, params: Any, /, *args: Any, **options: Any) -> Any:
        """What `layer(params, *args, **options)` returns, grafted."""
        ...


Network = Callable[[Any, Site, Any], Any]
"""`net(params, site, x)`."""


def bare(name: str, layer: Layer, params: Any, /, *args: Any, **options: Any) -> Any:
    """The site of a network that cannot grow; its bare twin in benchmarks and tests."""
    return layer(params, *args, **options)


def seeded(layer: Layer, name: str = "layer", **options: Any) -> Network:
    """A network of one site: any layer by itself, with the powers of a host.

    Args:
        layer: `layer(params, x, ...)`.
        name: its site's name.
        options: passed on to the layer at every call, such as `stride=2`.

    Returns:
        `net(params, site, x, *more)`, for `plan`, `forward`, `execute`, or as a part of a
        larger network, where it takes that network's `site`.
    """

    def net(params: Any, site: Site, *args: Any, **more: Any) -> Any:
        return site(name, layer, params, *args, **{**options, **more})

    return net


class Grafted(NamedTuple):
    """The output of one grafted layer, and what it saw."""

    output: jax.Array
    faults: tuple[jax.Array, ...]
    outputs: tuple[jax.Array | None, ...]


class HostCall(NamedTuple):
    """A layer's call: its input, and its output with the way to exchange it."""

    x: jax.Array
    h: jax.Array
    exchange: Callable[[Any], Any]
    """What the layer returned, with another array for `h`."""


def host_call(where: str, result: Any, args: Sequence[Any], options: Mapping[str, Any]) -> HostCall:
    """What kernels need of a layer's call.

    Args:
        where: the site, for messages.
        result: what the layer returned for `args` and `options`.

    Raises:
        KernelMismatchError: for a call that does not take and return an array first.
    """
    x = args[0] if args else None
    if not args:
        named = [name for name, value in options.items() if hasattr(value, "__array_namespace__")]
        if len(named) > 1:
            raise KernelMismatchError(
                f"{where} carries kernels and was called with the arrays {named} by name alone, so"
                " which of them is its input cannot be told: pass the input positionally"
            )
        x = options[named[0]] if named else None
    inner = result[0] if isinstance(result, tuple | list) and result else result
    for role, value in (("take", x), ("return", inner)):
        if not isinstance(value, jax.Array) and not hasattr(value, "__array_namespace__"):
            raise KernelMismatchError(
                f"{where} carries kernels, so its layer must {role} an array, or several of which"
                f" the first is one; it does {role} {type(value).__name__}. Unload its kernels, or"
                " choose another layer"
            )

    def exchange(y: Any) -> Any:
        if inner is result:
            return y
        fields: tuple[str, ...] | None = getattr(result, "_fields", None)
        kind: Any = type(result)
        return kind(y, *result[1:]) if fields else kind((y, *result[1:]))

    return HostCall(jnp.asarray(x), jnp.asarray(inner), exchange)


def run_program(
    where: str,
    program: Program,
    params: Params,
    x: jax.Array,
    h: jax.Array,
    *,
    summed: bool,
    contain: bool,
) -> tuple[jax.Array, jax.Array]:
    """A kernel's contained output, which is like h, and which examples of it are finite.

    Raises:
        KernelMismatchError: at trace time, for a kernel that refuses x or does not return
            an array like h.
    """
    expected = f"{x.dtype}{list(x.shape)} -> {h.dtype}{list(h.shape)}"
    if x.ndim < program.example_rank:
        raise KernelMismatchError(
            f"kernel {program.key} takes examples of rank {program.example_rank}, and {where}"
            f" gives it {x.dtype}{list(x.shape)}: choose a kernel of the layer's signature"
        )
    try:
        k, ok = run_contained(program, params, x, summed=summed, contain=contain)
    except KasminaException:
        raise
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise KernelMismatchError(
            f"kernel {program.key} does not fit {where}, which needs {expected}: it raised"
            f" {type(error).__name__}: {reason}"
        ) from error
    if k.shape != h.shape or k.dtype != h.dtype:
        raise KernelMismatchError(
            f"kernel {program.key} returned {k.dtype}{list(k.shape)} where its host {where}"
            f" returns {h.dtype}{list(h.shape)}: choose a kernel of the host's signature"
        )
    return k, ok


def run_site(
    runs: Sequence[Run],
    params: Sequence[Params],
    host_weight: Any,
    weights: Any,
    errors: Any,
    h: jax.Array,
    x: jax.Array,
    *,
    blend: Blend,
    isolate: bool,
    contain: bool = True,
    summed: bool = False,
    where: str = "the site",
) -> Grafted:
    """Blend the kernels of one site into its host output h.

    Args:
        runs: the programs, in seed order; incubating ones are passed over.
        params: their parameters.
        host_weight, weights, errors: scalars and `[runs]`, see `Live`.
        h: host output `[*batch, *out]`.
        x: host input `[*batch, *in]`.
        contain, summed: see `run_contained`.
        where: the site, for messages.

    Raises:
        KernelMismatchError: at trace time, for an output that is not like h.
    """
    if isolate:
        x = jax.lax.stop_gradient(x)
    outputs: list[Any] = []
    finite: list[jax.Array] = []
    faults: list[jax.Array] = []
    chosen: list[int] = []
    for i, (run, own) in enumerate(zip(runs, params, strict=True)):
        if run.incubating:
            outputs.append(None)
            faults.append(jnp.zeros((), jnp.bool_))
            continue
        own = jax.lax.stop_gradient(own) if run.frozen else own
        k, ok = run_program(where, run.program, own, x, h, summed=summed, contain=contain)
        faults.append(~jnp.all(ok))
        # A seed whose third failure is not absorbed yet has stopped already.
        finite.append(ok & (errors[i] < FAILURES_TO_RECOVERY))
        outputs.append(k)
        chosen.append(i)
    if not chosen:
        return Grafted(h, tuple(faults), tuple(outputs))
    cast = jax.lax.stop_gradient(jnp.asarray(weights)).astype(h.dtype)
    y = mix(
        blend,
        h,
        [outputs[i] for i in chosen],
        finite,
        jax.lax.stop_gradient(jnp.asarray(host_weight)).astype(h.dtype),
        [cast[i] for i in chosen],
        jnp.where,
    )
    return Grafted(y, tuple(faults), tuple(outputs))
