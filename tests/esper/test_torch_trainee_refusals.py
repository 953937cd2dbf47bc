"""What the torch trainee refuses, and that it is as it was then."""

import re

import numpy as np
import pytest
import torch
from torch import nn

from esper.errors import InputError
from esper.tolaria._torch_trainee import TorchTrainee
from esper.tolaria._trainee import Batch, Optimisation, Rates
from esper.tolaria.tasks import CustomHost, Split, Task, load_task
from esper_functional import Event, EventKind, SeedIndexError, state_digest
from tests.esper.trainee_life import BATCH, bits, draw, graft, train

OPTIONS = {"seed": 0, "seeds_per_layer": 4, "blend": "residual"}


def make(**options):
    return TorchTrainee(load_task("spirals"), **{**OPTIONS, **options})


def of_host(module, example=(2,), dtype=np.float32):
    x = np.ones((8, *example), dtype)
    split = Split(x, np.zeros(8, np.int32))
    host = CustomHost("own", torch=lambda seed: module)
    return TorchTrainee(Task("own", split, split, split, host), **OPTIONS)


def refused(words):
    return pytest.raises(InputError, match=re.escape(words))


def test_a_host_is_a_module():
    with refused("the host 'own' builds a list for torch: expected a torch.nn.Module"):
        of_host([nn.Linear(2, 2)])


def test_outputs_are_as_many_as_was_said():
    x = np.ones((8, 2), np.float32)
    split = Split(x, np.zeros(8, np.int32))

    def said(outputs):
        host = CustomHost("own", torch=lambda seed: nn.Linear(2, 2), outputs=outputs)
        return TorchTrainee(Task("own", split, split, split, host), **OPTIONS)

    with refused("is said to have 5 outputs, and returns [2] for an example: say 2, or leave"):
        said(5)
    assert said(2).sites


class Host(nn.Module):
    """A forward pass of a function's making."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.parts = nn.ModuleDict(layers)
        self.last = nn.Linear(4, 2)
        self.run = forward

    def forward(self, x):
        return self.run(self, x)


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


def test_a_host_returns_one_tensor_with_the_batch_first():
    with refused("returned a tuple for 2 examples: expected one tensor of outputs, [2, ...]"):
        of_host(Host(lambda m, x: (m.last(x.repeat(1, 2)), x)))
    with refused("the host Host returned [2] for 3 examples"):
        of_host(Host(lambda m, x: m.last(x.repeat(1, 2)).sum(0) if len(x) > 2 else x[:, 0]))


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
    x, kind = np.ones((6, 4), np.float32), np.int32 if loss == "cross_entropy" else np.float32
    split = Split(x, np.full((6, *labels), 2, kind))
    size = int(np.prod(outputs))
    host = nn.Sequential(nn.Linear(4, size), nn.Unflatten(1, outputs) if outputs else nn.Flatten(0))
    custom = CustomHost("own", torch=lambda seed: host)
    with refused(words):
        TorchTrainee(Task("own", split, split, split, custom, loss), **OPTIONS)


def test_a_layer_to_grow_at_is_there():
    with pytest.raises(SeedIndexError, match="no module's path matches 'layers.7'"):
        make(grow_at=["layers.7"])
    assert make(grow_at=["layers.0"]).sites == ("layers.0", "layers.1")


def test_layers_that_no_kernel_can_be_compiled_for():
    twice = Host(lambda m, x: m.last(m.parts["a"](m.parts["a"](x.repeat(1, 2)))), a=nn.Tanh())

    def signature(module, name):
        split = Split(np.ones((8, 2), np.float32), np.zeros(8, np.int32))
        task = Task("own", split, split, split, CustomHost("own", torch=lambda seed: module))
        own = TorchTrainee(task, grow_at=[name], **OPTIONS)
        row = own.sites.index(name)
        with pytest.raises(InputError) as caught:
            own.signature(row)
        return own, row, str(caught.value)

    own, row, words = signature(twice, "parts.a")
    assert "no kernel can be compiled for layer 'parts.a': its host calls it 2 times" in words
    assert "Let kernels be grafted elsewhere, by `grow_at`" in words
    with refused("layer 'parts.a' cannot be probed: its host calls it 2 times in a forward pass"):
        own.probe(row, BATCH[:2])
    assert row not in own.probed
    assert own.probed

    unused = Host(lambda m, x: m.last(x.repeat(1, 2)), a=nn.Tanh())
    assert "its host calls it 0 times" in signature(unused, "parts.a")[2]
    pairs = Host(lambda m, x: m.last(m.parts["a"]([x])), a=_Pair())
    assert "it does not take and return tensors" in signature(pairs, "parts.a")[2]
    flat = Host(
        lambda m, x: m.last(
            m.parts["a"](x.repeat(1, 4).reshape(-1, 4)).reshape(len(x), 2, 4)[:, 0]
        ),
        a=nn.Tanh(),
    )
    assert "no axis for the batch alone" in signature(flat, "parts.a")[2]
    second = Host(lambda m, x: m.last(m.parts["a"](x.repeat(1, 2).T).T), a=nn.Tanh())
    assert "the batch is axis 1 of its input, and kernels expect it" in signature(
        second, "parts.a"
    )[2]  # fmt: skip
    double = Host(lambda m, x: m.last(m.parts["a"](x.repeat(1, 2).double()).float()), a=_double())
    words = signature(double, "parts.a")[2]
    assert "kernels take and give float32 or bfloat16, and the layer is float64" in words
    integers = Host(lambda m, x: m.last(m.parts["a"](x[:, 0].long())), a=nn.Embedding(3, 4))
    assert "and the layer is of another dtype, or of several" in signature(integers, "parts.a")[2]
    wide = Host(
        lambda m, x: m.last(m.parts["a"](x)[:, :4]), a=nn.Linear(2, (1 << 20) + 1, bias=False)
    )
    words = signature(wide, "parts.a")[2]
    assert "which takes [2] and returns [1048577]: input should be less than" in words


class _Pair(nn.Module):
    def forward(self, given):
        return given[0].repeat(1, 2)


def _double():
    return nn.Linear(4, 4).double()


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


def test_snapshots_of_others(artifact):
    own = make()
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
    words = f"expected the host's parameter {first!r} of shape [8, 2], found [1, 2]"
    with refused(words):
        own.restore({**shot, "host": wrong}, {1: artifact})
    missing = {key: value for key, value in host.items() if key != first}
    with refused("of shape [8, 2], found nothing of that name"):
        own.restore({**shot, "host": missing}, {1: artifact})
    with refused("expected the host's parameter 'more' of shape nothing of that name"):
        own.restore({**shot, "host": {**host, "more": host[first]}}, {1: artifact})
    with refused("expected the host's buffer 'more'"):
        own.restore({**shot, "buffers": {"more": host[first]}}, {1: artifact})
    with refused(f"expected in slot 1, the kernel's parameter {name!r} of shape"):
        own.restore({**shot, "kernels": {"1": {**kernel, name: kernel[name][:0]}}}, {1: artifact})
    assert bits(own.snapshot()) == before
    train(own, 2, 3)


def test_a_layer_of_double_precision_trains():
    own = of_host(
        Host(lambda m, x: m.last(m.parts["a"](x.repeat(1, 2).double()).float()), a=_double())
    )
    before = own.snapshot()["host"]["parts.a.weight"]
    own.step(None, Rates(0.1, {}), 0)
    after = own.snapshot()["host"]["parts.a.weight"]
    assert before.dtype == after.dtype == np.float64
    assert (before != after).any()
    assert torch.get_default_dtype() is torch.float32
