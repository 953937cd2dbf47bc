"""Growing a population of networks in one compiled program."""

# %% [markdown]
# # Growing a population in one program
#
# In the **planned** mode (`growing_plain.py`) a graft is a new program. In the **dynamic** mode
# stages, slots and alphas are data inside the program: it compiles once, growth is scheduled on the
# device, and `jax.vmap` maps over networks that grow each in its own way. It pays for every kernel
# that could run; for one network that trains, the planned mode is many times cheaper.
#
# Here four hosts train twice each: with a graft when their loss has stopped falling, and without.

# %%
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

import esper_functional as ef
from esper.contracts import KernelSignature
from esper.execution import count_compilations
from esper.tezzeret import kernel_from_blueprint, load_blueprint
from esper.tolaria import load_task
from esper_functional import SeedLifecycleState

task = load_task("spirals")
x, y, optimizer = jnp.asarray(task.train.x), jnp.asarray(task.train.y), optax.adam(1e-2)
STEPS, HIDDEN, OPTIONS = 600, 0, {"sites": ("hidden", "out"), "blend": "residual"}
signature = KernelSignature(input_shape=(2,), output_shape=(8,))
bank = ef.make_bank([kernel_from_blueprint(load_blueprint("residual_mlp"), signature)])


def net(params, site, x):
    h = jax.nn.relu(site("hidden", ef.linear, params["hidden"], x))
    return site("out", ef.linear, params["out"], h)


# %% [markdown]
# ## One network's life, written for one network
#
# The policy is a line: graft where the loss has fallen by less than 0.01 in 100 steps. It may ask
# as often as it likes: what the lifecycle forbids is refused seed by seed, and changes nothing.


# %%
def loss_of(params, seeds):
    own = dataclasses.replace(bank, params=params["kernels"])
    logits, faults = ef.forward_dynamic(net, params["host"], seeds, own, x, **OPTIONS)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), faults


def graft(seeds, where, now):
    dormant = seeds.stage == SeedLifecycleState.DORMANT
    for stage in (SeedLifecycleState.LOADING, SeedLifecycleState.ACTIVE):
        seeds = ef.transition(seeds, where, stage, step=now, slot=0).state
    return ef.start_ramp(seeds, where & dormant, 1.0, 100, step=now).state


@jax.jit
@jax.vmap
def live(key, may_grow):
    keys = jax.random.split(key)
    host = {"hidden": ef.init_linear(keys[0], 2, 8), "out": ef.init_linear(keys[1], 8, 2)}
    params = {"host": host, "kernels": bank.params}
    seeds = jax.tree.map(jnp.asarray, ef.init_seeds(len(OPTIONS["sites"]), 1))

    def step(carried, now):
        params, opt_state, seeds, past = carried
        (loss, faults), grads = jax.value_and_grad(loss_of, has_aux=True)(params, seeds)
        stalled = (now % 100 == 99) & (past - loss < 0.01)
        where = jnp.zeros(seeds.shape, bool).at[HIDDEN].set(stalled & may_grow)
        seeds = graft(ef.record_faults(seeds, faults, step=now), where, now)
        seeds = ef.advance(seeds, now + 1)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        past = jnp.where(now % 100 == 99, loss, past)
        return (optax.apply_updates(params, updates), opt_state, seeds, past), loss

    born = (params, optimizer.init(params), seeds, jnp.inf)
    (params, _, seeds, _), losses = jax.lax.scan(step, born, jnp.arange(STEPS))
    return params, seeds, losses[-1]


# %%
keys, others = (jax.random.split(jax.random.key(seed), 4) for seed in (0, 1))
hosts, strangers = jnp.concatenate([keys, keys]), jnp.concatenate([others, others])
may_grow = jnp.arange(8) < 4
params, seeds, losses = live(hosts, may_grow)
with count_compilations() as count:
    _, _, more = live(strangers, may_grow)
print("stages       ", np.asarray(seeds.stage[:, HIDDEN, 0]))
print("losses, grown", np.round(np.concatenate([losses[:4], more[:4]]), 4))
print("losses, hosts", np.round(np.concatenate([losses[4:], more[4:]]), 4))
print("programs compiled for the second population:", count())
assert count() == 0
assert (losses[:4] < losses[4:]).all()
assert (more[:4] < more[4:]).all()

# %% [markdown]
# A member is a network like any other: taken out, it runs in the planned mode.


# %%
def accuracy(member):
    host, kernels, state = jax.tree.map(lambda leaf: leaf[member], (*params.values(), seeds))
    own, state = dataclasses.replace(bank, params=kernels), jax.tree.map(np.asarray, state)
    logits, _ = ef.execute(net, host, state, own, task.test.x, **OPTIONS)
    return np.mean(np.argmax(logits, -1) == task.test.y)


grown, small = ([accuracy(i) for i in own] for own in (range(4), range(4, 8)))
print("test accuracy, grown", np.round(grown, 3))
print("test accuracy, hosts", np.round(small, 3))
assert min(grown) > max(small)
