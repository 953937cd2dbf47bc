"""Structured logs: fields beside messages, written by a thread that nobody waits for."""

from esper.logs._configure import Kind, Level, Logs, configure_logs
from esper.logs._fields import bound, bound_fields
from esper.logs._log import Log, get_log
from esper.logs._redact import Redaction, is_secret_name

__all__ = [
    "Kind",
    "Level",
    "Log",
    "Logs",
    "Redaction",
    "bound",
    "bound_fields",
    "configure_logs",
    "get_log",
    "is_secret_name",
]
