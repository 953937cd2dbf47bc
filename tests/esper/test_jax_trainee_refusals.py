"""What the jax trainee refuses, and that it is as it was then."""

import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from esper.errors import InputError
from esper.tezzeret import compile_blueprint, load_blueprint
from esper.tolaria._jax_trainee import JaxTrainee
from esper.tolaria._trainee import Batch, Optimisation, Rates
from esper.tolaria.tasks import CustomHost, Loss, Split, Task, load_task
from esper_functional import Event, EventKind, KasminaException, SeedIndexError, state_digest
from tests.esper.trainee_life import BATCH, bits, draw, graft, train

OPTIONS = {"seed": 0, "seeds_per_layer": 4, "blend": "residual"}


def make(**options):
    return JaxTrainee(load_task("spirals"), **{**OPTIONS, **options})


def of_host(build, example=(4,), labels=(), loss: Loss = "cross_entropy", highest=0, **options):
    x = np.ones((8, *example), np.float32)
    kind = np.int32 if loss == "cross_entropy" else np.float32
    split = Split(x, np.full((8, *labels), highest, kind))
    given = {name: options.pop(name) for name in ("call", "keyed") if name in options}
    host = CustomHost("own", jax=lambda seed: build(), **given)
    return JaxTrainee(Task("own", split, split, split, host, loss), **{**OPTIONS, **options})


def refused(words):
    return pytest.raises(InputError, match=re.escape(words))


class Host(eqx.Module):
    """A forward pass of a function's making, of one example."""

    parts: dict
    last: eqx.nn.Linear
    run: Any = eqx.field(static=True)

    def __init__(self, run, outputs=2, **parts):
        self.parts = parts
        self.last = eqx.nn.Linear(4, outputs, key=jax.random.key(0))
        self.run = run

    def __call__(self, x):
        return self.run(self, x)


def batched(module, x):
    return module(x)


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        (Optimisation(weight_decay=0.1), "weight_decay is 0.1, and adam has none"),
        (Optimisation("adamw", momentum=0.9), "momentum is 0.9, and is of sgd alone: adamw has"),
        (Optimisation("adam", momentum=0.9), "leave it out, or choose the optimizer sgd"),
    ],
)
def test_optimisers_refuse_what_they_do_not_have(chosen, words):
    with refused(words):
        make(optimisation=chosen)


def test_a_host_is_a_module_that_returns_one_array_with_the_batch_first():
    with refused("the host 'own' builds a dict for jax: expected an equinox.Module or a"):
        of_host(dict)
    with refused("returned a tuple for 2 examples: expected one array of outputs, [2, ...]"):
        of_host(lambda: Host(lambda m, x: (m.last(x), x)))
    with refused("the host own returned [2] for 3 examples"):
        of_host(
            lambda: Host(lambda m, x: jax.vmap(m.last)(x).sum(0) if len(x) > 2 else x[:, 0]),
            call=batched,
        )


def test_a_host_that_cannot_be_called_says_how_it_may_be():
    def dropping():
        drop = eqx.nn.Dropout(0.5)
        return Host(lambda m, x: m.last(m.parts["a"](x)), a=drop)

    words = "Dropout requires a key when running in non-deterministic mode"
    with refused(words) as caught:
        of_host(dropping)
    assert "the host 'own' cannot be grown on jax: wrap: the model could not" in str(caught.value)
    assert "needs CustomHost(..., keyed=True)" in str(caught.value)
    with refused("one that is not called as module(x) needs CustomHost(..., call=call)"):
        of_host(lambda: Host(lambda m, x: jax.vmap(m.last)(x)))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"torch": len, "keyed": True}, "the host 'own' has keyed=True, which is of jax, and no"),
        (
            {"torch": len, "call": len},
            "the host 'own' has `call`, which is of jax, and no function",
        ),
        ({"jax": len, "call": "twice"}, "`call` of the host 'own' is a str: expected a function"),
    ],
)
def test_ways_to_call_a_host_that_has_none(given, words):
    with refused(words):
        CustomHost("own", **given)


class Lazy(nnx.Module):
    """Of a state that is made when it is first needed."""

    def __init__(self):
        self.last = nnx.Linear(4, 2, rngs=nnx.Rngs(0))

    def __call__(self, x):
        self.seen = nnx.Variable(jnp.zeros((3,), jnp.int32))
        return self.last(x)


def test_a_state_keeps_its_type():
    drop = "which is nothing, ((3,), 'int32'): expected a state that keeps its shapes and dtypes"
    with refused(drop) as caught:
        of_host(lambda: LazyWith(Lazy()))
    assert "a training step of the host own makes of its state" in str(caught.value)


class LazyWith(nnx.Module):
    """One that has a state from the first."""

    def __init__(self, inner):
        self.inner = inner
        self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.inner(self.drop(x))


def test_a_seed_decides_values_alone():
    def build(seed):
        return eqx.nn.MLP(4, 2, 3 + seed, 1, key=jax.random.key(seed))

    x = np.ones((8, 4), np.float32)
    split = Split(x, np.zeros(8, np.int32))
    task = Task("own", split, split, split, CustomHost("own", jax=build))
    assert JaxTrainee(task, **OPTIONS).sites == ("layers.0", "layers.1")
    words = "the host 'own' is another network for seed 2 than for seed 0, first in 'layers.0"
    with refused(words):
        JaxTrainee(task, **{**OPTIONS, "seed": 2})


@pytest.mark.parametrize(
    ("outputs", "labels", "loss", "words"),
    [
        ((3,), (5,), "cross_entropy", "for cross-entropy expected [5, 'classes'], the"),
        ((), (), "cross_entropy", "returns [] for an example, and its labels are []: for"),
        ((2,), (), "cross_entropy", "its largest label is 2: with 2 classes, labels are from 0 to"),
        ((2,), (3,), "mean_squared_error", "and its labels are [3]: for the mean squared error"),
    ],
)  # fmt: skip
def test_outputs_that_are_not_for_the_labels(outputs, labels, loss, words):
    size = int(np.prod(outputs))

    def build():
        return Host(lambda m, x: m.last(x).reshape(outputs), size)

    with refused(words):
        of_host(build, labels=labels, loss=loss, highest=2)


def test_a_layer_to_grow_at_is_there():
    with pytest.raises(SeedIndexError, match=r"no layer's path matches 'layers.7'"):
        make(grow_at=["layers.7"])
    assert make(grow_at=["layers.0"]).sites == ("layers.0", "layers.1")


class Calls(eqx.Module):
    """A layer of a function's making."""

    function: Any = eqx.field(static=True)

    def __call__(self, x):
        return self.function(x)


def scanned(module, x):
    return jax.lax.scan(lambda own, _: (module.parts["a"](own), None), x, None, length=2)[0]


HOSTS = {
    "twice": (lambda: Host(lambda m, x: m.last(m.parts["a"](m.parts["a"](x))),
                           a=Calls(jnp.tanh)), {}, "its host calls it 2 times"),
    "never": (lambda: Host(lambda m, x: m.last(x), a=Calls(jnp.tanh)), {},
              "its host calls it 0 times"),
    "pairs": (lambda: Host(lambda m, x: m.last(m.parts["a"]([x])), a=Calls(lambda xs: xs[0])), {},
              "it does not take and return arrays"),
    "scanned": (lambda: Host(lambda m, x: m.last(scanned(m, x)), a=Calls(jnp.tanh)), {},
                "its host calls it inside jax.jit, jax.checkpoint, a scan or a loop"),
    "flat": (lambda: Host(lambda m, x: jax.vmap(m.last)(
                 m.parts["a"](x.reshape(-1)).reshape(-1, 4)), a=Calls(jnp.tanh)),
             {"call": batched}, "its input and output have no axis for the batch alone"),
    "second": (lambda: Host(lambda m, x: jax.vmap(m.last)(m.parts["a"](x.T).T), a=Calls(jnp.tanh)),
               {"call": batched}, "the batch is not the first axis of what it takes and returns"),
    "half": (lambda: Host(lambda m, x: m.last(
                 m.parts["a"](x.astype(jnp.float16)).astype(jnp.float32)), a=Calls(jnp.tanh)), {},
             "kernels take and give float32 or bfloat16, and the layer is float16"),
    "reshapes": (lambda: Host(lambda m, x: m.last(m.parts["a"](x).reshape(-1)),
                              a=Calls(lambda x: x.reshape(2, 2))), {},
                 "which takes [4] and returns [2, 2]: kernels are compiled for vectors and for"),
    "wide": (lambda: Host(lambda m, x: m.last(m.parts["a"](x)[:4]),
                          a=Calls(lambda x: jnp.tile(x, (1 << 18) + 1))), {},
             "which takes [4] and returns [1048580]: input should be less than"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(HOSTS))
def test_layers_that_no_kernel_can_be_compiled_for(name):
    build, how, words = HOSTS[name]
    own = of_host(build, grow_at=["parts.a"], **how)
    row = own.sites.index("parts.a")
    with refused("no kernel can be compiled for layer 'parts.a'") as caught:
        own.signature(row)
    assert words in str(caught.value)
    # What is there once, with the batch, can be probed all the same.
    if name in ("second", "half", "reshapes", "wide"):
        assert len(own.probe(row, np.arange(3, dtype=np.int32)).outputs) == 3
        assert row in own.probed
        return
    assert row not in own.probed
    with refused("layer 'parts.a' cannot be probed: it") as caught:
        own.probe(row, BATCH[:2])
    assert "or take triggers and initialisations that need no probe" in str(caught.value)


def test_a_part_that_the_task_does_not_have():
    with refused("the task spirals has no part 'tests': expected one of train, validation, test"):
        make().evaluate("tests")
    with refused("the task spirals has no part 'dev': expected one of"):
        make().losses_without("dev", [()])


def test_a_batch_that_cannot_be_divided():
    own = make(optimisation=Optimisation(accumulate=3))
    before = bits(own.snapshot())
    with refused("a batch of 32 examples cannot be accumulated in 3 equal parts"):
        own.step(BATCH, Rates(0.1, {}), 0)
    x = load_task("spirals").train.x
    with refused("choose a batch size that 3 divides, or another `accumulate`"):
        own.step(Batch(x[:4], np.zeros(4, np.int32)), Rates(0.1, {}), 0)
    assert bits(own.snapshot()) == before


def test_grafts_without_an_artifact_or_with_other_parameters(artifact):
    own = make()
    own.apply(Event(0, 0, 1, EventKind.LOAD, artifact.kernel_id, 1.0))
    before, digest = bits(own.snapshot()), state_digest(own.seeds)
    active = Event(0, 0, 1, EventKind.ACTIVATE, artifact.kernel_id, 0.5)
    with refused("an ACTIVATE event of layer 'layers.0', seed 1, came without the artifact"):
        own.apply(active)
    params = draw(artifact)
    name = next(iter(params))
    for wrong in (
        {name: params[name]},
        {**params, name: params[name][:1]},
        {**params, "more": params[name]},
    ):
        with refused(f"the first parameters of kernel {artifact.kernel_id[:12]} do not fit it"):
            own.apply(active, artifact, wrong)
    assert bits(own.snapshot()) == before
    assert state_digest(own.seeds) == digest
    own.apply(active, artifact, params)
    for key, value in own.snapshot()["kernels"]["1"].items():
        np.testing.assert_array_equal(value, params[key])


def test_changes_that_are_not_allowed_change_nothing(artifact):
    own = make(optimisation=Optimisation(ema_decay=0.5))
    graft(own, artifact, seed=1, alpha=0.5)
    train(own, 0, 2)
    before, digest = bits(own.snapshot()), state_digest(own.seeds)
    judged = own.evaluate("test")
    wrong = (
        Event(2, 0, 1, EventKind.FOLD),  # no affine kernel
        Event(2, 0, 1, EventKind.LOAD, artifact.kernel_id, 1.0),
        Event(2, 0, 2, EventKind.FOSSILIZE),
        Event(2, 7, 1, EventKind.UNLOAD),
    )
    for event in wrong:
        with pytest.raises((KasminaException, IndexError)):
            own.apply(event)
        assert bits(own.snapshot()) == before
    other = compile_blueprint(load_blueprint("low_rank"), make().signature(1), sizes={"rank": 1})
    own.apply(Event(2, 0, 2, EventKind.LOAD, other.kernel_id, 2.0))
    loading = state_digest(own.seeds)
    with pytest.raises(KasminaException):
        own.apply(Event(2, 0, 2, EventKind.ACTIVATE, other.kernel_id, 0.5), other)
    assert state_digest(own.seeds) == loading != digest
    assert own.evaluate("test") == judged


def test_snapshots_of_others(artifact):
    own = make(optimisation=Optimisation(ema_decay=0.9))
    graft(own, artifact, seed=1, alpha=0.5)
    train(own, 0, 2)
    shot, before = own.snapshot(), bits(own.snapshot())
    with refused("the snapshot has seeds [layers, seeds] of shape [2, 4], and this host [2, 2]"):
        make(seeds_per_layer=2).restore(shot, {1: artifact})
    with refused("the snapshot has kernels in the slots [1], whose artifacts were not given"):
        own.restore(shot, {})
    host, kernel = shot["host"], shot["kernels"]["1"]
    first, name = "layers.0.weight", next(iter(kernel))
    wrong = {**host, first: host[first][:1]}
    with refused(f"expected the host's parameter {first!r} of shape [8, 2], found [1, 2]"):
        own.restore({**shot, "host": wrong}, {1: artifact})
    missing = {key: value for key, value in host.items() if key != first}
    with refused("of shape [8, 2], found nothing of that name"):
        own.restore({**shot, "host": missing}, {1: artifact})
    with refused("expected the host's parameter 'more' of shape nothing of that name"):
        own.restore({**shot, "host": {**host, "more": host[first]}}, {1: artifact})
    with refused("expected the host's moment"):
        own.restore({**shot, "host_moments": {}}, {1: artifact})
    with refused(f"expected in slot 1, the kernel's parameter {name!r} of shape"):
        own.restore({**shot, "kernels": {"1": {**kernel, name: kernel[name][:0]}}}, {1: artifact})
    with refused("expected in slot 1, the kernel's average 'more' of shape nothing"):
        own.restore({**shot, "averages": {"1": {"more": kernel[name]}}}, {1: artifact})
    assert bits(own.snapshot()) == before
    train(own, 2, 3)
