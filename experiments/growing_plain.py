"""Growing a network of plain functions and pytrees, from its first step to a checkpoint."""

# %% [markdown]
# # Growing a network of plain functions
#
# The host is a function `net(params, site, x)`. Where it calls a layer through `site`, **kernels**
# can be grafted later: their outputs are blended into the layer's by a coefficient alpha. What
# the **seeds** of its layers do is data, a pytree that only events change. What runs is a static
# **plan** read off that data, and a plan is the key of a compiled step.

# %%
import dataclasses
import tempfile
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import esper_functional as ef
from esper.checkpoints import load_checkpoint, save_checkpoint, tree_digest
from esper.contracts import KernelSignature
from esper.execution import count_compilations
from esper.tezzeret import kernel_from_blueprint, load_blueprint
from esper.tolaria import load_task
from esper_adapters.optax import carry
from esper_functional import Event, EventKind, SeedLifecycleState

task = load_task("spirals")  # 194 points on two spirals, and test points between them
x, y, optimizer = jnp.asarray(task.train.x), jnp.asarray(task.train.y), optax.adam(1e-2)
SITES, SEEDS, BLEND = ("hidden", "out"), 2, "residual"


def net(params, site, x):
    h = jax.nn.relu(site("hidden", ef.linear, params["hidden"], x))
    return site("out", ef.linear, params["out"], h)


# %% [markdown]
# ## The step
#
# What trains is one pytree: the host, and the kernels by slot. `live` is what else the running
# seeds need: weights, and counts of failures. A kernel that **incubates** runs in a shadow of the
# forward pass alone; the shadow's loss reaches that kernel's parameters and nothing else.


# %%
def loss_of(params, planned, live):
    if live is not None:  # a fossil keeps what was gathered; the others are in order of slots
        own = iter([kernel.params for _, kernel in sorted(params["kernels"].items())])
        runs = zip(planned.runs, live.params, strict=True)
        live = dataclasses.replace(
            live, params=tuple(p if r.frozen else next(own) for r, p in runs)
        )
    logits, seen = ef.forward(net, planned, params["host"], live, x)
    shadows, shadowed = ef.shadow_forward(net, planned, params["host"], live, x)
    losses = [
        optax.softmax_cross_entropy_with_integer_labels(own, y).mean() for own in (logits, *shadows)
    ]
    return sum(losses), (losses[0], seen.faults, shadowed.faults)


@partial(jax.jit, static_argnums=2)
def one_step(params, opt_state, planned, live):
    grads, (loss, *faults) = jax.grad(loss_of, has_aux=True)(params, planned, live)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, ef.count_faults(live, *faults), loss


class Run(NamedTuple):
    """All that a run is at a step: a pytree of arrays."""

    params: Any  # {"host": a pytree, "kernels": {slot: Kernel}}
    opt_state: Any
    fossils: dict[int, ef.Kernel]
    seeds: ef.SeedState

    def kernels(self):
        """All by slot, whether they train or not."""
        return {**self.params["kernels"], **self.fossils}

    def with_params(self, **changes):
        """Kernels come and go; the moments of what stays are kept, bit by bit."""
        params = {**self.params, **changes}
        state = carry(optimizer, self.opt_state, self.params, params)
        return self._replace(params=params, opt_state=state)


ledger: list[Event] = []


def record(run, *events):
    """Every change of a seed is an event."""
    ledger.extend(events)
    return run._replace(seeds=ef.fold_events(run.seeds, events))


def graft(run, step, layer, seed, kernel, alpha):
    slot = layer * SEEDS + seed
    load = Event(step, layer, seed, EventKind.LOAD, value=slot)
    run = record(run, load, Event(step, layer, seed, EventKind.ACTIVATE, value=alpha))
    return run.with_params(kernels={**run.params["kernels"], slot: kernel})


def train(run, start, stop):
    params, opt_state, fossils, seeds = run
    planned = ef.plan(seeds, run.kernels(), SITES, blend=BLEND)
    live, loss = ef.gather(seeds, run.kernels(), planned), np.nan
    for now in range(start, stop):
        seeds = ef.advance(seeds, now)  # ramps
        live = ef.reweigh(live, seeds, planned)
        params, opt_state, live, loss = one_step(params, opt_state, planned, live)
    failures = [] if live is None else ef.fault_events(seeds, live.errors, step=stop)
    run = record(Run(params, opt_state, fossils, seeds), *failures)
    accuracy = np.mean(np.argmax(output(run, task.test.x), axis=-1) == task.test.y)
    print(f"step {stop}: loss {loss:.4f}, test accuracy {accuracy:.3f}")
    return run


def output(run, x):
    host, kernels = run.params["host"], run.kernels()
    return ef.execute(net, host, run.seeds, kernels, x, sites=SITES, blend=BLEND)[0]


def close(a, b):
    return ef.difference(a, b).within  # by the table of tolerances


# %% [markdown]
# ## A host that is too small

# %%
keys = jax.random.split(jax.random.key(0))
host = {"hidden": ef.init_linear(keys[0], 2, 8), "out": ef.init_linear(keys[1], 8, 2)}
params = {"host": host, "kernels": {}}
run = Run(params, optimizer.init(params), {}, ef.init_seeds(len(SITES), SEEDS))
run = train(run, 0, 300)

# %% [markdown]
# ## A graft: incubation, then a ramp
#
# A kernel from a blueprint trains in the shadow for 100 steps, and the host trains on as if it were
# not there. Then alpha runs to 1 in 100 steps, which compiles two programs at its first step (of
# training and of evaluation), and none after it.

# %%
signature = KernelSignature(input_shape=(2,), output_shape=(8,))
kernel = kernel_from_blueprint(load_blueprint("residual_mlp"), signature)
alone, moments = train(run, 300, 400), tree_digest(run.opt_state[0].mu["host"])
run = record(graft(run, 300, 0, 0, kernel, 0.0), Event(300, 0, 0, EventKind.INCUBATE))
assert tree_digest(run.opt_state[0].mu["host"]) == moments
run = train(run, 300, 400)
assert close(output(run, x), output(alone, x))

run = record(run, Event(400, 0, 0, EventKind.RAMP, value=1.0, span=100))
with count_compilations() as count:
    run = train(run, 400, 500)
print("programs compiled along the ramp:", count())
assert count() == 2
run = train(run, 500, 700)

# %% [markdown]
# ## A kernel that fails is contained, and its third failure in a row stops it

# %%
nan = ef.kernel_from_function(lambda params, h: params * h[:, :2], jnp.asarray(jnp.nan))
alone, run = train(run, 700, 720), train(graft(run, 700, 1, 0, nan, 0.5), 700, 720)
assert close(output(run, x), output(alone, x))
print("the kernel of NaN:", SeedLifecycleState(run.seeds.stage[1, 0]).name)
assert run.seeds.stage[1, 0] == SeedLifecycleState.ERROR_RECOVERY
run = record(run, Event(720, 1, 0, EventKind.RESET))
run = run.with_params(kernels={0: run.params["kernels"][0]})

# %% [markdown]
# ## Fossilised, and folded
#
# A fossil leaves what trains and stays as it is. A kernel that is affine, as `low_rank` is, can be
# folded into its host's weights.

# %%
run = record(run, Event(720, 0, 0, EventKind.FOSSILIZE))
run = run._replace(fossils=run.params["kernels"]).with_params(kernels={})
fossil, signature = tree_digest(run.fossils), KernelSignature(input_shape=(8,), output_shape=(2,))
low_rank = kernel_from_blueprint(load_blueprint("low_rank"), signature, sizes={"rank": 2})
run = train(graft(run, 720, 1, 1, low_rank, 1.0), 720, 800)
assert tree_digest(run.fossils) == fossil

affine = ef.affine_form(run.kernels()[3], 8)
out = jax.tree.map(np.asarray, run.params["host"]["out"])
weight, bias = ef.fold_linear(out["weight"], out["bias"], affine, BLEND, np.ones(1, np.float32), 0)
host = {**run.params["host"], "out": {"weight": jnp.asarray(weight), "bias": jnp.asarray(bias)}}
before = output(run, x)
run = record(run, Event(800, 1, 1, EventKind.FOLD)).with_params(host=host, kernels={})
assert close(output(run, x), before)

# %% [markdown]
# ## The record, and a checkpoint
#
# The ledger's events fold to the very state. A restored run goes on bit by bit.

# %%
again = ef.state_digest(ef.fold_events(ef.init_seeds(len(SITES), SEEDS), ledger))
print(f"{len(ledger)} events fold to {again[:16]}, the state is {ef.state_digest(run.seeds)[:16]}")
assert again == ef.state_digest(run.seeds)
with tempfile.TemporaryDirectory() as folder:
    save_checkpoint(folder, 800, run, {"events": len(ledger)})
    restored, meta = load_checkpoint(folder, 800, like=run)
assert tree_digest(train(restored, 800, 820)) == tree_digest(train(run, 800, 820))
