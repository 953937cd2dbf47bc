"""Users' own functions of jax and modules of Equinox and Flax as artifacts; own kernels at work."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

import esper
from esper.artifacts import load_stablehlo, read_artifact
from esper.contracts import KernelSignature
from esper.errors import ArtifactError, KernelCompilationError
from esper.execution import load_jax_kernel, load_torch_kernel
from esper.tezzeret import compile_equinox, compile_flax, compile_function, compile_module
from esper.tezzeret._own_kernel import own_kernel
from esper.tezzeret._parity import check_parity, run_jax, run_torch
from esper.tezzeret._programs import array_dtype
from esper.urza import Library
from tests.tolerance import assert_bitwise, assert_close

FOUR = KernelSignature.parse("4->4")


def lora(params, x):
    return x @ params["a"] @ params["b"]


def lora_params(dtype=jnp.float32):
    a, b = jax.random.split(jax.random.key(0))
    return {"a": jax.random.normal(a, (4, 2), dtype), "b": jax.random.normal(b, (2, 4), dtype)}


class FlaxNet(nnx.Module):
    """Convolution over signals [length, channels], with batch norm and dropout."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(3, 3, 3, feature_group_count=3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.dense = nnx.List([nnx.Linear(3, 5, rngs=rngs), nnx.Linear(5, 3, rngs=rngs)])

    def __call__(self, x):
        y = self.drop(nnx.gelu(self.dense[0](self.norm(self.conv(x))), approximate=False))
        return self.dense[1](y)


class EquinoxBlock(eqx.Module):
    """A convolution of images, written for one example."""

    conv: eqx.nn.Conv2d
    norm: eqx.nn.GroupNorm
    drop: eqx.nn.Dropout
    times: int = eqx.field(static=True)

    def __init__(self, key):
        self.conv = eqx.nn.Conv2d(4, 4, 3, padding=1, key=key)
        self.norm = eqx.nn.GroupNorm(2, 4)
        self.drop = eqx.nn.Dropout(0.5)
        self.times = 2

    def __call__(self, x):
        return x + self.times * self.drop(jax.nn.relu(self.conv(self.norm(x))))


def from_equinox(module, text):
    """An artifact, and the function of its flat parameters that it must be."""
    params, static = eqx.partition(eqx.nn.inference_mode(module), eqx.is_inexact_array)
    structure = jax.tree.structure(params)
    artifact = compile_equinox(module, KernelSignature.parse(text))

    def apply(flat, x):
        leaves = [flat[name] for name in artifact.params]
        own = eqx.combine(jax.tree.unflatten(structure, leaves), static)
        return jnp.stack([own(example) for example in x])

    return artifact, apply


def flax_net():
    module = FlaxNet()
    module(jax.random.normal(jax.random.key(1), (8, 6, 3)))
    before = jax.tree.map(np.array, nnx.state(module, nnx.Any(nnx.Param, nnx.BatchStat)))
    artifact = compile_flax(module, KernelSignature.parse("6x3->6x3"))
    after = nnx.state(module, nnx.Any(nnx.Param, nnx.BatchStat))
    assert_bitwise(jax.tree.leaves(after), jax.tree.leaves(before))

    def apply(flat, x):
        own = nnx.clone(module)
        own.eval()
        for name, value in flat.items():
            place: Any = own
            *path, last = name.split(".")
            for part in path:
                place = place[int(part)] if part.isdigit() else getattr(place, part)
            getattr(place, last)[...] = value
        return own(x)

    return artifact, apply


def nested():
    """Parameters in lists within mappings, in an order that is not their names'."""
    params = {"z": [jnp.full((4, 3), 0.3), jnp.ones(3)], "a": (jnp.full((3, 4), -0.2),)}

    def apply(p, x):
        return jax.nn.softmax(x @ p["z"][0] + p["z"][1]) @ p["a"][0]

    def flat(p, x):
        return apply({"z": [p["z.0"], p["z.1"]], "a": (p["a.0"],)}, x)

    return compile_function(apply, params, FOUR, name="nested"), flat


def attention():
    w = jax.random.normal(jax.random.key(2), (3, 4, 4))

    def apply(w, x):
        q, k, v = jnp.einsum("btd,nde->nbte", x, w)
        return jax.nn.softmax(q @ jnp.swapaxes(k, 1, 2) / 2.0) @ v

    artifact = compile_function(apply, w, KernelSignature.parse("5x4->5x4"))
    assert list(artifact.params) == ["param"]
    return artifact, lambda p, x: apply(p["param"], x)


def linen():
    from flax import linen

    net = linen.Dense(4)
    params = net.init(jax.random.key(0), jnp.ones((1, 4)))["params"]

    def apply(p, x):
        return net.apply({"params": p}, x)

    return compile_function(apply, params, FOUR, name="Dense"), apply


def indices():
    """Indexing, which jax writes as gathering, and its gradient as scattering."""
    params = {"w": jax.random.normal(jax.random.key(4), (4, 2))}

    def apply(p, x):
        turned = x[:, ::-1] * p["w"][jnp.array([1, 3, 0, 1]), 0]
        return turned.at[:, 1].add(x[:, 0]) + x[..., jnp.array([2, 2, 0, 1])] * p["w"][:, 1]

    return compile_function(apply, params, FOUR), apply


CASES = {
    "indices": indices,
    "linen": linen,
    "lora": lambda: (compile_function(lora, lora_params(), FOUR), lora),
    "lora_bfloat16": lambda: (
        compile_function(lora, lora_params(jnp.bfloat16), KernelSignature.parse("4->4 bfloat16")),
        lora,
    ),
    "nested": nested,
    "attention": attention,
    "equinox_mlp": lambda: from_equinox(
        eqx.nn.MLP(4, 3, 8, 2, jax.nn.gelu, key=jax.random.key(0)), "4->3"
    ),
    "equinox_block": lambda: from_equinox(EquinoxBlock(jax.random.key(0)), "4x5x5->4x5x5"),
    "flax_net": flax_net,
}


@pytest.mark.parametrize("case", CASES)
def test_jax_and_torch_compute_what_the_function_does(case):
    artifact, apply = CASES[case]()
    manifest = read_artifact(artifact.data, artifact.kernel_id).manifest
    assert manifest.origin == ("module" if "equinox" in case or "flax" in case else "function")
    assert (artifact.torchscript, artifact.blueprint) == (None, None)
    assert "torch" not in manifest.versions
    random, signature = np.random.default_rng(5), manifest.signature
    dtype = array_dtype(signature.dtype)

    def draw(*shape):
        return random.standard_normal(shape).astype(dtype)

    params = {name: draw(*value.shape) for name, value in artifact.params.items()}
    bridge = load_torch_kernel(artifact)
    assert bridge.route == "bridge"
    assert list(bridge.params) == sorted(params)
    for batch in (1, 3, 16):
        x, cotangent = draw(batch, *signature.input_shape), draw(batch, *signature.output_shape)
        expected = run_jax(apply, params, x, cotangent)
        ordered = {name: params[name] for name in bridge.params}
        for found in (
            run_jax(load_stablehlo(artifact.stablehlo).call, params, x, cotangent),
            run_torch(bridge.program, ordered, x, cotangent),
        ):
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                assert_close(found[name], value)


def test_parameters_are_those_that_were_given():
    params = lora_params()
    artifact = compile_function(lora, params, FOUR, birth="free", confidence=1.0)
    assert artifact.manifest.blueprint == "lora"
    assert_bitwise(artifact.params, params)
    assert_bitwise(load_jax_kernel(artifact).params, params)
    zero = compile_function(lora, {**params, "b": jnp.zeros((2, 4))}, FOUR, birth="zero")
    assert zero.manifest.birth == "zero"
    assert compile_function(lambda p, x: x @ p, jnp.eye(4), FOUR).manifest.blueprint == "function"


def test_programs_that_disagree_are_refused():
    params = {name: np.asarray(p) for name, p in lora_params().items()}
    kernel = own_kernel(params, FOUR)
    check_parity(kernel, lora, lora, own=params, run_other=run_jax)

    def nearly(p, x):
        return lora(p, x) + 1e-3 * p["b"][0]

    message = r"disagree at batch 1: \w.* differs by .* at \[\d.*; at most"
    with pytest.raises(KernelCompilationError, match=message):
        check_parity(kernel, lora, nearly, own=params, run_other=run_jax)
    # Equal outputs and another gradient.
    with pytest.raises(KernelCompilationError, match="gradient of a differs by"):
        check_parity(
            kernel,
            lora,
            lambda p, x: lora({**p, "a": jax.lax.stop_gradient(p["a"])}, x),
            own=params,
            run_other=run_jax,
        )


def test_equal_functions_give_equal_bytes_in_another_process(tmp_path: Path):
    ours = compile_function(lora, lora_params(), FOUR)
    program = tmp_path / "compile.py"
    program.write_text(
        # There torch cannot be had: a function's bytes do not depend on it.
        f"import sys\nsys.path[:0] = {sys.path!r}\nsys.modules['torch'] = None\n"
        "import jax, jax.numpy as jnp\n"
        "from esper.contracts import KernelSignature\n"
        "from esper.tezzeret import compile_function\n"
        "\n\n\ndef lora(params, x):\n    return x @ params['a'] @ params['b']\n\n"
        "a, b = jax.random.split(jax.random.key(0))\n"
        "params = {'b': jax.random.normal(b, (2, 4)), 'a': jax.random.normal(a, (4, 2))}\n"
        "print(compile_function(lora, params, KernelSignature.parse('4->4')).kernel_id)\n"
    )
    theirs = subprocess.run(
        [sys.executable, str(program)], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert theirs.stdout.strip() == ours.kernel_id
    assert str(Path(__file__).parents[2]).encode() not in ours.data
    assert b"0x" not in ours.data


# In a library, and in models


def own_kernels():
    """Kernels 2->8, one by each entry."""
    two_eight = KernelSignature.parse("2->8")
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(2, 4), nn.GELU(), nn.Linear(4, 8))
    a, b = jax.random.normal(jax.random.key(0), (2, 3)), 0.1 * jnp.ones((3, 8))
    return {
        "module": compile_module(module, two_eight, name="a module"),
        "function": compile_function(lora, {"a": a, "b": b}, two_eight),
        "equinox": compile_equinox(eqx.nn.MLP(2, 8, 4, 1, key=jax.random.key(3)), two_eight),
    }


@pytest.fixture(scope="module")
def own() -> dict:
    pytest.importorskip("torch2jax", reason="the extra 'torch2jax' is not installed")
    return own_kernels()


@pytest.fixture
def library(tmp_path: Path, own) -> Library:
    store = Library(tmp_path / "own")
    for artifact in own.values():
        store.put(artifact)
    return store


def test_a_library_keeps_them_and_counts_what_they_cost(library, own):
    records = {r.blueprint: r for r in library.find(KernelSignature.parse("2->8"))}
    assert set(records) == {"a module", "lora", "MLP"}
    lora_record = records["lora"]
    assert lora_record.parameter_count == 2 * 3 + 3 * 8
    # A multiplication and an addition for each parameter, but for the sums' first terms.
    assert 2 * 30 - 11 <= lora_record.flops <= 2 * 30
    assert records["MLP"].flops >= 2 * (2 * 4 + 4 * 8)
    for artifact in own.values():
        assert library.get(artifact.kernel_id).data == artifact.data


def test_a_route_that_needs_a_blueprint_is_refused(own):
    with pytest.raises(ArtifactError, match="holds no TorchScript: load it by the route 'bridge'"):
        load_torch_kernel(own["function"], route="torchscript")
    with pytest.raises(ArtifactError, match="was made of a module and holds no blueprint"):
        load_torch_kernel(own["module"], route="native")


X = np.random.default_rng(0).normal(size=(16, 2)).astype(np.float32)
Y = np.stack([np.sin(3 * X[:, 0]), X[:, 0] * X[:, 1], X[:, 1] ** 2], 1).astype(np.float32)


@pytest.mark.parametrize("kind", ["module", "function", "equinox"])
def test_they_train_in_a_model_of_torch(kind, own, library):
    torch.manual_seed(1)
    host = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3))
    model = esper.wrap(host, library=library, target_layers=["0"])
    assert model.load_kernel_sync("0", seed_idx=0, kernel_artifact_id=own[kind].kernel_id)
    model.set_seed_alpha("0", 0, 0.5)
    x, y = torch.tensor(X), torch.tensor(Y)
    # The blend, with the kernel run by jax.
    kernel = load_jax_kernel(own[kind])
    k = np.asarray(kernel.program.apply(kernel.params, jnp.asarray(X)))
    h = host[0](x).detach().numpy()
    assert_close(model[0](x).detach().numpy(), 0.5 * h + 0.5 * k)
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(8):
        optimiser.zero_grad()
        loss = ((model(x) - y) ** 2).mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    grafted = {n: p for n, p in model.named_parameters() if n not in dict(host.named_parameters())}
    assert sum(p.numel() for p in grafted.values()) == sum(
        p.size for p in own[kind].params.values()
    )
    assert all(p.grad is not None and bool(p.grad.any()) for p in grafted.values())


@pytest.mark.parametrize("kind", ["module", "function", "equinox"])
def test_they_train_alike_in_equinox_and_in_torch(kind, own, library):
    kernel_id = own[kind].kernel_id
    host = eqx.nn.MLP(2, 3, 8, 1, jnp.tanh, key=jax.random.key(0))
    grown = esper.wrap(host, library=library, target_layers=["layers.0"])
    grown = grown.load_kernel("layers.0", 0, kernel_id, alpha=0.5).module

    def loss(module):
        # Per example, as Equinox has it: the kernel's program takes them as one batch.
        return jnp.mean((jax.vmap(module)(jnp.asarray(X)) - Y) ** 2)

    twin = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3))
    with torch.no_grad():
        for ours, theirs in ((twin[0], host.layers[0]), (twin[2], host.layers[1])):
            ours.weight.copy_(torch.tensor(np.asarray(theirs.weight)))
            ours.bias.copy_(torch.tensor(np.asarray(theirs.bias)))
    model = esper.wrap(twin, library=library, target_layers=["0"])
    assert model.load_kernel_sync("0", seed_idx=0, kernel_artifact_id=kernel_id)
    model.set_seed_alpha("0", 0, 0.5)
    optimiser = torch.optim.SGD(model.parameters(), 0.1)

    first = loss(grown)
    step = eqx.filter_jit(eqx.filter_grad(loss))
    for _ in range(5):
        updates = jax.tree.map(lambda g: -0.1 * g, step(grown))
        grown = eqx.apply_updates(grown, updates)
        optimiser.zero_grad()
        ((model(torch.tensor(X)) - torch.tensor(Y)) ** 2).mean().backward()
        optimiser.step()
    assert loss(grown) < first
    assert_close(model(torch.tensor(X)).detach().numpy(), jax.vmap(grown)(jnp.asarray(X)))


@pytest.mark.parametrize("kind", ["module", "function", "equinox"])
def test_they_run_in_a_model_of_flax(kind, own, library):
    class Net(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.layers = nnx.List([nnx.Linear(2, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)])

        def __call__(self, x):
            return self.layers[1](jnp.tanh(self.layers[0](x)))

    host = Net()
    model = esper.wrap(host, library=library, target_layers=["layers.0"])
    model = model.load_kernel("layers.0", 0, own[kind].kernel_id, alpha=0.5)
    kernel = load_jax_kernel(own[kind])
    k = kernel.program.apply(kernel.params, jnp.asarray(X))
    h = host.layers[0](jnp.asarray(X))
    assert_close(model(jnp.asarray(X)), host.layers[1](jnp.tanh(0.5 * h + 0.5 * k)))
