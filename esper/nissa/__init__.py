"""Nissa, observability: measurements, progress, reports, the live page."""

from esper.nissa._entries import describe_entry, standing
from esper.nissa._figures import colour, dashes
from esper.nissa._growth import Growth, read_growth
from esper.nissa._interval import half_width
from esper.nissa._metrics import (
    OF_THE_PROCESS,
    MeasurementsDigest,
    MetricsWriter,
    keep_metrics_before,
    read_metrics,
)
from esper.nissa._page import write_page
from esper.nissa._progress import ProgressView, describe_stages
from esper.nissa._prometheus import PrometheusWriter
from esper.nissa._record import RunRecord, read_run
from esper.nissa._report import write_report
from esper.nissa._serve import serve_runs
from esper.nissa._tensorboard import TensorBoardWriter
from esper.nissa._writers import Writers, make_writers

__all__ = [
    "OF_THE_PROCESS",
    "Growth",
    "MeasurementsDigest",
    "MetricsWriter",
    "ProgressView",
    "PrometheusWriter",
    "RunRecord",
    "TensorBoardWriter",
    "Writers",
    "colour",
    "dashes",
    "describe_entry",
    "describe_stages",
    "half_width",
    "keep_metrics_before",
    "make_writers",
    "read_growth",
    "read_metrics",
    "read_run",
    "serve_runs",
    "standing",
    "write_page",
    "write_report",
]
