"""`esper kernels verify`, `fetch` and `prune`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from esper.cli._arguments import DEFAULT_LIBRARY, LibraryFolder, bytes_of, is_file_of_kernel
from esper.cli._arguments import progress as progress_bar
from esper.cli._console import Trace, err, errors, out, say
from esper.errors import ArtifactError, EsperError, InputError, KernelNotFoundError

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

    Exit status 1 where one is refused.
    """
    with errors(traceback):
        from esper.artifacts import verify as verify_kernel

        refused = 0
        for kernel in kernels:
            verdict = verify_kernel(_bytes(kernel, library), probation=probation)
            _show_verdict(kernel, verdict)
            refused += not verdict.accepted
        if refused:
            raise typer.Exit(1)


def _bytes(kernel: str, library: Path) -> bytes:
    """The bytes of a kernel, not parsed."""
    from esper.urza import Library

    if is_file_of_kernel(kernel):
        return bytes_of(kernel)
    store = Library(library, create=False)
    return store.read_bytes(store.full_id(kernel))


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
    out.print(table)
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
            raise typer.Exit(2 if all(isinstance(f, InputError) for f in failures) else 1)


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
        asked = origin.full_id(kernel)
        data = origin.read_bytes(asked)
    verdict = verify_kernel(data)
    if not verdict.accepted:
        raise ArtifactError(f"{kernel} is refused: {verdict.reason}")
    # Under its id, another kernel may lie there.
    return read_artifact(data, expected_id=asked)


def prune(
    library: LibraryFolder = DEFAULT_LIBRARY,
    damaged: Annotated[bool, typer.Option(help="Those whose files are damaged or missing.")] = True,
    replaced: Annotated[
        bool, typer.Option("--replaced", help="Those that were compiled anew since.")
    ] = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="Remove them, and not only say which.")
    ] = False,
    traceback: Trace = False,
) -> None:
    """Remove kernels that are of no use from the library; without --yes, say which those are.

    Runs refer to kernels by id: one that is removed can be compiled again, from its blueprint, with
    the libraries that made it.
    """
    with errors(traceback):
        from esper.urza import Library

        store = Library(library, create=False)
        rows = store.find()
        gone: dict[str, str] = {}
        ancestors: dict[str, str] = {}
        with progress_bar() as progress:
            for row in progress.track(rows, description="reading"):
                try:
                    artifact = store.get(row.kernel_id)
                except (ArtifactError, KernelNotFoundError) as error:
                    if damaged:
                        missing = isinstance(error, KernelNotFoundError)
                        gone[row.kernel_id] = "its file is missing" if missing else "damaged"
                    continue
                if artifact.manifest.ancestor is not None:
                    ancestors[artifact.manifest.ancestor] = row.kernel_id
        if replaced:
            held = {row.kernel_id for row in rows}
            gone |= {
                old: f"replaced by {new[:12]}" for old, new in ancestors.items() if old in held
            }
        table = Table("kernel", "why", box=None)
        for kernel_id, why in gone.items():
            table.add_row(kernel_id, why)
            if yes:
                store.remove(kernel_id)
        if gone:
            out.print(table, soft_wrap=True)
        done = "removed" if yes else "would be removed; --yes removes them"
        out.print(f"{len(gone)} of {len(rows)} kernels {done}", highlight=False)
