import os
import subprocess
import sys
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
    # Putting the good one does not pretend that the damaged file is good.
    with pytest.raises(ArtifactError, match="is damaged"):
        library.put(artifact)


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


@pytest.mark.parametrize("name", ["a?b", "a%20b", "ü [x] b"])
def test_a_library_lies_where_it_was_asked_for(tmp_path, name, artifact):
    Library(tmp_path / name).put(artifact)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert Library(tmp_path / name, create=False).get(artifact.kernel_id).data == artifact.data


def test_a_full_disk_leaves_nothing_half_written(small_disk, artifact):
    disk = small_disk(256)
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
