"""The classes of layers with seeds: each a subclass of the layer that it is."""

import inspect
from collections.abc import Callable, Iterator
from functools import cache, wraps
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from esper_adapters.pytorch._layer import SeededLayer
from esper_functional import KasminaException


def _forward_of(base: type[nn.Module]) -> tuple[Callable[..., Any], str]:
    """`base`'s forward with seeds, and the name of the argument that kernels see."""
    plain: Any = base.forward
    parameters = list(inspect.signature(plain).parameters.values())[1:]
    first = parameters[0].name if parameters else ""
    if len(parameters) == 1 and first == "input" and parameters[0].kind.name.startswith("POS"):
        # A call with packed arguments costs a dormant layer 0.1 µs more.
        @wraps(plain)
        def of_one(self: Any, input: Tensor) -> Any:
            live = self._live
            if live is None:
                return plain(self, input)
            return self.run_grafted(live, plain(self, input), (input,), {})

        return of_one, first

    @wraps(plain)
    def of_any(self: Any, *args: Any, **options: Any) -> Any:
        live = self._live
        if live is None:
            return plain(self, *args, **options)
        return self.run_grafted(live, plain(self, *args, **options), args, options)

    return of_any, first


def seeds(base: type[nn.Module]) -> Callable[[type], type]:
    """Complete a class of layers with seeds by the forward of its base."""

    def complete(cls: type) -> type:
        own: Any = cls
        own.forward, own._esper_input = _forward_of(base)
        own._esper_linear = base.forward is nn.Linear.forward
        own._esper_base, own._esper_kind = cls, None
        return cls

    return complete


@seeds(nn.Linear)
class KasminaLayer(SeededLayer, nn.Linear):
    """`nn.Linear` with seeds.

    Args:
        args, options: as for `nn.Linear`; `input_size` and `output_size` name its sizes too. The
            rest as for `SeededLayer`.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        for theirs, ours in (("input_size", "in_features"), ("output_size", "out_features")):
            if theirs in options:
                options[ours] = options.pop(theirs)
        super().__init__(*args, **options)

    @property
    def default_transform(self) -> "KasminaLayer":
        """The layer without its seeds is the layer itself: its `weight` and `bias`."""
        return self


@seeds(nn.Conv2d)
class KasminaConv2dLayer(SeededLayer, nn.Conv2d):
    """`nn.Conv2d` with seeds; its kernels take and return images (`example_rank` 3)."""


@seeds(nn.MultiheadAttention)
class KasminaAttentionLayer(SeededLayer, nn.MultiheadAttention):
    """`nn.MultiheadAttention` with seeds: kernels see the query, weights are the host's own."""


@seeds(nn.LayerNorm)
class KasminaLayerNormLayer(SeededLayer, nn.LayerNorm):
    """`nn.LayerNorm` with seeds."""


@seeds(_BatchNorm)
class KasminaBatchNormLayer(SeededLayer, _BatchNorm):
    """Batch norm with seeds; running statistics are the host's own.

    By itself it takes inputs of any rank from 2; in a wrapped model it is also the
    `nn.BatchNorm1d`, `2d` or `3d` that it was.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected an input of at least 2 axes, got {input.dim()}")


_FAMILY: tuple[type, ...] = (
    KasminaLayer,
    KasminaConv2dLayer,
    KasminaAttentionLayer,
    KasminaLayerNormLayer,
)


@cache
def seeded_class(base: type[nn.Module]) -> type[nn.Module]:
    """The class of layers with seeds whose base is `base`: the family's own, or a new one."""
    for own in _FAMILY:
        if own.__bases__[1] is base:
            return own
    carrier = KasminaBatchNormLayer if issubclass(base, _BatchNorm) else SeededLayer
    forward, first = _forward_of(base)
    # The base's own check of dimensions comes first.
    check: Any = getattr(base, "_check_input_dim", None)
    more = {"_check_input_dim": check} if carrier is not SeededLayer else {}
    body: dict[str, Any] = {
        **same_name(base),
        "__doc__": f"{base.__name__} with seeds.",
        "_esper_base": base,
        "_esper_kind": "seeded",
        "_esper_input": first,
        "_esper_linear": base.forward is nn.Linear.forward,
        "forward": forward,
        **more,
    }
    if issubclass(base, nn.Sequential):
        # It runs its children one after the other, and kernels are none of them.
        body |= {"__iter__": _iterate, "__len__": _count, "__getitem__": _item}
    made: Any = type(base.__name__, (carrier, base), body)
    return made


def same_name(base: type) -> dict[str, str]:
    """What makes a class print as `base` does: libraries keep tables by classes' names."""
    return {"__module__": base.__module__, "__qualname__": base.__qualname__}


def _iterate(self: Any) -> Iterator[nn.Module]:
    own = self._modules.items()
    return iter([module for name, module in own if not name.startswith("kernel_")])


def _item(self: Any, index: int | slice) -> nn.Module:
    own = list(_iterate(self))
    return nn.Sequential(*own[index]) if isinstance(index, slice) else own[index]


def _count(self: Any) -> int:
    return len(list(_iterate(self)))


def base_class(cls: type) -> type:
    """The class that a class of layers with seeds was made from.

    Raises:
        KasminaException: for one that others have made of it since, such as a parametrisation.
    """
    if len(cls.__bases__) < 2 or not issubclass(cls.__bases__[0], SeededLayer):
        raise KasminaException(
            f"a layer of class {cls.__name__} was made another after it was wrapped, by a"
            " parametrisation for example: take that away first"
        )
    return cls.__bases__[1]


def fresh_layer(base: type[nn.Module], kind: str | None) -> nn.Module:
    """An empty layer, for copies and pickles to fill."""
    cls = base if kind is None else seeded_class(base)
    return cls.__new__(cls)
