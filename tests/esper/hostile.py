"""Hostile programs and files, made without running any of them."""

import dataclasses
import hashlib
import io
import json
import struct
import zipfile
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jax import export
from jax.interpreters import mlir
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo

from esper.artifacts import Artifact
from esper.artifacts._archive import read_archive, write_archive


def members_of(data: bytes) -> dict[str, bytes]:
    return read_archive(data, max_bytes=1 << 30)


def lying(artifact: Artifact, change: Callable[[dict[str, Any]], None]) -> bytes:
    """A file whose manifest was changed."""
    members = members_of(artifact.data)
    manifest = json.loads(members["manifest.json"])
    change(manifest)
    return write_archive(members | {"manifest.json": json.dumps(manifest).encode()})


def with_params(artifact: Artifact, params: bytes) -> bytes:
    """A file with other bytes as its parameters, and an honest digest of them."""
    members = members_of(artifact.data)
    manifest = json.loads(members["manifest.json"])
    manifest["digests"]["params.safetensors"] = hashlib.sha256(params).hexdigest()
    return write_archive(
        members | {"params.safetensors": params, "manifest.json": json.dumps(manifest).encode()}
    )


def safetensors(header: Any, content: bytes = b"", *, size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + content


def exported(function: Callable[..., Any], *shape: int) -> export.Exported:
    (batch,) = export.symbolic_shape("b")
    given = jax.ShapeDtypeStruct((batch, *(shape or (2,))), jnp.float32)
    return export.export(jax.jit(function), platforms=("cpu", "cuda"))({}, given)


def crafted(text: str, *, as_vjp: int = 0) -> bytes:
    """A program that jax would not write, in an envelope that it would.

    Args:
        as_vjp: hide it in the VJP of an honest program, or in the VJP's own.
    """
    honest = exported(lambda _, x: jnp.tanh(x))
    with mlir.make_ir_context():
        module = ir.Module.parse(text)
        program = stablehlo.serialize_portable_artifact(module, stablehlo.get_current_version())
    chain = [honest]
    for _ in range(as_vjp):
        chain.append(chain[-1].vjp())
    found = dataclasses.replace(chain[-1], mlir_module_serialized=program)
    for outer in reversed(chain[:-1]):
        found = dataclasses.replace(outer, _get_vjp=lambda _, inner=found: inner)
    return bytes(found.serialize(vjp_order=as_vjp))


def main(body: str, *, extra: str = "", attributes: str = "") -> str:
    """The text of a module whose function is `body`, on `%x`."""
    return f"""module @m {attributes} {{
  func.func public @main(%x: tensor<?x2xf32>) -> tensor<?x2xf32> {{
{body}
    return %x : tensor<?x2xf32>
  }}
{extra}
}}"""


CALLBACK = main(
    "    %r = stablehlo.custom_call @xla_ffi_python_cpu_callback(%x) {api_version = 4 : i32,"
    " backend_config = {index = 81985529216486895 : ui64}} :"
    " (tensor<?x2xf32>) -> tensor<?x2xf32>"
)
ENDLESS = main(
    """    %one = stablehlo.constant dense<true> : tensor<i1>
    %r = stablehlo.while(%c = %one) : tensor<i1>
      cond { stablehlo.return %c : tensor<i1> }
      do { stablehlo.return %c : tensor<i1> }"""
)
TERABYTES = main(
    "    %z = stablehlo.constant dense<0.0> : tensor<f32>\n"
    "    %r = stablehlo.broadcast_in_dim %z, dims = [] :"
    " (tensor<f32>) -> tensor<1048576x1048576xf32>"
)
SORT = main(
    """    %i = stablehlo.iota dim = 0 : tensor<268435456xi32>
    %r = "stablehlo.sort"(%i) <{dimension = 0 : i64, is_stable = true}> ({
      ^bb0(%a: tensor<i32>, %b: tensor<i32>):
        %c = stablehlo.compare LT, %a, %b : (tensor<i32>, tensor<i32>) -> tensor<i1>
        stablehlo.return %c : tensor<i1>
    }) : (tensor<268435456xi32>) -> tensor<268435456xi32>"""
)
RECURSION = main(
    "    %r = func.call @again(%x) : (tensor<?x2xf32>) -> tensor<?x2xf32>",
    extra="""  func.func private @again(%x: tensor<?x2xf32>) -> tensor<?x2xf32> {
    %r = func.call @again(%x) : (tensor<?x2xf32>) -> tensor<?x2xf32>
    return %r : tensor<?x2xf32>
  }""",
)
DISGUISED = main("    // nothing", attributes='attributes {mhlo.frontend_attributes = {a = "b"}}')
ALIASED = main("    // nothing").replace(
    "%x: tensor<?x2xf32>)", "%x: tensor<?x2xf32> {tf.aliasing_output = 0 : i32})"
)
OUTER_PRODUCT = main(
    "    %r = stablehlo.dot_general %x, %x, contracting_dims = [1] x [1] :"
    " (tensor<?x2xf32>, tensor<?x2xf32>) -> tensor<?x?xf32>"
)


def many_operations(count: int) -> str:
    return main("\n".join(f"    %v{i} = stablehlo.tanh %x : tensor<?x2xf32>" for i in range(count)))


def doubling_calls(depth: int) -> str:
    """2^depth operations, in a function for each doubling."""
    kind = "tensor<?x2xf32>"
    call = f"func.call @f{{}}(%x) : ({kind}) -> {kind}"
    functions = [
        f"  func.func private @f{i}(%x: {kind}) -> {kind} {{\n"
        f"    %a = {call.format(i + 1)}\n    %b = {call.format(i + 1)}\n"
        f"    return %b : {kind}\n  }}"
        for i in range(depth)
    ]
    functions.append(
        f"  func.func private @f{depth}(%x: {kind}) -> {kind} {{\n"
        f"    %a = stablehlo.tanh %x : {kind}\n    return %a : {kind}\n  }}"
    )
    return main(f"    %r = {call.format(0)}", extra="\n".join(functions))


def costly_product() -> str:
    """2^51 floating-point operations on operands of a quarter of a gigabyte each."""
    wide = "tensor<65536x65536xbf16>"
    return main(
        f"    %z = stablehlo.constant dense<0.0> : tensor<bf16>\n"
        f"    %a = stablehlo.broadcast_in_dim %z, dims = [] : (tensor<bf16>) -> {wide}\n"
        f"    %r = stablehlo.dot_general %a, %a, contracting_dims = [1] x [0] :"
        f" ({wide}, {wide}) -> {wide}"
    ).replace("65536", "32768")


def nested(text: str, name: str) -> str:
    """The module with another in it, whose one function costs nothing."""
    kind = "tensor<?x2xf32>"
    function = f"func.func public @{name}(%x: {kind}) -> {kind} {{ return %x : {kind} }}"
    return f"{text.rstrip().removesuffix('}')}  module @inner {{ {function} }}\n}}"


def torchscript(body: str, arguments: str = "") -> bytes:
    """An archive with a method of this code, as the members of an honest one are."""
    source = (
        "class EsperKernel(Module):\n  __parameters__ = []\n  __buffers__ = []\n"
        f"  def forward(self: __torch__.EsperKernel,\n    {arguments}x: Tensor) -> Tensor:\n"
    )
    source += "".join(f"    {line}\n" for line in body.splitlines())
    return archive_of(source.encode())


def archive_of(source: bytes, **members: bytes) -> bytes:
    honest = {
        "kernel/byteorder": b"little",
        "kernel/.data/version": b"10\n",
        "kernel/constants.pkl": b"\x80\x02).",
        "kernel/data.pkl": b"\x80\x02c__torch__\nEsperKernel\nq\x00)\x81}(ubq\x01.",
        "kernel/code/__torch__.py": source,
    }
    return write_archive(honest | members)


def deflated(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def flatbuffer_bomb(depth: int) -> bytes:
    """An envelope of a few kilobytes whose tree of arguments has 2^depth nodes.

    A node's two children are one and the same, as offsets of a flatbuffer may be.
    """
    from jax._src.export import serialization
    from jax._src.export import serialization_generated as ser

    def shared(builder: Any, _: Any) -> Any:
        ser.PyTreeDefStart(builder)
        ser.PyTreeDefAddKind(builder, ser.PyTreeDefKind.none)
        node = ser.PyTreeDefEnd(builder)
        for _ in range(depth):
            ser.PyTreeDefStartChildrenVector(builder, 2)
            builder.PrependUOffsetTRelative(node)
            builder.PrependUOffsetTRelative(node)
            children = builder.EndVector()
            ser.PyTreeDefStart(builder)
            ser.PyTreeDefAddKind(builder, ser.PyTreeDefKind.tuple)
            ser.PyTreeDefAddChildren(builder, children)
            node = ser.PyTreeDefEnd(builder)
        return node

    # jax's own writer writes all the rest.
    with mock.patch.object(serialization, "_serialize_pytreedef", shared):
        return bytes(exported(lambda _, x: x).serialize(vjp_order=1))
