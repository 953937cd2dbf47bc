"""What the commands on kernels share: where the library is, and how things are named."""

import stat
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from esper.cli._console import err
from esper.errors import InputError, KernelNotFoundError

if TYPE_CHECKING:
    from esper.contracts import KernelSignature
    from esper.tezzeret import BlueprintIR
    from esper.urza import KernelLibrary


def _folder(path: Path) -> Path:
    from esper.urza._open import check_folder

    try:
        check_folder(str(path), others=": this command works on the files themselves")
    except InputError as error:
        raise typer.BadParameter(str(error)) from error
    return path


LibraryFolder = Annotated[
    Path, typer.Option("--library", help="Folder of the library.", callback=_folder)
]
DEFAULT_LIBRARY = Path("runs/library")

InFeatures = Annotated[
    int | None, typer.Option("--in", min=1, max=1 << 20, help="Features of the input.")
]
OutFeatures = Annotated[
    int | None, typer.Option("--out", min=1, max=1 << 20, help="Features of the output.")
]
Signatures = Annotated[
    list[str] | None,
    typer.Option(help="Shapes and dtype, such as '3x32x32->8x16x16 bfloat16'; repeatable."),
]
Sizes = Annotated[
    list[str] | None, typer.Option(help="A named size, such as 'width=16'; repeatable.")
]
FirstSeed = Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Seed of the first parameters.")]
SeedCount = Annotated[
    int, typer.Option(min=1, max=10_000, help="How many kernels, with seeds from there on.")
]

_MOST_TEXT = 1 << 20
"""Largest blueprint that is parsed."""


def progress() -> Progress:
    """A bar on standard error, which goes when it is done."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=err,
        transient=True,
    )


def signature_of(text: str) -> "KernelSignature":
    """A signature by its text.

    Raises:
        InputError: for a text that is none.
    """
    from esper.contracts import KernelSignature

    try:
        return KernelSignature.parse(text)
    except ValueError as error:
        raise InputError(str(error)) from error


def blueprint_of(name: str) -> "BlueprintIR":
    """One of Esper's own by its name, or that of a file.

    Raises:
        InputError: for a file that cannot be read.
        BlueprintError: for an unknown name, and for what is no blueprint.
    """
    from esper.tezzeret import load_blueprint, parse_blueprint

    path = Path(name)
    if path.suffix not in (".yaml", ".yml", ".json"):
        return load_blueprint(name)
    try:
        text = _content(path, "blueprint file", _MOST_TEXT).decode()
    except UnicodeDecodeError as error:
        raise InputError(f"the blueprint file {path} cannot be read: {error}") from error
    return parse_blueprint(text, str(path))


def is_file_of_kernel(text: str) -> bool:
    """Whether an argument names a file, and not a kernel of the library."""
    try:
        return text.endswith(".kernel") or Path(text).is_file()
    except OSError:  # longer than a file's name may be
        return False


def bytes_of(path: str, advice: str = "") -> bytes:
    """The content of a kernel's file.

    Raises:
        InputError: where it cannot be read, or is larger than any kernel.
    """
    from esper.artifacts import MAX_BYTES

    return _content(Path(path), "kernel file", MAX_BYTES, advice)


def _content(path: Path, what: str, most: int, advice: str = "") -> bytes:
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise InputError(f"the {what} {path} cannot be read: it is no file{advice}")
        if found.st_size > most:
            raise InputError(
                f"the {what} {path} has {found.st_size} bytes, and may have at most {most}: it is"
                " something else"
            )
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"the {what} {path} cannot be read: {error}{advice}") from error


def id_of(text: str, store: "KernelLibrary") -> str:
    """The id of the kernel of a library that an argument names.

    Raises:
        InputError: where the library has none that begins so, or several.
    """
    try:
        return store.full_id(text)
    except KernelNotFoundError as error:
        raise InputError(str(error)) from error
