"""Growing an Equinox model, from a graft to a model that needs no Esper."""

# %% [markdown]
# # Growing an Equinox model
#
# `esper.wrap` gives layers of a model **seeds**, into which **kernels** can be grafted. The model
# itself is not changed: `model.module` is the host until a kernel runs, and then the host with a
# grafted layer in that layer's place, whose output is blended with its kernels' by a coefficient
# alpha. Every change of a seed is an event, and every surgery returns a new model.

# %%
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import esper
import esper_functional as ef
from esper.contracts import KernelSignature
from esper.execution import count_compilations
from esper.tezzeret import kernel_from_blueprint, load_blueprint
from esper.tolaria import load_task
from esper_adapters.equinox import kernel_from_module, shadows, trainable
from esper_adapters.optax import carry, freeze
from esper_functional import Event, EventKind, SeedLifecycleState

task = load_task("spirals")  # 194 points on two spirals, and test points between them
x, y = jnp.asarray(task.train.x), jnp.asarray(task.train.y)
keys = jax.random.split(jax.random.key(0), 3)
host = eqx.nn.MLP(2, 2, width_size=8, depth=1, key=keys[0])
model = esper.wrap(host, seeds_per_layer=2, blend="residual", example=(x[0],))
assert model.sites == ("layers.0", "layers.1")
assert jax.tree.structure(model.module) == jax.tree.structure(host)

# %% [markdown]
# ## The step
#
# An ordinary one. `freeze` keeps the optimiser off blend weights and fossils. `shadows` gives the
# network with each **incubating** kernel at alpha 1; its loss reaches that kernel and nothing else.

# %%
optimizer = freeze(optax.adam(1e-2), trainable)


def cross_entropy(module):
    logits = jax.vmap(module)(x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


@eqx.filter_grad(has_aux=True)
def gradient(module):
    loss = cross_entropy(module)
    return loss + sum(cross_entropy(shadow) for shadow in shadows(module)), loss


def params_of(module):
    return eqx.filter(module, eqx.is_inexact_array)


@eqx.filter_jit
def step(module, opt_state):
    grads, loss = gradient(module)
    updates, opt_state = optimizer.update(grads, opt_state, params_of(module))
    return eqx.apply_updates(module, updates), opt_state, loss


def train(model, opt_state, start, stop):
    loss = np.nan
    for now in range(start, stop):
        model = model.advance(now)  # ramps
        module, opt_state, loss = step(model.module, opt_state)
        model = model.with_module(module)
    accuracy = np.mean(np.argmax(jax.vmap(model)(task.test.x), axis=-1) == task.test.y)
    print(f"step {stop}: loss {loss:.4f}, test accuracy {accuracy:.3f}")
    return model, opt_state


ledger: list[Event] = []


def record(model, opt_state, *events, kernel=None):
    """The model after some events, and the optimiser's state for it."""
    ledger.extend(events)
    old = params_of(model.module)
    for event in events:
        model = model.apply_event(event, kernel)
    return model, carry(optimizer, opt_state, old, params_of(model.module))


def graft(layer, seed, step, alpha):
    """The events of a kernel that is at hand."""
    slot = layer * model.seeds.shape[1] + seed
    load = Event(step, layer, seed, EventKind.LOAD, value=slot)
    return load, Event(step, layer, seed, EventKind.ACTIVATE, value=alpha)


# %% [markdown]
# ## A host that is too small

# %%
model, opt_state = train(model, optimizer.init(params_of(model.module)), 0, 300)

# %% [markdown]
# ## A graft: incubation, then a ramp
#
# The kernel is an Equinox module. `carry` fits the optimiser's state to what surgery made of the
# parameters: every moment that was there is the very array that it was. The ramp's first step
# compiles one program, and the others none.

# %%
kernel = kernel_from_module(eqx.nn.MLP(2, 8, 24, 2, jax.nn.gelu, key=keys[1]))
before = jax.tree.leaves(opt_state)
incubation = Event(300, 0, 0, EventKind.INCUBATE)
model, opt_state = record(model, opt_state, *graft(0, 0, 300, 0.0), incubation, kernel=kernel)
after = {id(leaf) for leaf in jax.tree.leaves(opt_state)}
print(f"{sum(id(leaf) in after for leaf in before)} of {len(before)} arrays carried")
assert all(id(leaf) in after for leaf in before)
model, opt_state = train(model, opt_state, 300, 400)

model, opt_state = record(model, opt_state, Event(400, 0, 0, EventKind.RAMP, value=1.0, span=100))
model, opt_state = train(model, opt_state, 400, 401)
with count_compilations() as count:
    model, opt_state = train(model, opt_state, 401, 500)
print("programs compiled along the rest of the ramp:", count())
assert count() == 0
model, opt_state = train(model, opt_state, 500, 800)

# %% [markdown]
# ## A kernel that fails is contained
#
# A module returns its output and counts nothing, so `observe` counts faults on sampled steps; the
# third in a row stops the seed.

# %%
nan = ef.kernel_from_function(lambda params, h: params * h[:, :2], jnp.asarray(jnp.nan))
poisoned, _ = record(model, opt_state, *graft(1, 0, 800, 0.5), kernel=nan)
np.testing.assert_array_equal(jax.vmap(poisoned)(x), jax.vmap(model)(x))
for now in range(800, 803):
    counted = poisoned.observe(x, step=now)
    errors = [counted.seeds.error_count[place] for place in ef.running_seeds(poisoned.seeds)]
    ledger += ef.fault_events(poisoned.seeds, errors, step=now)
    poisoned = counted
print("the kernel of NaN:", SeedLifecycleState(poisoned.seeds.stage[1, 0]).name)
assert poisoned.seeds.stage[1, 0] == SeedLifecycleState.ERROR_RECOVERY
model, opt_state = record(poisoned, opt_state, Event(803, 1, 0, EventKind.RESET))

# %% [markdown]
# ## Fossilised, folded, exported
#
# A fossil's parameters leave the optimiser. A kernel that is affine, as `low_rank` is, can be
# folded into its host's weights. What is exported has no layer of Esper's.

# %%
model, opt_state = record(model, opt_state, Event(803, 0, 0, EventKind.FOSSILIZE))
signature = KernelSignature(input_shape=(8,), output_shape=(2,))
low_rank = kernel_from_blueprint(load_blueprint("low_rank"), signature, sizes={"rank": 2})
model, opt_state = record(model, opt_state, *graft(1, 1, 803, 1.0), kernel=low_rank)
fossil = jax.tree.leaves(model.kernels[0])
model, opt_state = train(model, opt_state, 803, 900)
assert all(map(np.array_equal, jax.tree.leaves(model.kernels[0]), fossil))

folded, opt_state = record(model, opt_state, Event(900, 1, 1, EventKind.FOLD))
plain = esper.export_plain(folded)
expected = jax.vmap(model)(x)
for grown in (folded, plain):
    assert ef.difference(jax.vmap(grown)(x), expected).within  # by the table of tolerances
kinds = [type(layer).__name__ for layer in plain.layers]
print(folded.get_model_stats()["seeds_by_stage"], kinds)
assert kinds == ["Lambda", "Linear"]

# %% [markdown]
# ## The record
#
# The ledger's events fold to the very state that the model has.

# %%
again = ef.state_digest(ef.fold_events(ef.init_seeds(2, 2), ledger))
print(
    f"{len(ledger)} events fold to {again[:16]}, the state is {ef.state_digest(folded.seeds)[:16]}"
)
assert again == ef.state_digest(folded.seeds)
