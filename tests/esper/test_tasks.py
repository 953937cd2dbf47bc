"""Tasks made here: what they hold, that it stays so, and what cannot be a task."""

import ast
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.errors import InputError
from esper.tolaria.tasks import (
    TASKS,
    ConvHost,
    CustomHost,
    MLPHost,
    TextHost,
    check_task_name,
    grammar_entropy_rate,
    load_task,
    make_task,
)
from esper.tolaria.tasks._grammar import CHARACTERS, RULES, write_text
from esper.tolaria.tasks._parity import parity

DIGESTS = {
    # The README's figures were measured on the first two.
    "spirals": "2f663b886eb315952619e1aff7ec477cc59a3f22cbf4b1624823a682790d17c4",
    "digits": "57eb5bcec2041b45becf9f1ec684016e0824c2bb6e089e35dc07c6daaafb237d",
    "xor-4": "756eb945b9023379d8e64af40f71bee44d8b5e58ae249dade9bbd369f626e8d7",
    "shapes": "7cb5fc6b4718ee1904c80d8855295f99ae8c72fa6a8f5a846053395f369064d3",
    "grammar": "fa9e490c3bac3e278cd25908e5518f088152d95d0e67be66795cd360d3746766",
}
SIZES = {
    "spirals": (194, 192, 192),
    "digits": (997, 400, 400),
    "xor-2": (128, 64, 64),
    "xor-12": (2_048, 1_024, 1_024),
    "shapes": (1_800, 600, 600),
    "grammar": (4_000, 500, 1_000),
}
BUILT = sorted(DIGESTS.keys() | SIZES.keys())


@pytest.mark.parametrize("name", DIGESTS)
def test_what_a_task_holds_is_what_it_held(name):
    task = load_task(name)
    assert task.digest == DIGESTS[name]
    assert load_task(name).digest == task.digest


@pytest.mark.parametrize("name", BUILT)
def test_no_example_is_in_two_parts(name):
    task = load_task(name)
    assert task.name == name
    if name in SIZES:
        assert tuple(len(split) for split in task.splits.values()) == SIZES[name]
    together = np.concatenate([split.x.reshape(len(split), -1) for split in task.splits.values()])
    assert len(np.unique(together, axis=0)) == len(together)
    # Every class is in every part.
    classes = task.host.interface().outputs
    for split in task.splits.values():
        assert set(np.unique(split.y)) == set(range(classes))
        assert not split.streamed


def test_a_digest_tells_every_array_apart():
    task = load_task("spirals")
    pairs = {name: (split.x, split.y) for name, split in task.splits.items()}
    digests = {task.digest}
    for name, role in ((n, r) for n in pairs for r in (0, 1)):
        changed = [array.copy() for array in pairs[name]]
        changed[role][0] = 0 if role == 0 else 1
        digests.add(make_task("other", **(pairs | {name: changed}), host=task.host).digest)
    swapped = pairs | {"validation": pairs["test"], "test": pairs["validation"]}
    digests.add(make_task("other", **swapped, host=task.host).digest)
    assert len(digests) == 8
    assert make_task("other", **pairs, host=MLPHost((2, 3, 2))).digest == task.digest


def test_the_label_is_the_parity_of_some_bits_and_of_no_fewer():
    for bits in (2, 4, 7):
        task = parity(bits)
        x = np.concatenate([split.x for split in task.splits.values()])
        y = np.concatenate([split.y for split in task.splits.values()])
        width = bits + 6
        rows = {tuple(row): label for row, label in zip(x.astype(int).tolist(), y, strict=True)}
        counting = []
        for place in range(width):
            changes = []
            for row, label in rows.items():
                other = (*row[:place], -row[place], *row[place + 1 :])
                if other in rows:
                    changes.append(rows[other] != label)
            assert changes
            assert all(changes) or not any(changes)
            counting += [place] if changes[0] else []
        assert len(counting) == bits
        assert set(np.unique(x)) == {-1.0, 1.0}


def test_shapes_are_as_many_of_each_and_brighter_where_they_are():
    task = load_task("shapes")
    for split in task.splits.values():
        assert len(set(np.bincount(split.y))) == 1
        # Noise alone has the mean 0 and the standard deviation 0.2.
        border = np.concatenate([split.x[:, 0, 0], split.x[:, 0, -1]])
        assert abs(float(border.mean())) < 0.01
        assert 0.19 < float(border.std()) < 0.21
        assert float(split.x.mean(axis=(1, 2, 3)).min()) > 0.02


def test_a_grammar_tells_its_rule_by_the_next_character():
    assert {character for rules in RULES.values() for _, body in rules for character in body} == (
        set(CHARACTERS) | RULES.keys() - {"S"}
    )
    for name, rules in RULES.items():
        assert math.isclose(sum(chance for chance, _ in rules), 1.0)
        first = [body[:1] for _, body in rules]
        assert len(set(first)) == len(first)
        # A lone rule needs no telling; of several, each begins with a character, or is empty
        # and then followed by one that closes or separates, which no other begins with.
        if len(rules) > 1:
            assert not set(first) & RULES.keys()
        if "" in first:
            assert not set(".)]" if name == "M" else ".)],") & set(first)


def test_the_entropy_rate_is_the_mean_surprise_of_endless_text():
    tokens, surprise = write_text(np.random.default_rng(7), 60_000)
    # Sentences are independent, so the error of the mean is told by their sums.
    ends = np.flatnonzero(tokens == CHARACTERS.index("."))
    excess = np.add.reduceat(surprise - grammar_entropy_rate(), np.r_[0, ends[:-1] + 1])
    error = math.sqrt(float((excess**2).sum())) / len(tokens)
    assert abs(surprise.mean() - grammar_entropy_rate()) < 3 * error < 0.02
    assert load_task("grammar").best_loss == grammar_entropy_rate()


def test_a_label_of_grammar_is_the_next_character_across_pieces():
    train = load_task("grammar").train
    np.testing.assert_array_equal(train.x.reshape(-1)[1:], train.y.reshape(-1)[:-1])
    text = "".join(CHARACTERS[token] for token in train.x.reshape(-1))
    for sentence in text.split(".")[:-1]:
        depth: list[str] = []
        for character in sentence:
            if character in "([":
                depth.append(character)
            elif character in ")]":
                assert depth.pop() + character in ("()", "[]")
            elif character == ",":
                assert depth[-1] == "["
        assert not depth


def test_loading_a_task_imports_no_framework_beside_what_errors_bring():
    script = (
        "import sys; from esper.tolaria.tasks import load_task\n"
        "for name in ('spirals', 'xor-4', 'shapes', 'grammar'): load_task(name).digest\n"
        "print(*sorted(sys.modules.keys() & {'torch', 'equinox', 'grain', 'datasets'}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr
    # jax is there already, by the core's exceptions; no file here asks for it but these.
    own = Path(sys.modules["esper.tolaria.tasks"].__file__ or "").parent
    asking = set()
    for path in own.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if {name.split(".")[0] for name in names} & {"jax", "torch", "equinox", "grain"}:
                asking.add(path.name)
    assert asking == {"_equinox_hosts.py", "_torch_hosts.py", "_stream.py"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("spirlas", r"unknown task 'spirlas': expected one of spirals, .*did you mean 'spirals'"),
        ("xor-3x", r"unknown task 'xor-3x'.*did you mean 'xor-3'"),
        ("xor-1", r"xor-1 is not a task: expected xor-2 to xor-12"),
        ("xor-04", r"xor-04 is not a task: expected xor-2 to xor-12"),
        ("cifar10", r"'cifar10' is read from files: expected cifar10:PATH"),
        ("cifar10:", r"'cifar10:' names no place: expected cifar10:PATH"),
        ("cifar:data", r"unknown task 'cifar:data'.*did you mean 'cifar10:data'"),
        ("huggingface:?x=image", r"names no place: expected huggingface:PATH"),
        ("huggingface:a?lable=b", r"unknown option 'lable': expected one of x, y, .*"),
        ("huggingface:a?tset=b", r"unknown option 'tset'.*did you mean 'test'"),
        ("huggingface:a?x", r"cannot be read \(.*\): expected \?x=COLUMN"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(name, message):
    with pytest.raises(InputError, match=message):
        load_task(name)
    if name != "cifar10:":
        with pytest.raises(InputError, match=message):
            check_task_name(name)


def test_names_are_checked_without_reading():
    for name in (*TASKS, "cifar10:/nowhere", "huggingface:nothing?x=a&y=b"):
        check_task_name(name)
    with pytest.raises(InputError, match="xor-13 is not a task"):
        parity(13)


# A user's own

X = np.zeros((4, 3), np.float32)
Y = np.asarray([0, 1, 1, 0])
HOST = MLPHost((3, 2, 2))


def own(train=(X, Y), validation=(X, Y), test=(X, Y), host=HOST, loss="cross_entropy", **rest):
    parts = {"train": train, "validation": validation, "test": test}
    return make_task("own", **parts, host=host, loss=loss, **rest)


def test_a_users_arrays_are_kept_in_the_dtypes_that_training_takes():
    task = own(train=(X.astype(np.float64), Y.astype(np.uint8)), best_loss=0.5)
    assert (task.train.x.dtype, task.train.y.dtype) == (np.float32, np.int32)
    assert (task.host_sizes, task.loss, task.best_loss) == ((3, 2, 2), "cross_entropy", 0.5)
    listed = own(train=[X.tolist(), Y.tolist()])
    np.testing.assert_array_equal(listed.train.y, Y)
    regression = own(*[(X, Y[:, None] / 2)] * 3, host=MLPHost((3, 2, 1)), loss="mean_squared_error")
    assert regression.train.y.dtype == np.float32
    anything = own(
        *[(np.zeros((4, 2, 2, 5)), Y)] * 3, host=CustomHost("own", jax=lambda seed: seed)
    )
    assert anything.train.x.shape == (4, 2, 2, 5)


def changed(array, index, value):
    array = array.copy()
    array[index] = value
    return array


TOKENS = np.zeros((4, 6), np.int32)
TEXT = TextHost(5, 2, 2, 2, 2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"train": (changed(X, (2, 1), np.nan), Y)},
            r"x of the train part of 'own' holds nan in example 2: expected finite float32",
        ),
        ({"test": (changed(X, (3, 0), -np.inf), Y)}, "test part of 'own' holds -inf in example 3"),
        (
            {"test": (changed(X.astype(np.float64), (1, 0), 1e300), Y)},
            "test part of 'own' holds inf in example 1",
        ),
        ({"validation": (X[:0], Y[:0])}, "validation part of 'own' is empty: expected at least"),
        ({"train": (X, Y[:3])}, "train part of 'own' has 4 examples and 3 labels: expected one"),
        (
            {"test": (X, changed(Y, 1, 2))},
            "y of the test part of 'own' holds the class 2 in example 1: the host.*takes 0 to 1",
        ),
        ({"train": (X, changed(Y, 3, -1))}, "holds the class -1 in example 3.*takes 0 to 1"),
        ({"train": (X, Y.astype(np.float32))}, r"dtype float32, and cross entropy takes classes"),
        (
            {"train": (X.astype(np.complex64), Y)},
            "x of the train part of 'own' has dtype complex64, which cannot be used: expected",
        ),
        ({"train": (np.asarray([[None]] * 4), Y)}, "has dtype object, which cannot be used"),
        ({"train": (X.astype(np.uint8), Y)}, "'mlp-3-2-2' takes floating point values; images of"),
        ({"train": (X[:, :2], Y)}, r"examples of shape \[2\]: the host 'mlp-3-2-2' takes \[3\]"),
        ({"train": (np.float32(3), Y)}, "x of the train part of 'own' is a single number"),
        ({"train": {"x": X, "y": Y}}, r"is not a pair: expected \(x, y\), got dict"),
        ({"train": (X, np.zeros((4, 2), int))}, r"y of .* has the shape \[4, 2\]: expected \[4\]"),
        ({"loss": "mse"}, "unknown loss 'mse' of the task 'own': expected one of cross_entropy, m"),
        ({"loss": "mean_squared_error"}, r"the shape \[4\]: .*reshape with y\[:, None\]"),
        (
            {"loss": "mean_squared_error", "train": (X, X)},
            r"y of .* has the shape \[4, 3\]: expected \[4, 2\] for the host 'mlp-3-2-2'",
        ),
        (
            {"loss": "mean_squared_error", "train": (X, changed(X[:, :2], (0, 0), np.nan))},
            "y of the train part of 'own' holds nan in example 0",
        ),
        ({"train": (TOKENS + 0.5, TOKENS), "host": TEXT}, "'text-5-2x2-2-2' takes integer tokens"),
        (
            {"train": (changed(TOKENS, (1, 5), 5), TOKENS), "host": TEXT},
            "x of the train part of 'own' holds the token 5 in example 1.*takes 0 to 4",
        ),
        ({"train": (TOKENS, TOKENS[:, 1:]), "host": TEXT}, r"shape \[4, 5\]: expected \[4, 6\]"),
        (
            {"train": (X, Y), "test": (X[:, :2], Y), "host": CustomHost("c", torch=lambda s: s)},
            r"the test part of 'own' has examples float32\[2\], and the train part float32\[3\]",
        ),
        (
            {"host": CustomHost("c", torch=lambda s: s, outputs=1)},
            "holds the class 1 in example 1: the host 'c' takes 0 to 0",
        ),
    ],
)
def test_what_cannot_be_trained_on_is_refused(given, message):
    with pytest.raises(InputError, match=message):
        own(**given)


def test_a_task_has_a_name_and_sizes_are_asked_of_an_mlp():
    with pytest.raises(InputError, match="a task needs a name.*got ''"):
        make_task("", train=(X, Y), validation=(X, Y), test=(X, Y), host=HOST)
    task = load_task("shapes")
    with pytest.raises(InputError, match="the host of shapes is 'conv-.*take `task.host`"):
        _ = task.host_sizes


@given(
    row=st.integers(0, 40),
    column=st.integers(0, 2),
    value=st.sampled_from([np.nan, np.inf, -np.inf]),
)
def test_the_example_that_is_not_finite_is_named_wherever_it_is(row, column, value):
    x, y = np.zeros((41, 3), np.float32), np.zeros(41, np.int32)
    x[row, column] = value
    with pytest.raises(InputError, match=rf"holds {value} in example {row}:"):
        own(validation=(x, y))


def test_a_part_larger_than_a_block_is_looked_at_to_its_end():
    x = np.zeros((9, 1 << 21), np.float32)  # a block holds eight such examples
    x[8, 7] = np.nan
    host = CustomHost("own", jax=lambda seed: seed)
    with pytest.raises(InputError, match="holds nan in example 8:"):
        own(train=(x, np.zeros(9, int)), host=host)


def test_a_mapped_file_stays_on_disk_and_is_not_converted(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, X)
    task = own(train=(np.load(path, mmap_mode="r"), Y))
    assert task.train.streamed
    assert task.digest == own().digest
    np.save(path, X.astype(np.float64))
    with pytest.raises(InputError, match="mapped file of float64.*write it as float32"):
        own(train=(np.load(path, mmap_mode="r"), Y))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MLPHost((2,)), r"an MLPHost of sizes \(2,\) is no network: expected at least"),
        (lambda: MLPHost((2, 0, 2)), "is no network: .* each at least 1"),
        (lambda: ConvHost(1, 16, (), 2), "is no network: expected at least one block"),
        (lambda: ConvHost(1, 6, (2, 2, 2), 2), "6 pixels cannot be halved 2 times.*multiple of 4"),
        (lambda: ConvHost(1, 4, (2, 3), 2, groups=2), "3 channels cannot be normed in 2 groups"),
        (lambda: TextHost(5, 0, 1, 1, 1), "is no network: expected all sizes to be at least 1"),
        (lambda: CustomHost("", jax=len), "a CustomHost needs a name"),
        (lambda: CustomHost("mine"), "'mine' can be built for no backend: give `jax=build`"),
        (
            lambda: CustomHost("mine", jax=len, grow_at="a.b"),  # pyright: ignore
            r"grow_at of the host 'mine' is the string 'a.b': expected a tuple",
        ),
        (
            lambda: CustomHost("mine", jax=lambda seed: None).params(3),
            r"'mine' is a user's own, so its parameters are not known by name.*host.jax\(3\)",
        ),
        (
            lambda: CustomHost("mine", jax=lambda seed: None).torch(0),
            "'mine' has no function for torch: give .*torch=build.*or run it on jax",
        ),
        (
            lambda: CustomHost("mine", jax=lambda seed: None).jax(5),
            "`jax` of the host 'mine' returned None for seed 5: expected a module",
        ),
    ],
)
def test_a_host_that_makes_no_network_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()
