"""What is known of kernels, and which of them fit."""

import asyncio
import re

import jax
import pytest
import torch
from pydantic import ValidationError

from esper.artifacts import rewrite_artifact
from esper.cache import KernelCache, KernelMetadata
from esper.cache._metadata import describe_artifact, describe_record
from esper.contracts import KernelSignature
from esper.errors import InputError
from esper.tezzeret import compile_blueprint, load_blueprint
from esper.urza import Library
from tests.esper.cache_kernels import Shelf, variant


@pytest.fixture(scope="module")
def square():
    """Three numbers in, three out."""
    return compile_blueprint(
        load_blueprint("low_rank"), KernelSignature(input_shape=(3,), output_shape=(3,))
    )


@pytest.fixture(scope="module")
def kernels(artifact):
    return [variant(artifact, number) for number in range(5)]


def metadata(**changes) -> KernelMetadata:
    return KernelMetadata(
        **{
            "kernel_id": "0" * 64, "blueprint": "b", "birth": "zero", "confidence": 0.5,
            "input_shape": (4,), "output_shape": (4,), "dtype": "float32", "parameter_count": 10,
            "parameter_bytes": 40, "flops": 20, "size_bytes": 1000, "platforms": ("cpu",),
            "has_torchscript": False,
        } | changes
    )  # fmt: skip


def found(cache: KernelCache, *args, **options) -> list[str]:
    return [kernel_id for kernel_id, _ in cache.find_compatible_kernels(*args, **options)]


# ---- what is known ----


def test_metadata_is_what_the_library_records_and_more(tmp_path, artifact, square):
    library = Library(tmp_path / "library")
    for kernel in (artifact, square):
        library.put(kernel)
        told = describe_artifact(kernel)
        (record,) = library.find(kernel.manifest.signature)
        recorded = describe_record(record)
        unseen = {"platforms": None, "has_torchscript": None}
        assert told.model_copy(update=unseen) == recorded
        assert told.platforms == ("cpu", "cuda")
        assert told.has_torchscript
        assert told.flops == record.flops > 0
        assert told.parameter_count == sum(p.size for p in kernel.params.values())
        # Its parameters, and five examples in and out, all of four bytes.
        sides = sum(told.input_shape) + sum(told.output_shape)
        assert told.memory_bytes(5) == 4 * (told.parameter_count + 5 * sides)
        assert told.memory_footprint_mb == told.memory_bytes() / (1 << 20)


def test_what_the_library_counted_is_known_when_the_kernel_is_loaded(library, artifact):
    (record,) = library.find()
    # As of a user's own kernel, the artifact alone does not tell what its program costs.
    own = rewrite_artifact(artifact, blueprint=b"{")
    assert describe_artifact(own).flops is None
    cache = KernelCache(Shelf(own))
    assert cache.load_metadata([record.model_copy(update={"kernel_id": own.kernel_id})]) == 1
    for _ in range(2):
        assert cache.load_kernel_sync(own.kernel_id) is not None
        known = cache.metadata(own.kernel_id)
        assert known is not None
        assert known.flops == record.flops > 0
        assert known.platforms == ("cpu", "cuda")
        cache.clear()


def test_what_cannot_be_read_is_known_to_run_nowhere(artifact):
    broken = rewrite_artifact(
        artifact, blueprint=b"\xff{", stablehlo=b"no program", torchscript=None
    )
    cache = KernelCache()
    cache.put(broken)
    known = cache.metadata(broken.kernel_id)
    assert known is not None
    assert (known.platforms, known.has_torchscript, known.flops) == ((), False, None)
    assert found(cache, (1, 2), "cpu") == []


def test_metadata_outlives_the_artifact_up_to_its_limit(kernels):
    cache = KernelCache(Shelf(*kernels), max_entries=1, max_metadata=2)
    for kernel in kernels:
        cache.load_kernel_sync(kernel.kernel_id)
    known = [cache.metadata(kernel.kernel_id) is not None for kernel in kernels]
    assert known == [False, False, True, True, True]
    assert cache.get_enhanced_stats()["metadata_cache_size"] == 3
    assert set(found(cache, (1, 2), "cpu")) == {k.kernel_id for k in kernels[2:]}


def test_records_of_the_library_are_known_in_bulk(tmp_path, kernels, square):
    library = Library(tmp_path / "library")
    for kernel in (*kernels, square):
        library.put(kernel)
    cache = KernelCache(library, max_metadata=4)
    cache.put(square)
    assert cache.load_metadata(library.find()) == 4
    assert cache.load_metadata(library.find()) == 0
    assert len(found(cache, (1, 2), "cpu")) == 4
    # Where its programs run is known when it was seen.
    (first, *_) = found(cache, (1, 2), "tpu", backend="jax")
    cache.load_kernel_sync(first)
    assert first not in found(cache, (1, 2), "tpu", backend="jax")
    # What was seen of a kernel is not forgotten for what was only told.
    assert cache.record_performance(first, 0.7)
    cache.clear()
    assert cache.load_metadata(library.find()) == 0
    known = cache.metadata(first)
    assert known is not None
    assert (known.performance, known.accesses) == (0.7, 1)


@pytest.mark.parametrize(
    "changes",
    [
        {"signature": "2->8"},
        {"signature": "2 float32"},
        {"signature": "2->x float32"},
        {"signature": "1->2->3 float32"},
        {"birth": "odd"},
    ],
)
def test_a_record_that_cannot_be_read_is_refused_and_none_is_taken(library, changes):
    (record,) = library.find()
    cache = KernelCache()
    bad = record.model_copy(update=changes)
    with pytest.raises(
        InputError, match=r"the record of kernel .* cannot be used: .* such as '2->"
    ):
        cache.load_metadata([record, bad])
    assert cache.get_enhanced_stats()["metadata_cache_size"] == 0


def test_metadata_is_strict_data():
    for changes in ({"confidence": 1.5}, {"flops": -1}, {"dtype": "int8"}, {"colour": 1}):
        with pytest.raises(ValidationError):
            metadata(**changes)
    with pytest.raises(ValidationError, match="frozen"):
        metadata().blueprint = "other"


def test_names_of_the_owners_metadata():
    known = metadata(performance=0.25)
    assert known.performance_profile == {"score": 0.25, "confidence": 0.5}
    assert metadata().performance_profile["score"] == 0.0
    assert known.is_compatible_with_shape([4])
    assert not known.is_compatible_with_shape([4, 4])
    assert known.device_requirements == ("cpu",)
    assert metadata(has_torchscript=True).device_requirements == ()
    assert metadata(platforms=None, has_torchscript=None).device_requirements == ()


@pytest.mark.parametrize(
    ("platforms", "torchscript", "platform", "backend", "runs"),
    [
        (("cpu",), False, "cpu", None, True),
        (("cpu",), False, "cuda", None, False),
        (("cpu",), False, "cuda", "torch", False),
        (("cpu",), True, "cuda", None, True),
        (("cpu",), True, "cuda", "jax", False),
        ((), True, "mps", "torch", True),
        (None, None, "cuda", "jax", True),
        (None, None, "cuda", "torch", True),
    ],
)
def test_where_a_kernel_runs(platforms, torchscript, platform, backend, runs):
    known = metadata(platforms=platforms, has_torchscript=torchscript)
    assert known.runs_on(platform, backend) is runs


# ---- which fit ----


@pytest.mark.parametrize(
    ("wanted", "fits"),
    [
        ({"target_shape": (32, 2)}, True),
        ({"target_shape": torch.Size([32, 2])}, True),
        # Each position of a sequence is a vector.
        ({"target_shape": (32, 7, 2)}, True),
        ({"target_shape": (2,)}, False),
        ({"target_shape": (32, 3)}, False),
        ({"output_shape": (32, 8)}, True),
        ({"output_shape": (32, 7)}, False),
        ({"output_shape": (8,)}, False),
        ({"dtype": "float32"}, True),
        ({"dtype": "float16"}, False),
        ({"device": "cuda:1"}, True),
        ({"device": torch.device("cpu")}, True),
        ({"device": jax.devices("cpu")[0]}, True),
        ({"device": "gpu", "backend": "jax"}, True),
        ({"device": "tpu", "backend": "jax"}, False),
        ({"max_parameters": 168}, True),
        ({"max_parameters": 167}, False),
        # 168 parameters, and 32 examples of 2 and 8 numbers, of 4 bytes each.
        ({"max_memory_mb": 4 * (168 + 32 * 10) / (1 << 20)}, True),
        ({"max_memory_mb": 4 * (168 + 32 * 10 - 1) / (1 << 20)}, False),
        ({"max_memory_mb": 0.0}, False),
    ],
)
def test_a_kernel_that_fits_and_one_that_does_not(artifact, wanted, fits):
    cache = KernelCache()
    cache.put(artifact)
    options = {"target_shape": (32, 2), "device": "cpu"} | wanted
    assert bool(found(cache, **options)) is fits
    # And so it is when it is loaded, with and without knowing it before.
    for fresh in (False, True):
        other = KernelCache(Shelf(artifact)) if fresh else cache
        loaded = asyncio.run(
            other.load_kernel_with_validation(artifact.kernel_id, batch_size=32, **options)
        )
        assert (loaded is not None) is fits
        stats = other.get_enhanced_stats()
        assert stats["compatibility_checks"] == 1
        assert stats["compatibility_failures"] == (not fits)
        assert stats["compatibility_rate"] == fits
        assert [event.kind for event in other.events()] == ["incompatible"] * (not fits)


def test_best_measured_first_then_the_last_asked_for(kernels):
    cache = KernelCache(Shelf(*kernels))
    for kernel in kernels:
        cache.load_kernel_sync(kernel.kernel_id)
    cache.record_performance(kernels[2].kernel_id, 0.3)
    cache.record_performance(kernels[4].kernel_id, 0.9)
    cache.load_kernel_sync(kernels[0].kernel_id)
    order = [4, 2, 0, 3, 1]
    assert found(cache, (1, 2), "cpu") == [kernels[n].kernel_id for n in order]
    scores = [known.performance for _, known in cache.find_compatible_kernels((1, 2), "cpu")]
    assert scores == [0.9, 0.3, None, None, None]


def test_one_that_is_known_not_to_fit_is_not_fetched(artifact):
    library = Shelf(artifact)
    cache = KernelCache(library)

    def validated(shape):
        return asyncio.run(cache.load_kernel_with_validation(artifact.kernel_id, shape, "cpu"))

    loaded = validated((1, 2))
    assert loaded is not None
    assert loaded[0] is artifact
    assert loaded[1].accesses == 1
    cache.clear()
    assert validated((1, 3)) is None
    assert len(library.asks) == 1
    (event,) = cache.events()
    assert event.detail == "it takes examples of shape (2,), got (1, 3)"
    assert asyncio.run(cache.load_kernel_with_validation("0" * 64, (1, 2), "cpu")) is None
    assert cache.get_enhanced_stats()["compatibility_checks"] == 2


@pytest.mark.parametrize(
    "device", [None, "", 0, object(), "banana", "cuda:", "cuda:x", "cuda:0:1", "CPU", ":0"]
)
def test_what_is_no_device(device):
    cache = KernelCache()
    expected = (
        rf"^{re.escape(repr(device))} is no device: expected a torch.device, a jax.Device or a name"
        r" such as 'cpu' or 'cuda:0', of cpu, cuda, gpu, hpu, meta, mps, rocm, tpu, xla, xpu$"
    )
    with pytest.raises(InputError, match=expected):
        cache.find_compatible_kernels((1, 2), device)
    with pytest.raises(InputError, match=expected):
        asyncio.run(cache.load_kernel_with_validation("0" * 64, (1, 2), device))


def test_a_device_of_torch_is_known_whatever_its_name(artifact):
    cache = KernelCache()
    cache.put(artifact)
    # torch runs its TorchScript wherever it runs anything.
    for device in (torch.device("privateuseone:1"), torch.device("vulkan")):
        assert found(cache, (1, 2), device) == [artifact.kernel_id]


@pytest.mark.parametrize("shape", [3, None, (1.5, 2), ("b", 2)])
def test_what_is_no_shape(shape):
    cache = KernelCache()
    with pytest.raises(InputError, match="target_shape must be whole numbers, the batch axis firs"):
        cache.find_compatible_kernels(shape, "cpu")
    if shape is not None:
        with pytest.raises(InputError, match="output_shape must be whole numbers, the batch axis"):
            cache.find_compatible_kernels((1, 2), "cpu", output_shape=shape)


@pytest.mark.parametrize("score", [-0.1, 1.1, float("nan"), "1", None])
def test_what_is_no_score(artifact, score):
    cache = KernelCache()
    cache.put(artifact)
    with pytest.raises(InputError, match=r"performance of kernel .* must be from 0 to 1, got"):
        cache.record_performance(artifact.kernel_id, score)


def test_of_an_unknown_kernel_nothing_is_recorded():
    cache = KernelCache()
    assert not cache.record_performance("0" * 64, 0.5)
    assert not cache.record_failure("0" * 64)
    assert cache.metadata("0" * 64) is None


def test_memory_and_parameters_of_what_is_in_memory(artifact, square):
    cache = KernelCache()
    assert cache.get_enhanced_stats()["average_kernel_parameters"] == 0.0
    cache.put(artifact)
    cache.put(square)
    told = [describe_artifact(kernel) for kernel in (artifact, square)]
    stats = cache.get_enhanced_stats()
    assert stats["total_estimated_memory_mb"] == sum(k.memory_footprint_mb for k in told)
    assert stats["average_kernel_parameters"] == sum(k.parameter_count for k in told) / 2
