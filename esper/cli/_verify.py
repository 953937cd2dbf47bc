"""`esper kernels verify` and `fetch`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from esper.cli._arguments import DEFAULT_LIBRARY, LibraryFolder, bytes_of, id_of, is_file_of_kernel
from esper.cli._arguments import progress as progress_bar
from esper.cli._console import Trace, err, errors, out, say, show_table, status_of
from esper.errors import ArtifactError, EsperError

if TYPE_CHECKING:
    from esper.artifacts import Artifact, Verdict
    from esper.urza import Library


def verify(
    kernels: Annotated[list[str], typer.Argument(help="Files or ids of kernels.")],
    library: LibraryFolder = DEFAULT_LIBRARY,
    probation: Annotated[
        bool, typer.Option(help="Run the programs in a child process under limits.")
    ] = True,
    traceback: Trace = False,
) -> None:
    """Find out whether kernels may be used: scan them, and run them where they can do no harm.

    Exit status 1 where one is refused; 2 where none is, and one is not there.
    """
    with errors(traceback):
        from esper.artifacts import verify as verify_kernel

        failures: list[EsperError] = []
        for kernel in kernels:
            try:
                verdict = verify_kernel(_bytes(kernel, library), probation=probation)
            except EsperError as error:
                say(err, "red", str(error))
                failures.append(error)
                continue
            _show_verdict(kernel, verdict)
            if not verdict.accepted:
                failures.append(ArtifactError(verdict.reason))
        if failures:
            raise typer.Exit(status_of(failures))


def _bytes(kernel: str, library: Path) -> bytes:
    """The bytes of a kernel, not parsed."""
    from esper.urza import Library

    if is_file_of_kernel(kernel):
        return bytes_of(kernel)
    store = Library(library, create=False)
    return store.read_bytes(id_of(kernel, store))


_ADVICE = ". For a kernel of another library, say which by --from"

_COLOURS = {"passed": "green", "refused": "red", "noted": "yellow", "skipped": "dim"}


def _show_verdict(kernel: str, verdict: "Verdict") -> None:
    word = "[green]accepted[/]" if verdict.accepted else "[red]refused[/]"
    known = " (its programs were run before)" if verdict.remembered else ""
    out.print(f"{escape(kernel)}: {word}{known}", highlight=False, soft_wrap=True)
    table = Table("check", "outcome", "ms", "detail", box=None)
    for check in verdict.checks:
        colour = _COLOURS[check.outcome]
        table.add_row(
            check.name,
            f"[{colour}]{check.outcome}[/]",
            f"{check.milliseconds:.1f}",
            escape(check.detail),
        )
    show_table(table)
    if verdict.protections:
        out.print(f"the child was held by {', '.join(verdict.protections)}", highlight=False)
    for missing in verdict.missing:
        out.print(f"[yellow]not to be had here:[/] {escape(missing)}", highlight=False)


def fetch(
    kernels: Annotated[
        list[str], typer.Argument(help="Kernel files, or ids of kernels of --from.")
    ],
    source: Annotated[
        Path | None, typer.Option("--from", help="Folder of the library to fetch from.")
    ] = None,
    library: LibraryFolder = DEFAULT_LIBRARY,
    traceback: Trace = False,
) -> None:
    """Verify kernels from elsewhere, and keep those that are accepted. Prints their ids."""
    with errors(traceback):
        from esper.urza import Library

        origin = None if source is None else Library(source, create=False)
        failures: list[EsperError] = []
        store = Library(library)
        with progress_bar() as progress:
            bar = progress.add_task("fetching", total=len(kernels))
            for kernel in kernels:
                try:
                    kept = store.put(_accepted(kernel, origin))
                    out.print(kept, highlight=False, soft_wrap=True)
                except EsperError as error:
                    failures.append(error)
                progress.advance(bar)
        for failure in failures:
            say(err, "red", str(failure))
        if failures:
            raise typer.Exit(status_of(failures))


def _accepted(kernel: str, origin: "Library | None") -> "Artifact":
    """A kernel of a file or of another library, once it was verified.

    Raises:
        InputError: where it cannot be read.
        ArtifactError: where it is refused.
    """
    from esper.artifacts import read_artifact
    from esper.artifacts import verify as verify_kernel

    asked = None
    if origin is None or is_file_of_kernel(kernel):
        data = bytes_of(kernel, _ADVICE)
    else:
        asked = id_of(kernel, origin)
        data = origin.read_bytes(asked)
    verdict = verify_kernel(data)
    if not verdict.accepted:
        raise ArtifactError(f"{kernel} is refused: {verdict.reason}")
    # Under its id, another kernel may lie there.
    return read_artifact(data, expected_id=asked)
