"""`esper grow --bus URL`: what a run tells, and that it runs the same without anybody who hears."""

import json

import pytest

from esper.contracts import PAYLOADS, Topic, payload_of
from esper.oona import SqliteBroker
from tests.esper.test_cli import esper_here

CONFIG = "steps: 60\ndecide_every: 10\ncheckpoint_every: 30\nvariants: 1\n"


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    place = tmp_path_factory.mktemp("told")
    (place / "short.yaml").write_text(CONFIG)
    for out, bus in (("told", ["--bus", f"sqlite:{place / 'bus.sqlite'}"]), ("silent", [])):
        esper_here(
            "grow", "--task", "spirals", "--backend", "torch", "--controller", "none",
            "--config", place / "short.yaml", "--out", place / out, *bus, check=0,
        )  # fmt: skip
    return place


def test_a_run_tells_its_measurements_and_events_as_it_writes_them(told):
    with SqliteBroker(told / "bus.sqlite") as broker:
        consumer = broker.consumer("all", list(Topic), start="all")
        got = [each.message for each in consumer.receive(1000)]
    name = str(told / "told")
    assert {message.sender_id for message in got} == {name}
    assert all(isinstance(payload_of(message), PAYLOADS[message.topic]) for message in got)
    rows = [message.payload for message in got if message.topic == Topic.METRICS]
    written = [json.loads(line) for line in (told / "told/metrics.jsonl").read_text().splitlines()]
    assert rows == written
    entries = [message.payload for message in got if message.topic == Topic.SEED_EVENT]
    lines = (told / "told/events.jsonl").read_text().splitlines()
    assert entries == [json.loads(line)["entry"] for line in lines]


def test_telling_changes_nothing_of_a_run(told):
    def end(run):
        return json.loads((told / run / "events.jsonl").read_text().splitlines()[-1])["entry"]

    assert end("told") == end("silent")


def test_a_bus_that_is_none_is_said_before_anything_is_trained(tmp_path):
    for url, match in (
        ("http://x", "http: names no bus: expected memory:, sqlite:PATH or redis://"),
        (f"sqlite:{tmp_path}/no/bus.sqlite", "there is no folder"),
        ("sqlite:bus?synchronous=maybe", "synchronous is 'normal' or 'full', not 'maybe'"),
    ):
        done = esper_here(
            "grow", "--task", "spirals", "--out", tmp_path / "run", "--bus", url, check=2
        )
        assert match in done.output.replace("\n", "")
    assert not (tmp_path / "run").exists()
