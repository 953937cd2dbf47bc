"""Whether the measurements beside a ledger are those that it saw."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from esper.errors import EsperError
from esper.nissa import MeasurementsDigest


def check_measurements(
    path: Path, rows: Sequence[Mapping[str, Any]], end: Mapping[str, Any]
) -> bool:
    """Hold a run's measurements against the mark at its end.

    Args:
        path: of the measurements.
        end: the entry; runs of old recorded no digest in it.

    Returns:
        Whether there was a digest to hold them against.

    Raises:
        EsperError: where they are others.
    """
    recorded = end.get("measurements")
    if recorded is None:
        return False
    found = str(MeasurementsDigest(rows))
    if found != recorded:
        raise EsperError(
            f"{path} was changed after the run had ended: the SHA-256 of its measurements is"
            f" {found[:12]}…, and the ledger recorded {str(recorded)[:12]}…; restore the file from"
            " a copy, or make the run again"
        )
    return True
