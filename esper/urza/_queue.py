"""Blueprints that wait to be compiled, and workers that take them for a time.

A claim is a row with a random token and a lease. Every step of a blueprint is one conditional
update, so that of several who try, one succeeds. A lease that has run out keeps its token until
somebody else claims the blueprint: who was only slow may still complete it.
"""

import uuid
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from esper.contracts import (
    BlueprintRecord,
    BlueprintRequest,
    BlueprintState,
    Claim,
    KernelSignature,
    check_move,
    reason_text,
)
from esper.errors import (
    BlueprintNotFoundError,
    ConflictError,
    IllegalTransitionError,
    InputError,
    KernelNotFoundError,
    LeaseLostError,
)
from esper.urza._connections import is_sqlite, upsert
from esper.urza._database import Database
from esper.urza._failures import doing
from esper.urza._schema import BLUEPRINTS, KERNELS
from esper.urza._tags import BLUEPRINTS_TAGS
from esper.urza._valid import checked_label, valid
from esper.urza._wire import checked_claim

MOST_DOCUMENT_BYTES = 8 << 20
"""Of the blueprints in a page, or claimed at once: who asks, and a service that answers with JSON,
has all of them in memory. The first is given however large it is."""
_SET_BACK_SECONDS = 1.0
"""A lease that begins so much later than now was given before the clock was set back."""

_S = BlueprintState
_B = BLUEPRINTS.c
_ORDER = (_B.priority.desc(), _B.created, _B.blueprint_id)


class Queue:
    """The blueprints of a library.

    Args:
        max_attempts: how many leases of a blueprint may run out, or workers ask for another try,
            before it is INVALID.
    """

    def __init__(self, database: Database, *, max_attempts: int) -> None:
        if max_attempts < 1:
            raise InputError(f"max_attempts must be at least 1, got {max_attempts}")
        self._database = database
        self._max_attempts = max_attempts

    def submit(self, request: BlueprintRequest) -> BlueprintRecord:
        """See `KernelLibrary.submit`."""
        blueprint_id = request.blueprint_id
        what = f"blueprint {blueprint_id[:12]} could not be kept in {self._database.where}"
        with doing(what), self._database.writing() as connection:
            now = self._database.now(connection)
            row = {
                "blueprint_id": blueprint_id,
                "name": request.name,
                "source": request.source,
                "signature": str(request.signature),
                "sizes": dict(request.sizes),
                "init_seed": request.init_seed,
                "priority": request.priority,
                "state": _S.UNVALIDATED.value,
                "attempts": 0,
                "reason": "",
                "created": now,
                "changed": now,
            }
            insertion = upsert(connection, BLUEPRINTS).values(**row).on_conflict_do_nothing()
            if connection.scalar(insertion.returning(_B.blueprint_id)) is None:
                self._submit_again(connection, request, now)
            BLUEPRINTS_TAGS.add(connection, blueprint_id, request.tags)
            return self._one(connection, blueprint_id)

    def _submit_again(
        self, connection: sa.Connection, request: BlueprintRequest, now: float
    ) -> None:
        mine = _B.blueprint_id == request.blueprint_id
        connection.execute(
            sa.update(BLUEPRINTS)
            .where(mine, _B.priority < request.priority)
            .values(priority=request.priority)
        )
        kept = sa.exists().where(KERNELS.c.kernel_id == _B.kernel_id)
        connection.execute(
            sa.update(BLUEPRINTS)
            .where(mine, _B.state == _S.VALIDATED.value, ~kept)
            .values(state=_S.UNVALIDATED.value, changed=now, attempts=0, **_NO_LEASE)
        )

    def blueprint(self, blueprint_id: str) -> BlueprintRecord:
        """See `KernelLibrary.blueprint`."""
        what = f"the library {self._database.where} cannot be searched"
        with doing(what), self._database.reading() as connection:
            return self._one(connection, blueprint_id)

    def set_state(
        self,
        blueprint_id: str,
        state: BlueprintState,
        *,
        expected: BlueprintState | None = None,
        reason: str = "",
    ) -> BlueprintRecord:
        """See `KernelLibrary.set_blueprint_state`."""
        what = f"blueprint {blueprint_id[:12]} could not be changed in {self._database.where}"
        with doing(what), self._database.writing() as connection:
            row = self._row(connection, blueprint_id, lock=True)
            now = self._database.now(connection)
            current = _S(row["state"])
            if current is not state:
                _check_step(blueprint_id, current, state, expected)
                connection.execute(
                    sa.update(BLUEPRINTS)
                    .where(_B.blueprint_id == blueprint_id, _B.state == current.value)
                    .values(
                        state=state.value,
                        reason=reason_text(reason),
                        changed=now,
                        attempts=0 if state is _S.UNVALIDATED else _B.attempts,
                        token=None,
                        **_NO_LEASE,
                    )
                )
            return self._one(connection, blueprint_id)

    def claim(self, worker: str, *, most: int = 1, lease_seconds: float = 60.0) -> list[Claim]:
        """See `KernelLibrary.claim`."""
        checked_claim(most, lease_seconds)
        worker = checked_label(worker, "worker")
        what = f"no blueprint could be claimed in {self._database.where}"
        with doing(what), self._database.writing() as connection:
            claimed: dict[str, str] = {}
            now = self._database.now(connection)
            room, full = MOST_DOCUMENT_BYTES, False
            while len(claimed) < most and not full:
                wanted = most - len(claimed)
                found = self._free(connection, now, wanted)
                taken: list[dict[str, Any]] = []
                for row in found:
                    if row["state"] == _S.COMPILING and row["attempts"] >= self._max_attempts:
                        self._give_up(connection, row, now)
                        continue
                    full = bool(claimed) and row["document_bytes"] > room
                    if full:
                        break
                    room -= row["document_bytes"]
                    token = claimed[row["blueprint_id"]] = uuid.uuid4().hex
                    taken.append({"taken": row["blueprint_id"], "its_token": token})
                if taken:
                    update = _TAKE.values(
                        worker=worker,
                        lease_begun=now,
                        lease_until=now + lease_seconds,
                        changed=now,
                    )
                    connection.execute(update, taken)
                if len(found) < wanted:
                    break
            records = self._records(connection, list(claimed))
        return [
            valid(
                Claim,
                blueprint=record,
                worker=worker,
                token=claimed[record.blueprint_id],
                attempt=record.attempts,
                seconds=float(lease_seconds),
            )
            for record in records
        ]

    def _free(self, connection: sa.Connection, now: float, most: int) -> list[Any]:
        """Blueprints that may be claimed, locked until the transaction ends."""
        columns = (_B.blueprint_id, _B.state, _B.attempts, _B.priority, _B.created, _B.worker)
        columns += (document_bytes(connection),)
        found: list[Any] = []
        # Each of the two walks along an index; one query for both would sort all that wait.
        for free in (
            _B.state == _S.UNVALIDATED.value,
            sa.and_(_B.state == _S.COMPILING.value, _has_run_out(now)),
        ):
            query = sa.select(*columns).where(free).order_by(*_ORDER).limit(most)
            if not is_sqlite(connection):
                query = query.with_for_update(skip_locked=True)
            found += connection.execute(query).mappings()
        found.sort(key=lambda row: (-row["priority"], row["created"], row["blueprint_id"]))
        return found[:most]

    def _give_up(self, connection: sa.Connection, row: Any, now: float) -> None:
        connection.execute(
            sa.update(BLUEPRINTS)
            .where(_B.blueprint_id == row["blueprint_id"])
            .values(
                state=_S.INVALID.value,
                reason=reason_text(
                    f"{row['attempts']} workers took it and none came back; the last was"
                    f" {row['worker']}. Let it wait again to have it tried once more."
                ),
                changed=now,
                **_NO_LEASE,
            )
        )

    def renew(self, claim: Claim) -> Claim:
        """See `KernelLibrary.renew`."""
        blueprint_id = claim.blueprint.blueprint_id
        what = f"the claim on blueprint {blueprint_id[:12]} could not be renewed"
        with doing(f"{what} in {self._database.where}"), self._database.writing() as connection:
            now = self._database.now(connection)
            done = connection.execute(
                sa.update(BLUEPRINTS)
                .where(*_held_by(claim))
                .values(lease_begun=now, lease_until=now + claim.seconds)
            )
            if not done.rowcount:
                raise self._lost(connection, claim)
        return claim

    def complete(self, claim: Claim, kernel_id: str) -> BlueprintRecord:
        """See `KernelLibrary.complete`."""
        blueprint_id = claim.blueprint.blueprint_id
        what = f"blueprint {blueprint_id[:12]} could not be completed in {self._database.where}"
        with doing(what), self._database.writing() as connection:
            there = sa.select(KERNELS.c.kernel_id).where(KERNELS.c.kernel_id == kernel_id)
            if connection.scalar(there) is None:
                raise KernelNotFoundError(
                    f"blueprint {blueprint_id[:12]} cannot be completed by kernel"
                    f" {kernel_id[:12]}, which {self._database.where} does not hold: put it first"
                )
            done = connection.execute(
                sa.update(BLUEPRINTS)
                .where(*_held_by(claim))
                .values(
                    state=_S.VALIDATED.value,
                    kernel_id=kernel_id,
                    reason="",
                    changed=self._database.now(connection),
                    **_NO_LEASE,
                )
            )
            record = self._one(connection, blueprint_id)
            same = record.state is _S.VALIDATED and record.kernel_id == kernel_id
            if not done.rowcount and not same:
                raise self._lost(connection, claim)
            return record

    def fail(self, claim: Claim, reason: str, *, retry: bool = False) -> BlueprintRecord:
        """See `KernelLibrary.fail`."""
        again = retry and claim.attempt < self._max_attempts
        state = _S.UNVALIDATED if again else _S.INVALID
        return self._end(claim, state, reason=reason_text(reason))

    def give_back(self, claim: Claim) -> BlueprintRecord:
        """See `KernelLibrary.give_back`."""
        return self._end(claim, _S.UNVALIDATED, attempts=claim.attempt - 1)

    def _end(self, claim: Claim, state: BlueprintState, **values: Any) -> BlueprintRecord:
        blueprint_id = claim.blueprint.blueprint_id
        what = f"the claim on blueprint {blueprint_id[:12]} could not be ended"
        with doing(f"{what} in {self._database.where}"), self._database.writing() as connection:
            done = connection.execute(
                sa.update(BLUEPRINTS)
                .where(*_held_by(claim))
                .values(
                    state=state.value,
                    changed=self._database.now(connection),
                    **values,
                    **_NO_LEASE,
                )
            )
            if not done.rowcount:
                row = self._row(connection, blueprint_id)
                # Told twice, because the first answer was lost.
                if (row["token"], row["state"]) != (claim.token, state.value):
                    raise self._lost(connection, claim)
            return self._one(connection, blueprint_id)

    def _lost(self, connection: sa.Connection, claim: Claim) -> LeaseLostError:
        row = self._row(connection, claim.blueprint.blueprint_id)
        holder = f", claimed by {row['worker']}" if row["state"] == _S.COMPILING else ""
        return LeaseLostError(
            f"{claim.worker} holds blueprint {row['blueprint_id'][:12]} no longer: it is"
            f" {row['state']}{holder}. Drop what was compiled for it, or claim it again."
        )

    def _row(self, connection: sa.Connection, blueprint_id: str, *, lock: bool = False) -> Any:
        query = sa.select(BLUEPRINTS).where(_B.blueprint_id == blueprint_id)
        if lock and not is_sqlite(connection):
            query = query.with_for_update()
        row = connection.execute(query).mappings().one_or_none()
        if row is None:
            raise BlueprintNotFoundError(
                f"the library {self._database.where} holds no blueprint {blueprint_id[:12]!r}:"
                " submit it first"
            )
        return row

    def _one(self, connection: sa.Connection, blueprint_id: str) -> BlueprintRecord:
        row = self._row(connection, blueprint_id)
        return blueprint_record(row, BLUEPRINTS_TAGS.of(connection, [blueprint_id]))

    def _records(self, connection: sa.Connection, ids: Sequence[str]) -> list[BlueprintRecord]:
        """In the order in which they are claimed."""
        query = sa.select(BLUEPRINTS).where(_B.blueprint_id.in_(ids)).order_by(*_ORDER)
        tags = BLUEPRINTS_TAGS.of(connection, ids)
        return [blueprint_record(row, tags) for row in connection.execute(query).mappings()]


_NO_LEASE = {"lease_begun": None, "lease_until": None}
_TAKE = (
    sa.update(BLUEPRINTS)
    .where(_B.blueprint_id == sa.bindparam("taken"))
    .values(state=_S.COMPILING.value, attempts=_B.attempts + 1, token=sa.bindparam("its_token"))
)


def _has_run_out(now: float) -> sa.ColumnElement[bool]:
    return sa.or_(
        _B.lease_until.is_(None),
        _B.lease_until <= now,
        _B.lease_begun > now + _SET_BACK_SECONDS,
    )


def _held_by(claim: Claim) -> tuple[sa.ColumnElement[bool], ...]:
    return (
        _B.blueprint_id == claim.blueprint.blueprint_id,
        _B.state == _S.COMPILING.value,
        _B.token == claim.token,
    )


def _check_step(
    blueprint_id: str,
    current: BlueprintState,
    state: BlueprintState,
    expected: BlueprintState | None,
) -> None:
    subject = f"blueprint {blueprint_id[:12]}"
    if expected is not None and current is not expected:
        raise ConflictError(
            f"{subject} is {current.value}, and was to become {state.value} from"
            f" {expected.value}: look at it again"
        )
    check_move(subject, current, state)
    by = {_S.COMPILING: "`claim`", _S.VALIDATED: "`complete`, which names its kernel"}.get(state)
    if by is not None:
        legal = ", ".join(s.value for s in (_S.UNVALIDATED, _S.INVALID) if s is not current)
        raise IllegalTransitionError(
            f"{subject} becomes {state.value} by {by} alone; without a claim it may become {legal}"
        )


def document_bytes(connection: sa.Connection) -> sa.Label[int]:
    """What of a blueprint's row may be large: the column `document_bytes`."""
    # Both are ASCII. PostgreSQL knows the octets of a text without unpacking it, and SQLite before
    # 3.43 knows them not at all.
    size = sa.func.length if is_sqlite(connection) else sa.func.octet_length
    return (size(_B.source) + size(sa.cast(_B.sizes, sa.Text))).label("document_bytes")


def blueprint_record(row: Any, tags: dict[str, tuple[str, ...]]) -> BlueprintRecord:
    """What is known of a blueprint, from its row."""
    names = BlueprintRecord.model_fields.keys() - {"schema_version", "tags", "signature", "state"}
    return valid(
        BlueprintRecord,
        **{name: row[name] for name in names},
        signature=KernelSignature.parse(row["signature"]),
        state=_S(row["state"]),
        tags=tags.get(row["blueprint_id"], ()),
    )
