"""Growing a Flax NNX model in place, from a graft to a model without Esper; and a Linen one."""

# %% [markdown]
# # Growing a Flax model
#
# `esper.wrap` gives layers of an NNX model **seeds**, into which **kernels** can be grafted. The
# model itself is not changed: `model.module` is a clone of it, in which a layer whose kernels run
# is a grafted one, its output blended with theirs by a coefficient alpha. `model.module` trains in
# place, like any module. Every surgery starts from the parameters that it has then, and returns a
# new model.

# %%
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen, nnx

import esper
import esper_functional as ef
from esper.execution import count_compilations
from esper.tolaria import load_task
from esper_adapters.flax import (
    FossilParam,
    carry_optimizer,
    find_linen_sites,
    kernel_from_module,
    linen_sites,
    shadows,
)
from esper_functional import Event, EventKind, SeedLifecycleState

task = load_task("spirals")  # 194 points on two spirals, and test points between them
x, y = jnp.asarray(task.train.x), jnp.asarray(task.train.y)


class Host(nnx.Module):
    """A multilayer perceptron that is too small."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(2, 8, rngs=rngs)
        self.out = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x):
        """Logits."""
        return self.out(nnx.relu(self.hidden(x)))


model = esper.wrap(Host(nnx.Rngs(0)), seeds_per_layer=2, blend="residual", example=(x,))
assert model.sites == ("hidden", "out")

# %% [markdown]
# ## The step
#
# An ordinary one. Kernels' parameters are `nnx.Param`; blend weights and fossils are variables of
# other types, which the optimiser does not see. `shadows` gives the network with each
# **incubating** kernel at alpha 1; its loss reaches that kernel and nothing else.


# %%
def cross_entropy(module):
    return optax.softmax_cross_entropy_with_integer_labels(module(x), y).mean()


@nnx.jit
def step(module, optimizer):
    def loss_of(module):
        loss = cross_entropy(module)
        return loss + sum(cross_entropy(shadow) for shadow in shadows(module)), loss

    grads, loss = nnx.grad(loss_of, has_aux=True)(module)
    optimizer.update(module, grads)
    return loss


def train(model, optimizer, start, stop):
    loss = np.nan
    for now in range(start, stop):
        model = model.advance(now) if model.seeds.ramp_span.any() else model
        loss = step(model.module, optimizer)
    accuracy = np.mean(np.argmax(model(task.test.x), axis=-1) == task.test.y)
    print(f"step {stop}: loss {loss:.4f}, test accuracy {accuracy:.3f}")
    return model


ledger: list[Event] = []


def record(model, optimizer, *events, kernel=None):
    """The model after some events, and its optimiser."""
    ledger.extend(events)
    changed = model
    for event in events:
        changed = changed.apply_event(event, kernel)
    return changed, carry_optimizer(optimizer, model.module, changed.module)


def graft(layer, seed, step, alpha):
    """The events of a kernel that is at hand."""
    slot = layer * model.seeds.shape[1] + seed
    load = Event(step, layer, seed, EventKind.LOAD, value=slot)
    return load, Event(step, layer, seed, EventKind.ACTIVATE, value=alpha)


# %% [markdown]
# ## A host that is too small

# %%
optimizer = nnx.Optimizer(model.module, optax.adam(1e-2), wrt=nnx.Param)
model = train(model, optimizer, 0, 300)

# %% [markdown]
# ## A graft: incubation, then a ramp
#
# The kernel is an NNX module. `carry_optimizer` fits the optimiser to the new module: every moment
# that was there stays, bit by bit. The ramp's first step compiles one program, the others none.

# %%
rngs = nnx.Rngs(1)
layers = [nnx.Linear(2, 24, rngs=rngs), nnx.gelu, nnx.Linear(24, 24, rngs=rngs), nnx.gelu]
kernel = kernel_from_module(nnx.Sequential(*layers, nnx.Linear(24, 8, rngs=rngs)))
moment = optimizer.opt_state[0].mu.hidden.kernel[...]
incubation = Event(300, 0, 0, EventKind.INCUBATE)
model, optimizer = record(model, optimizer, *graft(0, 0, 300, 0.0), incubation, kernel=kernel)
np.testing.assert_array_equal(optimizer.opt_state[0].mu.hidden.esper_host.kernel[...], moment)
model = train(model, optimizer, 300, 400)

model, optimizer = record(model, optimizer, Event(400, 0, 0, EventKind.RAMP, value=1.0, span=100))
model = train(model, optimizer, 400, 401)
with count_compilations() as count:
    model = train(model, optimizer, 401, 500)
print("programs compiled along the rest of the ramp:", count())
assert count() == 0
model = train(model, optimizer, 500, 800)

# %% [markdown]
# ## A kernel that fails is contained
#
# A module returns its output and counts nothing, so `observe` counts faults on sampled steps; the
# third in a row stops the seed.

# %%
nan = ef.kernel_from_function(lambda params, h: params * h[:, :2], jnp.asarray(jnp.nan))
poisoned, _ = record(model, optimizer, *graft(1, 0, 800, 0.5), kernel=nan)
np.testing.assert_array_equal(poisoned(x), model(x))
for now in range(800, 803):
    counted = poisoned.observe(x, step=now)
    errors = [counted.seeds.error_count[place] for place in ef.running_seeds(poisoned.seeds)]
    ledger += ef.fault_events(poisoned.seeds, errors, step=now)
    poisoned = counted
print("the kernel of NaN:", SeedLifecycleState(poisoned.seeds.stage[1, 0]).name)
assert poisoned.seeds.stage[1, 0] == SeedLifecycleState.ERROR_RECOVERY
model, optimizer = record(poisoned, optimizer, Event(803, 1, 0, EventKind.RESET))

# %% [markdown]
# ## Fossilised, and exported
#
# A fossil's parameters leave the optimiser. What is exported is a model of NNX modules, without
# Esper's; kernels that are affine are folded into the weights of their hosts.

# %%
model, optimizer = record(model, optimizer, Event(803, 0, 0, EventKind.FOSSILIZE))
before = jax.tree.leaves(nnx.as_pure(nnx.state(model.module, FossilParam)))
model = train(model, optimizer, 803, 850)
after = jax.tree.leaves(nnx.as_pure(nnx.state(model.module, FossilParam)))
assert len(after) == 6  # weights and biases of three layers
assert all(map(np.array_equal, before, after))

plain = esper.export_plain(model)
assert ef.difference(plain(x), model(x)).within  # by the table of tolerances
kinds = {type(module).__module__.split(".")[0] for _, module in nnx.iter_modules(plain)}
print(model.get_model_stats()["seeds_by_stage"], "exported as modules of", sorted(kinds))
assert kinds == {__name__, "flax"}

# %% [markdown]
# ## The record
#
# The ledger's events fold to the very state that the model has.

# %%
again = ef.state_digest(ef.fold_events(ef.init_seeds(2, 2), ledger))
print(
    f"{len(ledger)} events fold to {again[:16]}, the state is {ef.state_digest(model.seeds)[:16]}"
)
assert again == ef.state_digest(model.seeds)

# %% [markdown]
# ## Linen
#
# A Linen module keeps no parameters, so it needs no wrapping: while it is applied, the calls of
# chosen layers go through a site, and the module is a network of the core like any function.


# %%
class LinenHost(linen.Module):
    """The same host in Linen."""

    @linen.compact
    def __call__(self, x):
        """Logits."""
        return linen.Dense(2, name="out")(linen.relu(linen.Dense(8, name="hidden")(x)))


module = LinenHost()
params: Any = module.init(jax.random.key(0), x)["params"]
sites = find_linen_sites(module, {"params": params}, x)
assert sites == ("hidden", "out")


def net(params, site, x):
    with linen_sites(site, sites):
        return module.apply({"params": params}, x)


def output(seeds, kernels):
    return ef.execute(net, params, seeds, kernels, x, sites=sites, blend="residual")[0]


kernel = model.kernels[0]  # the one that the NNX model grew
seeds = ef.init_seeds(len(sites), 2)
grown = ef.fold_events(seeds, graft(0, 0, 0, 1.0))
np.testing.assert_array_equal(output(seeds, {}), jax.jit(module.apply)({"params": params}, x))
h = x @ params["hidden"]["kernel"] + kernel.program.apply(kernel.params, x)
by_hand = jax.nn.relu(h) @ params["out"]["kernel"]  # biases are zero at birth
assert ef.difference(output(grown, {0: kernel}), by_hand).within
print(f"Linen: a graft moves the output by up to {np.abs(by_hand - output(seeds, {})).max():.3f}")
