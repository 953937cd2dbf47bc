"""Nissa, observability: measurements, progress, reports."""

from esper.nissa._interval import half_width
from esper.nissa._metrics import MetricsWriter, keep_metrics_before, read_metrics
from esper.nissa._progress import ProgressView, describe_stages
from esper.nissa._record import RunRecord, read_run
from esper.nissa._report import write_report

__all__ = [
    "MetricsWriter",
    "ProgressView",
    "RunRecord",
    "describe_stages",
    "half_width",
    "keep_metrics_before",
    "read_metrics",
    "read_run",
    "write_report",
]
