"""Which kernels a library may forget, and forgetting them beside everything else that goes on.

Each kernel goes by one conditional deletion, which holds again all that protects it: what a run
began to refer to in the meantime stays. Its file goes after its row. What was cut short in between
is a file that nothing names; those go once they are older than the grace time, and so do half files
of puts that were killed.
"""

from collections import defaultdict
from typing import Any

import sqlalchemy as sa

from esper.contracts import BlueprintState, GarbageReport, RetentionPolicy
from esper.urza._blobs import Blobs
from esper.urza._database import Database
from esper.urza._failures import doing
from esper.urza._kernels import Kernels, forget
from esper.urza._schema import BLUEPRINTS, KERNELS, REFERENCES

_K = KERNELS.c
_WRITTEN_SECONDS = 600.0
"""A half file that was written to so lately may be a put's, which could not go on without it."""


class Retention:
    """Collects the garbage of a library."""

    def __init__(self, database: Database, blobs: Blobs, kernels: Kernels, where: str) -> None:
        self._database = database
        self._blobs = blobs
        self._kernels = kernels
        self._where = where

    def collect(self, policy: RetentionPolicy) -> GarbageReport:
        """See `KernelLibrary.collect_garbage`."""
        with doing(f"the garbage of {self._where} could not be collected"):
            files = list(self._blobs.listing())
            with self._database.reading() as connection:
                now = self._database.now(connection)
                rows = connection.execute(sa.select(*_COLUMNS).order_by(_K.used)).mappings().all()
            unwanted = _unwanted(rows, policy, now)
            removed: list[Any] = []
            young = referenced = 0
            for row in unwanted:
                if now - max(row["created"], row["used"]) < policy.grace_seconds:
                    young += 1
                elif row["protected"] or not self._removed(row["kernel_id"], policy, now):
                    referenced += 1
                else:
                    removed.append(row)
            # What was listed after the files were is not taken for one that nothing names.
            with self._database.reading() as connection:
                listed = set(connection.scalars(sa.select(_K.kernel_id)))
            listed |= {row["kernel_id"] for row in removed}
            unlisted = []
            for blob in sorted(files, key=lambda blob: blob.kernel_id):
                if blob.kernel_id in listed:
                    continue
                if now - blob.changed < policy.grace_seconds:
                    young += 1
                elif policy.dry_run or self._kernels.drop_file(blob.kernel_id):
                    unlisted.append(blob)
            for path, blob in sorted(self._blobs.halves(), key=lambda half: half[1].kernel_id):
                if now - blob.changed < max(policy.grace_seconds, _WRITTEN_SECONDS):
                    young += 1
                    continue
                if not policy.dry_run:
                    path.unlink(missing_ok=True)
                unlisted.append(blob)
        left = sum(row["size_bytes"] for row in rows) - sum(row["size_bytes"] for row in removed)
        return GarbageReport(
            dry_run=policy.dry_run,
            removed=tuple(row["kernel_id"] for row in removed),
            removed_bytes=sum(row["size_bytes"] for row in removed),
            unlisted=tuple(blob.kernel_id for blob in unlisted),
            unlisted_bytes=sum(blob.size for blob in unlisted),
            referenced=referenced,
            young=young,
            kernels_left=len(rows) - len(removed),
            bytes_left=left,
        )

    def _removed(self, kernel_id: str, policy: RetentionPolicy, now: float) -> bool:
        if policy.dry_run:
            return True
        before = now - policy.grace_seconds
        with self._database.writing() as connection:
            gone = connection.execute(
                sa.delete(KERNELS).where(
                    _K.kernel_id == kernel_id,
                    _K.state.in_([state.value for state in policy.states]),
                    _K.created <= before,
                    _K.used <= before,
                    ~_PROTECTED,
                )
            )
            if not gone.rowcount:
                return False
            forget(connection, kernel_id)
        self._kernels.drop_file(kernel_id)
        return True


_WAITING = [BlueprintState.UNVALIDATED.value, BlueprintState.COMPILING.value]
_PROTECTED = sa.or_(
    sa.exists().where(REFERENCES.c.kernel_id == _K.kernel_id),
    sa.exists().where(BLUEPRINTS.c.kernel_id == _K.kernel_id, BLUEPRINTS.c.state.in_(_WAITING)),
)
"""A run refers to it, or a blueprint is compiled anew that gave it before."""
_COLUMNS = (
    _K.kernel_id,
    _K.signature,
    _K.state,
    _K.size_bytes,
    _K.created,
    _K.used,
    _PROTECTED.label("protected"),
)


def _unwanted(rows: Any, policy: RetentionPolicy, now: float) -> list[Any]:
    """The kernels that a policy does without, whether or not something protects them."""
    states = {state.value for state in policy.states}
    may_go = [row for row in rows if row["state"] in states]
    limits = (policy.max_age_seconds, policy.keep_per_signature, policy.max_bytes)
    if all(limit is None for limit in limits):
        return may_go
    gone: dict[str, Any] = {}
    if policy.max_age_seconds is not None:
        gone |= {r["kernel_id"]: r for r in may_go if now - r["created"] > policy.max_age_seconds}
    if policy.keep_per_signature is not None:
        by_signature: dict[str, list[Any]] = defaultdict(list)
        for row in sorted(may_go, key=lambda row: (-row["created"], row["kernel_id"])):
            by_signature[row["signature"]].append(row)
        for found in by_signature.values():
            gone |= {row["kernel_id"]: row for row in found[policy.keep_per_signature :]}
    if policy.max_bytes is not None:
        held = sum(row["size_bytes"] for row in rows)
        free = held - sum(row["size_bytes"] for row in gone.values() if _may(row, policy, now))
        # The least recently used first, of those that may go at all.
        for row in may_go:
            if free <= policy.max_bytes:
                break
            if row["kernel_id"] not in gone and _may(row, policy, now):
                gone[row["kernel_id"]] = row
                free -= row["size_bytes"]
    return list(gone.values())


def _may(row: Any, policy: RetentionPolicy, now: float) -> bool:
    old = now - max(row["created"], row["used"]) >= policy.grace_seconds
    return old and not row["protected"]
