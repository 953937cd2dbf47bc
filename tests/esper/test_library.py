import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from esper.contracts import KernelSignature
from esper.errors import ArtifactError, InputError, KernelNotFoundError, LibraryError
from esper.tezzeret import compile_blueprint, load_blueprint
from esper.urza import Library


def _file(library: Library, kernel_id: str) -> Path:
    return library.folder / "kernels" / kernel_id[:2] / f"{kernel_id}.kernel"


def test_get_returns_what_was_put(library, artifact):
    again = library.get(artifact.kernel_id)
    assert again.data == artifact.data
    assert again.manifest == artifact.manifest


def test_putting_twice_changes_nothing(library, artifact):
    assert library.put(artifact) == artifact.kernel_id
    assert len(library.find()) == 1


def test_find_by_signature_blueprint_and_recipe(library, artifact):
    other = compile_blueprint(
        load_blueprint("low_rank"), KernelSignature(input_shape=(3,), output_shape=(3,))
    )
    library.put(other)
    (found,) = library.find(artifact.manifest.signature)
    assert found.kernel_id == artifact.kernel_id
    assert found.parameter_count == sum(p.size for p in artifact.params.values())
    assert [r.kernel_id for r in library.find(blueprint="low_rank")] == [other.kernel_id]
    assert [r.kernel_id for r in library.find(recipe=other.manifest.recipe)] == [other.kernel_id]
    assert library.find(KernelSignature(input_shape=(9,), output_shape=(9,))) == []


def test_another_process_sees_what_was_put(library, artifact):
    script = (
        "import sys; from esper.urza import Library\n"
        "print(Library(sys.argv[1]).get(sys.argv[2]).kernel_id)"
    )
    seen = subprocess.run(
        [sys.executable, "-c", script, str(library.folder), artifact.kernel_id],
        capture_output=True,
        text=True,
        check=True,
    )
    assert seen.stdout.strip() == artifact.kernel_id


def test_a_kernel_that_is_not_there(library):
    with pytest.raises(KernelNotFoundError, match="holds no kernel abababababab"):
        library.get("ab" * 32)
    assert issubclass(KernelNotFoundError, LookupError)


def test_one_flipped_bit_is_refused(library, artifact):
    path = _file(library, artifact.kernel_id)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    with pytest.raises(
        ArtifactError, match=r"is damaged.*compile it again\. Its file is .*\.kernel"
    ):
        library.get(artifact.kernel_id)
    # Putting the good one mends it, whatever its length is.
    library.put(artifact)
    assert library.get(artifact.kernel_id).data == artifact.data
    path.write_bytes(data[:-1])
    library.put(artifact)
    assert library.get(artifact.kernel_id).data == artifact.data
    assert len(library.find()) == 1


def test_a_file_larger_than_any_artifact_is_not_read(library, artifact):
    with _file(library, artifact.kernel_id).open("r+b") as file:
        file.truncate(1 << 40)
    for read in (library.get, library.read_bytes):
        with pytest.raises(
            ArtifactError, match=r"its file has 1099511627776 bytes, .* at most 1073741824\. Remove"
        ):
            read(artifact.kernel_id)


@pytest.mark.parametrize("text", ["", "abc", "../../secret", "AB" * 32, "ab" * 33, "ü" * 64])
def test_what_is_no_id_is_not_there(library, text):
    for ask in (library.get, library.read_bytes):
        with pytest.raises(KernelNotFoundError, match="an id is 64 hexadecimal digits, in lower"):
            ask(text)
    library.remove(text)
    assert len(library.find()) == 1


def test_a_file_that_is_not_found_is_told_of(library, artifact):
    assert library.unlisted() == []
    data = artifact.data
    library.remove(artifact.kernel_id)
    path = _file(library, artifact.kernel_id)
    path.write_bytes(data)
    (path.parent / "notes.txt").write_text("no kernel")
    assert library.find() == []
    assert library.unlisted() == [artifact.kernel_id]
    library.put(artifact)
    assert library.unlisted() == []


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be used.*Choose a folder that can be written"):
        Library(tmp_path / "file" / "library")


def test_a_database_that_is_no_database(tmp_path):
    folder = tmp_path / "library"
    folder.mkdir()
    (folder / "library.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(InputError, match="cannot be used"):
        Library(folder)


def test_a_library_that_is_not_there_is_not_made_by_reading(tmp_path):
    with pytest.raises(InputError, match="there is no library in"):
        Library(tmp_path / "typo", create=False)
    assert list(tmp_path.iterdir()) == []


def test_a_database_of_something_else_is_left_as_it_is(tmp_path):
    path = tmp_path / "library.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as theirs:
        theirs.execute("CREATE TABLE kernels (name TEXT)")
    before = path.read_bytes()
    for create in (True, False):
        with pytest.raises(InputError, match="is no library of Esper's: its table .* lacks .*size"):
            Library(tmp_path, create=create)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


_OPEN = """
import multiprocessing, sys
from esper.urza import Library

def open_each(barrier):
    for i in range(25):
        barrier.wait()
        Library(f"{sys.argv[1]}/{i}").close()

context = multiprocessing.get_context("fork")  # the import takes seconds
barrier = context.Barrier(4)
processes = [context.Process(target=open_each, args=[barrier]) for _ in range(4)]
for process in processes:
    process.start()
for process in processes:
    process.join(60)
    if process.exitcode != 0:
        barrier.abort()
sys.exit(any(process.exitcode for process in processes))
"""


def test_several_processes_open_a_library_that_is_not_there(tmp_path, artifact):
    done = subprocess.run(
        [sys.executable, "-W", "ignore::RuntimeWarning", "-c", _OPEN, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for i in range(25):
        assert Library(tmp_path / str(i), create=False).put(artifact) == artifact.kernel_id


@contextlib.contextmanager
def nobody(folder: Path):
    """A while in which a folder can be read and not written, by root neither."""
    kept = {path: path.stat().st_mode for path in (folder, *folder.rglob("*"))}
    for path in kept:
        path.chmod(0o555 if path.is_dir() else 0o444)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        for path, mode in kept.items():
            path.chmod(mode)


@pytest.fixture
def shared():
    """A folder of a file system that everybody may enter, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def test_a_library_that_can_only_be_read_is_read(shared, artifact):
    folder = shared / "library"
    with contextlib.closing(Library(folder)) as store:
        store.put(artifact)
    other = compile_blueprint(load_blueprint("low_rank"), artifact.manifest.signature)
    with nobody(shared):
        reader = Library(folder, create=False)
        (row,) = reader.find()
        assert reader.get(reader.full_id(row.kernel_id[:9])).data == artifact.data
        assert reader.measurements(row.kernel_id) == []
        with pytest.raises(LibraryError, match="could not be kept in"):
            reader.put(other)
    # Nothing is made beside it.
    assert sorted(p.name for p in folder.iterdir()) == ["kernels", "library.sqlite"]
    # What its owner puts there later is found; while they have it open too.
    with contextlib.closing(Library(folder)) as store:
        store.put(other)
        with nobody(shared):
            assert len(reader.find()) == 2
            assert len(Library(folder, create=False).find()) == 2
    with nobody(shared):
        assert len(reader.find()) == 2


def test_a_log_beside_a_database_that_can_only_be_read_is_not_passed_over(shared, artifact):
    folder = shared / "library"
    store = Library(folder)
    store.put(artifact)
    shutil.copytree(folder, shared / "copy", ignore=shutil.ignore_patterns("*-shm"))
    store.close()
    with nobody(shared), pytest.raises(InputError, match="cannot be used: .*that can be read"):
        Library(shared / "copy", create=False)
    assert len(Library(shared / "copy", create=False).find()) == 1


@pytest.mark.parametrize("name", ["a?b", "a%20b", "ü [x] b"])
def test_a_library_lies_where_it_was_asked_for(tmp_path, name, artifact):
    Library(tmp_path / name).put(artifact)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert Library(tmp_path / name, create=False).get(artifact.kernel_id).data == artifact.data


def test_a_full_disk_leaves_nothing_half_written(small_disk, artifact):
    disk = small_disk(1024)
    store = Library(disk / "library")
    store.put(artifact)
    (disk / "ballast").write_bytes(b"0" * (os.statvfs(disk).f_bavail * 4096 - 8192))
    other = compile_blueprint(load_blueprint("gated"), artifact.manifest.signature)
    with pytest.raises(LibraryError, match="could not be kept in"):
        store.put(other)
    assert [record.kernel_id for record in store.find()] == [artifact.kernel_id]
    assert store.get(artifact.kernel_id).data == artifact.data
    # With room again, the same put succeeds.
    (disk / "ballast").unlink()
    assert store.put(other) == other.kernel_id
    assert store.get(other.kernel_id).data == other.data
