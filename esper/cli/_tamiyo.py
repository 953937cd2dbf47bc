"""`esper tamiyo`: the policy that learns, and the controller as a service."""

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from esper.cli._connected import BusAddress, bus_at, settings_of
from esper.cli._console import Trace, errors, out
from esper.cli._tamiyo_learned import evaluate, explain, train
from esper.errors import InputError

if TYPE_CHECKING:
    from esper.logs import Logs
    from esper.tamiyo.learning import OnlineLearner
    from esper.tamiyo.service import Advisor

app = typer.Typer(
    name="tamiyo",
    help="The policy that learns, and the controller as a service.",
    no_args_is_help=True,
)

app.command("train")(train)
app.command("evaluate")(evaluate)
app.command("explain")(explain)

DEFAULT_PORT = 8430


@app.callback()
def _group() -> None:
    """The policy that learns, and the controller as a service."""


@app.command("serve")
def serve(
    context: typer.Context,
    bus: BusAddress = None,
    port: Annotated[
        int, typer.Option(min=0, max=65_535, help="Of health and metrics; 0 for a free one.")
    ] = DEFAULT_PORT,
    host: Annotated[
        str, typer.Option(help="The address to listen at; others than this one open it to others.")
    ] = "127.0.0.1",
    shadow: Annotated[
        bool, typer.Option("--shadow", help="Advise, on a topic that nobody acts upon.")
    ] = False,
    learn: Annotated[
        bool, typer.Option("--learn", help="Learn from what came of decisions, with --policy.")
    ] = False,
    policy: Annotated[
        Path | None,
        typer.Option(help="A file of a policy; without one, rules.", show_default=False),
    ] = None,
    kept: Annotated[
        Path | None,
        typer.Option(
            "--folder", help="Where what is learned is kept, and goes on from.", show_default=False
        ),
    ] = None,
    most_kl: Annotated[
        float, typer.Option(min=0, help="How far learning may lead from --policy, in nats.")
    ] = 0.1,
    save_every: Annotated[
        int, typer.Option(min=1, help="Updates after which what is learned is written.")
    ] = 500,
    safety: Annotated[
        Path | None,
        typer.Option(help="A file of the rules of safety; without one, there are none."),
    ] = None,
    sample: Annotated[
        float, typer.Option(min=0, max=1, help="The share of normal health that is looked at.")
    ] = 0.1,
    capacity: Annotated[int, typer.Option(min=1, help="Rows of health that may wait.")] = 65_536,
    traceback: Trace = False,
) -> None:
    """Collect health and reports from a bus, and decide for all models on it.

    Ctrl-C and SIGTERM end it, once what was heard is decided upon, and what was learned is written.
    """
    # What comes with jax does not bear Ctrl-C while it is imported, which `errors` answers.
    from esper.tamiyo.service import (
        HealthCollector,
        Tamiyo,
        TamiyoService,
        read_safety,
        serve_tamiyo,
    )

    with errors(traceback, " and start it again", trains=False), ExitStack() as logs:
        if bus is None:
            raise InputError(
                "a service hears of models on a bus, and none is named: give --bus URL, such as"
                " redis://HOST:PORT/0 or sqlite:PATH, or set bus.url"
            )
        if bus.startswith("memory:"):
            raise InputError(
                "a bus in memory is in one process, so nobody could tell this one anything: give"
                " --bus redis://HOST:PORT/0 or sqlite:PATH"
            )
        if kept is not None and not learn:
            raise InputError(
                "--folder keeps what is learned, and nothing is: give --learn too, or leave the"
                " folder out"
            )
        if learn and policy is None:
            raise InputError(
                "learning is switched on, and there is nobody who learns: rules do not; give"
                " --policy FILE, which is where learning begins, or leave --learn out"
            )
        logs.enter_context(_logs(context))
        advisor, learner = _advisor(policy), None
        if learn:
            learner = _learner(advisor, kept, most_kl, save_every)
        tamiyo = Tamiyo(
            advisor,
            safety=None if safety is None else read_safety(safety),
            collector=HealthCollector(capacity=capacity, sample=sample),
            shadow=shadow,
            learn=learn,
            learner=learner,
        )
        broker = bus_at(bus)
        assert broker is not None
        with closing(broker):
            mode = "advises in shadow" if shadow else "decides"
            with _written(learner):
                serve_tamiyo(
                    TamiyoService(tamiyo, broker),
                    host=host,
                    port=port,
                    tell=lambda address: _tell(f"Tamiyo {mode}, at {address} (Ctrl-C ends it)"),
                )
        _tell("esper: Tamiyo has ended")


def _logs(context: typer.Context) -> "Logs":
    """What is logged, to standard error."""
    from esper.logs import configure_logs
    from esper.settings import LoggingSettings

    settings = settings_of(context)
    asked = LoggingSettings() if settings is None else settings.logging
    return configure_logs(asked.format, asked.level, capacity=asked.capacity)


def _advisor(policy: Path | None) -> "Advisor":
    """A policy's, or one by rules.

    Raises:
        InputError: where the file is none, or the packages of the extra `equinox` are missing.
    """
    from esper.tamiyo.service import RuleAdvisor

    if policy is None:
        return RuleAdvisor()
    try:
        from esper.tamiyo.policy import load_policy
        from esper.tamiyo.service import PolicyAdvisor
    except ImportError as error:
        raise InputError(
            f"a policy needs equinox, which cannot be imported ({error}):"
            " pip install 'esper-morphogenetic[equinox]'"
        ) from error
    return PolicyAdvisor(load_policy(policy), compile_aside=True)


def _learner(
    advisor: "Advisor", folder: Path | None, most_kl: float, save_every: int
) -> "OnlineLearner":
    """Who learns, and has the advisor decide by what was learned."""
    from esper.tamiyo.learning import OnlineLearner, OnlineSettings
    from esper.tamiyo.service import PolicyAdvisor

    assert isinstance(advisor, PolicyAdvisor), "learning begins with a policy"
    return OnlineLearner(
        advisor.policy,
        OnlineSettings(most_kl=most_kl, save_every=save_every),
        exchanged=advisor.exchange,
        folder=folder,
        compile_aside=True,
    )


@contextmanager
def _written(learner: "OnlineLearner | None") -> Iterator[None]:
    """What was learned is written where the service ends as it was told to.

    Where another one took its place, or something is wrong, it is not: the last that was stays.
    """
    try:
        yield
    except KeyboardInterrupt:
        if learner is not None:
            learner.close()
        raise
    if learner is not None:
        learner.close()


def _tell(text: str) -> None:
    out.print(text, highlight=False, markup=False, soft_wrap=True)
