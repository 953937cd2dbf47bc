"""TorchScript archives: made reproducible, and scanned before they are loaded.

`torch.jit.load` runs code (`__setstate__`) and may write files, so an archive
is read as data first. It must be what `esper.tezzeret` writes: one class with
one method of straight-line code that calls allowed functions of torch alone,
and pickles without foreign globals.
"""

import ast
import io
import pickletools
import warnings
import zipfile
from typing import Any

from esper.artifacts._allowed import ALLOWED_CALLS
from esper.artifacts._archive import read_archive, write_archive
from esper.errors import ArtifactError

ROOT = "kernel"
CODE = f"{ROOT}/code/__torch__.py"
MAX_BYTES = 64 << 20

_VERSION = {f"{ROOT}/.data/version", f"{ROOT}/version"}
"""torch writes one of the two, by the age of the operators used."""
_PICKLES = {f"{ROOT}/data.pkl", f"{ROOT}/constants.pkl"}
_REQUIRED = _PICKLES | {CODE, f"{ROOT}/byteorder"}

_ALLOWED_NODES = (
    ast.Module, ast.ClassDef, ast.FunctionDef, ast.arguments, ast.arg, ast.Assign, ast.Return,
    ast.Call, ast.keyword, ast.Attribute, ast.Name, ast.Constant, ast.List, ast.Load, ast.Store,
    ast.UnaryOp, ast.USub,
)  # fmt: skip


def normalise(archive: bytes) -> bytes:
    """Rewrite what `torch.jit.save` wrote so that its bytes depend on its content alone.

    Drops the source locations (paths of the machine that compiled) and the
    serialisation id, and fixes names and dates.
    """
    with zipfile.ZipFile(io.BytesIO(archive)) as source:
        members = {name.split("/", 1)[1]: source.read(name) for name in source.namelist()}
    kept = {
        f"{ROOT}/{name}": data
        for name, data in members.items()
        if f"{ROOT}/{name}" in _REQUIRED | _VERSION
    }
    return write_archive(kept)


def _scan_code(source: str) -> None:
    tree = ast.parse(source)
    methods = 0
    for node in ast.walk(tree):
        if not isinstance(node, _ALLOWED_NODES):
            raise ArtifactError(
                f"its TorchScript contains {type(node).__name__.lower()}, which kernels may not use"
            )
        if isinstance(node, ast.FunctionDef):
            methods += 1
            if node.name != "forward" or node.decorator_list:
                raise ArtifactError(
                    f"its TorchScript defines {node.name!r}; the only method allowed is 'forward'"
                )
        if isinstance(node, ast.Call):
            f = node.func
            is_torch = (
                isinstance(f, ast.Attribute)
                and isinstance(f.value, ast.Name)
                and f.value.id == "torch"
                and f.attr in ALLOWED_CALLS
            )
            if not is_torch:
                raise ArtifactError(
                    f"its TorchScript calls {ast.unparse(f)}, which is not on the list of allowed"
                    " functions"
                )
    if len(tree.body) != 1 or methods != 1:
        raise ArtifactError("its TorchScript must be one class with one method")


def _scan_pickle(name: str, data: bytes) -> None:
    allowed_globals = {"__torch__ EsperKernel"}
    allowed_ops = {
        "PROTO", "GLOBAL", "EMPTY_TUPLE", "NEWOBJ", "EMPTY_DICT", "BUILD", "STOP", "BINPUT",
        "MARK", "SETITEMS",
    }  # fmt: skip
    for op, argument, _ in pickletools.genops(data):
        if op.name not in allowed_ops:
            raise ArtifactError(f"{name} uses the pickle operation {op.name}, which is not allowed")
        if op.name == "GLOBAL" and argument not in allowed_globals:
            raise ArtifactError(f"{name} names the global {argument!r}, which is not allowed")


def load(archive: bytes) -> Any:
    """The scripted module `program(params..., x)` of an archive that passes `scan`.

    Raises:
        ArtifactError: for one that does not.
    """
    import torch

    scan(archive)
    with warnings.catch_warnings():
        # TorchScript is deprecated by torch and is what it can load without Python code.
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.load(io.BytesIO(archive))


def scan(archive: bytes) -> None:
    """Refuse an archive that could do anything but compute; runs nothing.

    Raises:
        ArtifactError: saying what was found.
    """
    try:
        members = read_archive(archive, max_bytes=MAX_BYTES)
    except ValueError as error:
        raise ArtifactError(f"its TorchScript cannot be read: {error}") from error
    odd = sorted((set(members) - _VERSION) ^ _REQUIRED)
    if odd or len(_VERSION & set(members)) != 1:
        raise ArtifactError(
            f"its TorchScript archive has unexpected or missing members: {odd or 'version'}"
        )
    try:
        _scan_code(members[CODE].decode())
        for name in sorted(_PICKLES):
            _scan_pickle(name, members[name])
    except (SyntaxError, ValueError, RecursionError) as error:
        raise ArtifactError(f"its TorchScript cannot be parsed: {error}") from error
