"""Requests tried until they are answered: one algorithm, with an event loop or without.

What is done is yielded, as in `esper.recovery`; nothing here sends, sleeps or reads a clock.
"""

import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import Any

from esper.errors import InputError, ServiceUnavailableError
from esper.recovery import CircuitBreaker, RetryPolicy
from esper.recovery._effects import Call, Effects, Wait
from esper.urza.client._errors import AWAY, LATER, began_nothing, error_of, retry_after
from esper.urza.client._messages import (
    Answer,
    Ask,
    Broken,
    DistrustedError,
    Opened,
    Transport,
)

LONGEST_WAIT = 60.0
"""A service that asks for more is not waited for."""


class _AwayError(Exception):
    """The service answered that it cannot work now."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.status)
        self.answer = answer


class _ToldError(Exception):
    """The service answered what is wrong with a request."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.status)
        self.answer = answer


class Exchange:
    """Sends requests to one service, again where that may help.

    Args:
        url: of the service, for messages.
        transport: what carries requests.
        retry: how often, and how long in between: each wait is drawn evenly from 0 to the
            policy's delay, so that clients that failed together do not come again together.
        breaker: what is asked before each request.
        draws: where the waits are drawn.
    """

    def __init__(
        self,
        url: str,
        transport: Transport,
        *,
        retry: RetryPolicy,
        breaker: CircuitBreaker,
        draws: random.Random,
    ) -> None:
        self.url = url
        self.transport = transport
        self.retry = retry
        self.breaker = breaker
        self._draws = draws
        self._plain = dataclasses.replace(retry, jitter=0.0)

    def delays(self) -> "Delays":
        """The waits after the first, second, ... failure."""
        return Delays(self._plain, self._draws)

    def ask(self, ask: Ask, *, repeat: bool = True) -> Effects[Answer]:
        """The answer to a request.

        Args:
            repeat: whether it may be sent again where it is not known whether it was done.

        Raises:
            ServiceUnavailableError: where none came.
            InputError: where the service's certificate is not believed.
            CircuitBreakerOpenError: where none was asked for.
            KasminaException: what the service says that was wrong.
        """
        answer = yield from self.answered(ask, repeat=repeat)
        if answer.status >= 300:
            raise error_of(self.url, answer)
        return answer

    def answered(self, ask: Ask, *, repeat: bool = True) -> Effects[Answer]:
        """The answer to a request, which may be a problem.

        Args:
            repeat: as of `ask`.

        Raises:
            ServiceUnavailableError, InputError, CircuitBreakerOpenError: as `ask`.
        """
        return (yield from self._tried(lambda: self.transport.send(ask), _whole, repeat=repeat))

    def open(self, ask: Ask, *, taken: Sequence[int] = ()) -> Effects[Opened]:
        """The head of an answer, whose content is taken piece by piece.

        Args:
            taken: statuses that are no errors here.

        Raises:
            As `ask`.
        """

        def check(opened: Opened) -> Effects[None]:
            # Here, so that an error that is cut before it is told is asked for again.
            if opened.status >= 300 and opened.status not in taken:
                answer = yield from _taken_in(opened)
                raise (_AwayError if opened.status in LATER else _ToldError)(answer)

        try:
            return (yield from self._tried(lambda: self.transport.open(ask), check, repeat=True))
        except _ToldError as told:
            raise error_of(self.url, told.answer) from None

    def _tried(
        self,
        action: Callable[[], Any],
        check: Callable[[Any], Effects[None]],
        *,
        repeat: bool,
    ) -> Effects[Any]:
        delays, uncertain, last = self.delays(), False, self.retry.attempts - 1
        for attempt in range(self.retry.attempts):
            wait = 0.0
            try:
                answer = yield from self._once(action, check)
            except Broken as broken:
                uncertain |= broken.sent
                if attempt == last or (broken.sent and not repeat):
                    raise ServiceUnavailableError(
                        f"the library at {self.url} cannot be reached: {broken.reason} (tried"
                        f" {attempt + 1} times). Check its address, and that it runs."
                    ) from broken
            except DistrustedError as error:
                raise InputError(
                    f"the library at {self.url} shows a certificate that is not believed:"
                    f" {error.reason}. Nothing was sent to it. Check the host in the address; where"
                    " that is right, give the file of the authority that signed the certificate, in"
                    " PEM format, as the client's `verify` or in the variable SSL_CERT_FILE."
                ) from error
            except _AwayError as away:
                # Whoever gave up on an answer may have left behind what goes on and is done.
                done = away.answer.status in AWAY and not began_nothing(away.answer)
                uncertain |= done
                if attempt == last or (done and not repeat):
                    raise error_of(self.url, away.answer) from None
                wait = retry_after(away.answer.headers)
                if wait > LONGEST_WAIT:
                    raise error_of(self.url, away.answer) from None
            else:
                if uncertain and isinstance(answer, Answer):
                    return dataclasses.replace(answer, repeated=True)
                return answer
            yield Wait(max(wait, next(delays)))
        raise AssertionError("a retry has at least 1 attempt")

    def _once(
        self, action: Callable[[], Any], check: Callable[[Any], Effects[None]]
    ) -> Effects[Any]:
        permit = self.breaker.acquire()
        try:
            answer = yield Call(action)
            yield from check(answer)
        except Broken:
            self.breaker.record_failure(permit)
            raise
        except _AwayError as away:
            failed = away.answer.status in AWAY
            (self.breaker.record_failure if failed else self.breaker.record_success)(permit)
            raise
        except _ToldError:
            self.breaker.record_success(permit)
            raise
        except BaseException:
            self.breaker.release(permit)
            raise
        self.breaker.record_success(permit)
        return answer


class Delays:
    """Waits, each drawn evenly from nothing to what the policy says."""

    def __init__(self, policy: RetryPolicy, draws: random.Random) -> None:
        self._most = policy.delays(draws)
        self._draws = draws

    def __next__(self) -> float:
        """The next wait."""
        return self._draws.random() * next(self._most)


def _whole(answer: Answer) -> Effects[None]:
    if answer.status in LATER:
        raise _AwayError(answer)
    return
    yield Wait(0.0)


def _taken_in(opened: Opened) -> Effects[Answer]:
    """An opened answer as a whole one."""
    pieces: list[bytes] = []
    try:
        while piece := (yield Call(opened.piece)):
            pieces.append(piece)
    finally:
        yield Call(opened.close)
    return Answer(opened.status, opened.headers, b"".join(pieces))
