"""Giving the layers of a JAX model seeds; for Equinox and Flax alike."""

from collections.abc import Sequence
from typing import Any

import jax

from esper_adapters._functional import Call, FunctionalModel, join_arrays, split_arrays
from esper_adapters._naming import describe_array
from esper_adapters._seeded import Resolve, SeededModel
from esper_adapters._select import Target, select_layers
from esper_adapters._surgery import Signature, Surgery
from esper_functional import (
    KasminaException,
    Network,
    SeedIndexError,
    check_blend,
    init_seeds,
)


class _Recorder:
    """A site that notes what each layer takes and returns."""

    def __init__(self) -> None:
        self.seen: dict[str, Signature] = {}

    def __call__(self, name: str, layer: Any, params: Any, /, *args: Any, **options: Any) -> Any:
        result = layer(params, *args, **options)
        x: Any = args[0] if args else next(iter(options.values()), None)
        h: Any = result[0] if isinstance(result, tuple | list) and result else result
        if hasattr(x, "shape") and hasattr(h, "shape"):
            given = [*args, *options.values()]
            alone = h is result and sum(value is not None for value in given) == 1
            self.seen[name] = Signature(
                tuple(x.shape), tuple(h.shape), x.dtype, h.dtype, True, alone
            )
        return result


def record_signatures(flat: FunctionalModel, example: Any) -> dict[str, Signature]:
    """What each site takes and returns when the model is run on an example; runs nothing."""
    if not isinstance(example, tuple):
        raise KasminaException(
            f"wrap: example must be a tuple of the arguments of one call, such as (x,); got"
            f" {type(example).__name__}"
        )
    recorder = _Recorder()
    net: Network = flat.net
    arrays, static = split_arrays(example)

    def run(params: Any, rest: Any, arrays: Any) -> Any:
        x = join_arrays(arrays, static)
        return net(params, recorder, x if flat.rest is None else (rest, x))

    try:
        jax.eval_shape(run, flat.params, flat.rest, arrays)
    except KasminaException:
        raise
    except Exception as error:  # whatever the user's model raises
        given = ", ".join(describe_array(array) for array in arrays) or "no arrays"
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise KasminaException(
            f"wrap: the model could not be traced on `example` ({given}), it raised"
            f" {type(error).__name__}: {reason}. Give the arguments of one call (Equinox: without a"
            " batch), or `call`, by which the model is run"
        ) from error
    return recorder.seen


def seed_model(
    host: Any,
    surgery: Surgery,
    *,
    target_layers: Target | Sequence[Target],
    seeds_per_layer: int,
    blend: str,
    isolate: bool,
    contain: bool,
    resolve: Resolve | None,
    example: tuple[Any, ...] | None,
    call: Call | None,
) -> SeededModel:
    """Give some layers of a host seeds; see a face's `wrap`."""
    check_blend(blend)
    if isinstance(host, SeededModel):
        raise KasminaException("wrap: the model is wrapped already; esper.unwrap it first")
    if surgery.strip(host).kernels:
        raise KasminaException(
            "wrap: the network has grafted layers: wrap its host, which esper.unwrap gives"
        )
    if seeds_per_layer < 1:
        raise SeedIndexError(f"wrap: seeds_per_layer must be at least 1, got {seeds_per_layer}")
    layers = surgery.layers(host)
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    names = select_layers(layers, target_layers)
    if surgery.mutable:
        for name in names:
            first.setdefault(id(layers[name]), name)
        names = tuple(first.values())
        aliases = {n: first[id(layer)] for n, layer in layers.items() if id(layer) in first}
    signatures = {
        name: signature
        for name in names
        if (signature := surgery.signature(layers[name])) is not None
    }
    if example is not None:
        signatures |= record_signatures(surgery.functional(host, names, call), example)
    return SeededModel(
        host=host,
        seeds=init_seeds(len(names), seeds_per_layer),
        kernels={},
        sites=names,
        blend=blend,
        isolate=isolate,
        contain=contain,
        surgery=surgery,
        aliases={alias: name for alias, name in aliases.items() if alias != name},
        signatures=signatures,
        resolve=resolve,
        call=call,
    )
