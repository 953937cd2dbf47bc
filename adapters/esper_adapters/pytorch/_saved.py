"""Seeds in a state_dict: written where there is something to say, found again by kernels' ids."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from esper_adapters.pytorch._kernel import TorchKernel
from esper_functional import KasminaException, SeedLifecycleState, SeedState, transition

if TYPE_CHECKING:
    from esper_adapters.pytorch._layer import SeededLayer

EXTRA = "_extra_state"
"""Under this key, torch's own for such things, a state_dict has a layer's seeds."""


def is_seeds(extra: Any) -> bool:
    """Whether an extra state of a module is that of seeds."""
    return isinstance(extra, Mapping) and extra.get("esper_seeds") == 1


def save_seeds(layer: "SeededLayer", destination: Any, prefix: str) -> None:
    """Write the layer's row of the seed state, and its kernels' ids; all of it plain data."""
    state, row = layer.seeds, layer.row
    # Dormant, a model's keys are its host's; in one that has grown, a layer that is empty again
    # may still have something to tell.
    grown, busy = np.asarray(state.stage).any(), np.asarray(state.stage)[row].any()
    if not busy and not (grown and np.asarray(state.last_update)[row].any()):
        return
    arrays = {
        field.name: torch.tensor(np.asarray(getattr(state, field.name))[row])
        for field in dataclasses.fields(state)
    }
    held = {seed: k.kernel_id for seed in range(layer.num_seeds) if (k := layer.kernel(seed))}
    destination[prefix + EXTRA] = {
        "esper_seeds": 1,
        "step": layer.seed_table.step,
        "blend": layer.blend,
        "isolate": layer.isolate,
        "state": arrays,
        "kernels": held,
        "structures": {seed: k.structure for seed in held if (k := layer.kernel(seed))},
    }


def find_kernels(layer: "SeededLayer", extra: Mapping[str, Any]) -> dict[int, TorchKernel | None]:
    """The kernels that saved seeds hold; None for one that the layer holds already.

    Raises:
        KasminaException: for seeds of another wrapping, or a kernel that is nowhere.
    """
    where = f"load_state_dict: layer {layer.layer_name!r}"
    seeds = int(extra["state"]["stage"].shape[0])
    saved = (seeds, extra["blend"], extra["isolate"])
    if saved != (layer.num_seeds, layer.blend, layer.isolate):
        raise KasminaException(
            f"{where} has {layer.num_seeds} seeds, blend {layer.blend!r} and isolate="
            f"{layer.isolate}, and was saved with {seeds}, {saved[1]!r} and isolate={saved[2]}:"
            " wrap with what it was saved with"
        )
    found: dict[int, TorchKernel | None] = {}
    for seed, kernel_id in extra["kernels"].items():
        held = layer.kernel(int(seed))
        same = held is not None and held.kernel_id == kernel_id
        if held is not None and same and not kernel_id:
            # What has no id can be told by what it is made of alone.
            same = extra.get("structures", {}).get(seed, held.structure) == held.structure
        if same:
            found[int(seed)] = None
            continue
        table = layer.seed_table
        try:
            if table.resolve is None or not kernel_id:
                raise LookupError
            found[int(seed)] = table.fetch(kernel_id)
        except LookupError:
            raise KasminaException(
                f"{where} was saved with kernel {kernel_id or 'without an id'!r} in seed"
                f" {seed}, which cannot be found: wrap with the `library` that has it, or with"
                " `resolve`, a function from ids to kernels"
            ) from None
    return found


def check_seeds(
    layers: Mapping[str, "SeededLayer"], state_dict: Mapping[str, Any], strict: bool
) -> None:
    """Refuse a state_dict whose seeds a model cannot take, before anything is changed.

    Raises:
        KasminaException: for the seeds of another wrapping, a kernel that is nowhere, or, where
            `strict`, kernels of the model that it has no word of.
    """
    keys = {f"{name}.{EXTRA}" if name else EXTRA: name for name in layers}
    foreign = [
        key[: -len(EXTRA) - 1] or "the model itself"
        for key, extra in state_dict.items()
        if (key == EXTRA or key.endswith(f".{EXTRA}")) and key not in keys and is_seeds(extra)
    ]
    if foreign:
        raise KasminaException(
            f"load_state_dict: it has seeds of {foreign}, and this model's layers with seeds are"
            f" {list(layers)}: wrap with the target_layers that the saved model was wrapped with"
        )
    for key, name in keys.items():
        extra = state_dict.get(key)
        if extra is not None and is_seeds(extra):
            find_kernels(layers[name], extra)
        elif strict and any(layers[name].kernel(i) for i in range(layers[name].num_seeds)):
            raise KasminaException(
                f"load_state_dict: layer {name!r} carries kernels, of which the state_dict has no"
                " word: unload them, or wrap the host anew and load into that (strict=False keeps"
                " them)"
            )


def take_seeds(layer: "SeededLayer", state_dict: Mapping[str, Any], prefix: str) -> None:
    """The saved row, and places for its kernels' parameters, which are loaded after."""
    extra = state_dict.get(prefix + EXTRA)
    if extra is None or not is_seeds(extra):
        return
    kernels = find_kernels(layer, extra)
    table = layer.seed_table
    arrays: dict[str, np.ndarray] = {}
    for field in dataclasses.fields(SeedState):
        arrays[field.name] = np.array(getattr(table.state, field.name))
        # What was saved before there were shapes of ramps has linear ones.
        row = extra["state"].get(field.name)
        arrays[field.name][layer.row] = 0 if row is None else row.cpu().numpy()
    for seed in range(layer.num_seeds):
        if kernels.get(seed, 0) is not None and layer.kernel(seed) is not None:
            layer.remove(seed)
    with table.lock:
        # Nobody is loading any more what was being loaded.
        state, where = SeedState(**arrays), np.zeros(table.state.shape, np.bool_)
        where[layer.row] = arrays["stage"][layer.row] == SeedLifecycleState.LOADING
        step = int(extra["step"])
        table.state = transition(state, where, SeedLifecycleState.DORMANT, step=step).state
        table.step = step
        for seed, kernel in kernels.items():
            if kernel is not None:
                layer.place(seed, kernel)
            held = layer.kernel(seed)
            if held is not None:
                # The counts on the device are those of the state that was saved.
                held.set_errors(int(table.state.error_count[layer.row, seed]))
        layer.refresh()
