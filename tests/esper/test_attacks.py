"""Files made to harm. Each is refused, and none of them runs, hangs, or takes the process down."""

import io
import json
import random
import struct
import zipfile
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from esper.artifacts import (
    Artifact,
    VerdictStore,
    load_stablehlo,
    read_artifact,
    rewrite_artifact,
    scan,
    scan_stablehlo,
    scan_torchscript,
    verify,
)
from esper.artifacts._archive import read_archive, write_archive
from esper.artifacts._cost import cost_of
from esper.errors import ArtifactError
from esper.sandbox import Limits, run
from tests.esper import hostile

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


def test_an_archive_with_another_directory_than_its_end_tells_of():
    entry = hostile.deflated({"a": b""}).rpartition(b"PK\x01\x02")
    entries = (entry[1] + entry[2][:-22]) * 1000
    ends = (
        struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 1000, 1000, len(entries), 0),
        struct.pack("<4sLQL", b"PK\6\7", 0, len(entries), 1),
        struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, 47, 0, 0),
    )
    many = entries + b"".join(ends)
    # Python's own reader follows the middle one.
    with zipfile.ZipFile(io.BytesIO(many)) as archive:
        assert len(archive.infolist()) == 1000
    with pytest.raises(ValueError, match="a zip archive with 64-bit numbers"):
        read_archive(many, max_bytes=1 << 30)


def test_an_archive_that_is_too_long_before_its_end_is_looked_at():
    with pytest.raises(ValueError, match="it has 40000 bytes, at most 33790 are read"):
        read_archive(bytes(40_000), max_bytes=1000)


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
    (hostile.ALIASED, "has the attribute 'tf.aliasing_output'"),
    (hostile.OUTER_PRODUCT, "one axis alone, the batch's"),
    (hostile.many_operations(50_001), "more than 50000 operations"),
    (hostile.doubling_calls(40), "operations, at most 5e\\+04 are allowed"),
    (hostile.nested(hostile.costly_product(), "main"), "a module within its module"),
    (hostile.nested(hostile.costly_product(), "other"), "a module within its module"),
    (hostile.costly_product(), "floating-point operations for one example, at most"),
]


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize(("text", "message"), STABLEHLO, ids=[m[:30] for _, m in STABLEHLO])
def test_programs_that_do_more_than_compute(text: str, message: str, order: int):
    with pytest.raises(ArtifactError, match=message):
        load_stablehlo(hostile.crafted(text, as_vjp=order))


def test_functions_that_a_parser_should_have_refused():
    """Names that are not one function's, for which the costs of another could be read."""
    from jax.interpreters import mlir
    from jaxlib.mlir import ir

    def change(place: Callable[[Any, Any], Any]) -> Any:
        module = ir.Module.parse(hostile.main("    // nothing"))
        (function,) = module.body.operations
        place(module.body, function.regions[0].blocks[0]).append(function.operation.clone())
        return module

    with mlir.make_ir_context():
        with pytest.raises(ArtifactError, match="its StableHLO has two functions 'main'"):
            cost_of(change(lambda outer, inner: outer))
        with pytest.raises(ArtifactError, match="has a function 'main' within another operation"):
            cost_of(change(lambda outer, inner: inner))


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


def test_a_manifest_that_promises_more_derivatives_than_there_are(artifact: Artifact):
    assert artifact.manifest.vjp_order == 2
    first_only = load_stablehlo(artifact.stablehlo).serialize(vjp_order=1)
    with pytest.raises(ArtifactError, match="VJPs of order 1, the manifest promises 2"):
        scan(rewrite_artifact(artifact, stablehlo=bytes(first_only)))
    scan(rewrite_artifact(artifact, stablehlo=bytes(first_only), vjp_order=1))


def test_programs_of_another_kernel(artifact: Artifact):
    other = hostile.exported(lambda _, x: x)
    swapped = rewrite_artifact(artifact, stablehlo=bytes(other.serialize(vjp_order=1)))
    with pytest.raises(ArtifactError, match="StableHLO contradicts its manifest: .*parameter"):
        scan(swapped)
    odd = hostile.torchscript("return x")
    with pytest.raises(ArtifactError, match="its TorchScript takes 1 tensors, its manifest says 7"):
        scan(rewrite_artifact(artifact, torchscript=odd))


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


# All the way: files with honest digests, given to `verify`


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with VerdictStore(tmp_path_factory.mktemp("verdicts")) as store:
        yield store


def test_a_file_with_a_native_callback_is_refused_and_nobody_dies(
    artifact: Artifact, verdicts: VerdictStore
):
    hidden = rewrite_artifact(artifact, stablehlo=hostile.crafted(hostile.CALLBACK, as_vjp=1))
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
        rewrite_artifact(artifact, stablehlo=bomb).data,
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
    verdict = verify(rewrite_artifact(artifact, stablehlo=program).data, verdicts=verdicts)
    assert not verdict.accepted
    assert "its StableHLO" in verdict.reason or "died by" in verdict.reason, verdict


def test_torchscript_is_refused_before_any_child_is_started(
    artifact: Artifact, verdicts: VerdictStore
):
    odd = rewrite_artifact(
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
    changed = rewrite_artifact(
        artifact, torchscript=write_archive(members | {"kernel/code/__torch__.py": other})
    )
    verdict = verify(changed.data, verdicts=verdicts)
    assert not verdict.accepted
    assert verdict.reason.startswith("agreement: its StableHLO and its TorchScript disagree: the")


def test_a_blueprint_that_is_not_that_of_the_programs(artifact: Artifact, verdicts: VerdictStore):
    # The native route, and jax under vmap, would run what the blueprint says.
    assert b"gelu" in artifact.blueprint
    changed = rewrite_artifact(artifact, blueprint=artifact.blueprint.replace(b"gelu", b"tanh"))
    verdict = verify(changed.data, verdicts=verdicts)
    assert not verdict.accepted
    assert verdict.reason.startswith("blueprint: its StableHLO and its blueprint disagree")


def test_a_blueprint_that_is_a_bomb(artifact: Artifact, verdicts: VerdictStore):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    changed = rewrite_artifact(artifact, blueprint="\n".join(lines).encode())
    verdict = verify(
        changed.data, verdicts=verdicts, limits=Limits(wall_seconds=30, memory_bytes=512 << 20)
    )
    assert not verdict.accepted
    # It is read as JSON, which has nothing to unfold.
    assert "is not a blueprint: " in verdict.reason, verdict


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
    changed = rewrite_artifact(artifact, stablehlo=serialise_stablehlo(program)[0])
    verdict = verify(changed.data, verdicts=verdicts)
    assert not verdict.accepted
    assert "more than in proportion" in verdict.reason or "one axis alone" in verdict.reason
