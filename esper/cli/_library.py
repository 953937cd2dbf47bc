"""`esper library` and its commands: what a library knows of its kernels, wherever it is."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from pydantic import BaseModel, ValidationError
from rich.markup import escape
from rich.table import Table

from esper.cli._arguments import id_of, signature_of
from esper.cli._connected import LibraryPlace, opened
from esper.cli._console import Trace, counted, err, errors, out, say, show_table
from esper.errors import InputError

if TYPE_CHECKING:
    from esper.contracts import (
        GarbageReport,
        KernelQuery,
        KernelRecord,
        KernelState,
        KernelUsage,
        Page,
    )
    from esper.urza import KernelLibrary

app = typer.Typer(
    name="library",
    help="What a library knows of its kernels: states, tags, outcomes, runs that need them.",
    no_args_is_help=True,
)

M = TypeVar("M", bound=BaseModel)

_DAY = 86_400.0
_MIB = 1 << 20

States = Annotated[
    list[str] | None,
    typer.Option(
        "--state", help="testing, validated, deployed, deprecated or invalid; repeatable."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="As JSON, one object a line.")]
Kernels = Annotated[list[str], typer.Argument(help="Ids of kernels, or how those begin.")]


@app.command()
def search(
    context: typer.Context,
    signature: Annotated[str | None, typer.Option(help="Such as '64->32 float32'.")] = None,
    blueprint: Annotated[str | None, typer.Option(help="The blueprint's name.")] = None,
    platform: Annotated[
        str | None, typer.Option(help="With a program for it, such as cuda.")
    ] = None,
    state: States = None,
    tag: Annotated[list[str] | None, typer.Option(help="With it; repeatable.")] = None,
    ancestor: Annotated[str | None, typer.Option(help="Compiled anew from this kernel.")] = None,
    max_parameters: Annotated[int | None, typer.Option(min=0)] = None,
    max_flops: Annotated[
        int | None, typer.Option(min=0, help="Floating-point operations an example, forward.")
    ] = None,
    max_bytes: Annotated[int | None, typer.Option(min=0, help="Of its file.")] = None,
    min_gain: Annotated[
        float | None, typer.Option(help="Mean gain in the runs that told of it.")
    ] = None,
    order: Annotated[str, typer.Option(help="name, created, flops, parameters or gain.")] = "name",
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="How many at most.")] = 1000,
    as_json: Json = False,
    library: LibraryPlace = None,
    traceback: Trace = False,
) -> None:
    """Find kernels: all that is given must hold.

    Deprecated and invalid ones are found only where --state asks for them.
    """
    with errors(traceback, trains=False):
        from esper.contracts import MOST_RESULTS, KernelQuery

        given = {
            "signature": None if signature is None else signature_of(signature),
            "blueprint": blueprint,
            "platform": platform,
            "states": _states(state),
            "tags": tuple(tag or ()),
            "max_parameters": max_parameters,
            "max_flops": max_flops,
            "max_bytes": max_bytes,
            "min_gain": min_gain,
            "order": order,
            "limit": min(limit, MOST_RESULTS),
        }
        with opened(context, library, create=False) as store:
            if ancestor is not None:
                given["ancestor"] = id_of(ancestor, store)
            found, more = _pages(
                store, _checked(KernelQuery, "kernels cannot be found", given), limit
            )
            if as_json:
                for record in found:
                    _print_json(record)
                return
            table = Table("kernel", "blueprint", "signature", "state", box=None)
            for heading in ("parameters", "FLOPs", "bytes"):
                table.add_column(heading, justify="right")
            table.add_column("tags")
            for record in found:
                table.add_row(
                    record.kernel_id,
                    escape(record.blueprint),
                    record.signature,
                    record.state.value,
                    f"{record.parameter_count:,}",
                    f"{record.flops:,}",
                    f"{record.size_bytes:,}",
                    escape(", ".join(record.tags)),
                )
            show_table(table, whole=True)
            left = ", and more: see --limit" if more else ""
            out.print(f"{counted(len(found), 'kernel')}{left}", highlight=False)


@app.command()
def show(
    context: typer.Context,
    kernel: Annotated[str, typer.Argument(help="Its id, or how that begins.")],
    as_json: Json = False,
    library: LibraryPlace = None,
    traceback: Trace = False,
) -> None:
    """Show all that a library knows of a kernel, without its file."""
    with errors(traceback, trains=False), opened(context, library, create=False) as store:
        kernel_id = id_of(kernel, store)
        record, usage = store.record(kernel_id), store.usage(kernel_id)
        runs, measured = store.references(kernel_id), store.measurements(kernel_id)
        if as_json:
            _print_json(record, usage=usage.model_dump(), runs=runs, measurements=measured)
            return
        table = Table(box=None, show_header=False)
        for name, value in _facts(record, usage).items():
            table.add_row(f"[dim]{name}[/]", escape(value))
        for run in runs:
            table.add_row("[dim]needed by run[/]", escape(run))
        for m in measured:
            # Anybody may have recorded them, and more than their place need not be there.
            told = [f"batch {m['batch']}"]
            for key, words in (
                ("forward_us", "forward"),
                ("forward_backward_us", "with gradients"),
            ):
                if isinstance(m.get(key), int | float):
                    told.append(f"{m[key]:.1f} µs {words}")
            table.add_row(
                f"[dim]{escape(m['backend'])} on {escape(m['device'])}[/]", ", ".join(told)
            )
        show_table(table, whole=True)


@app.command()
def move(
    context: typer.Context,
    state: Annotated[str, typer.Argument(help="What they are to be, such as deprecated.")],
    kernels: Kernels,
    reason: Annotated[str, typer.Option(help="Why; kept with the state.")] = "",
    library: LibraryPlace = None,
    traceback: Trace = False,
) -> None:
    """Give kernels another state. One that may not follow the present one is refused."""
    with errors(traceback, trains=False):
        to = _state(state)
        with opened(context, library, create=False) as store:
            for kernel_id in [id_of(kernel, store) for kernel in kernels]:
                after = store.set_state(kernel_id, to, reason=reason)
                out.print(f"{after.kernel_id} {after.state.value}", highlight=False, soft_wrap=True)


@app.command()
def tag(
    context: typer.Context,
    kernels: Kernels,
    add: Annotated[list[str] | None, typer.Option(help="A tag to give; repeatable.")] = None,
    remove: Annotated[list[str] | None, typer.Option(help="A tag to take; repeatable.")] = None,
    library: LibraryPlace = None,
    traceback: Trace = False,
) -> None:
    """Give kernels tags, and take some from them."""
    with errors(traceback, trains=False):
        if not add and not remove:
            raise InputError("say which tags to --add or to --remove")
        if both := sorted({*(add or [])} & {*(remove or [])}):
            raise InputError(
                f"{_quoted(both)} cannot be added and removed at once: give each tag to --add or to"
                " --remove"
            )
        with opened(context, library, create=False) as store:
            ids = [id_of(kernel, store) for kernel in kernels]
            if remove:
                _check_tags_are_there(store, ids, remove)
            for kernel_id in ids:
                after = store.tag(kernel_id, add=add or [], remove=remove or [])
                out.print(
                    f"{after.kernel_id} {', '.join(after.tags) or 'has no tags'}",
                    highlight=False, markup=False, soft_wrap=True,
                )  # fmt: skip


@app.command()
def collect(
    context: typer.Context,
    state: States = None,
    older_than: Annotated[
        float | None, typer.Option(min=0, metavar="DAYS", help="Those that are older.")
    ] = None,
    keep: Annotated[
        int | None, typer.Option(min=0, help="Those beyond so many newest of their signature.")
    ] = None,
    max_size: Annotated[
        int | None,
        typer.Option(min=0, metavar="MIB", help="Least used first, down to so much for all."),
    ] = None,
    grace: Annotated[float, typer.Option(min=0, metavar="HOURS", help="Younger ones stay.")] = 1.0,
    yes: Annotated[
        bool, typer.Option("--yes", help="Remove them, and not only say which.")
    ] = False,
    as_json: Json = False,
    library: LibraryPlace = None,
    traceback: Trace = False,
) -> None:
    """Remove kernels that nobody needs; without --yes, say which those are.

    By default those that are deprecated or invalid, and files that the library does not list. What
    a run needs stays, until `esper library release` says that it needs nothing any longer.
    """
    with errors(traceback, trains=False):
        from esper.contracts import RetentionPolicy

        given: dict[str, Any] = {
            "max_age_seconds": None if older_than is None else older_than * _DAY,
            "keep_per_signature": keep,
            "max_bytes": None if max_size is None else max_size * _MIB,
            "grace_seconds": grace * 3600.0,
            "dry_run": not yes,
        }
        states = _states(state)
        if states is not None:
            given["states"] = states
        policy = _checked(RetentionPolicy, "nothing can be collected", given)
        with opened(context, library, create=False) as store:
            report = store.collect_garbage(policy)
            if as_json:
                _print_json(report)
                return
            _show_report(report)


@app.command()
def release(
    context: typer.Context,
    runs: Annotated[list[str], typer.Argument(help="Folders of runs, or their ids.")],
    library: LibraryPlace = None,
    traceback: Trace = False,
) -> None:
    """Say that runs need their kernels no longer, so that those may be collected.

    A run's id is what `esper library show` tells of a kernel. A run whose kernels are gone still
    replays its decisions, and cannot train again.
    """
    with errors(traceback, trains=False), opened(context, library, create=False) as store:
        for run_id in [_run_id(run) for run in runs]:
            store.release_run(run_id)
            say(err, "green", f"no kernel is kept here for run {run_id[:16]} any longer")


def _run_id(text: str) -> str:
    """The id of a run that is named by its folder, or by itself."""
    path = Path(text)
    if not path.is_dir():
        if "/" in text or not text.strip():
            raise InputError(f"{text!r} is no folder of a run, and no run's id")
        return text
    from esper.tolaria import open_run

    return open_run(path).genesis


def _check_tags_are_there(store: "KernelLibrary", ids: list[str], tags: list[str]) -> None:
    """Refuse a tag that would be taken from kernels of which none has it: it is misspelt.

    Raises:
        InputError: with the tags that they have.
    """
    there = {tag for kernel_id in ids for tag in store.record(kernel_id).tags}
    if missing := sorted({*tags} - there):
        raise InputError(
            f"{_quoted(missing)} cannot be removed, and nothing was changed: expected tags that any"
            f" of the kernels has, which are {_quoted(sorted(there)) or 'none'}"
        )


def _quoted(tags: list[str]) -> str:
    return ", ".join(repr(tag[:80]) for tag in tags)


def _checked(model: type[M], what: str, given: dict[str, Any]) -> M:
    from esper.contracts import explained

    try:
        return model(**given)
    except ValidationError as error:
        raise InputError(f"{what} by that: {explained(error)}") from error


def _pages(
    store: "KernelLibrary", query: "KernelQuery", limit: int
) -> "tuple[list[KernelRecord], bool]":
    """Kernels, page after page, and whether there are more."""
    found: list[KernelRecord] = []
    while True:
        page: Page[KernelRecord] = store.search(query)
        found += page.items
        if page.next_cursor is None or len(found) >= limit:
            return found[:limit], page.next_cursor is not None or len(found) > limit
        query = query.model_copy(update={"cursor": page.next_cursor})


def _states(texts: list[str] | None) -> "tuple[KernelState, ...] | None":
    return tuple(_state(text) for text in texts) if texts else None


def _state(text: str) -> "KernelState":
    from esper.contracts import KernelState

    try:
        return KernelState(text.lower())
    except ValueError as error:
        raise InputError(
            f"there is no state {text[:40]!r}: expected one of {', '.join(KernelState)}"
        ) from error


def _facts(record: "KernelRecord", usage: "KernelUsage") -> dict[str, str]:
    gain = "nothing is known"
    if usage.mean_gain is not None:
        gain = f"{usage.mean_gain:.4g}"
        if usage.low is not None and usage.high is not None:
            gain += f" ({usage.low:.4g} to {usage.high:.4g})"
        places, runs = counted(usage.outcomes, "place"), counted(usage.runs, "run")
        gain += f" in {places} of {runs}; kept in {usage.kept}"
    parameters, flops = counted(record.parameter_count, "parameter"), counted(record.flops, "FLOP")
    return {
        "kernel": record.kernel_id,
        "blueprint": record.blueprint,
        "signature": record.signature,
        "state": record.state.value,
        "because": record.reason or "-",
        "tags": ", ".join(record.tags) or "-",
        "ancestor": record.ancestor or "-",
        "platforms": "-" if record.platforms is None else ", ".join(record.platforms),
        "cost": f"{parameters}, {flops} an example",
        "bytes": f"{record.size_bytes:,}",
        "kept since": _moment(record.created),
        "gain": gain,
        "last used": _moment(usage.last_used or 0.0),
    }


def _moment(seconds: float) -> str:
    if not seconds:
        return "-"
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _show_report(report: "GarbageReport") -> None:
    for kernel_id in report.removed:
        out.print(kernel_id, highlight=False, soft_wrap=True)
    for kernel_id in report.unlisted:
        out.print(f"{kernel_id} (a file that is not listed)", highlight=False, soft_wrap=True)
    count = len(report.removed) + len(report.unlisted)
    size = (report.removed_bytes + report.unlisted_bytes) / _MIB
    done = "would be removed; --yes removes them" if report.dry_run else "removed"
    stay = ", ".join(
        f"{number} stay{'s' * (number == 1)}, {why}"
        for number, why in (
            (report.referenced, "because runs or blueprints need them"),
            (report.young, "because they are too new"),
        )
        if number
    )
    out.print(
        f"{counted(count, 'kernel')} with {size:,.1f} MiB {done}; {report.kernels_left:,} with"
        f" {report.bytes_left / _MIB:,.1f} MiB {'is' if report.kernels_left == 1 else 'are'} left"
        f"{'; ' * bool(stay)}{stay}",
        highlight=False,
        soft_wrap=True,
    )


def _print_json(record: Any, **more: Any) -> None:
    text = json.dumps(record.model_dump(mode="json") | more)
    out.print(text, highlight=False, markup=False, soft_wrap=True)
