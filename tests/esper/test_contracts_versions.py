"""What older and newer versions of Esper wrote."""

import json

import pytest
from hypothesis import given

from esper.contracts import (
    UPGRADES,
    Action,
    AdaptationDecision,
    AdaptationDecisionBatch,
    BlueprintRequest,
    Claim,
    KernelRecord,
    KernelState,
    OonaMessage,
    Page,
    Topic,
    payload_of,
    read,
    schema_version,
)
from esper.errors import InputError, MessageError, SchemaVersionError
from tests.esper.contract_schemas.models import MODELS
from tests.esper.contract_values import data_of

BEFORE_STATES = {
    "kernel_id": "a" * 64, "recipe": "b" * 64, "blueprint": "mlp", "signature": "2->8 float32",
    "birth": "zero", "confidence": 0.5, "init_seed": 3, "parameter_count": 10, "flops": 20,
    "size_bytes": 30,
}  # fmt: skip
"""A record as libraries kept it when kernels had no states."""

VERSIONED = {name: model for name, model in MODELS.items() if schema_version(model)}


def test_an_older_record_is_upgraded_by_the_table():
    assert (KernelRecord, 1) in UPGRADES
    found = read(KernelRecord, json.dumps(BEFORE_STATES))
    assert found.schema_version == 2
    assert found.state is KernelState.TESTING
    assert (found.tags, found.ancestor, found.created) == ((), None, 0.0)
    assert {key: getattr(found, key) for key in BEFORE_STATES} == BEFORE_STATES
    assert read(KernelRecord, found.model_dump_json()) == found


def test_an_older_record_inside_of_something_else_is_upgraded_too():
    page = {"schema_version": 1, "items": [BEFORE_STATES], "next_cursor": None}
    assert read(Page[KernelRecord], json.dumps(page)).items == (
        read(KernelRecord, json.dumps(BEFORE_STATES)),
    )


def test_an_older_decision_had_no_effect():
    old = {"schema_version": 1, "step": 50, "action": "graft", "layer": 0, "seed": 1}
    found = read(AdaptationDecision, json.dumps(old))
    assert found == AdaptationDecision(step=50, action=Action.GRAFT, layer=0, seed=1)
    assert (found.uncertainty, found.effect, found.features) == (None, None, ())
    columns = {
        "step": [50, 60], "action": ["graft", "unload"], "layer": [0, 1], "seed": [1, 2],
        "reason": ["", ""], "kernel_id": ["", ""], "initialisation": ["", ""],
        "alpha": [1.0, 1.0], "confidence": [1.0, 1.0],
    }  # fmt: skip
    batch = read(AdaptationDecisionBatch, json.dumps(columns))
    assert batch.items()[0] == found
    assert [own.effect for own in batch.items()] == [None, None]
    assert read(AdaptationDecisionBatch, batch.model_dump_json()) == batch


def test_every_version_but_the_newest_has_an_upgrade():
    older = {
        (model, version)
        for model in VERSIONED.values()
        for version in range(1, schema_version(model) or 1)
    }
    # A manifest is part of what its artifact's digest is of, so it is read as it was written.
    assert set(UPGRADES) == {each for each in older if each[0].__name__ != "Manifest"}


@pytest.mark.parametrize("model", VERSIONED.values(), ids=VERSIONED)
def test_a_newer_version_is_refused_and_named(model):
    known = schema_version(model)

    @given(data_of(model))
    def law(value):
        data = {**value.model_dump(mode="json"), "schema_version": known + 5, "what_is_new": 1}
        message = rf"schema version {known + 5}.*knows it up to {known}.*Update Esper"
        with pytest.raises(SchemaVersionError, match=message):
            read(model, json.dumps(data))

    law()


def test_a_newer_version_inside_of_something_else_is_refused():
    page = {"items": [{**BEFORE_STATES, "schema_version": 3}]}
    with pytest.raises(SchemaVersionError, match="this KernelRecord has schema version 3"):
        read(Page[KernelRecord], json.dumps(page))


@pytest.mark.parametrize("version", [0, -1, "1", 1.5, True, None])
def test_what_is_no_version_is_refused(version):
    with pytest.raises(InputError, match=r"schema_version: Input should be 2"):
        read(KernelRecord, json.dumps({**BEFORE_STATES, "schema_version": version}))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "this is no KernelRecord: all of it: Invalid JSON"),
        (b"[1]", "should be an object"),
        (b"\xff\xfe", "Invalid JSON"),
        (b"[" * 100_000, "Invalid JSON: recursion limit"),
        (b'{"kernel_id": "x"}', "kernel_id: String should match.*'x'.*recipe: Field required"),
    ],
)  # fmt: skip
def test_what_is_no_data_says_where_and_what(data, message):
    with pytest.raises(InputError, match=message):
        read(KernelRecord, data)


@given(data_of(Claim))
def test_what_is_secret_or_long_is_not_repeated(claim):
    data = claim.model_dump(mode="json")
    data["token"] = "hunter2" * 1_000
    with pytest.raises(InputError, match="token: String should match") as raised:
        read(Claim, json.dumps(data))
    assert "hunter2" not in str(raised.value)
    with pytest.raises(InputError, match="source.*canonical") as raised:
        read(BlueprintRequest, json.dumps({"source": '{"name": "hunter2"}', "signature": None}))
    assert "hunter2" not in str(raised.value)


def test_a_newer_message_or_payload_is_refused():
    message = OonaMessage(topic=Topic.HEALTH, sender_id="x", payload={"schema_version": 9})
    with pytest.raises(SchemaVersionError, match="HealthMeasured has schema version 9"):
        payload_of(message)
    data = json.loads(message.to_bytes())
    with pytest.raises(SchemaVersionError, match="OonaMessage has schema version 7"):
        OonaMessage.from_bytes(json.dumps({**data, "schema_version": 7}).encode())
    with pytest.raises(MessageError, match="schema_version: Input should be 1"):
        OonaMessage.from_bytes(json.dumps({**data, "schema_version": "x"}).encode())
