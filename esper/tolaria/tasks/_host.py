"""What a host is: first parameters by path, and a module for each backend that has them."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from esper.errors import InputError


class Host(Protocol):
    """A network to grow, as data; equal hosts are one key of compiled programs.

    Attributes:
        grow_at: paths of the modules where kernels may be grafted by default, in order of
            preference; the same in both backends.
    """

    @property
    def name(self) -> str: ...

    @property
    def grow_at(self) -> tuple[str, ...]: ...

    def params(self, seed: int) -> dict[str, np.ndarray]:
        """First parameters by module path, shaped as torch has them, f32."""
        ...

    def jax(self, seed: int) -> Any:
        """An Equinox or NNX module with those parameters; an Equinox one takes one example."""
        ...

    def torch(self, seed: int) -> Any:
        """An `nn.Module` of a batch, with those parameters."""
        ...


class Interface(NamedTuple):
    """What a host takes and gives, by which data is checked before anything is built."""

    example: tuple[int | None, ...]
    """Shape of one example; None is any length."""
    tokens: bool
    """Whether examples are i32 tokens rather than f32 values."""
    outputs: int
    """Size of the last axis of the output: classes, or values for regression."""
    vocabulary: int | None = None
    """Tokens are below this."""


@runtime_checkable
class DescribedHost(Protocol):
    """A host that can say what data fits it."""

    def interface(self) -> Interface:
        """What it takes and gives."""
        ...


Build = Callable[[int], Any]
Call = Callable[..., Any]


@dataclasses.dataclass(frozen=True, init=False)
class CustomHost:
    """A host of the user's own, by one function for each backend that it is for.

    Equal only to a host of the very same functions, so keep them: a lambda written anew is
    another host, and its programs are compiled anew.

    Args:
        name: what it is called in a run's record.
        jax: `build(seed)` gives an Equinox or Flax NNX module. Without `call` an Equinox module
            is called with one example, and mapped over a batch; an NNX module with a batch.
        torch: `build(seed)` gives an `nn.Module`.
        grow_at: paths of modules where kernels may be grafted by default.
        outputs: size of the output's last axis, where labels are to be checked against it.
        call: on jax, `call(module, x)` gives the outputs of a batch, where the module is not called
            in its usual way; on torch, the module's own `forward` is.
        keyed: on jax, whether training gives the module a random key, a new one for each step
            (and each example, where it takes one): an Equinox module is then called as
            `module(x, key=key)`, and `call` as `call(module, x, key)`. The network is judged
            without one: by `module(x, key=None)` in inference mode, or `call(module, x)`. NNX
            modules with `nnx.Rngs` of their own need none.

    Raises:
        InputError: without a name, without any function, or with `call` or `keyed` and nothing to
            call on jax.
    """

    name: str
    build_jax: Build | None
    build_torch: Build | None
    grow_at: tuple[str, ...]
    outputs: int | None
    call: Call | None
    keyed: bool

    def __init__(
        self,
        name: str,
        *,
        jax: Build | None = None,
        torch: Build | None = None,
        grow_at: tuple[str, ...] = (),
        outputs: int | None = None,
        call: Call | None = None,
        keyed: bool = False,
    ) -> None:
        if not name:
            raise InputError("a CustomHost needs a name, which a run's record calls it by; got ''")
        if jax is None and torch is None:
            raise InputError(
                f"the host {name!r} can be built for no backend: give `jax=build`, `torch=build`,"
                " or both, each a function of the seed"
            )
        if jax is None and (call is not None or keyed):
            given = "keyed=True" if call is None else "`call`"
            raise InputError(
                f"the host {name!r} has {given}, which is of jax, and no function for jax: give"
                " `jax=build` too, or leave it out"
            )
        if call is not None and not callable(call):
            raise InputError(
                f"`call` of the host {name!r} is a {type(call).__name__}: expected a function,"
                " call(module, x)"
            )
        if isinstance(grow_at, str):
            raise InputError(
                f"grow_at of the host {name!r} is the string {grow_at!r}: expected a tuple of"
                f" paths, such as ({grow_at!r},)"
            )
        for field, value in (
            ("name", name), ("build_jax", jax), ("build_torch", torch),
            ("grow_at", tuple(grow_at)), ("outputs", outputs), ("call", call), ("keyed", keyed),
        ):  # fmt: skip
            object.__setattr__(self, field, value)

    def params(self, seed: int) -> dict[str, np.ndarray]:
        """Refused: only the user's functions know the first parameters.

        Raises:
            InputError: always.
        """
        raise InputError(
            f"the host {self.name!r} is a user's own, so its parameters are not known by name:"
            f" build it for a backend, as in host.jax({seed}) or host.torch({seed})"
        )

    def _build(self, backend: str, build: Build | None, seed: int) -> Any:
        if build is None:
            other = "torch" if backend == "jax" else "jax"
            raise InputError(
                f"the host {self.name!r} has no function for {backend}: give"
                f" CustomHost({self.name!r}, {backend}=build), or run it on {other}"
            )
        module = build(seed)
        if module is None:
            raise InputError(
                f"`{backend}` of the host {self.name!r} returned None for seed {seed}: expected a"
                " module; does the function end in a return?"
            )
        return module

    def jax(self, seed: int) -> Any:
        """What the user's function gives.

        Raises:
            InputError: where there is none, or it gives None.
        """
        return self._build("jax", self.build_jax, seed)

    def torch(self, seed: int) -> Any:
        """What the user's function gives.

        Raises:
            InputError: where there is none, or it gives None.
        """
        return self._build("torch", self.build_torch, seed)
