"""The folder that processes share: whole files or none, exact sums, and what is damaged goes."""

import json
import os
import random
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from esper.cache import DiskTier, KernelCache
from esper.cache._disk import LEVEL
from esper.errors import ArtifactError, InputError
from tests.esper import cache_crashes, cache_process
from tests.esper.cache_kernels import Shelf, variant

ROOT = Path(__file__).parents[2]
PLENTY = 1 << 30


def file_of(tier: DiskTier, kernel) -> Path:
    return tier.folder / f"{kernel.kernel_id}.zst"


def lying_bytes(tier: DiskTier) -> int:
    return sum(path.stat().st_size for path in tier.folder.glob("*.zst"))


def partials(tier: DiskTier) -> list[Path]:
    return list(tier.folder.glob("*.partial"))


@pytest.fixture
def tier(tmp_path: Path) -> DiskTier:
    return DiskTier(tmp_path / "disk", PLENTY)


@pytest.fixture(scope="module")
def kernels(artifact):
    return [variant(artifact, number) for number in range(8)]


def packed(kernel) -> int:
    return len(zstandard.ZstdCompressor(level=LEVEL).compress(kernel.data))


# ---- one process ----


def test_what_was_put_is_got_and_by_another_tier_too(tier, artifact):
    assert tier.put(artifact) == (True, 0)
    for other in (tier, DiskTier(tier.folder, PLENTY)):
        found = other.get(artifact.kernel_id)
        assert found is not None
        assert found.data == artifact.data
        assert found.manifest == artifact.manifest
        assert len(other) == 1
        assert other.bytes == lying_bytes(tier) == packed(artifact)
    assert not partials(tier)


def test_what_is_not_there_and_what_is_no_id(tier, artifact):
    assert tier.get(artifact.kernel_id) is None
    tier.put(artifact)
    for odd in ("", "../disk/" + artifact.kernel_id, artifact.kernel_id.upper(), "usage", "\n"):
        assert tier.get(odd) is None


def test_putting_again_writes_nothing_and_marks_it_as_used(tier, kernels):
    for kernel in kernels[:2]:
        tier.put(kernel)
    before = file_of(tier, kernels[0]).stat()
    tier.put(kernels[0])
    after = file_of(tier, kernels[0]).stat()
    assert after.st_ino == before.st_ino
    assert after.st_mtime_ns > file_of(tier, kernels[1]).stat().st_mtime_ns
    assert tier.bytes == lying_bytes(tier)


def test_those_unused_longest_go_first(tmp_path, kernels):
    size = max(map(packed, kernels))
    tier = DiskTier(tmp_path / "disk", 5 * size)
    gone = [tier.put(kernel).evicted for kernel in kernels[:4]]
    assert tier.get(kernels[0].kernel_id) is not None
    # The first was used after the three that came behind it.
    used = [*kernels[1:4], kernels[0]]
    for kernel in kernels[4:]:
        gone.append(tier.put(kernel).evicted)
        used.append(kernel)
        assert tier.bytes == lying_bytes(tier) <= 5 * size
        left = [k for k in used if file_of(tier, k).exists()]
        assert left == used[-len(left) :]
        assert len(left) == len(used) - sum(gone) == len(tier) >= 3
    assert gone[:4] == [0] * 4
    assert sum(gone) >= 3


def test_one_larger_than_the_tier_is_not_kept(tmp_path, artifact):
    tier = DiskTier(tmp_path / "disk", packed(artifact) - 1)
    assert tier.put(artifact) == (False, 0)
    assert tier.bytes == len(tier) == 0
    assert not partials(tier)


def test_clear_and_foreign_files(tier, kernels):
    (tier.folder / "notes.txt").write_text("mine")
    for kernel in kernels:
        tier.put(kernel)
    assert tier.clear() == len(kernels)
    assert tier.bytes == len(tier) == 0
    assert (tier.folder / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("change", ["unknown", "", "12 apples", "-5"])
def test_a_sum_that_is_not_known_is_counted_anew(tier, kernels, change):
    tier.put(kernels[0])
    (tier.folder / "usage").write_text(change)
    assert tier.bytes == lying_bytes(tier)
    (tier.folder / "usage").write_text(change)
    tier.put(kernels[1])
    assert tier.bytes == lying_bytes(tier)


def test_files_removed_by_hand_are_found_missing_when_counted(tier, kernels):
    for kernel in kernels[:2]:
        tier.put(kernel)
    file_of(tier, kernels[0]).unlink()
    assert tier.get(kernels[0].kernel_id) is None
    assert tier.repair() == tier.bytes == lying_bytes(tier)


def test_a_folder_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot be used as the disk tier.*Choose a folder"):
        DiskTier(tmp_path / "file" / "disk", PLENTY)


@contextmanager
def nobody() -> Iterator[None]:
    """One who may do nothing that is not allowed to all; the tests may run as root."""
    if os.geteuid() != 0:
        yield
        return
    try:
        os.seteuid(65534)
    except OSError as error:
        pytest.skip(f"root, and cannot be anyone else: {error}")
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("ledger", [True, False], ids=["with a sum", "without"])
def test_a_folder_that_may_not_be_written_is_read_all_the_same(kernels, ledger):
    # The folder of this test's own may be root's alone.
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        folder = Path(place) / "disk"
        tier = DiskTier(folder, PLENTY)
        for kernel in kernels[:2]:
            tier.put(kernel)
        if not ledger:
            (folder / "usage").unlink()
        file_of(tier, kernels[1]).write_bytes(b"rubbish")
        lying = lying_bytes(tier)
        for path in folder.iterdir():
            path.chmod(0o444)
        folder.chmod(0o555)
        library = Shelf(*kernels)
        try:
            with nobody():
                if os.access(folder, os.W_OK, effective_ids=True):
                    pytest.skip("nothing is forbidden to who runs the tests")
                cache = KernelCache(library, disk=folder)
                for kernel in kernels[:3]:
                    found = cache.load_kernel_sync(kernel.kernel_id)
                    assert found is not None
                    assert found.data == kernel.data
                stats = cache.get_enhanced_stats()
                with pytest.raises(ArtifactError, match="was damaged and cannot be removed"):
                    tier.get(kernels[1].kernel_id)
        finally:
            folder.chmod(0o755)
        # The first came from there; the others from the library, and what was not kept is told.
        assert library.asks == [kernel.kernel_id for kernel in kernels[1:3]]
        assert (stats["disk_hits"], stats["disk_bytes"], stats["disk_entries"]) == (1, lying, 2)
        assert [event.kind for event in cache.events()] == ["damaged", "disk", "disk"]
        assert stats["disk_failures"] == 2
        assert file_of(tier, kernels[1]).exists()
        assert not partials(tier)


def test_a_folder_that_may_not_be_read_cannot_be_used():
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "disk"
        folder.mkdir()
        folder.chmod(0)
        with nobody(), pytest.raises(InputError, match=r"Permission denied.*Choose a folder"):
            DiskTier(folder, PLENTY)


# ---- damage ----


@given(data=st.data())
def test_every_flipped_bit_is_found_and_its_file_removed(tmp_path_factory, artifact, data):
    tier = DiskTier(tmp_path_factory.mktemp("disk"), PLENTY)
    tier.put(artifact)
    path = file_of(tier, artifact)
    damaged = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, 8 * len(damaged) - 1))
    damaged[place // 8] ^= 1 << place % 8
    path.write_bytes(damaged)
    damage = None
    try:
        found = tier.get(artifact.kernel_id)
    except ArtifactError as error:
        damage, found = error, tier.get(artifact.kernel_id)
    if damage is None:
        # A few bits of a frame say nothing about its content.
        assert found is not None
        assert found.data == artifact.data
        return
    assert f"kernel {artifact.kernel_id[:12]} in {tier.folder} was damaged" in str(damage)
    assert found is None
    assert not path.exists()
    assert tier.bytes == 0


@given(keep=st.floats(0.0, 0.999))
def test_every_truncation_is_found(tmp_path_factory, artifact, keep):
    tier = DiskTier(tmp_path_factory.mktemp("disk"), PLENTY)
    tier.put(artifact)
    path = file_of(tier, artifact)
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(ArtifactError, match="was damaged and is removed"):
        tier.get(artifact.kernel_id)
    assert not path.exists()
    assert tier.bytes == 0


def test_another_kernels_file_under_its_name_is_found(tier, kernels):
    tier.put(kernels[0])
    file_of(tier, kernels[0]).rename(file_of(tier, kernels[1]))
    with pytest.raises(ArtifactError, match=f"kernel {kernels[1].kernel_id[:12]} is damaged"):
        tier.get(kernels[1].kernel_id)


def frames(size: int) -> dict[str, bytes]:
    zeros = b"\0" * size
    stream = zstandard.ZstdCompressor(level=LEVEL).compressobj()
    return {
        "says that it is large": zstandard.ZstdCompressor(level=19).compress(zeros),
        "does not say how large": stream.compress(zeros) + stream.flush(),
    }


@pytest.mark.parametrize("kind", frames(0))
def test_a_frame_is_not_unpacked_beyond_its_limit(tmp_path, artifact, kind, monkeypatch):
    tier = DiskTier(tmp_path / "disk", PLENTY, max_artifact_bytes=1 << 20)
    file_of(tier, artifact).write_bytes(frames(64 << 20)[kind])
    unpacked = []
    real = zstandard.ZstdDecompressor
    monkeypatch.setattr(zstandard, "ZstdDecompressor", lambda: unpacked.append(1) or real())
    with pytest.raises(ArtifactError, match="not known to be within 1048576 bytes"):
        tier.get(artifact.kernel_id)
    assert not unpacked


def test_a_file_longer_than_any_artifact_is_not_read(tmp_path, artifact):
    tier = DiskTier(tmp_path / "disk", PLENTY, max_artifact_bytes=1000)
    file_of(tier, artifact).write_bytes(os.urandom(5000))
    with pytest.raises(ArtifactError, match="it is longer than 2031 bytes"):
        tier.get(artifact.kernel_id)
    assert tier.put(artifact) == (False, 0)


def test_a_damaged_file_is_fetched_again_and_training_hears_nothing(tmp_path, artifact):
    library, told = Shelf(artifact), []
    cache = KernelCache(library, disk=tmp_path / "disk", on_event=told.append)
    cache.put(artifact)
    assert cache.disk is not None
    path = file_of(cache.disk, artifact)
    path.write_bytes(path.read_bytes()[:-1])
    cache.clear()
    found = cache.load_kernel_sync(artifact.kernel_id)
    assert found is not None
    assert found.data == artifact.data
    (event,) = told
    assert (event.kind, event.kernel_id) == ("damaged", artifact.kernel_id)
    assert "was damaged and is removed" in event.detail
    assert cache.events() == told
    stats = cache.get_enhanced_stats()
    assert (stats["disk_damaged"], stats["fetched"], stats["disk_hits"]) == (1, 1, 0)
    # And a good copy lies there again.
    assert cache.disk.get(artifact.kernel_id) is not None


def test_putting_a_good_one_mends_a_damaged_file(tier, artifact):
    tier.put(artifact)
    file_of(tier, artifact).write_bytes(b"rubbish")
    assert tier.put(artifact).kept
    found = tier.get(artifact.kernel_id)
    assert found is not None
    assert found.data == artifact.data
    assert tier.bytes == lying_bytes(tier)


def test_a_good_file_that_was_put_in_a_damaged_ones_place_stays(tier, artifact):
    path = file_of(tier, artifact)
    path.write_bytes(b"rubbish")
    damaged = path.stat()
    # As when another process removes it and fetches it again while this one reads it.
    kept = tier.folder / "kept"
    path.rename(kept)
    tier.put(artifact)
    tier._remove(artifact.kernel_id, damaged)
    assert tier.get(artifact.kernel_id) is not None
    kept.rename(path)
    tier._remove(artifact.kernel_id, damaged)
    assert not path.exists()


def test_the_only_copy_that_is_damaged_is_an_error_once(tmp_path, artifact):
    cache = KernelCache(Shelf(), disk=tmp_path / "disk")
    cache.put(artifact)
    cache.clear()
    assert cache.disk is not None
    file_of(cache.disk, artifact).write_bytes(b"rubbish")
    with pytest.raises(ArtifactError, match="has no other: compile kernel .* again"):
        cache.load_kernel_sync(artifact.kernel_id)
    assert cache.load_kernel_sync(artifact.kernel_id) is None


def test_a_file_that_cannot_be_read_is_a_miss_and_an_event(tmp_path, artifact):
    cache = KernelCache(Shelf(artifact), disk=tmp_path / "disk")
    assert cache.disk is not None
    # A directory in its place: open succeeds, and reading does not.
    file_of(cache.disk, artifact).mkdir()
    found = cache.load_kernel_sync(artifact.kernel_id)
    assert found is not None
    assert cache.get_enhanced_stats()["disk_failures"] >= 1
    assert cache.events()[0].kind == "disk"


def test_a_full_disk_leaves_nothing_half_written_and_loading_goes_on(small_disk, artifact):
    disk = small_disk(256)
    kernels = [variant(artifact, n, padding=200_000 * (n == 1)) for n in range(3)]
    noise = os.urandom(1 << 20)
    cache = KernelCache(Shelf(*kernels), disk=disk / "cache")
    tier = cache.disk
    assert tier is not None
    cache.load_kernel_sync(kernels[0].kernel_id)
    ballast = disk / "ballast"
    ballast.write_bytes(noise[: os.statvfs(disk).f_bavail * 4096 - 4096])
    found = cache.load_kernel_sync(kernels[2].kernel_id)
    assert found is not None
    assert found.data == kernels[2].data
    assert not partials(tier)
    assert (len(tier), tier.bytes) == (1, lying_bytes(tier))
    stats = cache.get_enhanced_stats()
    assert (stats["disk_failures"], stats["fetched"], stats["entries"]) == (1, 2, 2)
    assert "No space left" in cache.events()[0].detail
    # With room again it is kept.
    ballast.unlink()
    cache.clear()
    assert cache.load_kernel_sync(kernels[2].kernel_id) is not None
    assert (len(tier), tier.bytes) == (2, lying_bytes(tier))


# ---- several at once ----


def test_two_writers_of_one_kernel_leave_one_file(tmp_path, kernels):
    tiers = [DiskTier(tmp_path / "disk", PLENTY) for _ in range(8)]
    barrier = threading.Barrier(len(tiers))

    def write(tier: DiskTier) -> None:
        barrier.wait()
        for kernel in kernels:
            assert tier.put(kernel).kept

    threads = [threading.Thread(target=write, args=(tier,)) for tier in tiers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(tiers[0]) == len(kernels)
    assert tiers[0].bytes == lying_bytes(tiers[0]) == sum(map(packed, kernels))
    assert not partials(tiers[0])


def test_what_a_killed_writer_left_is_removed_and_a_living_ones_is_not(tier, kernels):
    code = (
        "import fcntl, os, sys, time\n"
        "fd = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)\n"
        "fcntl.flock(fd, fcntl.LOCK_EX)\nos.write(fd, b'half')\nprint('ready', flush=True)\n"
        "time.sleep(600)"
    )
    partial = tier.folder / f"{kernels[0].kernel_id}.0123456789abcdef.partial"
    writer = subprocess.Popen([sys.executable, "-c", code, partial], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    try:
        writer.stdout.readline()
        tier.repair()
        assert partial.exists()
    finally:
        writer.kill()
        writer.wait()
        writer.stdout.close()
    assert tier.get(kernels[0].kernel_id) is None
    assert tier.repair() == 0
    assert not partial.exists()


def test_a_process_killed_at_any_step_leaves_whole_files_and_the_right_sum(tmp_path, artifact):
    file = tmp_path / "artifact"
    file.write_bytes(artifact.data)
    done = subprocess.run(
        [sys.executable, cache_crashes.__file__, str(tmp_path), str(file)],
        capture_output=True,
        text=True,
        check=True,
        env=environment(),
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["step"] for line in found] == list(cache_crashes.STEPS)
    for line in found:
        assert line["killed"], line
        # What it wrote down is right, or nothing is; and then it is counted anew.
        assert line["written_down"] in (None, line["lying"]), line
        assert line["counted"] == line["lying_after"] <= line["limit"], line
        assert line["partials"] == 0, line
        assert line["damaged"] == 0, line
        # And whoever comes next can put it.
        assert line["put_again"], line
    # Each died where it was to die.
    assert [line["step"] for line in found if line["visible"]] == ["write", "written"]
    unknown = [line["step"] for line in found if line["written_down"] is None]
    assert unknown == ["unlink", "replace", "write"]


def environment() -> dict[str, str]:
    roots = (ROOT, ROOT / "functional", ROOT / "adapters")
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, roots))}


def test_processes_killed_at_random_lose_and_double_nothing(tmp_path, artifact):
    file, folder = tmp_path / "artifact", tmp_path / "disk"
    file.write_bytes(artifact.data)
    done = subprocess.run(
        [sys.executable, cache_process.__file__, str(folder), str(file)],
        capture_output=True,
        text=True,
        check=True,
        env=environment(),
    )
    assert done.stderr == ""
    rounds = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rounds) == cache_process.ROUNDS
    for left in rounds:
        # They were at work, and ended by none of their own checks.
        assert left["killed"] == cache_process.PROCESSES, left
        assert left["threads"] == 16, left
        assert left["done"] >= 16, left
        # The sum that they wrote down is right, or they left none.
        assert left["written_down"] in (None, left["lying"]), left
        assert left["counted"] == left["lying"] <= cache_process.MAX_BYTES, left
        assert left["partials"] == 0, left
        assert left["whole"] == left["files"] > 0, left


def test_sixteen_threads_on_one_folder(tmp_path, artifact):
    kernels = [variant(artifact, n, padding=500 * n) for n in range(12)]
    limit = 4 * packed(kernels[-1])
    tier = DiskTier(tmp_path / "disk", limit)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        chance = random.Random(seed)
        try:
            for _ in range(30):
                kernel = chance.choice(kernels)
                if chance.random() < 0.5:
                    tier.put(kernel)
                else:
                    found = tier.get(kernel.kernel_id)
                    assert found is None or found.data == kernel.data
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert tier.bytes == lying_bytes(tier) <= limit
    assert not partials(tier)
