import io
import json
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jax import export

from esper.artifacts import (
    load_stablehlo,
    load_torchscript,
    normalise_torchscript,
    read_artifact,
    rewrite_artifact,
    scan_torchscript,
)
from esper.artifacts._archive import read_archive, write_archive
from esper.errors import ArtifactError
from esper.tezzeret._programs import script_method, torchscript_archive


def test_writing_what_was_read_gives_the_same_bytes(artifact):
    again = rewrite_artifact(read_artifact(artifact.data, artifact.kernel_id))
    assert again.data == artifact.data
    assert list(again.params) == [p.name for p in artifact.manifest.parameters]


@pytest.mark.parametrize(
    "changed", [{"vjp_order": 3}, {"confidence": 2.0}, {"blueprint_name": "\x1b[2J"}]
)
def test_parts_that_are_no_artifact_together(artifact, changed):
    with pytest.raises(ArtifactError, match="these parts are no kernel artifact: 1 validation"):
        rewrite_artifact(artifact, **changed)


@pytest.mark.parametrize(
    "change",
    [
        lambda a, name: {"blueprint_name": name},
        lambda a, name: {"sizes": {name: 1}},
        lambda a, name: {"versions": {name: "1"}},
        lambda a, name: {"versions": {"jax": name}},
        lambda a, name: {
            "params": {name if n == "up.weight" else n: p for n, p in a.params.items()}
        },
    ],
)
def test_names_may_be_of_any_letters_and_do_not_steer_a_terminal(artifact, change):
    for name in ("layers.0.weight", "größe", "重み", ".layers[0].weight", "a b", "\U0001f600", ""):
        assert rewrite_artifact(artifact, **change(artifact, name)).kernel_id
    for name in ("\x1b[2J", "a\n", "\r", "\x9b31m", "\u202e", "\u2028", "\x7f", "\0"):
        with pytest.raises(ArtifactError, match="should match pattern") as error:
            rewrite_artifact(artifact, **change(artifact, name))
        assert set(name) & set(str(error.value)) <= set("a[2J3m1\n")


@given(data=st.data())
def test_every_flipped_bit_is_refused(artifact, data):
    place = data.draw(st.integers(0, 8 * len(artifact.data) - 1))
    damaged = bytearray(artifact.data)
    damaged[place // 8] ^= 1 << place % 8
    with pytest.raises(ArtifactError, match=f"{artifact.kernel_id[:12]} is damaged"):
        read_artifact(bytes(damaged), artifact.kernel_id)


@given(keep=st.floats(0.0, 0.999))
def test_every_truncation_is_refused_even_without_an_id(artifact, keep):
    with pytest.raises(ArtifactError, match="is not a kernel artifact"):
        read_artifact(artifact.data[: int(keep * len(artifact.data))])


def _with(artifact, **members: bytes) -> bytes:
    held = read_archive(artifact.data, max_bytes=1 << 30)
    return write_archive(held | {k.replace("__", "."): v for k, v in members.items()})


def test_a_member_that_is_not_the_manifests(artifact):
    with pytest.raises(ArtifactError, match=r"contradicts its manifest: blueprint\.json has"):
        read_artifact(_with(artifact, blueprint__json=b"{}"))


def test_a_manifest_that_lies_about_parameters(artifact):
    manifest = json.loads(read_archive(artifact.data, max_bytes=1 << 30)["manifest.json"])
    manifest["parameters"][0]["shape"] = [99, 99]
    with pytest.raises(ArtifactError, match="it holds the parameters"):
        read_artifact(_with(artifact, manifest__json=json.dumps(manifest).encode()))


def test_a_manifest_with_an_unknown_key_or_version(artifact):
    manifest = json.loads(read_archive(artifact.data, max_bytes=1 << 30)["manifest.json"])
    for change in ({"colour": 1}, {"schema_version": 3}):
        with pytest.raises(ArtifactError, match="is not a kernel artifact"):
            read_artifact(_with(artifact, manifest__json=json.dumps(manifest | change).encode()))


def test_archives_that_are_compressed_repeated_or_too_large():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a", b"0" * 1000)
    with pytest.raises(ValueError, match="compressed"):
        read_archive(buffer.getvalue(), max_bytes=10)
    with pytest.raises(ValueError, match="larger than 10 bytes"):
        read_archive(write_archive({"a": b"0" * 11}), max_bytes=10)
    doubled = write_archive({"a": b"1", "b": b"2"}).replace(b"b", b"a")
    with pytest.raises(ValueError, match="two members have one name"):
        read_archive(doubled, max_bytes=1 << 20)


# Programs that could do more than compute are refused before they are loaded


def _archive_of(module: torch.nn.Module) -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(module), buffer)
    return buffer.getvalue()


class _Writes(torch.nn.Module):
    """Writes a file as soon as it is loaded."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return (self.path, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.path, self.training = state
        torch.save(torch.zeros(1), self.path)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize("rewritten", [False, True])
def test_torchscript_that_writes_when_loaded_never_is(tmp_path: Path, rewritten: bool):
    target = tmp_path / "written"
    archive = _archive_of(_Writes(str(target)))
    # Rewritten, it has the members of an honest one.
    archive = normalise_torchscript(archive) if rewritten else archive
    with pytest.raises(ArtifactError, match="64-bit|compressed|members|defines|uses|contains"):
        load_torchscript(archive)
    assert not target.exists()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("while bool(x.sum() == x.sum()):\n        x = x + 1\n    return x", "contains while"),
        (
            'return torch.from_file("/etc/hostname", False, 3, dtype=torch.uint8)',
            "calls .*from_file",
        ),
        ("return x.resize_(1 << 30)", "contains|calls"),
        ("return torch.zeros([1 << 40])", "contains|calls torch.zeros"),
        ("torch.manual_seed(0)\n    return x", "contains|calls"),
    ],
)
def test_torchscript_that_does_more_than_compute(body, message):
    hostile = script_method(f"def forward(self, x: Tensor) -> Tensor:\n    {body}\n")
    with pytest.raises(ArtifactError, match=message):
        scan_torchscript(normalise_torchscript(torchscript_archive(hostile)))


def test_torchscript_with_a_pickle_that_names_a_foreign_global(artifact):
    members = read_archive(artifact.torchscript, max_bytes=1 << 20)
    members["kernel/data.pkl"] = b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R."
    with pytest.raises(ArtifactError, match=r"global 'os system'|not allowed"):
        scan_torchscript(write_archive(members))


def _exported(function) -> bytes:
    (batch,) = export.symbolic_shape("b")
    return bytes(
        export.export(jax.jit(function))(jax.ShapeDtypeStruct((batch, 2), jnp.float32)).serialize()
    )


def test_stablehlo_that_loops_or_sorts_is_refused():
    def loops(x):
        return jax.lax.while_loop(lambda c: jnp.sum(c) < 3.0, lambda c: c + 1.0, x)

    for function, op in ((loops, "stablehlo.while"), (lambda x: jnp.sort(x), "stablehlo.sort")):
        with pytest.raises(ArtifactError, match=f"uses {op}, which is not on the list"):
            load_stablehlo(_exported(function))


def test_stablehlo_that_makes_a_huge_tensor_is_refused():
    def huge(x):
        return x * jnp.sum(jnp.broadcast_to(jnp.float32(1.0), (1 << 20, 1 << 20)))

    with pytest.raises(ArtifactError, match="larger than"):
        load_stablehlo(_exported(huge))


@given(garbage=st.binary(max_size=200))
def test_bytes_that_are_no_program(garbage):
    with pytest.raises(ArtifactError, match="cannot be read"):
        load_stablehlo(garbage)
    with pytest.raises(ArtifactError, match="cannot be read"):
        load_torchscript(garbage)
