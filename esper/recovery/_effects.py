"""Calls and waits as data: one algorithm, run with an event loop or without.

A generator yields what is to be done and is sent what came of it. It holds no clock and no loop,
so that the same lines serve `with_sleep` and `with_async_sleep`.
"""

import inspect
from collections.abc import Awaitable, Callable, Generator
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")


class Call(NamedTuple):
    """Call this, and send what it returns; throw what it raises."""

    action: Callable[[], Any]


class Wait(NamedTuple):
    """Let so many seconds pass."""

    seconds: float


Effects = Generator[Call | Wait, Any, T]


def with_sleep(effects: Effects[T], sleep: Callable[[float], object]) -> T:
    """Run effects in this thread.

    Raises:
        InputError: for an action that returns what would have to be awaited.
        BaseException: what the effects raise.
    """
    resume: Callable[[], Call | Wait] = lambda: next(effects)  # noqa: E731
    while True:
        try:
            effect = resume()
        except StopIteration as done:
            return done.value
        try:
            if isinstance(effect, Wait):
                sleep(effect.seconds)
                result = None
            else:
                result = effect.action()
                if inspect.isawaitable(result):
                    raise _cannot_await(effect.action, result)
        except BaseException as raised:
            # Interruptions too: what is held is let go by the generator.
            resume = _thrower(effects, raised)
        else:
            resume = _sender(effects, result)


async def with_async_sleep(effects: Effects[T], sleep: Callable[[float], Awaitable[object]]) -> T:
    """Run effects in an event loop: waits are awaited, and what actions return where it can be.

    An action that is a plain function runs in the loop's thread, and holds it up.
    """
    resume: Callable[[], Call | Wait] = lambda: next(effects)  # noqa: E731
    while True:
        try:
            effect = resume()
        except StopIteration as done:
            return done.value
        try:
            result = await sleep(effect.seconds) if isinstance(effect, Wait) else effect.action()
            if inspect.isawaitable(result):
                result = await result
        except BaseException as raised:
            resume = _thrower(effects, raised)
        else:
            resume = _sender(effects, result)


def _thrower(effects: Effects[Any], raised: BaseException) -> Callable[[], Call | Wait]:
    return lambda: effects.throw(raised)


def _sender(effects: Effects[Any], result: Any) -> Callable[[], Call | Wait]:
    return lambda: effects.send(result)


def _cannot_await(action: Callable[[], Any], result: Any) -> Exception:
    from esper.errors import InputError

    close = getattr(result, "close", None)
    if callable(close):  # a coroutine that is never awaited warns
        close()
    return InputError(
        f"{getattr(action, '__qualname__', action)} returned a {type(result).__name__}, which only"
        " an event loop can wait for: give a plain function, or await the async form"
    )
