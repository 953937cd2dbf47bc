"""Data sets of Hugging Face's `datasets`: read from what it writes, where it is installed."""

import importlib.util

import numpy as np
import pytest

from esper.errors import InputError
from esper.tolaria.tasks import load_task

MISSING = importlib.util.find_spec("datasets") is None


@pytest.mark.skipif(not MISSING, reason="the package is here")
def test_without_the_package_it_is_said_what_to_do():
    with pytest.raises(InputError, match="read by the package `datasets`, which is not installed"):
        load_task("huggingface:mnist")


def test_a_part_is_not_taken_twice():
    message = "is to take train, test, test for training, validation and test, one of them twice"
    with pytest.raises(InputError, match=message):
        load_task("huggingface:mnist?validation=test")


def saved(tmp_path, validation=True, **columns):
    datasets = pytest.importorskip("datasets")
    random = np.random.default_rng(0)
    parts = {}
    for part, count in (("train", 20), ("validation", 5), ("test", 6)):
        if part == "validation" and not validation:
            continue
        made = {
            name: make(random, count) if callable(make) else make
            for name, make in (
                {"label": lambda r, n: r.integers(0, 3, n).tolist()} | columns
            ).items()
        }
        parts[part] = datasets.Dataset.from_dict(made)
    place = tmp_path / "saved"
    datasets.DatasetDict(parts).save_to_disk(str(place))
    return place, parts


def rows(random, count):
    return random.standard_normal((count, 4)).tolist()


def test_rows_of_numbers_become_a_task(tmp_path):
    place, parts = saved(tmp_path, features=rows)
    task = load_task(f"huggingface:{place}?x=features")
    assert [len(split) for split in task.splits.values()] == [20, 5, 6]
    assert task.host_sizes == (4, 8, 3)
    np.testing.assert_allclose(task.test.x, np.asarray(parts["test"]["features"]), rtol=1e-6)
    np.testing.assert_array_equal(task.test.y, np.asarray(parts["test"]["label"]))


def test_images_become_channels_first_in_minus_one_to_one(tmp_path):
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("PIL")
    random = np.random.default_rng(1)
    pixels = random.integers(0, 256, (8, 8, 8, 3), np.uint8)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    held = {"image": list(pixels), "label": [0, 1] * 4}
    part = datasets.Dataset.from_dict(held, features=features)
    place = tmp_path / "saved"
    datasets.DatasetDict(train=part, test=part).save_to_disk(str(place))
    task = load_task(f"huggingface:{place}")
    assert [len(split) for split in task.splits.values()] == [7, 1, 8]
    back = np.rint((task.test.x + 1) * 127.5).astype(np.uint8)
    np.testing.assert_array_equal(np.moveaxis(back, 1, -1), pixels)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("?x=features&y=lable", "the part 'train' of .* has no column 'lable': it has label, feat"),
        ("?x=features&test=tset", "has the parts train, validation, test, and not 'tset'"),
        ("?x=words", r"holds?|has dtype .* which cannot be used|expected rows of floating point"),
    ],
)
def test_what_is_not_there_is_named(tmp_path, query, message):
    place, _ = saved(tmp_path, features=rows, words=lambda r, n: ["a"] * n)
    with pytest.raises(InputError, match=message):
        load_task(f"huggingface:{place}{query}")


def test_nothing_is_downloaded(tmp_path):
    datasets = pytest.importorskip("datasets")
    if datasets.config.HF_HUB_OFFLINE:
        message = "huggingface:no/such cannot be read"
    else:
        message = "tasks are not downloaded: set HF_HUB_OFFLINE=1"
    with pytest.raises(InputError, match=message):
        load_task("huggingface:no/such")
