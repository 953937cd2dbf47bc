"""Scenarios under `fully_shard`: each returns what a rank saw, as in `distributed_ddp`."""

import copy
import pickle
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard

from esper_adapters.pytorch import (
    MorphableModel,
    export_plain,
    replicate_kernels,
    to_functional,
    unwrap,
    wrap,
)
from esper_functional import difference, state_digest
from tests.adapters.distributed import (
    AFFINE,
    BAD,
    BATCH,
    TANH,
    X,
    digest,
    gap,
    host,
    life,
    own,
    rank,
    refusal,
    shared,
    small,
    step,
    weights,
    wrapped,
)


def sharded(model: Any) -> Any:
    """Its layers, and what is left."""
    for layer in (model[0], model[2]):
        fully_shard(layer)
    return fully_shard(model)


def fsdp_dormant() -> dict[str, Any]:
    bare, model = sharded(host()), sharded(wrapped())
    losses = []
    for net in (bare, model):
        optimizer = torch.optim.Adam(net.parameters(), 1e-2)
        losses.append([step(net, optimizer, now, split=True) for now in range(3)])
    same = digest(bare) == digest(model) and losses[0] == losses[1]
    both = isinstance(model, FSDPModule) and isinstance(model, MorphableModel)
    return {"alike": digest(model), "bitwise": same and both}


def fsdp_life() -> dict[str, Any]:
    model = wrapped()
    replicate_kernels(model)
    model = sharded(model)
    seen = life(model, model, split=True, first=small(seed=rank()), folds=False)
    alone = wrapped()
    life(alone, alone, split=False, folds=False)
    return {
        "alike": seen,
        "whole batch": gap(weights(model), weights(alone)),
        "states": state_digest(model.seeds) == state_digest(alone.seeds),
        "name": model._get_name(),
    }


def fsdp_decisions() -> dict[str, Any]:
    model = sharded(wrapped())
    replicate_kernels(model)
    return {"alike": shared(model, model, folds=False)}


def fsdp_state_dict() -> dict[str, Any]:
    model = sharded(wrapped())
    replicate_kernels(model)
    model.load_kernel_sync("0", 0, TANH, alpha=0.4)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    step(model, optimizer, 0, split=True)
    model.fossilize("0", 0)
    outputs = model(X[0]).detach()
    again = sharded(wrapped())
    replicate_kernels(again)
    again.load_state_dict(model.state_dict())
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    alone = wrapped()
    alone.load_state_dict(full)
    states = [state_digest(m.seeds) for m in (model, again, alone)]
    return {
        "alike": [states[0], digest(model)],
        "states": len(set(states)) == 1,
        "sharded": torch.equal(again(X[0]), outputs),
        "whole": difference(alone(X[0]).detach().numpy(), outputs.numpy()).within,
    }


def fsdp_faults() -> dict[str, Any]:
    """Failures of fossils, which have no gradient, are all ranks' at once too."""
    model = wrapped()
    replicate_kernels(model)
    model = sharded(model)
    model.load_kernel_sync("0", 0, BAD, alpha=0.5)
    model.fossilize("0", 0)
    seen = []
    for bad in (0, BATCH - 1, 1):
        x = X[0].abs()
        x[bad, 0] = -1.0
        model(own(x)).square().mean().backward()
        seen.append(int(model[0].kernel(0).errors))
    events = [str(event) for event in model.absorb(1)]
    return {"alike": [seen, events, model.seeds.stage.tolist()], "seen": seen}


def fsdp_refusals() -> dict[str, Any]:
    alone = sharded(wrapped())
    unguarded = refusal(lambda: alone.load_kernel_sync("0", 0, small()))
    model = sharded(wrapped())
    replicate_kernels(model)
    model.load_kernel_sync("0", 0, AFFINE, alpha=0.4)
    rest = model.kasmina_layers["0"]
    found = {
        "unguarded": unguarded,
        "fold": refusal(lambda: model.fold("0", 0)),
        "unwrap": refusal(lambda: unwrap(model)),
        "export": refusal(lambda: export_plain(model)),
        "to jax": refusal(lambda: to_functional(model)),
        "copy": refusal(lambda: copy.deepcopy(model)),
        "pickle": refusal(lambda: pickle.dumps(model)),
        "pickle a layer": refusal(lambda: pickle.dumps(rest)),
        "wrap": refusal(lambda: wrap(sharded(host()))),
        "shadow": refusal(lambda: model.shadow_forward(X[0])),
    }
    # The root keeps its parameters whole after a forward pass, and FSDP takes them back.
    single = wrapped()
    replicate_kernels(single)
    fully_shard(single)
    single.load_kernel_sync("0", 0, AFFINE, alpha=0.4)
    with torch.no_grad():
        single(X[0])
    kind = type(single[0].weight.data).__name__
    found["fold of what is whole for now"] = refusal(lambda: single.fold("0", 0))
    return {"alike": found, "kind": kind, "active": int(single.seeds.stage[0, 0])}


SCENARIOS = {name: call for name, call in list(globals().items()) if name.startswith("fsdp_")}
