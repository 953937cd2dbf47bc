"""Following files that other processes write."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.nissa._tail import Tail, last_line

PIECES = st.lists(st.binary(max_size=40).map(lambda b: b.replace(b"x", b"\n")), max_size=20)


def drained(tail: Tail, chunk: int) -> list[tuple[int, bytes]]:
    found = []
    while True:
        lines = tail.read(chunk)
        assert not lines.anew
        found += [tuple(line) for line in lines.fresh]
        if not lines.more:
            return found


@given(pieces=PIECES, chunk=st.integers(1, 30))
def test_every_whole_line_is_read_once_however_it_is_written(tmp_path_factory, pieces, chunk):
    path = tmp_path_factory.mktemp("tail") / "file"
    tail, found, written = Tail(path), [], b""
    for piece in pieces:
        with path.open("ab") as file:
            file.write(piece)
        written += piece
        found += drained(tail, chunk)
    assert found == list(enumerate(written.split(b"\n")[:-1], start=1))


@given(pieces=PIECES)
def test_the_last_line_is_the_last_that_is_whole(tmp_path_factory, pieces):
    path = tmp_path_factory.mktemp("last") / "file"
    path.write_bytes(b"".join(pieces))
    whole = b"".join(pieces).split(b"\n")[:-1]
    assert last_line(path) == (whole[-1] if whole else b"")


def test_the_last_line_of_a_large_file(tmp_path):
    path = tmp_path / "file"
    long = b"y" * 300_000
    path.write_bytes(b"first\n" + long + b"\nbegun")
    assert last_line(path) == long
    assert last_line(path, limit=1000) == b""


def test_a_file_that_is_not_there_yet(tmp_path):
    path = tmp_path / "none"
    assert last_line(path) == b""
    tail = Tail(path)
    assert tail.read() == ([], False, False)
    path.write_bytes(b"a\n")
    assert [line.data for line in tail.read().fresh] == [b"a"]
    path.unlink()
    assert tail.read() == ([], True, False)


def replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(b"one\nTWO\nthree\n")
    other.replace(path)


def shrink(path: Path) -> None:
    os.truncate(path, 4)


def rewrite(path: Path) -> None:
    path.write_bytes(b"one\nTWO\nthree\nfour\n")


@pytest.mark.parametrize("change", [replace, shrink, rewrite])
def test_a_file_that_was_written_anew_is_read_anew(tmp_path, change):
    path = tmp_path / "file"
    path.write_bytes(b"one\ntwo\nth")
    tail = Tail(path)
    assert len(tail.read().fresh) == 2
    change(path)
    lines = tail.read()
    assert lines.anew
    whole = path.read_bytes().split(b"\n")[:-1]
    assert [tuple(line) for line in lines.fresh] == list(enumerate(whole, start=1))


def test_a_file_that_may_not_be_read_is_an_error_of_the_system(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(OSError, match="directory"):
        Tail(folder).read()
