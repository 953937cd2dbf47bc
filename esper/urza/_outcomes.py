"""What kernels did in runs, and which runs need them still."""

import math
from collections.abc import Iterable, Sequence

import sqlalchemy as sa

from esper.contracts import KernelOutcome, KernelUsage
from esper.errors import KernelNotFoundError
from esper.urza._connections import is_sqlite, upsert
from esper.urza._database import Database
from esper.urza._failures import doing
from esper.urza._schema import KERNELS, OUTCOMES, REFERENCES
from esper.urza._valid import checked_label, valid

_LEVEL = 0.95
_MOST_SHOWN = 1_000
_MOST_IDS = 500
_KEYS = ("kernel_id", "run_id", "layer", "seed", "step")
_O = OUTCOMES.c
_R = REFERENCES.c


def mean_interval(
    count: int, mean: float, squares: float, level: float = _LEVEL
) -> tuple[float, float] | None:
    """Student's t interval of a mean; None below two values.

    Args:
        squares: the sum of the squared distances from the mean.
    """
    if count < 2:
        return None
    from scipy.special import stdtrit

    error = math.sqrt(max(0.0, squares) / (count - 1) / count)
    half = float(stdtrit(count - 1, 0.5 + level / 2.0)) * error
    return mean - half, mean + half


class Outcomes:
    """What the runs of a library told."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._what = f"the library {database.where} cannot be searched"

    def record(self, outcomes: Sequence[KernelOutcome]) -> None:
        """See `KernelLibrary.record_outcomes`."""
        if not outcomes:
            return
        what = f"{len(outcomes)} outcomes of kernels could not be kept in {self._database.where}"
        with doing(what), self._database.writing() as connection:
            now = self._database.now(connection)
            rows: dict[tuple[object, ...], dict[str, object]] = {}
            for outcome in outcomes:
                at = outcome.at or now
                content = outcome.model_copy(update={"at": at}).model_dump(mode="json")
                keys = {name: content[name] for name in _KEYS}
                rows[tuple(keys.values())] = keys | {
                    "gain": outcome.gain, "kept": outcome.kept, "at": at, "content": content
                }  # fmt: skip
            # In one order, so that two who record the same do not wait for each other.
            ordered = [rows[key] for key in sorted(rows, key=repr)]
            insertion = upsert(connection, OUTCOMES)
            changed = {name: insertion.excluded[name] for name in ("gain", "kept", "at", "content")}
            connection.execute(
                insertion.on_conflict_do_update(index_elements=list(_KEYS), set_=changed), ordered
            )
            for kernel_id in sorted({outcome.kernel_id for outcome in outcomes}):
                mine = _O.kernel_id == kernel_id
                gain = sa.select(sa.func.avg(_O.gain)).where(mine).scalar_subquery()
                connection.execute(
                    sa.update(KERNELS)
                    .where(KERNELS.c.kernel_id == kernel_id)
                    .values(gain=gain, used=now)
                )

    def of(self, kernel_id: str) -> list[KernelOutcome]:
        """See `KernelLibrary.outcomes`."""
        last = sa.select(OUTCOMES).where(_O.kernel_id == kernel_id)
        last = last.order_by(_O.at.desc(), *(_O[name] for name in _KEYS)).limit(_MOST_SHOWN)
        with doing(self._what), self._database.reading() as connection:
            rows = connection.execute(last).mappings().all()
        found = [valid(KernelOutcome, **row["content"]) for row in rows]
        return sorted(found, key=lambda o: (o.run_id, o.layer, o.seed, o.step))

    def usage(self, kernel_id: str) -> KernelUsage:
        """See `KernelLibrary.usage`."""
        mine = _O.kernel_id == kernel_id
        gains = sa.select(_O.gain, _O.kept).where(mine).order_by(*(_O[name] for name in _KEYS))
        runs = sa.select(sa.func.count(sa.distinct(_O.run_id)), sa.func.max(_O.at)).where(mine)
        used = sa.select(KERNELS.c.used, KERNELS.c.created).where(KERNELS.c.kernel_id == kernel_id)
        references = sa.select(sa.func.count()).where(_R.kernel_id == kernel_id)
        with doing(self._what), self._database.reading() as connection:
            rows = connection.execute(gains).all()
            run_count, last = connection.execute(runs).one()
            there = connection.execute(used).one_or_none()
            referring = connection.scalar(references) or 0
        values = [row.gain for row in rows]
        mean = math.fsum(values) / len(values) if values else None
        interval = None
        if mean is not None:
            squares = math.fsum((value - mean) ** 2 for value in values)
            interval = mean_interval(len(values), mean, squares)
        if there is not None and there.used > there.created:
            last = max(last or 0.0, there.used)
        return valid(
            KernelUsage,
            kernel_id=kernel_id,
            runs=run_count,
            outcomes=len(values),
            kept=sum(bool(row.kept) for row in rows),
            mean_gain=mean,
            low=None if interval is None else interval[0],
            high=None if interval is None else interval[1],
            references=referring,
            last_used=last,
        )

    def refer(self, run_id: str, kernel_ids: Iterable[str]) -> None:
        """See `KernelLibrary.refer`."""
        run_id = checked_label(run_id, "run")
        ids = sorted(set(kernel_ids))
        if not ids:
            return
        where = self._database.where
        with (
            doing(f"run {run_id[:40]} could not refer to its kernels in {where}"),
            self._database.writing() as connection,
        ):
            now = self._database.now(connection)
            found = 0
            for start in range(0, len(ids), _MOST_IDS):
                some = KERNELS.c.kernel_id.in_(ids[start : start + _MOST_IDS])
                if not is_sqlite(connection):
                    # An update locks rows as they lie. In the order in which `record` has them,
                    # neither of the two waits for a row of the other while that waits for its own.
                    ordered = sa.select(KERNELS.c.kernel_id).where(some)
                    ordered = ordered.order_by(KERNELS.c.kernel_id).with_for_update()
                    connection.execute(ordered)
                # Their rows are locked: who collects garbage waits, and sees the reference.
                found += connection.execute(
                    sa.update(KERNELS).where(some).values(used=now)
                ).rowcount
            if found < len(ids):
                there = set(connection.scalars(sa.select(KERNELS.c.kernel_id)))
                missing = next(each for each in ids if each not in there)
                raise KernelNotFoundError(
                    f"run {run_id[:40]} cannot refer to kernel {missing[:12]}, which {where} does"
                    " not hold: put it first"
                )
            rows = [{"run_id": run_id, "kernel_id": kernel_id} for kernel_id in ids]
            connection.execute(upsert(connection, REFERENCES).on_conflict_do_nothing(), rows)

    def release(self, run_id: str) -> None:
        """See `KernelLibrary.release_run`."""
        what = f"run {run_id[:40]} could not be released in {self._database.where}"
        with doing(what), self._database.writing() as connection:
            connection.execute(sa.delete(REFERENCES).where(_R.run_id == run_id))

    def references(self, kernel_id: str) -> list[str]:
        """See `KernelLibrary.references`."""
        query = sa.select(_R.run_id).where(_R.kernel_id == kernel_id).order_by(_R.run_id)
        with doing(self._what), self._database.reading() as connection:
            return list(connection.scalars(query))
