"""Messages, and what they may hold."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

import esper.oona
import esper.recovery
import esper.tamiyo
from esper import contracts
from esper.contracts import (
    BATCHES,
    ENTRY_FIELDS,
    MAX_MESSAGE_BYTES,
    MOST_ROWS,
    PAYLOADS,
    AdaptationDecision,
    AdaptationDecisionBatch,
    HealthSignal,
    HealthSignalBatch,
    OonaMessage,
    SeedEvent,
    Topic,
    TopicNames,
    payload_of,
    topic_of,
)
from esper.errors import MessageError, UnknownTopicError
from esper.recovery import ErrorType, HealthMonitor
from esper.tolaria import start_run
from esper_functional import EventKind, SeedLifecycleState
from tests.esper.contract_values import JSON, data_of, entries
from tests.esper.recovery_clock import context, failing, managed
from tests.esper.runs import EVENTFUL, UNSTEADY, config

SMALL = OonaMessage(topic=Topic.ERROR, sender_id="a", payload={})


@given(data_of(OonaMessage))
def test_a_message_is_read_back_as_it_was(message):
    data = message.to_bytes()
    found = OonaMessage.from_bytes(data)
    assert found == message
    assert found.to_bytes() == data


def test_messages_made_here_have_an_id_and_a_time_of_their_own():
    other = OonaMessage(topic=Topic.ERROR, sender_id="a", payload={})
    assert other.message_id != SMALL.message_id
    assert other.sent_at >= SMALL.sent_at > 0
    data = {k: v for k, v in json.loads(SMALL.to_bytes()).items() if k != "message_id"}
    with pytest.raises(MessageError, match="it lacks message_id"):
        OonaMessage.from_bytes(json.dumps(data).encode())


def _sized(size):
    free = size - len(OonaMessage.model_copy(SMALL, update={"payload": {"x": ""}}).to_bytes())
    return OonaMessage.model_copy(SMALL, update={"payload": {"x": "a" * free}})


def test_a_message_may_be_as_large_as_it_may_be_and_no_larger():
    data = _sized(MAX_MESSAGE_BYTES).to_bytes()
    assert len(data) == MAX_MESSAGE_BYTES
    assert OonaMessage.from_bytes(data).to_bytes() == data
    large = "has 1,048,577 bytes, and may have at most 1,048,576: send less"
    with pytest.raises(MessageError, match=f"about error.occurred {large}"):
        _sized(MAX_MESSAGE_BYTES + 1).to_bytes()
    with pytest.raises(MessageError, match=large):
        OonaMessage.from_bytes(data + b" ")


def _deep(levels):
    inner = 1
    for _ in range(levels):
        inner = [inner]
    return {"x": inner}


def _written(levels):
    message = OonaMessage(topic=Topic.ERROR, sender_id="a", payload=_deep(levels))
    return message, message.to_bytes()


def test_what_is_written_can_be_read_however_deep_it_is():
    for levels in (10, 185, 190, 195):
        message, data = _written(levels)
        assert OonaMessage.from_bytes(data) == message
    for levels in (200, 210, 230):
        with pytest.raises(MessageError, match="about error.occurred.*recursion limit"):
            _written(levels)


@pytest.mark.parametrize("payload", [{"x": "\ud800"}, {"\ud800": 1}], ids=["a value", "a key"])
def test_text_that_is_no_unicode_is_refused(payload):
    with pytest.raises(
        (MessageError, ValidationError), match="surrogates not allowed|valid string|unicode"
    ):
        OonaMessage(topic=Topic.ERROR, sender_id="a", payload=payload).to_bytes()


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_payload_is_json(number):
    for payload in ({"x": number}, {"x": [{"y": number}]}):
        with pytest.raises(ValidationError, match="finite number"):
            OonaMessage(topic=Topic.ERROR, sender_id="a", payload=payload)
    for value in ({1, 2}, object(), b"x", (1, 2)):
        with pytest.raises(ValidationError, match="not a valid JSON value"):
            OonaMessage(topic=Topic.ERROR, sender_id="a", payload={"x": value})


def _changed(**changes):
    return json.dumps({**json.loads(SMALL.to_bytes()), **changes}).encode()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "it is no JSON"),
        (b"\xff", "it is no JSON"),
        (b"[]", "no JSON object, but a list"),
        (b"[" * 1_000, "it is no JSON: recursion limit"),
        (SMALL.to_bytes()[:-1], "it is no JSON: EOF"),
        (SMALL.to_bytes().replace(b"{}", b'{"x":NaN}'), "it is no JSON"),
        (SMALL.to_bytes().replace(b"{}", b'{"x":1e999}'), "payload.*finite number"),
        (_changed(payload=[]), "payload: .*dictionary"),
        (_changed(payload=None), "payload: .*dictionary"),
        (_changed(sender_id=1), r"sender_id: .*string \(got 1\)"),
        (_changed(sender_id="a\x1b[2J"), "sender_id: String should match"),
        (_changed(key="a" * 201), "key: String should have at most 200"),
        (_changed(message_id="../x"), "message_id: String should match"),
        (_changed(sent_at=-1), "sent_at: .*greater than or equal"),
        (_changed(topic=3), r"topic: .*Topic"),
        (_changed(more=1), "more: Extra inputs"),
    ],
)
def test_what_is_no_message_says_where_and_what(data, message):
    with pytest.raises(MessageError, match=f"this is no message: .*{message}|{message}"):
        OonaMessage.from_bytes(data)


def test_an_unknown_topic_names_the_nearest():
    with pytest.raises(UnknownTopicError, match="'seed.events'.*mean 'seed.event'"):
        topic_of("seed.events")
    with pytest.raises(UnknownTopicError, match="expected one of seed.event, ") as raised:
        OonaMessage.from_bytes(_changed(topic="z" * 1_000))
    assert len(str(raised.value)) < 500
    assert topic_of("seed.event") is Topic.SEED_EVENT


def test_the_owner_s_names_are_there():
    assert TopicNames.TELEMETRY_SEED_HEALTH is Topic.SEED_HEALTH
    assert Topic.SEED_HEALTH == "telemetry.seed.health"


def test_there_is_one_vocabulary():
    assert esper.oona.Topic is contracts.Topic
    assert esper.tamiyo.Action is contracts.Action
    assert esper.recovery.ErrorType is contracts.ErrorType
    assert esper.recovery.RecoveryStrategy is contracts.RecoveryStrategy
    assert esper.recovery.CircuitState is contracts.CircuitState
    stage = contracts.HealthSignal.model_fields["stage"]
    least, most = (
        getattr(each, key) for each, key in zip(stage.metadata, ("ge", "le"), strict=True)
    )
    assert list(range(least, most + 1)) == [int(each) for each in SeedLifecycleState]
    own = {"mark", "veto", "worth", "rollback", "note", "decision"}
    assert set(ENTRY_FIELDS) == {str(kind) for kind in EventKind} | own


def test_a_decision_of_a_controller_is_an_adaptation_decision():
    import dataclasses

    own = {field.name for field in dataclasses.fields(esper.tamiyo.Decision)}
    assert set(AdaptationDecision.model_fields) == own | {"schema_version", "step"}
    effect = esper.tamiyo.Worth(0.2, -0.1, 0.5)
    full = esper.tamiyo.Decision(
        contracts.Action.UNLOAD, 0, 1, "", uncertainty=0.3, effect=effect, features=(("a", 0.5),)
    )
    sent = AdaptationDecision(step=50, **dataclasses.asdict(full))
    assert AdaptationDecision.model_validate_json(sent.model_dump_json()) == sent
    assert (sent.uncertainty, sent.effect, sent.features) == (0.3, effect, full.features)


# Payloads.


def test_every_topic_has_a_payload():
    assert set(PAYLOADS) == set(Topic)
    assert set(BATCHES) <= set(Topic)


@pytest.mark.parametrize("topic", Topic)
def test_a_payload_is_read_as_what_its_topic_says(topic):
    @given(data_of(PAYLOADS[topic]))
    def law(value):
        sent = OonaMessage(topic=topic, sender_id="a", payload=value.model_dump(mode="json"))
        assert payload_of(OonaMessage.from_bytes(sent.to_bytes())) == value

    law()
    bad = OonaMessage(topic=topic, sender_id="worker 7", payload={"what": 1})
    message = rf"about {topic} from 'worker 7' holds no {PAYLOADS[topic].__name__}: .*what: Extra"
    with pytest.raises(MessageError, match=message):
        payload_of(bad)


@pytest.mark.parametrize("topic", BATCHES)
def test_a_batch_is_a_payload_too_and_loses_nothing(topic):
    batch, item = BATCHES[topic], PAYLOADS[topic]
    assert batch.ITEM is item

    @given(st.lists(data_of(item), max_size=5))
    def law(values):
        made = batch.of(values)
        assert len(made) == len(values)
        sent = OonaMessage(topic=topic, sender_id="a", payload=made.model_dump(mode="json"))
        found = payload_of(OonaMessage.from_bytes(sent.to_bytes()))
        assert found == made
        assert found.items() == values

    law()


@pytest.mark.parametrize("batch", [HealthSignalBatch, AdaptationDecisionBatch])
def test_a_batch_has_the_columns_of_its_items_and_their_bounds(batch):
    columns, fields = batch.model_fields, batch.ITEM.model_fields
    assert list(columns) == list(fields)

    @given(data_of(batch))
    def law(value):
        data = value.model_dump(mode="json")
        name = list(fields)[1]
        with pytest.raises(ValidationError, match="columns differ in length"):
            batch.model_validate_json(json.dumps({**data, name: [*data[name], 0]}))

    law()


def test_a_batch_has_bounds():
    signal = HealthSignal(
        layer_id=0, seed_id=0, activation_variance=1.0, dead_neuron_ratio=0.0, avg_correlation=0.0
    )
    data = HealthSignalBatch.of([signal]).model_dump(mode="json")
    for name, bad in (("avg_correlation", 1.5), ("stage", 5), ("layer_id", -1)):
        with pytest.raises(ValidationError, match=rf"{name}.0\n.*(less|greater) than"):
            HealthSignalBatch.model_validate_json(json.dumps({**data, name: [bad]}))
    with pytest.raises(ValidationError, match=f"at most {MOST_ROWS} rows"):
        HealthSignalBatch.of([signal] * (MOST_ROWS + 1))


def test_the_signals_of_a_thousand_seeds_are_one_message():
    signals = [
        HealthSignal(
            layer_id=i, seed_id=3, chunk_id=1, epoch=1_000, step=1_000_000, stage=2,
            activation_variance=0.1 * i, dead_neuron_ratio=1 / 3, avg_correlation=-1 / 3,
            health_score=0.1, error_count=2,
        )
        for i in range(1_000)
    ]  # fmt: skip
    payload = HealthSignalBatch.of(signals).model_dump(mode="json")
    message = OonaMessage(topic=Topic.SEED_HEALTH, sender_id="a", payload=payload)
    assert len(message.to_bytes()) < MAX_MESSAGE_BYTES // 4


# Entries of a ledger.


@pytest.mark.parametrize("kind", ENTRY_FIELDS)
def test_an_entry_has_what_its_kind_has_and_nothing_else(kind):
    @given(entries(kind), st.data())
    def law(event, drawn):
        entry = event.model_dump(mode="json", exclude_unset=True)
        assert set(entry) == {"kind"} | ENTRY_FIELDS[kind]
        assert SeedEvent.model_validate_json(json.dumps(entry)) == event
        gone = drawn.draw(st.sampled_from(sorted(ENTRY_FIELDS[kind] - {"step"})))
        without = {key: value for key, value in entry.items() if key != gone}
        with pytest.raises(ValidationError, match=f"kind {kind} lacks {gone}"):
            SeedEvent.model_validate_json(json.dumps(without))
        extra = "cause" if kind != "rollback" else "rule"
        with pytest.raises(ValidationError, match=f"kind {kind} has no {extra}: it holds"):
            SeedEvent.model_validate_json(json.dumps({**entry, extra: ""}))

    law()


@pytest.mark.parametrize(
    ("kind", "value"),
    [("activate", 1.5), ("alpha", -0.1), ("health", 2.0), ("load", 0.5), ("load", -1.0),
     ("errors", 1.5), ("latency", -1.0), ("fold", None)],
)  # fmt: skip
def test_values_of_entries_are_in_the_range_of_their_kind(kind, value):
    entry = {"kind": kind, "step": 1, "layer": 0, "seed": 0, "kernel": "", "value": value,
             "span": 0, "reason": ""}  # fmt: skip
    with pytest.raises(ValidationError, match=f"entry of kind {kind}"):
        SeedEvent.model_validate_json(json.dumps(entry))


@given(JSON)
def test_any_json_can_travel(value):
    message = OonaMessage(topic=Topic.ERROR, sender_id="a", payload={"x": value})
    found = OonaMessage.from_bytes(message.to_bytes())
    assert found == message
    assert repr(found.payload) == repr(message.payload)


# What is published today.


def _checked(bus_messages):
    """Each is a payload of its topic, and as a message is read back as it was."""
    for message in bus_messages:
        sent = OonaMessage(topic=message.topic, sender_id="run", payload=dict(message.payload))
        found = OonaMessage.from_bytes(sent.to_bytes())
        assert found == sent
        value = payload_of(found)
        assert value.model_dump(mode="json", exclude_unset=True) == message.payload


@pytest.mark.parametrize(("backend", "values"), [("torch", UNSTEADY), ("jax", EVENTFUL)])
def test_all_that_a_run_publishes_is_what_its_topic_says(backend, values, tmp_path):
    bus = esper.oona.InProcessBus()
    heard = bus.subscribe(*Topic)
    start_run(tmp_path / "run", config(tmp_path, backend, values, steps=160), bus=bus)
    messages = heard.drain()
    _checked(messages)
    assert {message.topic for message in messages} == {Topic.SEED_EVENT, Topic.METRICS}
    kinds = {m.payload["kind"] for m in messages if m.topic is Topic.SEED_EVENT}
    assert {"load", "activate", "incubate", "ramp", "health", "worth", "mark"} <= kinds
    assert ("rollback" in kinds) == (values is UNSTEADY)


def test_all_that_recovery_publishes_is_what_its_topic_says():
    bus = esper.oona.InProcessBus()
    heard = bus.subscribe(*Topic)
    manager, _ = managed(bus=bus)
    for kind in ErrorType:
        metadata = {"n": 1, "share": 0.5, "on": True, "none": None, "other": object()}
        where = context(kind, kernel_id="k" * 64, layer_name="a", seed_idx=2, metadata=metadata)
        manager.handle_error_sync(where, lambda: True)
    guard = manager.guard("urza")
    for _ in range(2):
        with pytest.raises(ConnectionError):
            guard(failing(9))
    monitor = HealthMonitor(recovery=manager)
    for usage in (10.0, 99.0):
        monitor.update_metrics(0, 1, 1.0, usage)
        monitor.check_system_health_sync(lambda: True)
    messages = heard.drain()
    _checked(messages)
    topics = {message.topic for message in messages}
    assert topics == {Topic.ERROR, Topic.RECOVERY, Topic.CIRCUIT, Topic.HEALTH}
