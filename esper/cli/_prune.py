"""`esper kernels prune`."""

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from esper.cli._arguments import DEFAULT_LIBRARY, LibraryFolder
from esper.cli._arguments import progress as progress_bar
from esper.cli._console import Trace, counted, errors, out, show_table
from esper.errors import ArtifactError, KernelNotFoundError

if TYPE_CHECKING:
    from esper.artifacts import Artifact
    from esper.urza import Library


def prune(
    library: LibraryFolder = DEFAULT_LIBRARY,
    damaged: Annotated[
        bool,
        typer.Option(
            help="Those whose files are damaged or missing; whole files that are not listed are"
            " listed."
        ),
    ] = True,
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
        from esper.contracts import KernelState
        from esper.urza import Library

        store = Library(library, create=False)
        gone: dict[str, str] = {}
        whole: dict[str, _Origin] = {}
        stray: list[str] = []
        if damaged:
            for kernel_id in store.unlisted():
                found = _read(store, kernel_id)
                if isinstance(found, str):
                    gone[kernel_id] = f"{found}, and not listed"
                else:
                    stray.append(kernel_id)
        rows = store.find(states=KernelState)
        with progress_bar() as progress:
            for row in progress.track(rows, description="reading"):
                found = _read(store, row.kernel_id)
                if not isinstance(found, str):
                    whole[row.kernel_id] = _origin(found)
                elif damaged:
                    gone[row.kernel_id] = found
        kept: dict[str, str] = {}
        if replaced:
            new, kept = _replaced(whole)
            gone |= new
        table = Table("kernel", "why", box=None)
        for kernel_id, why in gone.items():
            table.add_row(kernel_id, why)
            if yes:
                store.remove(kernel_id)
        for kernel_id, why in kept.items():
            table.add_row(kernel_id, f"kept: {why}")
        for kernel_id in stray:
            table.add_row(kernel_id, "kept: it was not listed, and is whole")
            if yes:
                store.put(store.get(kernel_id))
        if table.row_count:
            show_table(table, whole=True)
        done = "removed" if yes else "would be removed; --yes removes them"
        total = len({row.kernel_id for row in rows} | set(gone) | set(stray))
        out.print(
            f"{len(gone)} of {counted(total, 'kernel')} {done}", highlight=False, soft_wrap=True
        )
        if stray:
            done = "listed again" if yes else "would be listed again by --yes"
            were = "was" if len(stray) == 1 else "were"
            out.print(
                f"{len(stray)} that {were} not listed {done}", highlight=False, soft_wrap=True
            )


def _read(store: "Library", kernel_id: str) -> "Artifact | str":
    """An artifact, or why there is none."""
    try:
        return store.get(kernel_id)
    except KernelNotFoundError:
        return "its file is missing"
    except ArtifactError:
        return "damaged"


@dataclasses.dataclass(frozen=True)
class _Origin:
    """What two kernels have in common of which one is the other, compiled anew."""

    made_of: dict[str, object]
    versions: dict[str, str]
    due: bool
    ancestor: str | None


def _origin(artifact: "Artifact") -> _Origin:
    from esper.tezzeret import is_due

    m = artifact.manifest
    return _Origin(
        made_of={
            "blueprint": m.digests.get("blueprint.json"),
            "signature": m.signature,
            "sizes": m.sizes,
            "seed": m.init_seed,
            "birth": m.birth,
            # Trained parameters are another kernel's.
            "parameters": m.digests["params.safetensors"],
        },
        versions=m.versions,
        due=is_due(artifact),
        ancestor=m.ancestor,
    )


def _replaced(whole: dict[str, _Origin]) -> tuple[dict[str, str], dict[str, str]]:
    """The kernels that others replace, and those that are kept though others say they do.

    Any kernel may name any other as its ancestor, and none is removed on its word alone.
    """
    gone: dict[str, str] = {}
    kept: dict[str, str] = {}
    for new_id, new in whole.items():
        old = None if new.ancestor is None else whole.get(new.ancestor)
        if new.ancestor is None or old is None:
            continue
        reason = _not_replaced(old, new)
        if reason is None:
            gone[new.ancestor] = f"replaced by {new_id[:12]}"
        else:
            kept[new.ancestor] = f"{new_id[:12]} names it as its ancestor, but {reason}"
    return gone, {kernel_id: why for kernel_id, why in kept.items() if kernel_id not in gone}


def _not_replaced(old: _Origin, new: _Origin) -> str | None:
    """Why one kernel does not replace another; None where it does."""
    other = [name for name, value in old.made_of.items() if new.made_of[name] != value]
    if other:
        return f"has another {', '.join(other)}"
    if old.made_of["blueprint"] is None:
        return "holds no blueprint"
    if old.due:
        return None
    if new.versions == old.versions:
        return "was compiled by the same versions"
    return "is due itself" if new.due else None
