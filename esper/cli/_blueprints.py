"""`esper blueprints` and its commands: what is to be compiled by workers."""

import json
import os
import socket
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import ValidationError
from rich.markup import escape
from rich.table import Table

from esper.cli._arguments import (
    FirstSeed,
    InFeatures,
    OutFeatures,
    SeedCount,
    Signatures,
    Sizes,
)
from esper.cli._compile import jobs_asked
from esper.cli._connected import BusAddress, LibraryPlace, bus_at, opened, opened_with
from esper.cli._console import Trace, counted, err, errors, out, say, show_table
from esper.errors import BlueprintNotFoundError, EsperError, InputError

if TYPE_CHECKING:
    from esper.contracts import BlueprintRecord, BlueprintRequest, BlueprintState
    from esper.oona import Broker
    from esper.tezzeret import CompileJob
    from esper.urza import KernelLibrary

app = typer.Typer(
    name="blueprints", help="Have blueprints compiled by workers.", no_args_is_help=True
)

_LONGEST_WAIT = 1.0
"""Seconds between two looks at what is waited for."""


@app.command()
def submit(
    context: typer.Context,
    blueprints: Annotated[
        list[str],
        typer.Argument(help="Blueprints: names of Esper's own, or YAML or JSON files."),
    ],
    in_features: InFeatures = None,
    out_features: OutFeatures = None,
    signature: Signatures = None,
    size: Sizes = None,
    init_seed: FirstSeed = 0,
    seeds: SeedCount = 1,
    tag: Annotated[
        list[str] | None, typer.Option(help="A tag that the kernels get; repeatable.")
    ] = None,
    priority: Annotated[int, typer.Option(help="Higher ones are compiled first.")] = 0,
    wait: Annotated[
        float | None,
        typer.Option(min=0, metavar="SECONDS", help="Wait until they are done, for so long."),
    ] = None,
    library: LibraryPlace = None,
    bus: BusAddress = None,
    traceback: Trace = False,
) -> None:
    """Ask for blueprints to be compiled.

    Prints the id of each, one a line; with --wait the ids of their kernels. What was asked for
    before is not compiled twice.
    """
    with errors(traceback):
        jobs = jobs_asked(
            blueprints, in_features, out_features, signature or [], size or [], init_seed, seeds
        )
        asked = [_request(job, tag or [], priority) for job in jobs]
        with opened_with(lambda: _bus(bus), context, library) as (store, broker):
            records = [store.submit(request) for request in asked]
            _announce(records, broker)
            if wait is None:
                _print_ids(record.blueprint_id for record in records)
                return
            records = _done(store, records, wait)
            _print_ids(record.kernel_id for record in records if record.kernel_id is not None)
            failed = [record for record in records if record.kernel_id is None]
            for record in failed:
                say(err, "red", f"{_title(record)}: {_why(record, wait)}")
            if failed:
                raise typer.Exit(1)


@app.command("list")
def list_blueprints(
    context: typer.Context,
    state: Annotated[
        list[str] | None,
        typer.Option(help="unvalidated, compiling, validated or invalid; repeatable."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Only those of this blueprint.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="Only those with it; repeatable.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="How many at most.")] = 1000,
    as_json: Annotated[bool, typer.Option("--json", help="One object a line.")] = False,
    library: LibraryPlace = None,
    traceback: Trace = False,
) -> None:
    """Show what was submitted, oldest first, and what became of it."""
    with errors(traceback):
        states = None if not state else tuple(_state(text) for text in state)
        with opened(context, library, create=False) as store:
            table = Table("blueprint", "name", "signature", "seed", "state", "tries", box=None)
            table.add_column("kernel, or why there is none")
            count, more = 0, False
            for record in _found(store, states, name, tag or [], limit + 1):
                if count == limit:
                    more = True
                    break
                count += 1
                if as_json:
                    _print_json(record)
                    continue
                table.add_row(
                    record.blueprint_id[:16],
                    escape(record.name),
                    str(record.signature),
                    str(record.init_seed),
                    record.state.value,
                    str(record.attempts),
                    (record.kernel_id or "")[:16] or escape(record.reason.partition("\n")[0][:200]),
                )
            if not as_json:
                show_table(table, whole=True)
                left = ", and more: see --limit" if more else ""
                out.print(f"{counted(count, 'blueprint')}{left}", highlight=False)


@app.command()
def show(
    context: typer.Context,
    blueprint: Annotated[str, typer.Argument(help="Its id, or how that begins.")],
    as_json: Annotated[bool, typer.Option("--json", help="As one object.")] = False,
    library: LibraryPlace = None,
    traceback: Trace = False,
) -> None:
    """Show all that the library knows of a blueprint that was submitted."""
    with errors(traceback), opened(context, library, create=False) as store:
        record = _one(store, blueprint)
        if as_json:
            _print_json(record)
            return
        table = Table(box=None, show_header=False)
        for key, value in _facts(record).items():
            table.add_row(key, escape(value))
        show_table(table, whole=True)


@app.command()
def retry(
    context: typer.Context,
    blueprints: Annotated[
        list[str] | None, typer.Argument(help="Their ids, or how those begin.")
    ] = None,
    all_invalid: Annotated[bool, typer.Option("--all", help="All that are invalid.")] = False,
    library: LibraryPlace = None,
    bus: BusAddress = None,
    traceback: Trace = False,
) -> None:
    """Let blueprints wait to be compiled again, such as those that failed."""
    with errors(traceback):
        from esper.contracts import BlueprintState

        if bool(blueprints) == all_invalid:
            raise InputError("say which blueprints are to be tried again: their ids, or --all")
        with opened_with(lambda: _bus(bus), context, library, create=False) as (store, broker):
            if all_invalid:
                found = list(_found(store, (BlueprintState.INVALID,), None, [], None))
            else:
                found = [_one(store, text) for text in blueprints or []]
            records = [
                store.set_blueprint_state(record.blueprint_id, BlueprintState.UNVALIDATED)
                for record in found
            ]
            _announce(records, broker)
            _print_ids(record.blueprint_id for record in records)


def _request(job: "CompileJob", tags: list[str], priority: int) -> "BlueprintRequest":
    from esper.contracts import explained
    from esper.tezzeret import resolve
    from esper.tezzeret.service import request_of

    # What does not fit is said here and now, and not by a worker later.
    resolve(job.blueprint, job.signature, job.sizes)
    try:
        return request_of(job, tags=tags, priority=priority)
    except ValidationError as error:
        raise InputError(f"{job} cannot be submitted: {explained(error)}") from error


def _bus(url: str | None) -> "Broker | Exception | None":
    """The bus, or why it is away, which is told once there is something to announce."""
    try:
        # Whom it would wake asks by himself within seconds.
        return bus_at(url, opening_seconds=1.0)
    except InputError:
        raise
    except (EsperError, OSError) as error:
        return error


def _announce(records: list["BlueprintRecord"], broker: "Broker | Exception | None") -> None:
    """Wake a worker; one that is not told asks within seconds by itself."""
    from esper.contracts import BlueprintState
    from esper.tezzeret.service import submitted

    if broker is None:
        return
    if isinstance(broker, Exception):
        _not_announced(broker)
        return
    sender = f"{socket.gethostname()[:80]}-{os.getpid()}"
    waiting = [record for record in records if record.state is BlueprintState.UNVALIDATED]
    try:
        with broker:
            broker.publish([submitted(record, sender) for record in waiting])
    except (EsperError, OSError) as error:
        _not_announced(error)


def _not_announced(error: Exception) -> None:
    say(err, "yellow", f"not announced on the bus, which delays it by seconds: {error}")


def _why(record: "BlueprintRecord", waited: float) -> str:
    from esper.contracts import BlueprintState

    if record.state is BlueprintState.INVALID:
        return record.reason
    return (
        f"{record.state.value} after {waited:g} s, and waited for no longer: see `esper blueprints"
        f" show {record.blueprint_id[:16]}`, and whether an `esper worker` runs"
    )


def _done(
    store: "KernelLibrary", records: list["BlueprintRecord"], seconds: float
) -> list["BlueprintRecord"]:
    """The records, when none of them waits any longer, or the time is over."""
    from esper.contracts import BlueprintState

    ended = (BlueprintState.VALIDATED, BlueprintState.INVALID)
    limit, delay = time.monotonic() + seconds, 0.05
    while any(record.state not in ended for record in records):
        if time.monotonic() >= limit:
            break
        time.sleep(delay)
        delay = min(_LONGEST_WAIT, delay * 1.5)
        records = [
            record if record.state in ended else store.blueprint(record.blueprint_id)
            for record in records
        ]
    return records


def _found(
    store: "KernelLibrary",
    states: "tuple[BlueprintState, ...] | None",
    name: str | None,
    tags: list[str],
    limit: int | None,
) -> Iterator["BlueprintRecord"]:
    """Blueprints, page after page."""
    from esper.contracts import MOST_RESULTS, BlueprintQuery, explained

    most, cursor = MOST_RESULTS if limit is None else min(limit, MOST_RESULTS), None
    while True:
        try:
            query = BlueprintQuery(
                states=states, name=name, tags=tuple(tags), limit=most, cursor=cursor
            )
        except ValidationError as error:
            raise InputError(f"blueprints cannot be found by that: {explained(error)}") from error
        page = store.blueprints(query)
        yield from page.items
        cursor = page.next_cursor
        if cursor is None:
            return


def _one(store: "KernelLibrary", text: str) -> "BlueprintRecord":
    """The blueprint whose id begins so.

    Raises:
        InputError: where there is none, or several.
    """
    if len(text) == 64:
        try:
            return store.blueprint(text)
        except BlueprintNotFoundError as error:
            raise InputError(str(error)) from error
    found = [r for r in _found(store, None, None, [], None) if r.blueprint_id.startswith(text)]
    if not found:
        raise InputError(
            f"the library holds no blueprint {text[:64]!r}: see esper blueprints list, or submit it"
        )
    if len(found) > 1:
        listed = ", ".join(record.blueprint_id[:16] for record in found[:3])
        raise InputError(f"several blueprints begin with {text!r}: {listed}; give more of the id")
    return found[0]


def _state(text: str) -> "BlueprintState":
    from esper.contracts import BlueprintState

    try:
        return BlueprintState(text.lower())
    except ValueError as error:
        raise InputError(
            f"there is no state {text[:40]!r}: expected one of {', '.join(BlueprintState)}"
        ) from error


def _facts(record: "BlueprintRecord") -> dict[str, str]:
    def when(seconds: float) -> str:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) if seconds else ""

    return {
        "blueprint": record.blueprint_id,
        "name": record.name,
        "signature": str(record.signature),
        "sizes": ", ".join(f"{key}={value}" for key, value in sorted(record.sizes.items())),
        "seed": str(record.init_seed),
        "priority": str(record.priority),
        "tags": ", ".join(record.tags),
        "state": record.state.value,
        "tries": str(record.attempts),
        "reason": record.reason,
        "kernel": record.kernel_id or "",
        "submitted": when(record.created),
        "changed": when(record.changed),
    }


def _title(record: "BlueprintRecord") -> str:
    return f"{record.name} {record.signature}, seed {record.init_seed}"


def _print_ids(ids: Iterable[str]) -> None:
    for each in ids:
        out.print(each, highlight=False, soft_wrap=True)


def _print_json(record: "BlueprintRecord") -> None:
    text = json.dumps(record.model_dump(mode="json"))
    out.print(text, highlight=False, markup=False, soft_wrap=True)
