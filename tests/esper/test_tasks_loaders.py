"""Laws of loaders: a batch is a function of its step, shards partition it, epochs permute."""

import hashlib
import subprocess
import sys
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.errors import InputError
from esper.tolaria.tasks import (
    Batch,
    CustomHost,
    MLPHost,
    batch_indices,
    crop_and_flip,
    load_task,
    make_loader,
    make_task,
)

COUNT = 23
IMAGES = np.random.default_rng(0).standard_normal((COUNT, 2, 4, 4)).astype(np.float32)
# The first value of an image is its number, so that it can be told in any batch.
IMAGES[:, 0, 0, 0] = np.arange(COUNT)
LABELS = np.arange(COUNT, dtype=np.int32)


def host():
    return CustomHost("own", jax=lambda seed: seed)


def images(x=IMAGES):
    part = (x, LABELS)
    return make_task("images", train=part, validation=part, test=part, host=host())


def shaken(image, random):
    return image + random.random(image.shape, dtype=np.float32)


def in_place(image, random):
    image += random.random(image.shape, dtype=np.float32)
    return image


@pytest.fixture(scope="module")
def mapped(tmp_path_factory):
    path = tmp_path_factory.mktemp("mapped") / "x.npy"
    np.save(path, IMAGES)
    return images(np.load(path, mmap_mode="r"))


INDICES = [13, 10, 11, 2, 20, 14]
STREAMED = [4, 22, 16, 7, 21, 3]
SHIFTS = [0.393764, 0.640662, 0.225756, 0.465363, 0.852186, 0.914677]
KINDS = ["indices", "augmented", "mapped"]


def loader_of(kind, mapped, **options):
    given = {"batch_size": 6, "seed": 3} | options
    if kind == "augmented":
        given["augment"] = shaken
    return make_loader(mapped if kind == "mapped" else images(), **given)


def arrays(batch):
    assert batch is not None
    return batch if isinstance(batch, Batch) else Batch(IMAGES[batch], LABELS[batch])


def told(batch):
    """A batch as something that can be compared."""
    return hashlib.sha256(b"".join(a.tobytes() for a in arrays(batch))).hexdigest()


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_the_same_whatever_was_asked_before(kind, mapped):
    one = loader_of(kind, mapped)
    in_order = [told(one.batch(step)) for step in range(9)]
    assert len(set(in_order)) == 9
    other = loader_of(kind, mapped)
    for step in (7, 0, 3, 4, 6, 7, 5, 5, 8, 2, 3, 1, 6, 7, 8, 0):
        assert told(other.batch(step)) == in_order[step]
    # Taken up again in the middle, and asked in between by somebody else.
    again = loader_of(kind, mapped)
    for step in (4, 5, 6):
        assert told(again.batch(step)) == told(one.batch(step)) == in_order[step]
    assert told(loader_of(kind, mapped, seed=4).batch(0)) != in_order[0]


_ALONE: dict[str, list[str]] = {}


@pytest.mark.parametrize("kind", KINDS)
@given(steps=st.lists(st.integers(0, 9), max_size=12))
def test_steps_in_any_order_give_what_each_gives_alone(kind, mapped, steps):
    if kind not in _ALONE:
        _ALONE[kind] = [told(loader_of(kind, mapped).batch(step)) for step in range(10)]
    loader = loader_of(kind, mapped)
    assert [told(loader.batch(step)) for step in steps] == [_ALONE[kind][step] for step in steps]


def test_the_order_of_a_seed_is_what_it_was(mapped):
    # Runs are recorded with it: where another release of grain shuffles otherwise, this tells.
    indices, streamed = (loader_of(kind, mapped).batch(0) for kind in ("indices", "mapped"))
    assert np.asarray(indices).tolist() == INDICES
    assert arrays(streamed).y.tolist() == STREAMED
    shift = arrays(loader_of("augmented", mapped).batch(0)).x - IMAGES[STREAMED]
    np.testing.assert_allclose(shift[:, 1, 1, 1], SHIFTS, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_epochs_are_permutations_of_their_own_and_short_batches_are_left_out(kind, mapped):
    loader = loader_of(kind, mapped)
    epochs = []
    for epoch in range(3):
        batches = [arrays(loader.batch(epoch * 3 + place)) for place in range(3)]
        assert all(batch.x.shape == (6, 2, 4, 4) for batch in batches)
        labels = np.concatenate([batch.y for batch in batches])
        assert labels.dtype == np.int32
        assert len(set(labels.tolist())) == 18
        epochs.append(labels)
        if kind != "augmented":
            np.testing.assert_array_equal(
                np.concatenate([batch.x for batch in batches])[:, 0, 0, 0], labels
            )
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[1], epochs[2])
    # Whatever is left out of one epoch comes in another.
    assert set(np.concatenate([arrays(loader.batch(s)).y for s in range(60)])) == set(range(COUNT))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shards", [2, 3])
def test_shards_are_what_one_process_would_get(kind, shards, mapped):
    whole = loader_of(kind, mapped)
    parts = [loader_of(kind, mapped, shard=(k, shards)) for k in range(shards)]
    for step in (0, 1, 2, 3, 11):
        batch = arrays(whole.batch(step))
        for k, part in enumerate(parts):
            own = arrays(part.batch(step))
            np.testing.assert_array_equal(own.x, batch.x[k::shards])
            np.testing.assert_array_equal(own.y, batch.y[k::shards])


def test_another_process_gets_the_same_batches(mapped):
    script = (
        "import numpy as np\n"
        "from esper.tolaria.tasks import crop_and_flip, load_task, make_loader\n"
        "task = load_task('shapes')\n"
        "loader = make_loader(task, batch_size=64, seed=5, augment=crop_and_flip(2))\n"
        "plain = make_loader(task, batch_size=64, seed=5)\n"
        "print(float(loader.batch(70).x.sum(dtype='f8')), plain.batch(70).tolist())"
    )
    task = load_task("shapes")
    loader = make_loader(task, batch_size=64, seed=5, augment=crop_and_flip(2))
    plain = make_loader(task, batch_size=64, seed=5)
    for step in range(3):
        loader.batch(step)
        plain.batch(step)
    batch, indices = loader.batch(70), plain.batch(70)
    assert isinstance(batch, Batch)
    assert isinstance(indices, np.ndarray)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    total, listed = done.stdout.split(" ", 1)
    assert float(total) == float(batch.x.sum(dtype="f8"))
    assert listed.strip() == str(indices.tolist())


@given(seed=st.integers(0, 2**31 - 1), step=st.integers(0, 10**7), size=st.integers(1, 997))
def test_indices_are_those_that_runs_were_recorded_with(seed, step, size):
    task = load_digits()
    epoch, place = divmod(step, 997 // size)
    order = np.random.default_rng([seed, 1, epoch]).permutation(997)
    expected = order[place * size : (place + 1) * size].astype(np.int32)
    got = make_loader(task, batch_size=size, seed=seed).batch(step)
    assert isinstance(got, np.ndarray)
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(batch_indices(task, size, seed, step), expected)


@cache
def load_digits():
    return load_task("digits")


def test_an_epochs_order_is_drawn_once():
    loader = make_loader(load_digits(), batch_size=64, seed=8)
    one, other = loader.batch(0), loader.batch(14)
    assert isinstance(one, np.ndarray)
    assert isinstance(other, np.ndarray)
    assert one.base is not None
    assert one.base is other.base
    with pytest.raises(ValueError, match="read-only"):
        one[0] = 1


def test_the_whole_part_is_no_batch_and_its_shards_are():
    task = images()
    assert make_loader(task, batch_size=None, seed=0).batch(5) is None
    assert batch_indices(task, None, 0, 5) is None
    even = load_task("spirals")
    shares = [make_loader(even, batch_size=None, seed=0, shard=(k, 2)).batch(9) for k in (0, 1)]
    together = np.concatenate([share for share in shares if isinstance(share, np.ndarray)])
    np.testing.assert_array_equal(np.sort(together), np.arange(194))


def test_each_use_of_an_example_is_augmented_anew_and_the_data_is_not_touched():
    task = images()
    kept = task.digest
    loader = make_loader(task, batch_size=COUNT, seed=1, augment=in_place)
    seen = []
    for step in range(3):
        batch = loader.batch(step)
        assert isinstance(batch, Batch)
        shift = (batch.x - IMAGES[batch.y])[np.argsort(batch.y)]
        assert 0 <= shift.min() < shift.max() <= 1 + 1e-5
        assert len({row.tobytes() for row in shift}) == COUNT
        seen.append(shift)
    assert not np.allclose(seen[0], seen[1])
    assert images().digest == kept
    np.testing.assert_array_equal(task.train.x, IMAGES)


def test_crop_and_flip_shifts_by_so_much_and_mirrors_every_other():
    image = np.arange(1, 33, dtype=np.float32).reshape(2, 4, 4)
    random = np.random.default_rng(0)
    assert set(np.unique(crop_and_flip(4)(image, random))) <= {0.0, *image.ravel().tolist()}
    np.testing.assert_array_equal(crop_and_flip(0, flip=False)(image, random), image)
    mirrored = 0
    for _ in range(200):
        own = crop_and_flip(0)(image, random)
        np.testing.assert_array_equal(np.sort(own, axis=2), np.sort(image, axis=2))
        mirrored += not np.array_equal(own, image)
    assert 70 < mirrored < 130
    shifts = set()
    for _ in range(200):
        own = crop_and_flip(1, flip=False)(image, random)
        down, across = np.argwhere(own[0] == image[0, 1, 1])[0]
        shifts.add((int(down), int(across)))
        np.testing.assert_array_equal(own[:, down, across], image[:, 1, 1])
    assert shifts == {(down, across) for down in range(3) for across in range(3)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"batch_size": 24},
            "batch_size is 24, and the training part of images has 23 examples: expected 1 to 23",
        ),
        ({"batch_size": 0}, "batch_size is 0.*expected 1 to 23, or None"),
        ({"shard": (2, 2)}, r"shard is \(2, 2\): expected \(k, n\)"),
        ({"shard": (-1, 2)}, r"shard is \(-1, 2\): expected \(k, n\)"),
        ({"shard": (0, 4)}, "batch_size is 6, which 4 shards cannot divide evenly: expected a mul"),
        (
            {"batch_size": None, "shard": (1, 2)},
            "the training part of images has 23, which 2 shards cannot divide evenly",
        ),
        (
            {"batch_size": None, "augment": shaken},
            "images is augmented, and batch_size is None.*all of its 23 examples",
        ),
    ],
)
def test_a_loader_that_does_not_fit_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        make_loader(images(), **({"batch_size": 6, "seed": 0} | options))


def test_what_lies_on_disk_has_no_indices(mapped):
    with pytest.raises(InputError, match="is read from disk, and batch_size is None"):
        make_loader(mapped, batch_size=None, seed=0)
    with pytest.raises(InputError, match="is read from disk, so a step's examples have no indices"):
        batch_indices(mapped, 6, 0, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_there_is_no_step_before_the_first(kind, mapped):
    with pytest.raises(InputError, match="there is no step -1: expected 0 or more"):
        loader_of(kind, mapped).batch(-1)


@pytest.mark.parametrize(
    ("augment", "message"),
    [
        (lambda x, r: x[:, 1:], r"gave float32\[2, 3, 4\] for an example of float32\[2, 4, 4\]"),
        (lambda x, r: x.astype(np.float64), r"gave float64\[2, 4, 4\] for an example of float32"),
        (lambda x, r: None, "the augmentation gave NoneType for an example"),
    ],
)
def test_an_augmentation_that_changes_the_form_is_refused_in_every_step(augment, message):
    loader = make_loader(images(), batch_size=6, seed=0, augment=augment)
    for step in (0, 1, 2, 1):
        with pytest.raises(InputError, match=message):
            loader.batch(step)


def test_an_augmentation_that_fails_once_does_not_change_other_steps():
    whole = make_loader(images(), batch_size=1, seed=0, augment=shaken)
    expected = [told(whole.batch(step)) for step in range(8)]
    bad = int(arrays(whole.batch(4)).y[0])

    def fails(image, random):
        if image[0, 0, 0] == bad:
            raise InputError("this one")
        return shaken(image, random)

    loader = make_loader(images(), batch_size=1, seed=0, augment=fails)
    for step in (0, 1, 2, 3, 4, 4, 5, 6, 7, 4, 5):
        if step == 4:
            with pytest.raises(InputError, match="this one"):
                loader.batch(step)
        else:
            assert told(loader.batch(step)) == expected[step]


def test_without_grain_it_is_said_what_to_do(monkeypatch):
    monkeypatch.delitem(sys.modules, "esper.tolaria.tasks._stream", raising=False)
    monkeypatch.setitem(sys.modules, "grain", None)  # as Python has it for what cannot be had
    with pytest.raises(InputError, match="put together by grain, which is not installed: pip"):
        make_loader(images(), batch_size=6, seed=0, augment=shaken)


def test_crop_and_flip_takes_images():
    with pytest.raises(InputError, match="padding is -1: expected 0 or more"):
        crop_and_flip(-1)
    task = make_task(
        "rows",
        **dict.fromkeys(("train", "validation", "test"), (IMAGES[:, 0, 0], LABELS)),
        host=MLPHost((4, COUNT)),
    )
    with pytest.raises(InputError, match=r"takes images .* got an example of shape \[4\]"):
        make_loader(task, batch_size=2, seed=0, augment=crop_and_flip()).batch(0)
