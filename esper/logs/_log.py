"""What code logs with: the standard library's loggers, and fields beside the message."""

import logging
from typing import Any

from esper.logs._record import FIELDS


class Log:
    """Logs messages with fields: `log.info("compiled", kernel=kernel_id, seconds=1.2)`.

    A message is one of few, in words; what differs from time to time goes into fields. Values are
    JSON values, or told as text. Fields of `bound` are added; where names are equal, those given
    here count.
    """

    __slots__ = ("_logger",)

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)

    def debug(self, message: str, **fields: Any) -> None:
        """What helps to find a fault."""
        self._log(logging.DEBUG, message, fields)

    def info(self, message: str, **fields: Any) -> None:
        """What happens when all is well."""
        self._log(logging.INFO, message, fields)

    def warning(self, message: str, **fields: Any) -> None:
        """What somebody should look at."""
        self._log(logging.WARNING, message, fields)

    def error(self, message: str, **fields: Any) -> None:
        """What failed."""
        self._log(logging.ERROR, message, fields)

    def exception(self, message: str, error: BaseException, **fields: Any) -> None:
        """What failed, with the exception as data: type, message, stack and what it came from."""
        self._log(logging.ERROR, message, fields, error)

    def _log(
        self, level: int, message: str, fields: dict[str, Any], error: BaseException | None = None
    ) -> None:
        if self._logger.isEnabledFor(level):
            info = None if error is None else (type(error), error, error.__traceback__)
            record = self._logger.makeRecord(
                self._logger.name, level, "", 0, message, (), info, extra={FIELDS: fields}
            )
            self._logger.handle(record)


def get_log(name: str) -> Log:
    """The log of a module: `get_log(__name__)`."""
    return Log(name)
