"""A bank: every slot a place that can hold the parameters of any of its programs.

In the dynamic mode which kernel a seed runs is data inside the program. So the
programs there are is static, which of them a slot holds is an array, and each
program's parameters are stacked over the slots.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Int32

from esper_functional._arrays import Array
from esper_functional._errors import KernelMismatchError, SeedIndexError
from esper_functional._kernel import Kernel, Params, Program

NO_PROGRAM = -1
"""What an empty slot holds."""


@dataclasses.dataclass(frozen=True)
class Bank:
    """Kernels by slot, as data: a pytree. Programs × slots × parameters in size."""

    code: Any
    """i32 `[*axes, slots]`: index into `programs` of what each slot holds, or `NO_PROGRAM`."""
    params: tuple[Params, ...]
    """For each program its parameters, every leaf `[*axes, slots, ...]`."""
    programs: tuple[Program, ...]
    """The programs there are, one for each shape of its parameters; static."""


jax.tree_util.register_dataclass(Bank, data_fields=["code", "params"], meta_fields=["programs"])


def make_bank(
    kernels: Mapping[int, Kernel] | Sequence[Kernel],
    *,
    slots: int | None = None,
    also: Sequence[Kernel] = (),
) -> Bank:
    """A bank that holds some kernels by slot.

    Args:
        kernels: by slot.
        slots: how many there are; by default one more than the highest in use.
        also: kernels that slots may come to hold later (`put_kernel`), as patterns for
            their programs and the shapes of their parameters.

    Raises:
        SeedIndexError: for a slot that is not there.
    """
    table = dict(kernels) if isinstance(kernels, Mapping) else dict(enumerate(kernels))
    size = max(table, default=-1) + 1 if slots is None else slots
    outside = [slot for slot in table if not 0 <= slot < size]
    if outside:
        raise SeedIndexError(f"make_bank: slots {outside} are not among the {size} there are")
    patterns: dict[tuple[Program, str], Params] = {}
    for kernel in (*table.values(), *also):
        patterns.setdefault(_kind(kernel), kernel.params)
    kinds = tuple(patterns)
    code = np.full(size, NO_PROGRAM, np.int32)
    for slot, kernel in table.items():
        code[slot] = kinds.index(_kind(kernel))

    def stacked(kind: tuple[Program, str]) -> Params:
        empty = jax.tree.map(jnp.zeros_like, patterns[kind])
        rows = [
            table[slot].params if slot in table and _kind(table[slot]) == kind else empty
            for slot in range(size)
        ]
        if not rows:
            return jax.tree.map(lambda p: jnp.zeros((0, *p.shape), p.dtype), empty)
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)

    params = tuple(stacked(kind) for kind in kinds)
    return Bank(jnp.asarray(code), params, tuple(program for program, _ in kinds))


def _kind(kernel: Kernel, row: bool = False) -> tuple[Program, str]:
    """A program and the shapes of its parameters; one program may come with several.

    Args:
        row: whether the parameters are a bank's, with a leading axis of slots.
    """
    leaves, structure = jax.tree.flatten(kernel.params)
    arrays = [jnp.asarray(leaf) for leaf in leaves]
    shapes = [f"{a.dtype}{list(a.shape[1:] if row else a.shape)}" for a in arrays]
    return kernel.program, f"{', '.join(shapes)} in {structure}"


def put_kernel(bank: Bank, slot: int | Int32[Array, ""], kernel: Kernel) -> Bank:
    """The bank with a kernel in a slot; `slot` may be traced.

    A traced slot that is not there leaves the bank as it is.

    Raises:
        SeedIndexError: for a concrete slot that is not there.
        KernelMismatchError: for a program, or shapes of its parameters, that the bank does
            not know.
    """
    code = jnp.asarray(bank.code)
    if not isinstance(slot, Tracer) and not 0 <= int(slot) < code.shape[0]:
        raise SeedIndexError(
            f"put_kernel: slot {int(slot)} is not among the {code.shape[0]} there are; name more"
            " `slots` in make_bank"
        )
    kinds = [
        _kind(Kernel(program, params), row=True)
        for program, params in zip(bank.programs, bank.params, strict=True)
    ]
    kind = _kind(kernel)
    if kind not in kinds:
        known = [f"{program.key} with {shapes}" for program, shapes in kinds]
        raise KernelMismatchError(
            f"put_kernel: the bank does not know program {kernel.program.key} with {kind[1]}: it"
            f" knows {known}; name such a kernel in make_bank's `also`"
        )
    index = kinds.index(kind)
    params = list(bank.params)
    params[index] = jax.tree.map(
        lambda rows, own: _put(jnp.asarray(rows), slot, own), params[index], kernel.params
    )
    return dataclasses.replace(bank, code=_put(code, slot, index), params=tuple(params))


def _put(rows: Any, slot: Any, own: Any) -> Any:
    return rows.at[slot].set(own, mode="drop", wrap_negative_indices=False)


def bank_kernels(bank: Bank) -> dict[int, Kernel]:
    """The kernels of a concrete bank, by slot: what the planned mode takes."""
    kernels: dict[int, Kernel] = {}
    for slot, index in enumerate(np.asarray(bank.code)):
        if index != NO_PROGRAM:
            own: Any = jax.tree.map(lambda rows, slot=slot: rows[slot], bank.params[index])
            kernels[slot] = Kernel(bank.programs[index], own)
    return kernels
