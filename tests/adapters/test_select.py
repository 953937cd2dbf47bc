"""Layers are chosen by type and by path, in the model's order."""

import equinox as eqx
import jax
import pytest
from flax import nnx

from esper_adapters._select import select_layers
from esper_functional import SeedIndexError
from tests.adapters.faces import EQUINOX, FLAX, each_face
from tests.adapters.hosts import equinox_sequence, flax_sequence


class Animal: ...


class Dog(Animal): ...


class Stone: ...


LAYERS = {
    "first": Stone(),
    "encoder.0": Dog(),
    "encoder.0.dog": Dog(),
    "encoder.1": Animal(),
    "decoder.0": Dog(),
}


@pytest.mark.parametrize(
    ("targets", "chosen"),
    [
        ([Stone], ["first"]),
        ([Animal], ["encoder.0", "encoder.0.dog", "encoder.1", "decoder.0"]),
        ([Dog], ["encoder.0", "encoder.0.dog", "decoder.0"]),
        (["encoder.0"], ["encoder.0"]),
        (["encoder.*"], ["encoder.0", "encoder.0.dog", "encoder.1"]),
        (["*.0"], ["encoder.0", "decoder.0"]),
        (["*"], list(LAYERS)),
        (["encoder.[1-9]"], ["encoder.1"]),
        (["decoder.0", "first", Stone], ["first", "decoder.0"]),
        (["decoder.0", "first", "first"], ["first", "decoder.0"]),
    ],
)
def test_the_layers_that_any_target_matches(targets, chosen):
    assert select_layers(LAYERS, targets) == tuple(chosen)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([], "wrap: target_layers is empty: name types of layers, or paths"),
        (["encodr.0"], r"no layer's path matches 'encodr\.0'; the nearest are \['encoder\.0'"),
        (["?zzzzz"], r"no layer's path matches '\?zzzzz'; there are \['first', 'encoder\.0'"),
        ([int], r"type int: it is made of \['Animal', 'Dog', 'Stone'\]\. Choose .* target_layers$"),
        ([type("Stones", (), {})], r"no layer of type Stones: .*; the nearest are \['Stone'\]"),
        ([Stone, "encoder.7"], r"matches 'encoder\.7'"),
        (["Encoder.0"], r"matches 'Encoder\.0'; the nearest are"),
    ],
)
def test_a_target_that_matches_nothing_is_refused(targets, message):
    with pytest.raises(SeedIndexError, match=message):
        select_layers(LAYERS, targets)


def test_of_many_layers_a_message_names_twenty():
    many = {f"layers.{i}": Stone() for i in range(30)}
    with pytest.raises(SeedIndexError, match="'layers.19'\\] and 10 more"):
        select_layers(many, ["?"])


def test_paths_of_equinox_models():
    host = equinox_sequence().module
    every = EQUINOX.wrap(host, target_layers=["*"]).sites
    assert set(every) >= {"embed", "norm", "attention", "attention.query_proj", "linear"}
    assert EQUINOX.wrap(host, target_layers=["attention.*_proj"]).sites == (
        "attention.query_proj",
        "attention.key_proj",
        "attention.value_proj",
        "attention.output_proj",
    )
    assert EQUINOX.wrap(host).sites[-1] == "linear"
    assert EQUINOX.wrap(host, target_layers=[eqx.nn.LayerNorm, "linear"]).sites == (
        "norm",
        "linear",
    )
    mlp = eqx.nn.MLP(2, 2, 3, 2, key=jax.random.key(0))
    assert EQUINOX.wrap(mlp).sites == ("layers.0", "layers.1", "layers.2")


def test_paths_of_flax_models():
    host = flax_sequence().module
    assert FLAX.wrap(host, target_layers=["attention", "attention.*"]).sites == (
        "attention",
        "attention.key",
        "attention.out",
        "attention.query",
        "attention.value",
    )
    assert FLAX.wrap(host).sites == ("linear",)
    assert FLAX.wrap(host, target_layers=[nnx.LayerNorm, nnx.Embed]).sites == ("embed", "norm")

    class Nested(nnx.Module):
        def __init__(self):
            self.parts = nnx.Dict({"a": FLAX.linear(2, 2), "b": FLAX.linear(2, 2)})
            self.plain = nnx.data([FLAX.linear(2, 2), {"c": FLAX.linear(2, 2)}])

        def __call__(self, x):
            return x

    assert FLAX.wrap(Nested()).sites == ("parts.a", "parts.b", "plain.0", "plain.1.c")


@each_face
def test_the_model_itself_is_no_layer(face):
    with pytest.raises(
        SeedIndexError, match="has no layers within it, and itself it cannot be one"
    ):
        face.wrap(face.linear(3, 5))
