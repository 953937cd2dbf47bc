"""From an exception to the kind of error it is: a table, which users may extend.

A class is given as itself, or by name as `module:Class`, which is looked up among the modules
that are loaded: an exception of torch can only have been raised where torch is.
"""

import errno
import sys
from collections.abc import Callable, Mapping
from typing import Any

from esper.recovery._types import ErrorContext, ErrorType

Verdict = ErrorType | None
"""None for what is no failure, but an answer."""

Rule = Verdict | Callable[[BaseException], Verdict]
"""A verdict, or a function that finds one for errors of a class."""

_GRAVE = (ErrorType.MEMORY_OVERFLOW, ErrorType.DEVICE_ERROR, ErrorType.TIMEOUT)
_UNREACHABLE = {
    getattr(errno, name)
    for name in ("ENETUNREACH", "ENETDOWN", "EHOSTUNREACH", "EHOSTDOWN", "ENOTCONN", "ENETRESET")
    if hasattr(errno, name)
}
_XLA_STATUS = {
    "RESOURCE_EXHAUSTED": ErrorType.MEMORY_OVERFLOW,
    "DEADLINE_EXCEEDED": ErrorType.TIMEOUT,
    "UNAVAILABLE": ErrorType.NETWORK_ERROR,
    "INTERNAL": ErrorType.DEVICE_ERROR,
    "DATA_LOSS": ErrorType.DEVICE_ERROR,
    "ABORTED": ErrorType.DEVICE_ERROR,
}
"""The word that a message of XLA begins with."""


def _of_system(error: BaseException) -> ErrorType:
    number = error.errno if isinstance(error, OSError) else None
    if number in _UNREACHABLE:
        return ErrorType.NETWORK_ERROR
    return ErrorType.MEMORY_OVERFLOW if number == errno.ENOMEM else ErrorType.KERNEL_LOADING


def _of_xla(error: BaseException) -> ErrorType:
    return _XLA_STATUS.get(str(error).partition(":")[0], ErrorType.KERNEL_EXECUTION)


def _of_runtime(error: BaseException) -> ErrorType:
    # torch has no class of its own for these.
    text = str(error)
    if "can't allocate memory" in text or "out of memory" in text:
        return ErrorType.MEMORY_OVERFLOW
    return ErrorType.DEVICE_ERROR if "CUDA error" in text else ErrorType.UNKNOWN


class Classifier:
    """Finds the type of an error by its class, and that of the nearest base where it has none.

    Args:
        rules: more classes, or other rules for those there are. A class's rule is a type, None
            where the exception is an answer and no failure, or a function of the exception.
    """

    def __init__(self, rules: Mapping[type[BaseException] | str, Rule] | None = None) -> None:
        self._by_class: dict[type[BaseException], Rule] = {
            MemoryError: ErrorType.MEMORY_OVERFLOW,
            TimeoutError: ErrorType.TIMEOUT,
            ConnectionError: ErrorType.NETWORK_ERROR,
            OSError: _of_system,
            FloatingPointError: ErrorType.KERNEL_EXECUTION,
            RuntimeError: _of_runtime,
        }
        self._by_name: dict[str, Rule] = {
            "esper.errors:KernelNotFoundError": None,
            "esper.errors:CircuitBreakerOpenError": ErrorType.CIRCUIT_BREAKER,
            "esper.errors:KernelExecutionError": self._of_execution,
            "esper.errors:KernelCompilationError": ErrorType.KERNEL_VALIDATION,
            "esper.errors:ArtifactError": ErrorType.KERNEL_VALIDATION,
            "esper.errors:LibraryError": self._of_library,
            "esper_functional:KernelMismatchError": ErrorType.KERNEL_VALIDATION,
            "esper_functional:KernelIdError": ErrorType.KERNEL_VALIDATION,
            "torch:OutOfMemoryError": ErrorType.MEMORY_OVERFLOW,
            "torch:AcceleratorError": ErrorType.DEVICE_ERROR,
            "torch.jit:Error": ErrorType.KERNEL_EXECUTION,
            "jax.errors:JaxRuntimeError": _of_xla,
            "socket:gaierror": ErrorType.NETWORK_ERROR,
            "httpx:TimeoutException": ErrorType.TIMEOUT,
            "httpx:TransportError": ErrorType.NETWORK_ERROR,
            "sqlalchemy.exc:SQLAlchemyError": ErrorType.KERNEL_LOADING,
            "obstore.exceptions:BaseError": ErrorType.KERNEL_LOADING,
        }
        for key, rule in (rules or {}).items():
            self.add(key, rule)

    def add(self, key: type[BaseException] | str, rule: Rule) -> None:
        """Give a class a rule, or another one.

        Raises:
            InputError: for what is neither a class of exceptions nor `module:Class`.
        """
        if isinstance(key, str) and key.count(":") == 1:
            self._by_name[key] = rule
        elif isinstance(key, type) and issubclass(key, BaseException):
            self._by_class[key] = rule
        else:
            from esper.errors import InputError

            raise InputError(
                f"{key!r} cannot be classified: expected a class of exceptions, or its name as"
                " 'module:Class'"
            )

    def __call__(self, error: BaseException) -> Verdict:
        """The type of an error; None for an answer, UNKNOWN for what no rule knows."""
        rules = self._by_class | self._named()
        for kind in type(error).__mro__:
            if kind in rules:
                rule = rules[kind]
                return rule if rule is None or isinstance(rule, ErrorType) else rule(error)
        return ErrorType.UNKNOWN

    def _named(self) -> dict[type[BaseException], Rule]:
        """The rules given by name, of the classes that are loaded."""
        found: dict[type[BaseException], Rule] = {}
        for key, rule in self._by_name.items():
            module, _, name = key.partition(":")
            kind = getattr(sys.modules.get(module), name, None)
            if isinstance(kind, type):
                found[kind] = rule
        return found

    def _of_execution(self, error: BaseException) -> ErrorType:
        return self._by_cause(error, _GRAVE, ErrorType.KERNEL_EXECUTION)

    def _of_library(self, error: BaseException) -> ErrorType:
        known = (*_GRAVE, ErrorType.NETWORK_ERROR, ErrorType.CIRCUIT_BREAKER)
        return self._by_cause(error, known, ErrorType.KERNEL_LOADING)

    def _by_cause(
        self, error: BaseException, known: tuple[ErrorType, ...], otherwise: ErrorType
    ) -> ErrorType:
        cause = None if error.__cause__ is None else self(error.__cause__)
        return cause if cause is not None and cause in known else otherwise


def create_error_context(
    component: str,
    *,
    error_type: ErrorType | None = None,
    exception: Exception | None = None,
    classify: Callable[[BaseException], Verdict] | None = None,
    **where: Any,
) -> ErrorContext:
    """An error's context, of the type that its exception has unless one is given.

    Args:
        classify: finds the type; a manager's own, or by default one without further rules.
        where: the other fields of `ErrorContext`.

    Raises:
        InputError: where neither says of which type it is, or the exception is no failure.
    """
    kind = error_type
    if kind is None and exception is not None:
        kind = (classify or Classifier())(exception)
    if kind is None:
        from esper.errors import InputError

        found = "neither" if exception is None else f"a {type(exception).__name__}, which is none"
        raise InputError(
            f"an error of {component} needs an error_type, or an exception that is a failure; got"
            f" {found}: treat it as an answer, or name a type"
        )
    return ErrorContext(kind, component, exception=exception, **where)
