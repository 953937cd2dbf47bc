"""Kernels by their features: costs, birth, and what their graphs are made of."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.tamiyo import Cost
from esper.tamiyo.graph import (
    BOUND,
    KERNEL,
    KERNEL_FEATURES,
    OPERATIONS,
    describe_costs,
    describe_kernel,
    describe_operations,
)
from esper.tezzeret import blueprint_names, load_blueprint, parse_blueprint, summarize_blueprint
from esper.tezzeret._ops import OPS
from esper.tezzeret._ops._traits import TRAITS
from tests.esper.controlled import record
from tests.tolerance import assert_close

HOST = Cost(100, 200.0)
COUNTS = st.integers(0, 10**12)


def described(blueprint):
    own = record("a", blueprint.name).model_copy(
        update={"birth": blueprint.birth, "confidence": blueprint.confidence}
    )
    return describe_kernel(own, HOST, blueprint)


def test_every_operation_has_its_traits():
    assert TRAITS.keys() == OPS.keys()
    assert all(TRAITS[name].mixes for name in OPS if name.endswith("pool"))
    assert all(TRAITS[name].norm for name in OPS if name.endswith("norm"))


def test_the_features_are_named():
    assert len(KERNEL_FEATURES) == len(set(KERNEL_FEATURES)) == KERNEL
    assert KERNEL_FEATURES[6:13] == (
        "linear", "nonlinear", "norm", "mixes", "gates", "adds", "layers",
    )  # fmt: skip


def test_a_description_is_exact_by_hand():
    operations = np.arange(OPERATIONS, dtype=np.float32)
    got = describe_costs(15, 100, 30, 50, birth="identity", confidence=0.25, operations=operations)
    wanted = [1.0, np.log(1.5), np.log(3.0), 0.0, 1.0, 0.25, *operations, 1.0]
    assert_close(got, np.array(wanted, np.float32))
    np.testing.assert_array_equal(got[3:], np.array(wanted[3:], np.float32))
    unknown = describe_costs(15, 100, 30, 50, birth="zero", confidence=0.25)
    np.testing.assert_array_equal(unknown[3:], np.array([1, 0, 0.25, *[0] * 8], np.float32))
    free = describe_costs(15, 100, 30, 50, birth="free", confidence=0.25)
    assert free[3:5].tolist() == [0.0, 0.0]


@given(parameters=COUNTS, flops=COUNTS, host=st.tuples(COUNTS, COUNTS))
def test_all_is_finite_and_bounded(parameters, flops, host):
    got = describe_costs(parameters, flops, *host, birth="zero", confidence=1.0)
    assert got.dtype == np.float32
    assert got.shape == (KERNEL,)
    assert np.isfinite(got).all()
    assert np.abs(got).max() <= BOUND


@given(pair=st.tuples(COUNTS, COUNTS), host=st.integers(1, 10**9))
def test_what_costs_more_is_described_as_more(pair, host):
    less, more = sorted(pair)
    rows = [
        describe_costs(count, count, host, host, birth="zero", confidence=0.5)
        for count in (less, more)
    ]
    assert (rows[0][:3] <= rows[1][:3]).all()
    np.testing.assert_array_equal(rows[0][3:], rows[1][3:])
    dearer = describe_costs(more, more, 2 * host, 2 * host, birth="zero", confidence=0.5)
    assert (dearer[1:3] <= rows[1][1:3]).all()


def test_variants_of_a_blueprint_are_one():
    blueprint = load_blueprint("low_rank")
    rows = [
        describe_kernel(own, HOST, blueprint).tobytes()
        for own in (record("a"), record("b"), record("a").model_copy(update={"init_seed": 7}))
    ]
    assert len(set(rows)) == 1


def test_a_kernel_whose_graph_is_not_known_says_so():
    own = describe_kernel(record("a"), HOST, None)
    known = describe_kernel(record("a"), HOST, load_blueprint("low_rank"))
    np.testing.assert_array_equal(own[:6], known[:6])
    assert not own[6:].any()
    assert known[-1] == 1.0


def test_blueprints_of_equal_cost_are_alike_where_their_operations_are():
    blueprints = [load_blueprint(name) for name in blueprint_names()]
    rows = [described(own) for own in blueprints]
    assert all(row[-1] == 1.0 and row[6:13].any() for row in rows)
    apart = [(describe_operations(own).tobytes(), own.birth, own.confidence) for own in blueprints]
    for one, other in itertools.combinations(range(len(rows)), 2):
        assert np.array_equal(rows[one], rows[other]) == (apart[one] == apart[other])
    assert len(rows) == 26
    assert len(set(apart)) >= 22


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        # linear, nonlinear, norms, mixing, gates, adds, layers
        ("low_rank", (2, 0, 0, 0, 0, 0, 2)),
        ("conv_low_rank", (2, 0, 0, 1, 0, 0, 2)),
        ("residual_mlp", (3, 2, 0, 0, 0, 1, 3)),
        ("gated", (3, 1, 0, 0, 1, 0, 2)),
        ("attention", (4, 1, 0, 1, 0, 0, 2)),
        ("highway", (2, 2, 0, 0, 1, 2, 1)),
        ("token_mixer", (2, 1, 1, 2, 0, 0, 3)),
        ("conformer_conv", (4, 2, 2, 1, 1, 0, 5)),
        ("squeeze_excite", (2, 1, 0, 1, 1, 0, 2)),
        ("pool_mixer", (1, 0, 0, 1, 0, 1, 1)),
        ("feature_scale", (0, 0, 0, 0, 0, 0, 1)),
    ],
)
def test_summaries_are_exact_by_hand(name, wanted):
    assert tuple(summarize_blueprint(load_blueprint(name))) == wanted


def test_a_linear_layer_of_signals_mixes_positions():
    def text(takes, extra):
        return (
            f"{{schema_version: 2, name: own, summary: s, takes: [{takes}], birth: free, nodes:"
            f" [{{name: a, op: linear, inputs: [x], features: 4}}{extra}], output: a}}"
        )

    found = [
        summarize_blueprint(parse_blueprint(text(takes, ""), "own")).mixing
        for takes in ("vector", "sequence", "signal")
    ]
    assert found == [0, 0, 1]
