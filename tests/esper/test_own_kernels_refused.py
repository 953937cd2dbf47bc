"""What of users' own modules and functions is refused, and what is said."""

import jax
import jax.numpy as jnp
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from esper.contracts import KernelSignature
from esper.errors import InputError, KernelCompilationError
from esper.tezzeret import (
    _torch2jax,
    compile_equinox,
    compile_flax,
    compile_function,
    compile_module,
)
from esper.tezzeret._replacements import REPLACEMENTS
from esper.tezzeret._torch2jax import jax_function
from esper.tezzeret._torch_export import export_line
from tests.esper.own_modules import Does, make, parameter

FOUR = KernelSignature.parse("4->4")
needs_torch2jax = pytest.mark.skipif(
    _torch2jax.find_spec("torch2jax") is None, reason="the extra 'torch2jax' is not installed"
)


def frozen() -> nn.Module:
    module = nn.Linear(4, 4)
    module.bias.requires_grad_(False)
    return module


def integers() -> nn.Module:
    module = nn.Linear(4, 4)
    module.register_parameter(
        "count", nn.Parameter(torch.ones(1, dtype=torch.int32), requires_grad=False)
    )
    return module


def with_buffer(value: torch.Tensor) -> nn.Module:
    module = Does(
        lambda m, x: x + (m.layer(x)[:, :1] * m.held.reshape(1, -1)).sum(-1, keepdim=True),
        layer=nn.Linear(4, 4),
    )
    module.register_buffer("held", value)
    return module


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x, other):
        return self.layer(x) + other


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.calls += 1
        return self.layer(x)


def in_place(m, x):
    x += 1
    return m.layer(x)


def branches(m, x):
    return m.layer(x) if x.sum() > 0 else x


def does(function, **layers) -> nn.Module:
    return Does(function, **(layers or {"layer": nn.Linear(4, 4)}))


MODULES = {
    "two_inputs": (Two, r"its forward takes 2 inputs \(x, other\): a kernel takes one"),
    "another_width": (
        lambda: nn.Linear(4, 5),
        r"float32 of shape \(5\) for each example, the signature says float32 of \(4\)",
    ),
    "another_dtype": (
        lambda: does(lambda m, x: m.layer(x).bfloat16()), "its output is bfloat16 of shape",
    ),
    "no_batch": (
        lambda: does(lambda m, x: m.layer(x).sum(0)), "its output has shape .* without the batch",
    ),
    "batch_squeezed_away": (
        lambda: does(lambda m, x: m.layer(x).squeeze()),
        r"torch gives an output of shape \(4,\) at batch 1, expected \(1, 4\)",
    ),
    "several_outputs": (lambda: does(lambda m, x: (m.layer(x), x)), "gives several outputs"),
    "another_input": (lambda: nn.Linear(3, 4), "torch.export cannot trace it"),
    "integers": (integers, "its parameter 'count' is int32: expected float32"),
    "complex": (
        lambda: does(lambda m, x: (x * m.w).real, w=parameter(4, dtype=torch.cfloat)),
        "its parameter 'w' is complex64: expected float32",
    ),
    "half_of_it": (
        lambda: nn.Linear(4, 4, dtype=torch.bfloat16),
        r"is bfloat16: expected float32.*Convert it by module\.to\(torch\.float32\)",
    ),
    "frozen": (frozen, "its parameter 'bias' is frozen.*make it a buffer"),
    "lazy": (lambda: nn.LazyLinear(4), r"'weight' holds no values \(lazy\): run the module once"),
    "meta": (lambda: nn.Linear(4, 4, device="meta"), "holds no values .on the meta device"),
    "no_parameters": (nn.Tanh, "it has no parameters: a kernel is trained"),
    "unused": (
        lambda: does(lambda m, x: m.layer(x), layer=nn.Linear(4, 4), more=parameter(2)),
        "its parameter 'more' takes no part in its output.*remove it",
    ),
    "not_finite": (
        lambda: does(lambda m, x: x * m.w, w=nn.Parameter(torch.full((4,), torch.nan))),
        "its parameter 'w' is not finite",
    ),
    "values_decide": (lambda: does(branches), "torch.export cannot trace it.*depend on values"),
    "batch_norm_without_data": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)),
        "its BatchNorm1d '1' has seen no data.*use group norm",
    ),
    "batch_norm_of_each_batch": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False)),
        "it uses torch.*which a module that is to be an artifact may not",
    ),
    "dropout_always": (
        lambda: does(lambda m, x: F.dropout(m.layer(x), 0.5)), r"draws random numbers \(.*dropout",
    ),
    "noise": (
        lambda: does(lambda m, x: m.layer(x) + torch.randn(4)), "draws random numbers .randn",
    ),
    "counts": (Counts, "it changes 'calls' in place"),
    "changes_input": (lambda: does(in_place), "it changes 'x' in place"),
    "sorts": (
        lambda: does(lambda m, x: m.layer(x).sort(-1)[0]), "it uses torch.sort, which a module",
    ),
    "custom": (
        lambda: does(lambda m, x: m.layer(x).cumsum(-1)), "it uses torch.cumsum, which a module",
    ),
    "takes_the_batch_apart": (
        lambda: does(lambda m, x: sum(m.layer(x).split(1))),
        "takes the batch apart by torch.split|torch.export cannot trace it",
    ),
    "rounded_division": (
        lambda: does(lambda m, x: m.layer(x) + torch.div(x, 2, rounding_mode="floor")),
        "it calls torch.div with rounding_mode='floor'",
    ),
    "infinity": (
        lambda: does(lambda m, x: m.layer(x).clamp(max=float("inf"))),
        "it gives inf to torch.clamp",
    ),
    "repeats_over_the_batch": (
        lambda: does(
            lambda m, x: m.layer(x) + m.w.expand(x.shape[0], 4), layer=nn.Linear(4, 4),
            w=parameter(1, 4),
        ),
        "repeats a tensor over the batch.*which broadcasts",
    ),
    "size_of_the_batch": (
        lambda: does(lambda m, x: m.layer(x) / x.shape[0]),
        "gives the batch's size to torch.div",
    ),
    "batch_along_two_axes": (
        lambda: does(
            lambda m, x: m.layer(x) + torch.matmul(x, x.transpose(0, 1)).unsqueeze(-1).mean(1)
        ),
        "has the batch's size in it more than once",
    ),
    "integer_constant": (lambda: with_buffer(torch.arange(3)), "with a constant of int64"),
    "large_constant": (
        lambda: with_buffer(torch.ones(4, 5000)), "hold 20,000 numbers, more than the 16,384",
    ),
    "unwritten_memory": (
        lambda: does(lambda m, x: m.layer(x) + torch.empty(4)), "memory that nothing was written",
    ),
    "logarithm_of_negatives": (
        lambda: does(lambda m, x: m.layer(x).log()), "is not finite for inputs of both signs",
    ),
    "constant_nan": (
        lambda: with_buffer(torch.tensor([torch.nan])), "one of its constants is not finite",
    ),
    "adaptive_pool_that_does_not_divide": (
        lambda: does(lambda m, x: m.layer(F.adaptive_avg_pool1d(x[:, None], 3)[:, 0]),
                     layer=nn.Linear(3, 4)),
        r"torch2jax does not follow torch\.nn\.functional\.adaptive_avg_pool1d.*do not divide",
    ),
    "dead": (
        lambda: does(lambda m, x: x + m.b * (m.a * x), a=nn.Parameter(torch.zeros(4)),
                     b=nn.Parameter(torch.zeros(4))),
        "would never learn",
    ),
}  # fmt: skip


@needs_torch2jax
@pytest.mark.parametrize("case", MODULES)
def test_modules_that_cannot_be_kernels(case):
    build, message = MODULES[case]
    with pytest.raises(KernelCompilationError, match=rf"(?s)^module '\w+' for 4->4.*{message}"):
        compile_module(build(), FOUR)


def test_what_is_no_module_and_arguments_out_of_range():
    with pytest.raises(InputError, match="takes a torch.nn.Module, got function.*compile_function"):
        compile_module(lambda x: x, FOUR)
    with pytest.raises(InputError, match="`birth` must be one of zero, identity, free, got 'dead'"):
        compile_module(nn.Linear(4, 4), FOUR, birth="dead")
    for confidence in (2, -0.1, float("nan"), "x"):
        with pytest.raises(InputError, match="`confidence` must be a number from 0 to 1, got "):
            compile_module(nn.Linear(4, 4), FOUR, confidence=confidence)
    for name in ("", "a" * 65, "two\nlines", 5):
        with pytest.raises(InputError, match="`name` must be a text of 1 to 64 printable"):
            compile_module(nn.Linear(4, 4), FOUR, name=name)
    with pytest.raises(InputError, match="`signature` must be a KernelSignature, got '4->4': make"):
        compile_module(nn.Linear(4, 4), "4->4")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"name": 5}, "`name` must be a text of 1 to 64 printable characters, got 5"),
        ({"confidence": "x"}, "`confidence` must be a number from 0 to 1, got 'x'"),
        ({"birth": 0}, "`birth` must be one of zero, identity, free, got 0"),
        ({"signature": "4->4"}, "`signature` must be a KernelSignature, got '4->4': make one by"),
    ],
)
def test_arguments_of_another_type(argument, message):
    asked = {"function": lambda p, x: x @ p, "params": jnp.ones((4, 4)), "signature": FOUR}
    with pytest.raises(InputError, match=message):
        compile_function(**(asked | argument))


@needs_torch2jax
def test_an_operation_that_torch2jax_lacks_is_named():
    module = make("gated").eval()
    line = export_line(module, FOUR)
    params = {key: jnp.asarray(p.detach().numpy()) for key, p in module.named_parameters()}
    fewer = {key: f for key, f in REPLACEMENTS.items() if key != "nn.functional.silu"}
    with pytest.raises(
        KernelCompilationError,
        match=r"follow torch\.nn\.functional\.silu .*by replacements=\{'nn.functional.silu'",
    ):
        jax_function(line, replacements=fewer)(params, jnp.ones((2, 4)))


@needs_torch2jax
def test_replacements_of_ones_own_are_held_to_what_torch_computes():
    def thirds(x, output_size):
        return jnp.stack([x[..., 0:2].mean(-1), x[..., 1:3].mean(-1), x[..., 2:4].mean(-1)], -1)

    build, message = MODULES["adaptive_pool_that_does_not_divide"]
    module, name = build(), "nn.functional.adaptive_avg_pool1d"
    with pytest.raises(KernelCompilationError, match=message):
        compile_module(module, FOUR)
    assert compile_module(module, FOUR, replacements={name: thirds}).torchscript is not None
    with pytest.raises(KernelCompilationError, match="the two programs disagree at batch 1"):
        compile_module(module, FOUR, replacements={name: lambda x, size: x[..., :3]})
    with pytest.raises(InputError, match=r"names 'nn\.functional\.gleu'.*did you mean 'nn\."):
        compile_module(module, FOUR, replacements={"nn.functional.gleu": thirds})


def test_without_torch2jax_its_licence_is_named(monkeypatch):
    monkeypatch.setattr(_torch2jax, "find_spec", lambda _: None)
    with pytest.raises(KernelCompilationError, match=r"install.*\[torch2jax\].*licence.*GPLv3"):
        compile_module(nn.Linear(4, 4), FOUR)


# Functions of jax

WEIGHTS = {"w": jnp.eye(4), "b": jnp.zeros(4)}


def affine(params, x):
    return x @ params["w"] + params["b"]


def noisy(params, x):
    return affine(params, x) + jax.random.normal(jax.random.key(0), (4,))


def loops(params, x):
    return jax.lax.fori_loop(0, 3, lambda _, y: jnp.tanh(y @ params["w"]), x) + params["b"]


FUNCTIONS = {
    "does_not_trace": (
        lambda p, x: x @ jnp.ones((3, 4)), WEIGHTS, "jax cannot trace it.*TypeError",
    ),
    "values_decide": (
        lambda p, x: affine(p, x) if x.sum() > 0 else x, WEIGHTS, "jax cannot trace it.*Tracer",
    ),
    "batch_decides": (
        lambda p, x: affine(p, x) if x.shape[0] > 4 else x, WEIGHTS,
        "jax cannot trace it.*nconclusive",
    ),
    "no_batch": (lambda p, x: affine(p, x).mean(0), WEIGHTS, r"float32\[4\], without the batch"),
    "another_width": (
        lambda p, x: affine(p, x)[:, :3], WEIGHTS,
        r"is float32\[b, 3\], the signature says float32\[b, 4\]",
    ),
    "another_dtype": (
        lambda p, x: affine(p, x).astype(jnp.bfloat16), WEIGHTS, r"its output is bfloat16\[b, 4\]",
    ),
    "several_outputs": (lambda p, x: (affine(p, x), x), WEIGHTS, "it gives a tuple: expected one"),
    "noise": (noisy, WEIGHTS, "it draws random numbers .*random_bits"),
    "loops": (loops, WEIGHTS, "its StableHLO uses stablehlo.while.*no loops, sorting"),
    "calls_back": (
        lambda p, x: affine(p, jax.pure_callback(lambda v: v, x, x)), WEIGHTS,
        "jax cannot export it",
    ),
    "integers": (
        lambda p, x: x * p["n"].astype(x.dtype), {"n": jnp.ones(4, jnp.int32)},
        "its parameter 'n' is int32: expected float32",
    ),
    "numbers": (
        lambda p, x: x * p["w"]["scale"], {"w": {"scale": 2.0}},
        r"its parameter 'w\.scale' is a float: expected an array",
    ),
    "one_name_twice": (
        lambda p, x: x * p["a.b"], {"a.b": jnp.ones(4), "a": {"b": jnp.ones(4)}},
        r"two of its parameters are called 'a\.b'",
    ),
    "no_parameters": (lambda p, x: x, {}, "it has no parameters"),
    "dead": (lambda p, x: x + 0 * affine(p, x), WEIGHTS, "would never learn"),
}  # fmt: skip


@pytest.mark.parametrize("case", FUNCTIONS)
def test_functions_that_cannot_be_kernels(case):
    function, params, message = FUNCTIONS[case]
    with pytest.raises(KernelCompilationError, match=rf"(?s)^function '\w+' for 4->4.*{message}"):
        compile_function(function, params, FOUR)


def test_what_is_given_to_the_wrong_entry():
    with pytest.raises(InputError, match=r"takes a function of \(params, x\), got dict"):
        compile_function(WEIGHTS, WEIGHTS, FOUR)
    with pytest.raises(InputError, match="takes an equinox.Module that can be called, got Linear"):
        compile_equinox(nn.Linear(4, 4), FOUR)
    with pytest.raises(InputError, match="takes a flax.nnx.Module.*linen module.*compile_function"):
        compile_flax(nn.Linear(4, 4), FOUR)


def test_a_parameter_that_was_given_away():
    params = {"w": jnp.ones(4)}
    params["w"].delete()
    with pytest.raises(KernelCompilationError, match="its parameter 'w' holds no values"):
        compile_function(lambda p, x: x * p["w"], params, FOUR)
