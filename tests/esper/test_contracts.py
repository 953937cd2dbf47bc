"""Laws of every contract: nothing is lost on the way, and nothing else gets through."""

import functools
import json
import math
import subprocess
import sys

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import esper.contracts
from esper.contracts import (
    LONGEST_REASON,
    BlueprintRequest,
    Claim,
    KernelChanged,
    KernelOutcome,
    KernelRecord,
    KernelSignature,
    OonaMessage,
    TrainingMetrics,
    read,
    reason_text,
    schema_version,
)
from tests.esper.contract_schemas.models import FOLDER, MODELS, PARTS, schema_text
from tests.esper.contract_values import NOT_FINITE, PATTERNS, bounds, data_of

EVERY = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)


@EVERY
def test_what_is_written_is_read_back_as_it_was(model):
    @given(data_of(model))
    def law(value):
        text = value.model_dump_json()
        found = read(model, text)
        assert found == value
        assert found.model_dump_json() == text
        data = value.model_dump(mode="json")
        assert model.model_validate_json(json.dumps(data)) == value
        # The defaults of what is made here, a new id and the time, are no part of what was sent.
        if model is not OonaMessage:
            given = value.model_dump_json(exclude_unset=True)
            assert model.model_validate_json(given) == value
        name = next(iter(model.model_fields))
        with pytest.raises(ValidationError, match="frozen"):
            setattr(value, name, getattr(value, name))
        with pytest.raises(ValidationError, match="anything_else\n.*not permitted"):
            model.model_validate_json(json.dumps({**data, "anything_else": 1}))

    law()


def _places(data, path=()):
    """The places of all numbers and truth values in JSON data."""
    if isinstance(data, dict):
        for key, value in data.items():
            yield from _places(value, (*path, key))
    elif isinstance(data, list):
        for index, value in enumerate(data):
            yield from _places(value, (*path, index))
    elif isinstance(data, (int, float)):
        yield path, data


def _with(data, path, value):
    if not path:
        return value
    copy = dict(data) if isinstance(data, dict) else list(data)
    copy[path[0]] = _with(data[path[0]], path[1:], value)
    return copy


def _confusions(value):
    """What is no number, or no truth value, and Python takes for one."""
    if isinstance(value, bool):
        return [int(value), str(value).lower()]
    whole = isinstance(value, int)
    wrong = [False, True, str(value), None] if not whole else [False, str(value), value + 0.5]
    return wrong + ([] if whole else list(NOT_FINITE))


FREE = {"payload", "metadata", "value", "low", "high", "seed", "source"}
"""Fields whose values may be of several types."""


@EVERY
def test_no_truth_value_is_a_number_and_no_number_a_text_and_none_is_nan(model):
    tried = 0

    @given(data_of(model), st.data())
    def law(value, drawn):
        nonlocal tried
        data = json.loads(value.model_dump_json())
        places = [
            (path, wrong)
            for path, number in _places(data)
            for wrong in _confusions(number)
            if not FREE & set(map(str, path)) and not (wrong is None and _may_be_none(model, path))
        ]
        if places:
            tried += 1
            path, wrong = drawn.draw(st.sampled_from(places))
            with pytest.raises(ValidationError):
                model.model_validate_json(json.dumps(_with(data, path, wrong)))

    law()
    has_numbers = any(kind in schema_text(model) for kind in ('"integer"', '"number"', '"boolean"'))
    assert tried or not has_numbers


def _may_be_none(model, path):
    return '"null"' in json.dumps(model.model_json_schema()["properties"][path[0]])


@pytest.mark.parametrize("number", NOT_FINITE)
@pytest.mark.parametrize(
    ("model", "name"), [(KernelOutcome, "gain"), (KernelRecord, "created"), (Claim, "seconds")]
)
def test_numbers_are_finite_in_python_too(model, name, number):
    @given(data_of(model))
    def law(value):
        with pytest.raises(ValidationError, match=name):
            model(**{**dict(value), name: number})

    law()


@functools.cache
def _one(model):
    found = []

    @settings(max_examples=1, phases=[Phase.generate])
    @given(data_of(model))
    def take(value):
        found.append(value)

    take()
    return found[0]


def _bounded():
    for title, model in MODELS.items():
        for name, field in model.model_fields.items():
            if isinstance(field.annotation, type) and field.annotation in (int, float):
                known = bounds(list(field.metadata))
                yield from ((title, name, key, known[key]) for key in known)


@pytest.mark.parametrize(("title", "name", "key", "bound"), list(_bounded()))
def test_bounds_hold_and_are_named(title, name, key, bound):
    model = MODELS[title]
    whole = model.model_fields[name].annotation is int
    step = 1 if whole else abs(bound) * 1e-9 or 1e-300
    beyond = {"ge": bound - step, "gt": bound, "le": bound + step}[key]
    value = _one(model)
    with pytest.raises(ValidationError, match=rf"{name}\n.*(greater|less) than"):
        model(**{**dict(value), name: beyond})


@pytest.mark.parametrize(
    ("pattern", "bad"),
    [
        (
            r"^[^\p{C}\p{Zl}\p{Zp}]*$",
            ["a\x1b[2J", "a\nb", "a\n", "a\N{LINE SEPARATOR}", "\N{RIGHT-TO-LEFT OVERRIDE}a"],
        ),
        (r"^[0-9a-f]{64}$", ["", "a" * 63, "A" * 64, "a" * 64 + "\n", "../" + "a" * 61]),
        (r"^[0-9a-f]{32}$", ["a" * 31, "G" * 32]),
        (r"^[^\x00]*$", ["\0"]),
        (r"^[!-~]*$", ["a b", "ä", "a\n"]),
        (
            r"^[0-9]+(x[0-9]+)*->[0-9]+(x[0-9]+)* (float32|bfloat16)$",
            ["2->8", "2->8 float64", "->8 float32", "2x->8 float32", "2->8 float32\n"],
        ),
    ],
)  # fmt: skip
def test_texts_hold_nothing_that_steers_a_terminal_a_path_or_a_database(pattern, bad):
    from typing import Annotated

    from pydantic import Field, TypeAdapter

    assert pattern in PATTERNS
    checked = TypeAdapter(Annotated[str, Field(pattern=pattern)])
    for text in bad:
        with pytest.raises(ValidationError, match="String should match pattern"):
            checked.validate_python(text)


@EVERY
def test_a_schema_does_not_change_unnoticed(model):
    name = next(name for name, own in MODELS.items() if own is model)
    path = FOLDER / f"{name}.json"
    again = "python -m tests.esper.contract_schemas.models"
    assert path.is_file(), f"there is no schema of {name}: write it by `{again}`"
    assert path.read_text() == schema_text(model), (
        f"the schema of {name} is not what it was. If it was changed on purpose, see what that asks"
        f" for in {FOLDER / 'models.py'}, and write it by `{again}`"
    )


def test_there_is_no_schema_of_what_is_gone():
    assert {path.stem for path in FOLDER.glob("*.json")} == set(MODELS)


def test_all_that_is_stored_or_sent_says_its_version():
    assert {name for name, model in MODELS.items() if schema_version(model) is None} == PARTS | {
        "KernelMetadata"
    } & set(MODELS)


def test_the_names_are_listed_and_there():
    assert len(set(esper.contracts.__all__)) == len(esper.contracts.__all__)
    assert not [name for name in esper.contracts.__all__ if not hasattr(esper.contracts, name)]


def test_importing_and_using_them_takes_neither_a_framework_nor_a_database():
    script = """
import sys
from esper.contracts import *
signature = KernelSignature.parse("2->8")
request = BlueprintRequest(source='{\\n "name": "a"\\n}', signature=signature)
message = OonaMessage(topic=Topic.HEALTH, sender_id="a", payload={
    "score": 1.0, "should_intervene": False, "reason": ""})
payload_of(OonaMessage.from_bytes(message.to_bytes()))
read(BlueprintRequest, request.model_dump_json())
check_move("a kernel", KernelState.TESTING, KernelState.VALIDATED)
print(*sorted(m for m in sys.modules if "." not in m))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    heavy = {"torch", "jax", "jaxlib", "numpy", "sqlalchemy", "alembic", "obstore", "fastapi"}
    assert not set(done.stdout.split()) & heavy


# What single models promise.

SIGNATURE = KernelSignature.parse("2->8")
SOURCE = '{\n "name": "mlp"\n}'


@given(data_of(BlueprintRequest), data_of(BlueprintRequest))
def test_a_blueprint_has_one_id_whatever_its_tags_and_priority(one, other):
    def without(request):
        return request.model_copy(update={"tags": (), "priority": 0})

    assert one.blueprint_id == without(one).blueprint_id
    assert (one.blueprint_id == other.blueprint_id) == (without(one) == without(other))
    shuffled = one.model_copy(update={"sizes": dict(reversed(one.sizes.items()))})
    assert shuffled.blueprint_id == one.blueprint_id


def test_the_id_of_a_blueprint_is_the_same_in_every_version():
    request = BlueprintRequest(source=SOURCE, signature=SIGNATURE, sizes={"b": 2, "a": 1})
    assert request.name == "mlp"
    assert request.blueprint_id == (
        "8a7285760a680571af1fe1ce7659276502b3729511d1ff98abd79c9a4cd54d5c"
    )


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{", "no JSON"),
        ("[]", "object with a `name`"),
        ('{\n "name": 1\n}', "object with a `name`"),
        ('{"name": "mlp"}', "not in the canonical form.*canonical_json"),
        ('{\n "name": "mlp",\n "name": "mlp"\n}', "not in the canonical form"),
        ('{\n "a": NaN,\n "name": "mlp"\n}', "NaN, which JSON has not"),
        ('{"name":' + "[" * 100_000, "no JSON"),
        ('{\n "name": "' + "a" * (1 << 20) + '"\n}', "at most 1048576 characters"),
    ],
)
def test_the_source_of_a_blueprint_is_canonical(source, message):
    with pytest.raises(ValidationError, match=message):
        BlueprintRequest(source=source, signature=SIGNATURE)


def test_a_real_blueprint_is_a_source():
    from esper.tezzeret import load_blueprint

    blueprint = load_blueprint("mlp") if "mlp" in _names() else load_blueprint(_names()[0])
    request = BlueprintRequest(
        source=blueprint.canonical_json().decode(), signature=KernelSignature.parse("8->8")
    )
    assert request.name == blueprint.name


def _names():
    from esper.tezzeret import blueprint_names

    return blueprint_names()


def test_tags_come_in_order_and_once():
    request = BlueprintRequest(source=SOURCE, signature=SIGNATURE, tags=("b", "a", "b"))
    assert request.tags == ("a", "b")
    with pytest.raises(ValidationError, match="at most 64 items"):
        BlueprintRequest(source=SOURCE, signature=SIGNATURE, tags=tuple(f"{i}" for i in range(65)))


@given(data_of(Claim))
def test_the_token_of_a_claim_is_not_shown(claim):
    shown = claim.model_copy(update={"token": "5ec7e7" * 5 + "00"})
    assert "5ec7e7" not in repr(shown)
    assert "5ec7e7" not in str(shown)


@given(data_of(KernelOutcome))
def test_a_gain_lies_in_its_interval(outcome):
    for name, side in (("low", 1.0), ("high", -1.0)):
        beyond = math.nextafter(outcome.gain, side * math.inf)
        if math.isfinite(beyond):
            with pytest.raises(ValidationError, match="outside of its interval"):
                KernelOutcome(**{**dict(outcome), "low": None, "high": None, name: beyond})


@given(data_of(KernelChanged))
def test_a_kernel_that_changed_is_or_was_there(changed):
    with pytest.raises(ValidationError, match="was there before, or is there now"):
        KernelChanged(**{**dict(changed), "before": None, "after": None})


def test_the_tables_of_metrics_are_of_one_shape():
    row = {
        "step": 1, "train_loss": None, "validation_loss": 1.0, "validation_accuracy": None,
        "test_loss": 1.0, "test_accuracy": None, "stages": [[0, 1]], "alphas": [[0.0, 1.0]],
        "health": [[None, 1.0]], "parameters": 1, "compilations": 0, "learning_rate": 0.1,
        "flops": 1.0, "rollbacks": 0, "seconds": {"train": 0.5},
    }  # fmt: skip
    assert TrainingMetrics.model_validate_json(json.dumps(row)).stages == ((0, 1),)
    with pytest.raises(ValidationError, match="same layers and seeds: got shapes"):
        TrainingMetrics.model_validate_json(json.dumps({**row, "health": [[None]]}))


@given(st.text(max_size=3 * LONGEST_REASON))
def test_any_text_can_be_a_reason(text):
    kept = reason_text(text)
    assert len(kept) <= LONGEST_REASON
    if "\0" not in text and len(text) <= LONGEST_REASON:
        assert kept == text


def test_a_long_reason_keeps_its_beginning_and_its_end():
    kept = reason_text("begin " + "x" * 5_000 + "\0\ud800 end")
    assert len(kept) <= LONGEST_REASON
    assert kept.startswith("begin xx")
    assert kept.endswith("xx\N{REPLACEMENT CHARACTER}? end")
    assert " … " in kept


def test_what_no_library_could_keep_is_refused():
    with pytest.raises(ValidationError, match="input_shape"):
        KernelSignature(input_shape=(), output_shape=(1,))
    source = json.dumps({"name": "\ud800"}, sort_keys=True, indent=1)
    with pytest.raises(ValidationError, match="`name` of a blueprint holds half a character"):
        BlueprintRequest(source=source, signature=KernelSignature.parse("2->1"))
    with pytest.raises(ValidationError, match="less than or equal to 86400"):
        Claim.model_validate({"seconds": 1e300})
