"""Files made to harm. Each is refused, and none of them runs, hangs, or takes the process down."""

import contextlib
import json
import pickle
import random
import struct
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.artifacts import (
    Artifact,
    VerdictStore,
    load_stablehlo,
    load_torchscript,
    read_artifact,
    scan,
    scan_stablehlo,
    scan_torchscript,
    verify,
)
from esper.artifacts._archive import read_archive, write_archive
from esper.errors import ArtifactError
from esper.sandbox import Limits, run
from tests.esper import hostile

# TorchScript: read by Python's parser, never by torch


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('return torch.from_file("/etc/passwd", False, 3)', "calls torch.from_file"),
        ('y = torch.save(x, "written")\nreturn x', "calls torch.save"),
        ("return ops.evil.run(x)", "calls ops.evil.run"),
        ("return torch.classes.evil.Thing(x)", "calls torch.classes.evil.Thing"),
        ("return torch.ops.evil.run(x)", "calls torch.ops.evil.run"),
        ("y = annotate(List[int], [])\nreturn x", "contains subscript|calls annotate"),
        ("return getattr(x, 'y')", "calls getattr"),
        ("return self.thing", "has the expression 'self.thing'"),
        ("return CONSTANTS.c0", "has the expression 'CONSTANTS.c0'"),
        ("return y", "uses the name 'y'"),
        ("while True:\n  x = torch.relu(x)\nreturn x", "contains while"),
        ("for i in x:\n  x = torch.relu(x)\nreturn x", "contains for"),
        ("if x:\n  x = torch.relu(x)\nreturn x", "contains if"),
        ("import os\nreturn x", "contains import"),
        ("return (lambda: x)()", "contains lambda"),
        ("return [y for y in x]", "contains listcomp"),
        ("return x.resize_(1)", "calls x.resize_"),
        ("return torch.relu(*x)", "contains starred"),
        ("return torch.relu(**x)", "unpacks arguments"),
        ("x.data = x\nreturn x", "assigns to 'x.data'"),
        ("y = z = x\nreturn x", "in its method"),
        ("torch.relu(x)\nreturn x", "contains expr"),
        ("return", "returns nothing"),
        ("return torch.mul(x, 9999999999)", "has the number 9999999999, at most 1048576"),
        ("return torch.mul(x, -1048577)", "has the number 1048577"),
        (f"return torch.mul(x, 0x{'f' * 100_000})", "has the number of 400000 bits"),
        (f"return torch.mul(x, {'9' * 5000})", "cannot be parsed: .*limit"),
        ("return torch.add(x, [65536, -65536, 1])", r"the sizes \[65536, -65536, 1\], whose"),
        (f"return torch.add(x, [{'1, ' * 2000}])", "has a list of 2000"),
        ("return torch.mul(x, 1j)", "a constant of type complex"),
        ("return torch.mul(x, b'1')", "a constant of type bytes"),
        ("return torch.mul(x, ...)", "a constant of type ellipsis"),
        ("return torch.mul(x, --1)", "has the expression '--1'"),
        ("return torch.mul(x, +1)", "contains uadd"),
        (f"return torch.gelu(x, approximate='{'a' * 65}')", "has a text of 65 characters"),
        (f"return {'torch.relu(' * 50}x{')' * 50}", "is nested more than 16 deep"),
        (f"return {'(' * 5000}x{')' * 5000}", "cannot be parsed"),
        (f"return {'-' * 50_000}1", "cannot be parsed: .*Memory"),
        (f"return x{'.a' * 50_000}", "cannot be parsed: .*recursion"),
        (f"return x{'()' * 5_000}", "cannot be parsed: .*recursion"),
        (f"return {'[' * 90}x{']' * 90}", "is nested more than 16 deep"),
        (f"y = {'x + ' * 900}x\nreturn y", "contains binop"),
        (f"return x  # {'a' * 300_000}", "larger than 262144 bytes"),
        ("return x\0", "cannot be parsed"),
        ("return тensor", "cannot be parsed: .*ascii"),
    ],
)
def test_code_that_does_more_than_compute(body: str, message: str):
    archive = hostile.torchscript(body)
    with pytest.raises(ArtifactError, match=f"its TorchScript .*({message})"):
        load_torchscript(archive)


@pytest.mark.parametrize(
    "body",
    [
        "return x",
        "y = torch.relu(x)\nreturn torch.add(x, y)",
        "return torch.mul(x, -1)",
        "return torch.mul(x, -0.5)",
        "return torch.gelu(x, approximate='tanh')",
        "return torch.add(x, x, alpha=2)",
        "return torch.linear(x, x, None)",
        "return torch.add(x, [-1, 64, 64])",
    ],
)
def test_code_of_the_form_that_kernels_have(body: str):
    assert scan_torchscript(hostile.torchscript(body)) == 1


HEAD = "class EsperKernel(Module):\n  __parameters__ = []\n  __buffers__ = []\n"
METHOD = "  def forward(self: __torch__.EsperKernel,\n    x: Tensor) -> Tensor:\n    return x\n"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "one class with one method"),
        ("x = 1\n", "one class with one method"),
        (HEAD, "one class with one method"),
        (HEAD + METHOD + HEAD + METHOD, "one class with one method"),
        (HEAD + METHOD + METHOD, "one class with one method"),
        (HEAD + METHOD.replace("forward", "__setstate__"), "defines '__setstate__'"),
        (HEAD + METHOD + METHOD.replace("forward", "__getstate__"), "defines '__getstate__'"),
        (HEAD.replace("EsperKernel", "Other") + METHOD, "defines the class 'Other'"),
        (HEAD.replace("Module", "Interface") + METHOD, r"the class 'EsperKernel' of \['Interface"),
        (HEAD.replace("(Module)", "(Module, metaclass=x)") + METHOD, "defines the class"),
        ("@final\n" + HEAD + METHOD, "defines the class"),
        (HEAD + "  @export\n" + METHOD, "defines 'forward'"),
        (HEAD + "  __constants__ = []\n" + METHOD, "has '__constants__ = .*' in its class"),
        (HEAD.replace("= []", "= ['a']") + METHOD, "in its class"),
        (HEAD + METHOD.replace("x: Tensor", "x: Tensor = 1"), "arguments that are not plain"),
        (HEAD + METHOD.replace("x: Tensor", "*x: Tensor"), "arguments that are not plain"),
        (HEAD + METHOD.replace("x: Tensor", "x: str"), r"takes .*'str'"),
        (HEAD + METHOD.replace("x: Tensor", "x"), "takes"),
        (HEAD + METHOD.replace("-> Tensor", "-> int"), "gives 'int'"),
        (HEAD + METHOD.replace(": __torch__.EsperKernel", ": __torch__.Other"), "takes"),
    ],
)
def test_classes_of_another_form(source: str, message: str):
    with pytest.raises(ArtifactError, match=message):
        scan_torchscript(hostile.archive_of(source.encode()))


class _Runs:
    def __reduce__(self) -> Any:
        return (print, ("it ran",))


@pytest.mark.parametrize("member", ["data.pkl", "constants.pkl"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps(_Runs(), 2), "global|operation"),
        (pickle.dumps(_Runs(), 4), "not allowed"),
        (b"cos\nsystem\n(S'true'\ntR.", "global 'os system'"),
        (b"\x80\x02c__torch__\nOther\n.", "global '__torch__ Other'"),
        (b"\x80\x02Vtext\n.", "operation UNICODE"),
        (b"\x80\x02).trailing", "goes on after its end"),
        (b"\x80\x02)", "cannot be read"),
        (b"", "cannot be read"),
        (b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f", "cannot be read|not allowed"),
        (b"\x80\x02" + b")" * 5000 + b".", "larger than 4096"),
    ],
)
def test_pickles_are_never_loaded(member: str, content: bytes, message: str, capsys: Any):
    archive = hostile.archive_of((HEAD + METHOD).encode(), **{f"kernel/{member}": content})
    with pytest.raises(ArtifactError, match=message):
        load_torchscript(archive)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "name",
    ["kernel/../../etc/cron.d/evil", "/etc/cron.d/evil", "kernel/code/__torch__/evil.py",
     "kernel\\data.pkl", "kernel/extra/a", "other/data.pkl", "kernel/data/0"],
)  # fmt: skip
def test_members_with_other_names(name: str, artifact: Artifact, tmp_path: Path):
    archive = hostile.archive_of((HEAD + METHOD).encode(), **{name: b"x"})
    with pytest.raises(ArtifactError, match="unexpected or missing members"):
        scan_torchscript(archive)
    # In the artifact's own archive as well.
    outer = write_archive(hostile.members_of(artifact.data) | {name: b"x"})
    with pytest.raises(ArtifactError, match="it has the members"):
        read_artifact(outer)


@pytest.mark.parametrize(
    ("member", "content", "message"),
    [
        ("kernel/.data/version", b"1" * 500, "has the version"),
        ("kernel/.data/version", b"-1", "has the version"),
        ("kernel/byteorder", b"middle", "has the byte order"),
    ],
)
def test_odd_small_members(member: str, content: bytes, message: str):
    with pytest.raises(ArtifactError, match=message):
        scan_torchscript(hostile.archive_of((HEAD + METHOD).encode(), **{member: content}))


# Archives


def test_a_zip_bomb_is_not_inflated():
    bomb = hostile.deflated({"a": b"\0" * (64 << 20)})
    assert len(bomb) < 1 << 20
    with pytest.raises(ValueError, match="is compressed"):
        read_archive(bomb, max_bytes=1 << 40)


def test_an_archive_that_lists_more_than_is_looked_at():
    many = hostile.deflated({str(i): b"" for i in range(40)})
    with pytest.raises(ValueError, match="lists 40 members"):
        read_archive(many, max_bytes=1 << 30)
    long = hostile.deflated({"a" * 20_000: b""})
    with pytest.raises(ValueError, match="lists 1 members in 20"):
        read_archive(long, max_bytes=1 << 30)


def test_members_that_share_their_bytes():
    # Two entries of the directory that point at one member: more content than file.
    data = bytearray(write_archive({"a": b"x" * 1000, "b": b"x" * 1000}))
    second = data.rindex(b"PK\x01\x02")
    data[second + 42 : second + 46] = struct.pack("<I", 0)
    with pytest.raises(ValueError, match="not a readable zip|not as they are written"):
        read_archive(bytes(data), max_bytes=1 << 30)
    claims = bytearray(write_archive({"a": b"x" * 1000}))
    entry = claims.rindex(b"PK\x01\x02")
    claims[entry + 20 : entry + 28] = struct.pack("<II", 1 << 29, 1 << 29)
    with pytest.raises(ValueError, match="larger than itself"):
        read_archive(bytes(claims), max_bytes=1 << 30)


@pytest.mark.parametrize("where", ["before", "after", "comment"])
def test_bytes_that_no_member_holds(where: str, artifact: Artifact):
    data = artifact.data
    changed = {
        "before": b"#!/bin/sh\n" + data,
        "after": data + b"\0",
        "comment": data[:-2] + struct.pack("<H", 3) + b"abc",
    }[where]
    with pytest.raises(ArtifactError, match="is not a kernel artifact"):
        read_artifact(changed)


# StableHLO: parsed, and refused before it could be compiled


STABLEHLO = [
    (hostile.CALLBACK, "calls the custom target 'xla_ffi_python_cpu_callback'"),
    (hostile.ENDLESS, "uses stablehlo.while"),
    (hostile.SORT, "uses stablehlo.sort"),
    (hostile.TERABYTES, "larger than 2147483648 bytes"),
    (hostile.RECURSION, "calls itself"),
    (hostile.DISGUISED, "has the attribute 'mhlo.frontend_attributes'"),
    (hostile.OUTER_PRODUCT, "one axis alone, the batch's"),
    (hostile.many_operations(50_001), "more than 50000 operations"),
    (hostile.doubling_calls(40), "operations, at most 5e\\+04 are allowed"),
    (hostile.costly_product(), "floating-point operations for one example, at most"),
]


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize(("text", "message"), STABLEHLO, ids=[m[:30] for _, m in STABLEHLO])
def test_programs_that_do_more_than_compute(text: str, message: str, order: int):
    with pytest.raises(ArtifactError, match=message):
        load_stablehlo(hostile.crafted(text, as_vjp=order))


def test_results_that_together_are_too_many():
    # 40 results of 2 GB each.
    wide = "tensor<536870912xf32>"
    body = "    %z = stablehlo.constant dense<0.0> : tensor<f32>\n" + "\n".join(
        f"    %v{i} = stablehlo.broadcast_in_dim %z, dims = [] : (tensor<f32>) -> {wide}"
        for i in range(40)
    )
    with pytest.raises(ArtifactError, match="bytes of results for one example"):
        scan_stablehlo(hostile.crafted(hostile.main(body)))


def test_honest_programs_pass_with_every_order_of_vjp():
    program = hostile.exported(lambda _, x: jnp.tanh(x) @ jnp.ones((2, 2)))
    costs = [scan_stablehlo(bytes(program.serialize(vjp_order=order)))[1] for order in (1, 2, 3)]
    assert costs[0].ops < costs[1].ops < costs[2].ops
    # tanh, and a product of 2 sums of 2 products each.
    assert costs[0].flops >= 2 + 8
    with pytest.raises(ArtifactError, match="VJPs of an order above 4"):
        scan_stablehlo(bytes(program.serialize(vjp_order=5)))


def test_a_declaration_that_checks_are_off():
    import dataclasses

    from jax.export import DisabledSafetyCheck

    honest = hostile.exported(lambda _, x: x)
    loose = dataclasses.replace(
        honest, disabled_safety_checks=(DisabledSafetyCheck.custom_call("evil"),)
    )
    with pytest.raises(ArtifactError, match="declares disabled safety checks"):
        scan_stablehlo(bytes(loose.serialize()))


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_truncated_programs(artifact: Artifact, keep: float):
    assert artifact.torchscript is not None
    with pytest.raises(ArtifactError, match="StableHLO"):
        scan_stablehlo(artifact.stablehlo[: int(keep * len(artifact.stablehlo))])
    with pytest.raises(ArtifactError, match="TorchScript cannot be read"):
        scan_torchscript(artifact.torchscript[: int(keep * len(artifact.torchscript))])


def test_programs_with_flipped_bits_are_parsed_in_a_child(artifact: Artifact):
    """With honest digests, as who writes the file can give them; flatbuffers are not verified."""
    outcome = run(
        "tests.esper.contained:scans_flipped",
        artifact.stablehlo,
        limits=Limits(wall_seconds=100, cpu_seconds=90),
    )
    assert outcome.status in ("finished", "signal", "limit"), outcome
    if outcome.status == "finished":
        counts = json.loads(outcome.result or b"")
        assert sum(counts.values()) == 300
        assert set(counts) <= {"refused", "accepted"}
        assert counts["refused"] > 0


# Manifests and parameters


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["parameters"][0].update(shape=[99, 99]), "it holds the parameters"),
        (lambda m: m["parameters"][0].update(dtype="int8"), "it holds the parameters"),
        (lambda m: m["parameters"].pop(), "it holds the parameters"),
        (lambda m: m["parameters"].append(m["parameters"][0]), "it holds the parameters"),
        (lambda m: m["digests"].update({"program.stablehlo": "0" * 64}), "has the SHA-256"),
        (lambda m: m["digests"].pop("program.torchscript"), "has the SHA-256"),
        (lambda m: m["digests"].update({"more": "0" * 64}), "the manifest has digests of"),
        (lambda m: m["signature"].update(dtype="float1024"), "is not a kernel artifact"),
        (lambda m: m["signature"].update(input_shape=[1 << 40]), "is not a kernel artifact"),
        (lambda m: m.update(confidence=7.0), "is not a kernel artifact"),
        (lambda m: m.update(schema_version=99), "is not a kernel artifact"),
        (lambda m: m.update(run="rm -rf /"), "is not a kernel artifact"),
    ],
)
def test_manifests_that_lie(artifact: Artifact, change: Any, message: str):
    with pytest.raises(ArtifactError, match=message):
        read_artifact(hostile.lying(artifact, change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["signature"].update(input_shape=[3]), "contradicts its manifest: input"),
        (lambda m: m["signature"].update(output_shape=[9]), "contradicts its manifest: output"),
    ],
)
def test_manifests_that_lie_about_programs(artifact: Artifact, change: Any, message: str):
    with pytest.raises(ArtifactError, match=message):
        scan(read_artifact(hostile.lying(artifact, change)))


def test_programs_of_another_kernel(artifact: Artifact):
    other = hostile.exported(lambda _, x: x)
    swapped = hostile.rewritten(artifact, stablehlo=bytes(other.serialize(vjp_order=1)))
    with pytest.raises(ArtifactError, match="StableHLO contradicts its manifest: .*parameter"):
        scan(swapped)
    odd = hostile.torchscript("return x")
    with pytest.raises(ArtifactError, match="its TorchScript takes 1 tensors, its manifest says 7"):
        scan(hostile.rewritten(artifact, torchscript=odd))


def test_a_program_that_could_not_be_trained():
    import jax
    from jax import export

    from esper.contracts import KernelSignature

    (batch,) = export.symbolic_shape("b")
    program = export.export(jax.jit(lambda p, x: x * p["a"]))(
        {"a": jax.ShapeDtypeStruct((2,), jnp.float32)},
        jax.ShapeDtypeStruct((batch, 2), jnp.float32),
    )
    from esper.artifacts import write_artifact

    made = write_artifact(
        blueprint_name="own",
        recipe="0" * 64,
        blueprint=b"{}",
        signature=KernelSignature(input_shape=(2,), output_shape=(2,)),
        sizes={},
        birth="free",
        confidence=0.5,
        init_seed=0,
        params={"a": np.ones(2, np.float32)},
        stablehlo=bytes(program.serialize()),
        torchscript=None,
        versions={},
    )
    with pytest.raises(ArtifactError, match="has no VJP"):
        scan(made)


@pytest.mark.parametrize(
    "params",
    [
        b"",
        b"\xff" * 8,
        hostile.safetensors({}, size=1 << 40),
        hostile.safetensors(b"{" * 1000),
        hostile.safetensors({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 4]}}),
        hostile.safetensors({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 1 << 62]}}),
        hostile.safetensors(
            {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"0000"
        ),
        hostile.safetensors({"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}, b"0000"),
        hostile.safetensors({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, b"0000"),
        hostile.safetensors(
            {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"0" * 9
        ),
        hostile.safetensors({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, b"0"),
        hostile.safetensors(
            {"a": {"dtype": "F8_E5M2", "shape": [4], "data_offsets": [0, 4]}}, b"0000"
        ),
    ],
)
def test_parameters_that_lie(artifact: Artifact, params: bytes):
    with pytest.raises(ArtifactError, match="is not a kernel artifact|it holds the parameters"):
        read_artifact(hostile.with_params(artifact, params))


def test_texts_that_are_nested_or_large(artifact: Artifact):
    members = hostile.members_of(artifact.data)
    for text in (b"[" * 100_000, b'{"a":' * 100_000, b" " * (2 << 20), b"\xff\xfe"):
        with pytest.raises(ArtifactError, match="is not a kernel artifact"):
            read_artifact(write_archive(members | {"manifest.json": text}))


# Ten thousand damaged files


FLIPS = 10_000


def test_every_flipped_bit_of_a_file_that_stands_for_itself(artifact: Artifact):
    """Without an id to compare with. What differs anywhere is refused."""
    chooser = random.Random(20)
    places = {chooser.randrange(8 * len(artifact.data)) for _ in range(FLIPS)}
    accepted = 0
    damaged = bytearray(artifact.data)
    for place in places:
        damaged[place // 8] ^= 1 << place % 8
        try:
            found = read_artifact(bytes(damaged))
        except ArtifactError:
            pass
        else:
            accepted += 1
            for part in ("manifest", "blueprint", "stablehlo", "torchscript"):
                assert getattr(found, part) == getattr(artifact, part), (place, part)
            assert {n: p.tobytes() for n, p in found.params.items()} == {
                n: p.tobytes() for n, p in artifact.params.items()
            }, place
        damaged[place // 8] ^= 1 << place % 8
    # One way of writing alone is read, so there is none that means the same.
    assert accepted == 0


def test_every_flipped_bit_of_a_file_that_was_asked_for(artifact: Artifact):
    chooser = random.Random(21)
    damaged = bytearray(artifact.data)
    for _ in range(FLIPS):
        place = chooser.randrange(8 * len(damaged))
        damaged[place // 8] ^= 1 << place % 8
        with pytest.raises(ArtifactError, match="is damaged"):
            read_artifact(bytes(damaged), artifact.kernel_id)
        damaged[place // 8] ^= 1 << place % 8


@settings(max_examples=300, deadline=None)
@given(source=st.text(alphabet="torch.relu(x)[]=-1,_ \nreturn", max_size=200))
def test_code_of_any_kind_is_refused_or_accepted_and_nothing_else(source: str):
    # Any other error fails the test.
    with contextlib.suppress(ArtifactError):
        assert scan_torchscript(hostile.torchscript(source)) == 1


# All the way: files with honest digests, given to `verify`


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with VerdictStore(tmp_path_factory.mktemp("verdicts")) as store:
        yield store


def test_a_file_with_a_native_callback_is_refused_and_nobody_dies(
    artifact: Artifact, verdicts: VerdictStore
):
    hidden = hostile.rewritten(artifact, stablehlo=hostile.crafted(hostile.CALLBACK, as_vjp=1))
    verdict = verify(hidden.data, verdicts=verdicts)
    assert not verdict.accepted
    assert "custom target 'xla_ffi_python_cpu_callback'" in verdict.reason


def test_a_flatbuffer_that_is_a_bomb_goes_off_in_the_child(
    artifact: Artifact, verdicts: VerdictStore
):
    bomb = hostile.flatbuffer_bomb(40)
    assert len(bomb) < 1 << 14
    # A small one is what the large one seems: a program that does not take (params, x).
    with pytest.raises(ArtifactError, match="its StableHLO"):
        scan_stablehlo(hostile.flatbuffer_bomb(4))
    verdict = verify(
        hostile.rewritten(artifact, stablehlo=bomb).data,
        verdicts=verdicts,
        limits=Limits(wall_seconds=60, cpu_seconds=5, memory_bytes=512 << 20),
    )
    assert not verdict.accepted
    assert "limit" in verdict.reason, verdict


@pytest.mark.parametrize("kind", ["zeros", "ones", "cut"])
def test_malformed_flatbuffers_all_the_way(artifact: Artifact, verdicts: VerdictStore, kind: str):
    program = {
        "zeros": b"\x04\0\0\0" * 1000,
        "ones": b"\xff" * 5000,
        "cut": artifact.stablehlo[:-3000],
    }[kind]
    verdict = verify(hostile.rewritten(artifact, stablehlo=program).data, verdicts=verdicts)
    assert not verdict.accepted
    assert "its StableHLO" in verdict.reason or "died by" in verdict.reason, verdict


def test_torchscript_is_refused_before_any_child_is_started(
    artifact: Artifact, verdicts: VerdictStore
):
    odd = hostile.rewritten(
        artifact, torchscript=hostile.torchscript("return torch.from_file('a', False, 3)")
    )
    verdict = verify(odd.data, verdicts=verdicts)
    assert not verdict.accepted
    assert verdict.reason.startswith("torchscript source: its TorchScript calls torch.from_file")
    assert verdict.protections == ()
    assert not any(check.name == "probation" for check in verdict.checks)


def test_programs_that_disagree(artifact: Artifact, verdicts: VerdictStore):
    assert artifact.torchscript is not None
    members = hostile.members_of(artifact.torchscript)
    code = members["kernel/code/__torch__.py"]
    assert b"torch.gelu(v_up)" in code
    other = code.replace(b"torch.gelu(v_up)", b"torch.tanh(v_up)")
    changed = hostile.rewritten(
        artifact, torchscript=write_archive(members | {"kernel/code/__torch__.py": other})
    )
    verdict = verify(changed.data, verdicts=verdicts)
    assert not verdict.accepted
    assert verdict.reason.startswith("agreement: its StableHLO and its TorchScript disagree: the")


def test_a_blueprint_that_is_not_that_of_the_programs(artifact: Artifact, verdicts: VerdictStore):
    # The native route, and jax under vmap, would run what the blueprint says.
    assert b"gelu" in artifact.blueprint
    changed = hostile.rewritten(artifact, blueprint=artifact.blueprint.replace(b"gelu", b"tanh"))
    verdict = verify(changed.data, verdicts=verdicts)
    assert not verdict.accepted
    assert verdict.reason.startswith("blueprint: its StableHLO and its blueprint disagree")


def test_a_blueprint_that_is_a_bomb(artifact: Artifact, verdicts: VerdictStore):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    changed = hostile.rewritten(artifact, blueprint="\n".join(lines).encode())
    verdict = verify(
        changed.data, verdicts=verdicts, limits=Limits(wall_seconds=30, memory_bytes=512 << 20)
    )
    assert not verdict.accepted
    assert "limit" in verdict.reason, verdict


def test_a_cost_that_grows_faster_than_the_batch(artifact: Artifact, verdicts: VerdictStore):
    import jax
    from jax import export

    from esper.artifacts import serialise_stablehlo

    honest = load_stablehlo(artifact.stablehlo)

    def squared(params: Any, x: Any) -> Any:
        y = honest.call(params, x)
        rows, columns = y.shape
        # Each example once for every example, along the one axis that may be symbolic.
        copies = jnp.broadcast_to(y.reshape(-1), (rows, rows * columns)).reshape(-1)
        return y + 0.0 * jnp.sum(jnp.tanh(copies))

    (batch,) = export.symbolic_shape("b")
    given = ({n: jax.ShapeDtypeStruct(p.shape, p.dtype) for n, p in artifact.params.items()},
             jax.ShapeDtypeStruct((batch, 2), jnp.float32))  # fmt: skip
    program = export.export(jax.jit(squared), platforms=("cpu", "cuda"))(*given)
    changed = hostile.rewritten(artifact, stablehlo=serialise_stablehlo(program))
    verdict = verify(changed.data, verdicts=verdicts)
    assert not verdict.accepted
    assert "more than in proportion" in verdict.reason or "one axis alone" in verdict.reason
