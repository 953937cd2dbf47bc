"""The torch trainee keeps the laws of trainees, and a dormant one is torch itself."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from esper.contracts import KernelSignature
from esper.tezzeret import compile_blueprint, load_blueprint
from esper.tolaria._torch_trainee import TorchTrainee
from esper.tolaria._trainee import Optimisation, Rates, Trainee
from esper.tolaria.tasks import load_task
from esper_functional import Event, EventKind
from tests.esper.trainee_laws import LAWS
from tests.esper.trainee_life import BATCH, EVERYTHING, bits, graft, train
from tests.tolerance import assert_close


def make(**options: Any) -> Trainee:
    given: dict[str, Any] = {"seed": 0, "seeds_per_layer": 4, "blend": "residual", **options}
    return TorchTrainee(load_task("spirals"), **given)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_torch_keeps_the_law(law, artifact):
    law(make, artifact)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_a_dormant_trainee_trains_bit_for_bit_as_torch_does(optimizer):
    momentum = 0.9 if optimizer == "sgd" else 0.0
    decay = 0.01 if optimizer == "adamw" else 0.0
    chosen = Optimisation(optimizer=optimizer, momentum=momentum, weight_decay=decay)
    own = make(optimisation=chosen)
    task = load_task("spirals")
    model = task.host.torch(0)
    more = {"sgd": {"momentum": momentum}, "adamw": {"weight_decay": decay}, "adam": {}}[optimizer]
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    optimiser = kinds[optimizer](model.parameters(), lr=0.01, fused=True, **more)
    x, y = torch.tensor(task.train.x[BATCH]), torch.tensor(task.train.y[BATCH]).long()
    losses = []
    for _ in range(5):
        optimiser.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert train(own, 0, 5) == np.asarray(losses, np.float32).tobytes()
    for name, value in own.snapshot()["host"].items():
        assert value.tobytes() == model.get_parameter(name).detach().numpy().tobytes()


def test_bfloat16_is_of_passes_and_parameters_stay_float32(artifact):
    exact, short = (make(optimisation=Optimisation(precision=p)) for p in ("float32", "bfloat16"))
    for own in (exact, short):
        graft(own, artifact, seed=1, alpha=0.5)
        graft(own, artifact, seed=2, incubate=True)
    ours, theirs = (np.frombuffer(train(own, 0, 20), np.float32) for own in (short, exact))
    assert (ours != theirs).any()
    np.testing.assert_allclose(ours, theirs, rtol=4e-2)
    shot = short.snapshot()
    kept = [*shot["host"].values(), *shot["kernels"]["1"].values(), *shot["kernels"]["2"].values()]
    assert {array.dtype.name for array in kept} == {"float32"}
    variants = [(), [(0, 1)]]
    looped = [short.evaluate("test", muted).loss for muted in variants]
    np.testing.assert_allclose(short.losses_without("test", variants)[:, 0], looped, rtol=4e-2)


def test_a_fossil_is_what_the_network_was_judged_by(artifact):
    own = make(optimisation=EVERYTHING)
    graft(own, artifact, seed=1, alpha=1.0)
    train(own, 0, 4)
    before = own.evaluate("test").loss
    own.apply(Event(4, 0, 1, EventKind.FOSSILIZE))
    assert_close(np.float32(own.evaluate("test").loss), np.float32(before))


@pytest.fixture(scope="module")
def affine():
    """A kernel of another program than `artifact`'s."""
    signature = KernelSignature(input_shape=(2,), output_shape=(8,))
    return compile_blueprint(load_blueprint("low_rank"), signature, sizes={"rank": 2})


def test_what_is_taken_back_has_its_own_program(artifact, affine):
    own = make(optimisation=EVERYTHING)
    graft(own, artifact, seed=1, alpha=0.5)
    train(own, 0, 2)
    held, before = own.hold(), bits(own.snapshot())
    losses = train(own, 2, 4)
    own.apply(Event(4, 0, 1, EventKind.UNLOAD))
    graft(own, affine, step=4, seed=1, alpha=0.5)
    train(own, 4, 5)
    own.take_back(held)
    assert bits(own.snapshot()) == before
    assert train(own, 2, 4) == losses


def test_folding_a_kernel_leaves_the_averages_judging_as_before(affine):
    own = make(optimisation=Optimisation(ema_decay=0.9))
    graft(own, affine, seed=1, alpha=1.0)
    train(own, 0, 2)
    own.apply(Event(2, 0, 1, EventKind.FOSSILIZE))
    train(own, 2, 4)
    before, count = own.evaluate("test").loss, own.cost().parameters
    own.apply(Event(4, 0, 1, EventKind.FOLD))
    assert own.cost().parameters < count
    assert_close(np.float32(own.evaluate("test").loss), np.float32(before))
    shot = own.snapshot()
    assert "1" not in shot["kernels"]
    again = make(seed=5, optimisation=Optimisation(ema_decay=0.9))
    again.restore(shot, {})
    assert train(again, 4, 6) == train(own, 4, 6)


def test_the_parameters_come_back_when_judging_fails(artifact):
    own = make(optimisation=EVERYTHING)
    graft(own, artifact, seed=1, alpha=0.5)
    train(own, 0, 3)
    before, judged = bits(own.snapshot()), own.evaluate("test")
    with pytest.raises(RuntimeError):
        own.predict(np.zeros((4, 3), np.float32))
    assert bits(own.snapshot()) == before
    assert own.evaluate("test") == judged


def test_predictions_are_probabilities_of_any_number_of_examples_at_a_time():
    whole, few = make(), make(evaluation_batch=7)
    x = load_task("spirals").test.x
    assert_close(few.predict(x), whole.predict(x))
    np.testing.assert_allclose(whole.predict(x).sum(-1), 1.0, rtol=1e-5)
    assert whole.predict(x[:0]).shape == (0, 2)


def test_costs_are_counted(artifact):
    own = make()
    bare = own.cost()
    # 2·8 + 8 and 8·2 + 2 numbers; a product and a sum for each weight.
    assert bare == (42, 64.0)
    size = sum(p.size for p in artifact.params.values())
    coming = own.cost([artifact])
    assert coming.parameters == 42 + size
    assert coming.flops > 64.0
    graft(own, artifact, seed=2)
    assert own.cost() == coming
    assert make(evaluation_batch=3).cost() == bare


def test_threads_are_set_where_they_are_asked_for():
    before = torch.get_num_threads()
    try:
        make(threads=2)
        assert torch.get_num_threads() == 2
        make()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_losses_are_read_together():
    own = make()
    assert own.read_losses([]).shape == (0,)
    losses = [own.step(BATCH, Rates(0.01, {}), 0), np.float32(0.5)]
    assert own.read_losses(losses).dtype == np.float32
    assert own.read_losses(losses)[1] == np.float32(0.5)
