"""Compiled programs by plan: the next one is compiled while the old one still runs."""

import threading
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, Generic, TypeVar

import jax
from jax.stages import Compiled

from esper.errors import EsperError
from esper.execution._background import COMPILER, Work
from esper.execution._signature import Signature, signature_of

Key = TypeVar("Key", bound=Hashable)


class PlannedPrograms(Generic[Key]):
    """Compiled steps, one for each plan and type of arguments.

    ```python
    programs = PlannedPrograms(make_step)          # make_step(plan) returns step(*args)
    step = programs.get(plan, params, live, x)     # compiled; keep it for the loop
    ...
    programs.prepare(coming, params, live_to_come, x)     # compiles in the background
    ...                                                   # while `step` goes on training
    step = programs.get(coming, params, live, x)   # at a boundary; waits if it must
    ```

    A program's key is its plan, and of its arguments the tree structure, shapes, dtypes,
    weak types, and the shardings of arrays that are committed to one; never a value. So
    alphas, parameters and which seeds run compile nothing. It is what `jax.jit` keys by,
    with the plan as a static argument, but for one thing: an array committed to the
    default device is as one that is committed to none. Equivalent shardings are one.
    Settings and mesh of the calling thread (`jax.numpy_dtype_promotion`, `jax.set_mesh`
    and their like) are part of the key, and in force where the program is traced.

    Arguments may be anything that `jax.jit` takes, numpy arrays too, and `prepare`,
    `ready` and `get` also take a `jax.ShapeDtypeStruct` in the place of any array.
    `prepare` keeps no array. A compiled program refuses arguments of another type
    instead of compiling again; numpy arrays are copied to the device in every call.

    All threads may use one object. Background compilations of the whole process are
    done by one thread in order, except that `get` does itself what has not begun.

    Args:
        build: returns the step of a plan, a function to compile. It is called once for
            each program, perhaps in the background.
        donate_argnums: positions, in the step's arguments, of arguments whose buffers
            the program may take for its results, as in `jax.jit`. A donated array is
            deleted by the call: go on with the result, and keep a copy of what is
            still needed.
        warm_up: run each new program once on zeros, as a part of compiling it. XLA does
            some of its work in a program's first run, on the CPU tens of steps long for
            a small network; so the loop is not held up where it swaps. It needs memory
            for one more set of arguments and results, and is wrong for steps that have
            effects, that run on several hosts, or that need not end on zeros. A program
            with a typed random key among its arguments is not run.

    A plan may be any hashable value, such as a tuple of a kind of step and a `Plan`.
    """

    def __init__(
        self,
        build: Callable[[Key], Callable[..., Any]],
        *,
        donate_argnums: int | Sequence[int] = (),
        warm_up: bool = False,
    ) -> None:
        self._build = build
        self._donated = donate_argnums
        self._warm_up = warm_up
        self._lock = threading.Lock()
        self._programs: dict[tuple[Key, Signature], Work[Compiled]] = {}
        self._known: list[Key] = []
        self._closed = False

    @property
    def known(self) -> list[Key]:
        """The plan of every program asked for, in order; one for each type of arguments."""
        return list(self._known)

    @property
    def compilations(self) -> int:
        """Programs asked for so far.

        A program counts once, when it is first asked for, whoever compiles it and when:
        so the count depends on no clock. One that failed counts, and again when it is
        tried again.
        """
        return len(self._known)

    def _find(self, plan: Key, signature: Signature) -> Work[Compiled] | None:
        work = self._programs.get((plan, signature))
        return None if work is None or work.result.cancelled() else work

    def _ask(self, plan: Key, signature: Signature) -> tuple[Work[Compiled], bool]:
        """The program, and whether it is new."""
        with self._lock:
            work = self._find(plan, signature)
            if work is not None:
                return work, False
            if self._closed:
                raise EsperError(
                    "these PlannedPrograms are closed and compile nothing more: close them"
                    " when the last program has been asked for, or make new ones"
                )
            work = Work(partial(self._compile, plan, signature))
            self._programs[plan, signature] = work
            self._known.append(plan)
            return work, True

    def _compile(self, plan: Key, signature: Signature) -> Compiled:
        with signature.context.entered():
            step = jax.jit(self._build(plan), donate_argnums=self._donated)
            compiled = step.lower(*signature.specs()).compile()
        zeros = signature.zeros() if self._warm_up else None
        if zeros is not None:
            # What becomes of zeros is nobody's error.
            with jax.debug_nans(False), jax.debug_infs(False):
                jax.block_until_ready(compiled(*zeros))
        return compiled

    def _forget(self, plan: Key, signature: Signature, work: Work[Compiled]) -> None:
        with self._lock:
            if self._programs.get((plan, signature)) is work:
                del self._programs[plan, signature]

    def prepare(self, plan: Key, *args: Any) -> None:
        """Begin to compile in the background what is new; returns at once.

        An error of tracing or compiling is raised by `get`.

        Raises:
            TypeError: for an argument that is no array.
            EsperError: once closed, or under a transformation of jax.
        """
        work, new = self._ask(plan, signature_of(args))
        if new:
            COMPILER.submit(work)

    def ready(self, plan: Key, *args: Any) -> bool:
        """Whether `get` would not wait; True too where it would raise a compiler's error."""
        work = self._find(plan, signature_of(args))
        return work is not None and work.result.done()

    def get(self, plan: Key, *args: Any) -> Compiled:
        """The compiled program: call it with arguments of these types, as often as you like.

        Where it is being compiled this waits for it; where that has not begun, it
        compiles it in this thread. A call of the program costs about 1 µs more than one
        of a function of `jax.jit`, which would compile again where this one refuses.

        Raises:
            TypeError: for an argument that is no array.
            EsperError: once closed, or under a transformation of jax.
            Exception: what tracing or compiling raised, such as a KernelMismatchError.
                It is raised as itself and then forgotten: the next call tries again.
        """
        signature = signature_of(args)
        while True:
            work, _ = self._ask(plan, signature)
            work.run()
            try:
                return work.result.result()
            except Exception:
                # Cancelled: the thread that was compiling it was interrupted. Begin anew.
                if not work.result.cancelled():
                    self._forget(plan, signature, work)
                    raise

    def __call__(self, plan: Key, *args: Any) -> Any:
        """`get(plan, *args)(*args)`; finding the program costs more than a small step."""
        return self.get(plan, *args)(*args)

    def close(self) -> None:
        """Give up what has not begun to compile, and let go of all programs.

        Programs that `get` returned go on working. Closing twice does nothing.
        """
        with self._lock:
            self._closed = True
            pending, self._programs = list(self._programs.values()), {}
        for work in pending:
            work.cancel()

    def __enter__(self) -> "PlannedPrograms[Key]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
