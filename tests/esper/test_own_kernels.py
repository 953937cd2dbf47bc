"""Users' own modules of torch as artifacts: both programs compute what the module does."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

from esper.artifacts import load_stablehlo, load_torchscript, read_artifact
from esper.contracts import KernelSignature
from esper.errors import KernelCompilationError
from esper.tensors import to_torch
from esper.tezzeret import compile_module
from esper.tezzeret._own_kernel import own_kernel
from esper.tezzeret._parity import check_parity, run_jax, run_torch
from esper.tezzeret._programs import array_dtype
from esper.tezzeret._replacements import REPLACEMENTS
from esper.tezzeret._torch2jax import jax_function
from esper.tezzeret._torch_export import export_line
from tests.esper.own_modules import IN_BFLOAT16, MODULES, make
from tests.tolerance import assert_close

pytest.importorskip("torch2jax", reason="the extra 'torch2jax' is not installed")

CASES = [(name, "float32") for name in MODULES] + [(name, "bfloat16") for name in IN_BFLOAT16]


def reference(module: nn.Module):
    """The module as `program(params..., x)`."""
    names = [name for name, _ in module.named_parameters()]

    def run(*tensors):
        return functional_call(module, dict(zip(names, tensors[:-1], strict=True)), (tensors[-1],))

    return run


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=lambda case: case)
def test_both_programs_compute_what_the_module_does(name, dtype):
    signature = KernelSignature.parse(f"{MODULES[name][1]} {dtype}")
    module = make(name).to(getattr(torch, dtype))
    before = {key: value.clone() for key, value in module.state_dict().items()}
    training = module.training
    artifact = compile_module(module, signature, name=name, confidence=0.75)

    # It is what was asked for, and the module is as it was.
    manifest = read_artifact(artifact.data, artifact.kernel_id).manifest
    assert (manifest.blueprint, manifest.origin, manifest.birth) == (name, "module", "free")
    assert (manifest.confidence, manifest.signature) == (0.75, signature)
    assert artifact.blueprint is None
    assert {"torch", "torch2jax", "jax"} <= set(manifest.versions)
    assert list(artifact.params) == [key for key, _ in module.named_parameters()]
    assert module.training == training
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key])

    # With parameters of no gate, forward and backward. (jax compiles for each size of batch: the
    # gates have run what was written at 1 and 7.)
    random = np.random.default_rng(11)
    scale = array_dtype(dtype).type(0.5)

    def draw(*shape):
        return random.standard_normal(shape).astype(array_dtype(dtype))

    params = {key: value + scale * draw(*value.shape) for key, value in artifact.params.items()}
    assert artifact.torchscript is not None
    exported, scripted = load_stablehlo(artifact.stablehlo), load_torchscript(artifact.torchscript)
    for batch in (1, 3, 16):
        x, cotangent = draw(batch, *signature.input_shape), draw(batch, *signature.output_shape)
        expected = run_torch(reference(module.eval()), params, x, cotangent)
        assert len(expected) == 2 + len(params)
        programs = [run_torch(scripted, params, x, cotangent)]
        if batch == 16:
            programs.append(run_jax(exported.call, params, x, cotangent))
        for found in programs:
            assert found.keys() == expected.keys()
            for key, value in expected.items():
                assert_close(found[key], value)


def test_the_gate_catches_what_torch2jax_takes_for_an_exact_gelu():
    signature = KernelSignature.parse("4->4")
    module = make("exact_gelu").eval()
    line = export_line(module, signature)
    params = {key: value.detach().numpy() for key, value in module.named_parameters()}
    theirs = {key: f for key, f in REPLACEMENTS.items() if key != "nn.functional.gelu"}
    kernel, program = own_kernel(params, signature), reference(module)
    check_parity(kernel, jax_function(line), program, own=params)
    with pytest.raises(KernelCompilationError, match=r"disagree at batch 1: .* differs by"):
        check_parity(kernel, jax_function(line, replacements=theirs), program, own=params)


def test_replacements_are_gone_when_a_module_has_been_followed():
    import torch2jax

    before = dict(torch2jax.HANDLED_FUNCTIONS)
    compile_module(make("linear"), KernelSignature.parse("4->3"))
    after = dict(torch2jax.HANDLED_FUNCTIONS)
    assert after == before


def test_tied_parameters_are_one_and_train_together():
    artifact = compile_module(make("tied"), KernelSignature.parse("4->4"))
    assert list(artifact.params) == ["0.weight", "0.bias", "2.bias"]


def test_claims_of_birth_are_checked():
    module = nn.Linear(4, 4)
    signature = KernelSignature.parse("4->4")
    with pytest.raises(KernelCompilationError, match="claims to be born zero.*as large as"):
        compile_module(module, signature, birth="zero")
    nn.init.zeros_(module.weight)
    nn.init.zeros_(module.bias)
    assert compile_module(module, signature, birth="zero").manifest.birth == "zero"
    nn.init.eye_(module.weight)
    assert compile_module(module, signature, birth="identity").manifest.birth == "identity"


def test_the_callers_mode_does_not_matter():
    module, signature = make("linear"), KernelSignature.parse("4->3")
    expected = compile_module(module, signature).kernel_id
    with torch.no_grad():
        assert compile_module(module, signature).kernel_id == expected
    with torch.inference_mode():
        assert compile_module(module, signature).kernel_id == expected


def test_a_module_in_training_enters_as_in_evaluation():
    module = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).train()
    artifact = compile_module(module, KernelSignature.parse("4->4"))
    assert artifact.torchscript is not None
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    params = [to_torch(p) for p in artifact.params.values()]
    assert_close(
        load_torchscript(artifact.torchscript)(*params, x).numpy(), module[0](x).detach().numpy()
    )
    assert module.training


def test_equal_modules_give_equal_bytes_in_another_process(tmp_path: Path):
    name = "masked_softmax_attention"
    ours = compile_module(make(name), KernelSignature.parse(MODULES[name][1]))
    script = (
        "from esper.contracts import KernelSignature\n"
        "from esper.tezzeret import compile_module\n"
        "from tests.esper.own_modules import MODULES, make\n"
        # Something else is exported and scripted first.
        "compile_module(make('linear'), KernelSignature.parse('4->3'))\n"
        f"artifact = compile_module(make({name!r}), KernelSignature.parse(MODULES[{name!r}][1]))\n"
        "print(artifact.kernel_id)\n"
    )
    root = Path(__file__).parents[2]
    program = tmp_path / "compile.py"
    program.write_text(f"import sys\nsys.path[:0] = {sys.path!r}\n{script}")
    theirs = subprocess.run(
        [sys.executable, str(program)], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert theirs.stdout.strip() == ours.kernel_id
    for path in (str(root), sys.prefix, "0x"):
        assert path.encode() not in ours.data
    other: Any = make(name)
    with torch.no_grad():
        other.qkv.bias[0] += 1
    assert compile_module(other, KernelSignature.parse("5x4->5x4")).kernel_id != ours.kernel_id
