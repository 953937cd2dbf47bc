"""Logs: what is written, what is not, and that nobody waits for it."""

import asyncio
import contextlib
import io
import json
import logging
import os
import subprocess
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.contracts import KernelSignature
from esper.errors import InputError
from esper.logs import Redaction, bound, configure_logs, get_log, is_secret_name
from esper.tezzeret import CompileJob, load_blueprint
from esper.tezzeret.service import request_of
from esper.tezzeret.service._leases import Leases
from esper.tezzeret.service._outbox import Outbox
from esper.tezzeret.service._patience import Patience
from esper.tezzeret.service._settling import Settling
from esper.tezzeret.service._statistics import Counts
from esper.urza import Library
from tests.esper.contract_values import JSON
from tests.esper.service_thread import ServedLibrary

SIGNATURE = KernelSignature(input_shape=(3,), output_shape=(4,))
LOG = get_log("esper.test_logs")


def written(form, *acts, **options):
    """What is written of acts that log."""
    stream = io.StringIO()
    with configure_logs(form, "debug", stream=stream, **options) as logs:
        for act in acts:
            act()
    assert (logs.dropped, logs.failed) == (0, 0)
    return stream.getvalue()


def objects(*acts, **options):
    return [json.loads(line) for line in written("json", *acts, **options).splitlines()]


# What is written.


def test_a_record_is_an_object_on_a_line():
    (found,) = objects(lambda: LOG.info("compiled", kernel="3f2a", seconds=1.5, gpu=None))
    time = found.pop("time")
    assert time.endswith("Z")
    assert len(time) == len("2026-01-01T00:00:00.000Z")
    assert found == {
        "level": "info", "logger": "esper.test_logs", "message": "compiled",
        "kernel": "3f2a", "seconds": 1.5, "gpu": None,
    }  # fmt: skip


@given(message=st.text(), fields=st.dictionaries(st.text(), JSON, max_size=4))
def test_whatever_is_logged_is_one_line_of_json_and_loses_nothing(message, fields):
    public = {k: v for k, v in fields.items() if not is_secret_name(k)}
    (found,) = objects(lambda: LOG._log(logging.INFO, message, public))
    for name, value in public.items():
        taken = name in ("time", "level", "logger", "message", "error")
        assert found[f"{name}_" if taken else name] == Redaction().value(name, value)
    lines = written("plain", lambda: LOG._log(logging.INFO, message, public)).split("\n")
    assert len(lines) == 2
    assert lines[0].isprintable()
    rich = written("rich", lambda: LOG._log(logging.INFO, message, public))
    assert rich.count("\x1b[") <= 12 + 4 * len(public)


@pytest.mark.parametrize(
    ("value", "told"),
    [(float("nan"), "nan"), (float("inf"), "inf"), (b"x", "b'x'"), ({1: {2}}, {"1": [2]}),
     ("\ud800", "\ud800"), (1 << 80, 1 << 80), (True, True)],
)  # fmt: skip
def test_what_is_no_json_is_told_as_text(value, told):
    (found,) = objects(lambda: LOG.info("x", value=value))
    assert found["value"] == told
    written("plain", lambda: LOG.info("x", value=value))


class Untold:
    def __str__(self):
        raise RuntimeError("no")


def test_what_cannot_be_told_stops_nobody():
    circle = {}
    circle["again"] = [circle]
    deep = found = []
    for _ in range(50):
        found.append([])
        found = found[0]
    first, second = objects(
        lambda: LOG.info("x", value=Untold(), other=1), lambda: LOG.info("y", value=deep)
    )
    assert (first["value"], first["other"]) == ("<Untold: RuntimeError>", 1)
    assert second["message"] == "y"
    stream = io.StringIO()
    with configure_logs("json", stream=stream) as logs:
        LOG.info("x", value=circle)
        LOG.info("after")
    assert logs.dropped == 1  # and it is told
    assert [json.loads(line)["message"] for line in stream.getvalue().splitlines()][-2:] == [
        "after", "records were dropped, because they came faster than they could be written",
    ]  # fmt: skip


def test_a_value_is_what_it_was_when_it_was_logged():
    values = [1]
    gate = threading.Event()

    class Slow(io.StringIO):
        def write(self, text):
            gate.wait(30)
            return super().write(text)

    stream = Slow()
    logs = configure_logs("json", stream=stream)
    LOG.info("first")
    LOG.info("second", values=values)
    values.append(2)
    gate.set()
    assert logs.stop(30)
    assert json.loads(stream.getvalue().splitlines()[1])["values"] == [1]


def fails():
    try:
        try:
            {}["wanted"]
        except KeyError as error:
            raise RuntimeError("two\nlines, and token=hunter2") from error
    except RuntimeError as error:
        LOG.exception("it failed", error, run=3)


def test_an_exception_is_data():
    (found,) = objects(fails)
    assert (found["level"], found["message"], found["run"]) == ("error", "it failed", 3)
    error = found["error"]
    assert (error["type"], error["message"]) == ("RuntimeError", "two\nlines, and token=***")
    assert error["stack"][-1].endswith(" fails")
    assert f"{__file__}:" in error["stack"][-1]
    assert (error["cause"]["type"], error["cause"]["message"]) == ("KeyError", "'wanted'")
    plain = written("plain", fails)
    assert plain.count("\n") == 1
    assert "<- RuntimeError: two\\nlines, and token=***" in plain
    assert "<- KeyError: 'wanted'" in plain
    rich = written("rich", fails)
    assert "RuntimeError: " in rich
    assert "KeyError: " in rich


def test_the_standard_library_s_way_goes_the_same_way():
    logger = logging.getLogger("esper.elsewhere")

    def act():
        logger.info("%s of %d", "one", 2)
        logger.warning("%d", "x")  # its arguments do not fit
        try:
            raise ValueError("bad")
        except ValueError:
            logger.exception("failed")

    first, second, third = objects(act)
    assert first["message"] == "one of 2"
    assert "its arguments do not fit" in second["message"]
    assert (third["error"]["type"], third["error"]["message"]) == ("ValueError", "bad")


def test_what_the_standard_library_calls_extra_are_fields():
    logger = logging.getLogger("esper.elsewhere")

    def act():
        more = {"run": "a-1", "token": "hunter2", "values": [1]}
        with bound(run="before", layer=3):
            logger.info("%d begun", 1, extra=more)
        more["values"].append(2)

    (found,) = objects(act)
    del found["time"]
    assert found == {
        "level": "info", "logger": "esper.elsewhere", "message": "1 begun",
        "run": "a-1", "layer": 3, "token": "***", "values": [1],
    }  # fmt: skip
    assert written("plain", act).endswith(" 1 begun run=a-1 layer=3 token=*** values=[1]\n")


def test_what_others_leave_at_a_record_is_no_field():
    formatter = logging.Formatter("%(asctime)s %(message)s")

    class Other(logging.Handler):
        def emit(self, record):
            formatter.format(record)

    logger, other = logging.getLogger("esper.elsewhere"), Other()
    logger.addHandler(other)
    try:
        # As uvicorn does; its other handlers have seen it first.
        (found,) = objects(lambda: logger.info("up", extra={"color_message": "\x1b[1mup\x1b[0m"}))
    finally:
        logger.removeHandler(other)
    assert found.keys() == {"time", "level", "logger", "message"}


def test_a_worker_s_line_says_of_which_blueprint_it_is(tmp_path):
    library = Library(tmp_path / "library")
    library.submit(request_of(CompileJob(load_blueprint("low_rank"), SIGNATURE)))
    (claim,) = library.claim("worker-1", most=1, lease_seconds=60.0)

    def away(*what):
        raise AssertionError(what)

    leases = Leases(library.renew, on_lost=away, on_away=away)
    leases.hold([claim])
    outbox, counts = Outbox(None, on_away=away), Counts(None, lambda: 0.0)
    settling = Settling(library, leases, outbox, counts, Patience(away), 1.0)
    (found,) = objects(lambda: settling.fail(claim, "it is wrong"))
    leases.close()
    library.close()
    del found["time"]
    assert found == {
        "level": "warning", "logger": "esper.tezzeret.worker", "message": "a blueprint was failed",
        "worker": "worker-1", "blueprint": "low_rank",
        "blueprint_id": claim.blueprint.blueprint_id, "attempt": 1, "reason": "it is wrong",
    }  # fmt: skip


def test_a_service_s_line_says_whose_request_it_was_and_how_long_it_took(tmp_path):
    def act():
        served = ServedLibrary(lambda: Library(tmp_path / "library"))
        try:
            assert served.find() == []
        finally:
            served.close()

    (found,) = [line for line in objects(act) if "token_name" in line]
    assert found["logger"] == "esper.urza.service"
    assert found["token_name"] == "tests"
    assert len(found["request"]) == 32
    assert found["milliseconds"] > 0.0


def test_markup_and_control_characters_steer_no_terminal():
    rich = written("rich", lambda: LOG.info("[red]x[/red] \x1b[2J\r", name="\x1b]0;t\x07 [b]"))
    assert "[red]x[/red] \\x1b[2J\\r" in rich
    assert "\x1b[2J" not in rich
    assert "\x07" not in rich
    assert "[b]" in rich


# Levels and loggers.


def test_levels_are_kept_and_loggers_given_back():
    logger = logging.getLogger("esper")
    before = (logger.level, logger.propagate, list(logger.handlers))
    stream = io.StringIO()
    with configure_logs("plain", "warning", stream=stream):
        LOG.debug("debug")
        LOG.info("info")
        LOG.warning("warning")
        LOG.error("error")
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == ["WARNING", "ERROR"]
    assert (logger.level, logger.propagate, list(logger.handlers)) == before
    LOG.error("to nobody")
    assert "nobody" not in stream.getvalue()


def test_other_loggers_can_be_taken_along():
    def act():
        logging.getLogger("uvicorn.error").info("started")

    (found,) = objects(act, loggers=["esper", "uvicorn"])
    assert found["logger"] == "uvicorn.error"


@pytest.mark.parametrize("wrong", [{"format": "xml"}, {"level": "loud"}, {"capacity": 0}], ids=str)
def test_what_is_wrong_is_refused(wrong):
    message = "a format of auto, json, plain, rich, a level of debug, .*; got "
    with pytest.raises(InputError, match=message):
        configure_logs(**wrong)


def test_auto_is_rich_on_a_terminal_and_plain_elsewhere():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for stream, coloured in ((Terminal(), True), (io.StringIO(), False)):
        with configure_logs("auto", stream=stream):
            LOG.info("x")
        assert ("\x1b[" in stream.getvalue()) == coloured


# Fields of a context.


def test_bound_fields_are_on_every_record_of_their_block():
    def act():
        with bound(run="a", step=1):
            LOG.info("1")
            with bound(step=2):
                LOG.info("2", step=3, own=4)
                logging.getLogger("esper.x").info("3")
            LOG.info("4")
        LOG.info("5")

    found = [(each.get("run"), each.get("step"), each.get("own")) for each in objects(act)]
    assert found == [("a", 1, None), ("a", 3, 4), ("a", 2, None), ("a", 1, None), (None,) * 3]


def test_tasks_and_threads_have_their_own():
    async def one(name):
        with bound(task=name):
            for _ in range(3):
                await asyncio.sleep(0)
                LOG.info("x", expected=name)

    async def both():
        with bound(outer=1):
            await asyncio.gather(one("a"), one("b"))

    def thread(name):
        with bound(task=name):
            LOG.info("x", expected=name)

    def act():
        asyncio.run(both())
        threads = [threading.Thread(target=thread, args=(str(n),)) for n in range(4)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()

    found = objects(act)
    assert len(found) == 10
    assert all(each["task"] == each["expected"] for each in found)
    assert sum("outer" in each for each in found) == 6


# Secrets.


@pytest.mark.parametrize(
    ("name", "secret"),
    [("token", True), ("access_token", True), ("Authorization", True),
     ("s3.secret_access_key", True), ("password", True), ("api_key", True), ("cookies", True),
     ("credentials", True),
     ("tokens", True), ("token_file", False), ("access_key_id", False), ("token_count", False),
     ("key", False), ("tokenizer", False), ("kernel", False), ("secretary", False)],
)  # fmt: skip
def test_which_names_are_secret(name, secret):
    assert is_secret_name(name) == secret


SECRET = "hunter2hunter2"


@pytest.mark.parametrize("form", ["json", "plain", "rich"])
def test_no_secret_is_written(form):
    def act():
        LOG.info("connecting to postgresql://esper:hunter2hunter2@db/x", token=SECRET)
        LOG.info("GET with Authorization: Bearer hunter2hunter2")
        LOG.info("x", headers={"Authorization": f"Bearer {SECRET}"}, url=f"redis://:{SECRET}@h")
        LOG.info("x", nested=[{"password": SECRET}], body=f'{{"token": "{SECRET}"}}')
        LOG.info("x", query=f"http://h/?api_key={SECRET}&a=1")
        with bound(secret=SECRET):
            LOG.info("x")
        try:
            raise ConnectionError(f"cannot reach redis://u:{SECRET}@h:6379")
        except ConnectionError as error:
            LOG.exception("failed", error)

    assert "hunter2" not in written(form, act)


@pytest.mark.parametrize("form", ["json", "plain", "rich"])
def test_known_secrets_are_not_written_wherever_they_are(form):
    def act():
        LOG.info(f"well, {SECRET}!", word=[f"<{SECRET}>"], number=7)

    assert SECRET in written(form, act)
    told = written(form, act, secrets=[SECRET, "7", "<"])
    assert SECRET not in told
    assert "well, ***!" in told
    assert "7" in told  # what is short is in everything


@given(st.text(max_size=40))
def test_what_holds_no_secret_is_as_it_was(text):
    plain = text.replace(":", "").replace("=", "").replace("@", "")
    if "earer" not in plain.lower() and "asic" not in plain.lower():
        assert Redaction().text(plain) == plain


@pytest.mark.parametrize(
    "part", ["a", "://", "a://", "a:b@", "?", "?token", "token", "bearer ", " ", "=", "&key", "-."]
)
def test_long_texts_take_no_longer_than_they_are(part):
    # Where it took the square of the length, this would not end.
    redaction = Redaction((SECRET,))
    text = part * (1_000_000 // len(part))
    assert len(redaction.text(text)) > 0
    assert SECRET not in redaction.text(text + f" http://u:{SECRET}@h")


# That nobody waits.


def test_who_logs_never_waits_and_what_has_no_room_is_counted_and_told():
    receiving, sending = os.pipe()
    stream = os.fdopen(sending, "w")
    logs = configure_logs("json", stream=stream, capacity=50)
    # Nobody reads: the pipe fills up, then the queue. If logging waited, this would not end.
    for n in range(5_000):
        LOG.info("x" * 2_000, n=n)
    assert logs.dropped > 1_000
    assert not logs.stop(0.2)

    read = []

    def drain():
        with os.fdopen(receiving) as lines:
            read.extend(map(json.loads, lines))

    reader = threading.Thread(target=drain)
    reader.start()
    assert logs._writer.stop(60)
    with contextlib.suppress(OSError):
        stream.close()
    reader.join(60)
    told = [each["dropped"] for each in read if "dropped_in_all" in each]
    assert sum(told) == logs.dropped
    numbers = [each["n"] for each in read if "n" in each]
    assert numbers == sorted(numbers)
    assert len(numbers) == logs.written == 5_000 - logs.dropped


def test_nobody_who_reads_and_no_room_on_the_disk_stop_nobody(small_disk):
    receiving, sending = os.pipe()
    os.close(receiving)
    with os.fdopen(sending, "w") as stream, configure_logs("json", stream=stream) as logs:
        LOG.info("x")
    assert (logs.written, logs.failed) == (0, 1)
    with (small_disk(1024) / "log").open("w") as stream:
        logs = configure_logs("json", stream=stream)
        for _ in range(64):
            LOG.info("x" * (1 << 16))
        assert logs.stop(60)
        assert logs.failed > 0
        assert logs.written + logs.failed == 64


def test_many_threads_lose_nothing():
    def act():
        def some(name):
            for n in range(200):
                LOG.info("x", thread=name, n=n)

        threads = [threading.Thread(target=some, args=(name,)) for name in range(8)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()

    found = objects(act)
    for name in range(8):
        assert [each["n"] for each in found if each["thread"] == name] == list(range(200))


def test_what_was_logged_is_written_when_the_process_ends():
    script = """
from esper.logs import configure_logs, get_log
configure_logs("json")
for n in range(300):
    get_log("esper.x").info("x", n=n)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    assert [json.loads(line)["n"] for line in done.stderr.splitlines()] == list(range(300))


def test_a_process_ends_though_nobody_reads_what_it_logged():
    script = """
from esper.logs import configure_logs, get_log
configure_logs("json")
for n in range(3_000):
    get_log("esper.x").info("x" * 1_000, n=n)
print("done", flush=True)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        assert process.stdout.read() == "done\n"
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.stdout.close()
        process.stderr.close()
        process.wait()


def test_stopping_twice_is_stopping_once():
    logs = configure_logs("plain", stream=io.StringIO())
    assert logs.stop()
    assert logs.stop()
    assert logs.written == 0
