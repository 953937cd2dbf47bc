"""CIFAR-10's own files: read in each of their forms, and refused where they are something else."""

import io
import os
import pickle
import struct
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest

from esper.errors import InputError
from esper.tolaria.tasks import CifarDigestWarning, load_task
from esper.tolaria.tasks._cifar import cifar10
from esper.tolaria.tasks._cifar_pickle import read_batch

RECORDS = 20
NAMES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def drawn():
    random = np.random.default_rng(0)
    x = random.integers(0, 256, (6, RECORDS, 3_072), np.uint8)
    return x, random.integers(0, 10, (6, RECORDS)).astype(np.uint8)


def short(text):
    return b"U" + bytes([len(text)]) + text


def python2_pickle(x, y, name="batch"):
    """What Python 2 wrote: strings of bytes, and numpy's array by its old names."""
    out = [b"\x80\x02}q\x01(", short(b"batch_label"), b"q\x02", short(name.encode()), b"q\x03"]
    out += [short(b"labels"), b"]q\x04(", *(b"K" + bytes([int(v)]) for v in y), b"e"]
    out += [short(b"data"), b"cnumpy.core.multiarray\n_reconstruct\nq\x05cnumpy\nndarray\nq\x06"]
    out += [b"K\x00\x85", short(b"b"), b"\x87Rq\x07(K\x01"]
    out += [b"M" + struct.pack("<H", len(x)), b"M" + struct.pack("<H", x.shape[1]), b"\x86"]
    out += [b"cnumpy\ndtype\nq\x08", short(b"u1"), b"K\x00K\x01\x87Rq\t(K\x03", short(b"|")]
    out += [b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"]
    out += [b"T" + struct.pack("<i", x.size), x.tobytes(), b"tb"]
    out += [short(b"filenames"), b"]q\n(", *(short(b"s_%06d.png" % i) for i in range(len(y)))]
    return b"".join([*out, b"eu."])


def binary(x, y):
    return np.concatenate([y[:, None], x], axis=1).tobytes()


def files(form):
    x, y = drawn()
    if form == "binary":
        return {f"{name}.bin": binary(x[i], y[i]) for i, name in enumerate(NAMES)}
    return {name: python2_pickle(x[i], y[i], name) for i, name in enumerate(NAMES)}


def folder(tmp_path, form, change=lambda held: None):
    held = files(form)
    change(held)
    place = tmp_path / ("cifar-10-batches-bin" if form == "binary" else "cifar-10-batches-py")
    place.mkdir()
    for name, data in held.items():
        (place / name).write_bytes(data)
    (place / "readme.html").write_text("<html>")
    return place


def archive(tmp_path, form, inside=None):
    path = tmp_path / f"cifar-{form}.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, data in (inside if inside is not None else files(form)).items():
            member = tarfile.TarInfo(f"cifar-10-batches/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def read(place):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CifarDigestWarning)
        return cifar10(place, records=RECORDS)


FORMS = ["binary", "python"]


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_hold_the_same_images(tmp_path, form):
    place = folder(tmp_path, form)
    task = read(place)
    x, y = drawn()
    assert [len(split) for split in task.splits.values()] == [90, 10, 20]
    np.testing.assert_array_equal(
        np.concatenate([task.train.y, task.validation.y]), y[:5].reshape(-1)
    )
    np.testing.assert_array_equal(task.test.y, y[5])
    back = np.rint((task.test.x + 1) * 127.5).astype(np.uint8)
    np.testing.assert_array_equal(back.reshape(RECORDS, -1), x[5])
    assert (task.train.x.shape, task.train.x.dtype) == ((90, 3, 32, 32), np.float32)
    assert task.train.x.min() == -1.0
    assert task.train.x.max() == 1.0
    # The first thousand bytes of an image are its red.
    np.testing.assert_array_equal(back[0, 0].reshape(-1), x[5, 0, :1_024])
    assert read(archive(tmp_path, form)).digest == read(tmp_path).digest == task.digest


def test_the_binary_and_the_python_form_are_one_task(tmp_path):
    for form in FORMS:
        (tmp_path / form).mkdir()
    digests = {read(folder(tmp_path / form, form)).digest for form in FORMS}
    assert len(digests) == 1


def test_the_python_form_that_is_written_here_is_the_one_that_pickle_reads():
    x, y = drawn()
    held = pickle.loads(python2_pickle(x[0], y[0]), encoding="latin1")
    np.testing.assert_array_equal(held["data"], x[0])
    assert held["labels"] == y[0].tolist()
    ours, labels = read_batch(python2_pickle(x[0], y[0]), "batch", RECORDS)
    np.testing.assert_array_equal(ours, x[0])
    np.testing.assert_array_equal(labels, y[0])


class Boom:
    def __reduce__(self):
        return (os.mkdir, ("exploded",))


X, Y = drawn()
GOOD = python2_pickle(X[0], Y[0])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (pickle.dumps({"data": Boom()}, 2), r"holds the name 'posix.mkdir'"),
        (pickle.dumps(Boom(), 0), "which CIFAR-10's python files do not.*nothing of it was run"),
        (pickle.dumps({"data": X[0], "labels": Y[0].tolist()}, 5), "holds the operation FRAME"),
        (pickle.dumps({"data": X[0]}, 2), r"holds the name 'numpy._core.multiarray._reconstruct'"),
        (GOOD.replace(b"numpy\ndtype", b"os\nsystem"), "holds the name 'os.system'"),
        (GOOD.replace(b"U\x02u1", b"U\x02O8"), "holds a call of"),
        (GOOD.replace(b"cnumpy\nndarray", b"cnumpy\ndtype"), "holds a call of"),
        (GOOD.replace(b"\x89T", b"\x88T"), "holds an array of another kind than bytes in rows"),
        (GOOD.replace(b"labels", b"lebals"), "holds a object where a list belongs"),
        (
            GOOD.replace(b"M\x14\x00", b"M\x15\x00"),
            r"holds 61440 bytes of images of the shape \(21",
        ),
        (python2_pickle(X[0], Y[0][:-1]), "holds 19 labels, or some that are no numbers"),
        (GOOD[:1_000], "is damaged or no pickle of CIFAR-10's"),
        (b"\x80\x02" + b"e.", "is damaged or no pickle"),
        (b"\x80\x02}(K\x01u.", "is damaged or no pickle"),
        (b"\x80\x02}q\x01(K\x01K\x02u.", "holds a int where a str belongs"),
        (b"\x80\x02h\x05.", "is damaged or no pickle"),
        (b"\x80\x02R.", "holds an empty stack"),
        (b"<html>", "is damaged or no pickle"),
        (b"", "is damaged or no pickle"),
    ],
)
def test_nothing_is_unpickled_and_only_cifars_own_form_is_read(
    tmp_path, monkeypatch, data, message
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"batch_1 .*{message}"):
        read_batch(data, "batch_1", RECORDS)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["data_batch_3", "test_batch"])
def test_a_missing_file_is_named_with_its_size(tmp_path, form, name):
    name += ".bin" if form == "binary" else ""
    place = folder(tmp_path, form, lambda held: held.pop(name))
    size = "61,460 bytes" if form == "binary" else "about 0 MB"
    message = f"is incomplete: {name} is missing, expected {size} beside data_batch_1"
    with pytest.raises(InputError, match=message):
        read(place)


def cut(held):
    held["data_batch_2.bin"] = held["data_batch_2.bin"][:-1]


def long(held):
    held["data_batch_2.bin"] += b"\0" * 3_073


def labelled(held):
    data = bytearray(held["data_batch_4.bin"])
    data[2 * 3_073] = 10
    held["data_batch_4.bin"] = bytes(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut, "data_batch_2.bin in .* has 61,459 bytes: expected 61,460 bytes; it is cut short"),
        (long, "data_batch_2.bin in .* has 64,533 bytes: expected 61,460 bytes"),
        (labelled, "data_batch_4.bin has the label 10 in image 2: expected 0 to 9"),
        (dict.clear, "does not hold CIFAR-10: expected the files data_batch_1.bin, .*kriz/cifar"),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        read(folder(tmp_path, "binary", change))


def test_a_python_file_that_is_cut_short_is_refused_by_its_size(tmp_path):
    def change(held):
        held["test_batch"] = held["test_batch"][:1_000]

    with pytest.raises(InputError, match="test_batch in .* has 1,000 bytes: expected about 0 MB"):
        read(folder(tmp_path, "python", change))


def test_an_archive_that_is_cut_short_or_none_is_refused(tmp_path):
    path = archive(tmp_path, "binary")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match=r"cannot be read as a .tar.gz archive \(.*cut short"):
        read(path)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(InputError, match="cannot be read as a .tar.gz archive"):
        read(path)
    held = files("binary")
    del held["data_batch_5.bin"]
    with pytest.raises(InputError, match=r"binary.tar.gz is incomplete: data_batch_5.bin is missi"):
        read(archive(tmp_path, "binary", held))
    held["data_batch_5.bin"] = b"short"
    with pytest.raises(InputError, match="data_batch_5.bin in .* has 5 bytes: expected 61,460"):
        read(archive(tmp_path, "binary", held))


def test_members_are_found_by_name_and_nothing_is_written(tmp_path):
    path = tmp_path / "sly.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files("binary").items():
            member = tarfile.TarInfo(f"../../{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("cifar-10-batches-bin/data_batch_1")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    assert len(read(path).test) == RECORDS
    assert [p.name for p in tmp_path.iterdir()] == ["sly.tar.gz"]


def test_what_is_not_the_published_data_is_told_of_and_used(tmp_path):
    path = archive(tmp_path, "binary")
    with pytest.warns(CifarDigestWarning, match="cifar-binary.tar.gz has the MD5 .*is used"):
        cifar10(path, records=RECORDS)
    place = folder(tmp_path, "python")
    with pytest.warns(CifarDigestWarning, match="data_batch_1 in .* and not c99cafc15224"):
        cifar10(place, records=RECORDS)
    # The page gives no MD5 of the binary version's files.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cifar10(folder(tmp_path, "binary"), records=RECORDS)


def test_the_whole_files_are_expected_by_name(tmp_path):
    with pytest.raises(
        InputError, match=r"data_batch_1.bin in .*61,460 bytes: expected 30,730,000"
    ):
        load_task(f"cifar10:{folder(tmp_path, 'binary')}")
    with pytest.raises(InputError, match="data_batch_1 in .* expected about 31 MB"):
        load_task(f"cifar10:{folder(tmp_path, 'python')}")
    with pytest.raises(InputError, match="there is no folder or archive .*nowhere"):
        load_task(f"cifar10:{tmp_path / 'nowhere'}")


@pytest.mark.skipif(not Path("/proc/self/mem").is_file(), reason="a file that cannot be read")
def test_a_file_that_cannot_be_read_is_told_of():
    with pytest.raises(InputError, match="/proc/self/mem cannot be read .*: expected CIFAR-10's"):
        read(Path("/proc/self/mem"))
