"""Artifacts run by themselves, in torch and in jax: as by hand, once loaded, and with account."""

import asyncio
import dataclasses
import json
import subprocess
import sys
import threading
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from prometheus_client import CollectorRegistry

from esper.artifacts import rewrite_artifact
from esper.errors import ArtifactError, InputError, KernelExecutionError
from esper.execution import count_compilations, load_jax_kernel, load_torch_kernel
from esper.execution._executor import RealKernelExecutor
from esper.execution._latency import Latencies
from esper.oona import InProcessBus, Topic
from esper.recovery import ErrorRecoveryManager, ErrorType
from esper_adapters.pytorch import TorchKernel
from esper_functional import Kernel, KernelMismatchError
from tests.adapters.kernels import BLUEPRINTS, artifact, random_params
from tests.tolerance import assert_bitwise, assert_close

ROUTES = {"torch": "torchscript", "jax": "stablehlo"}


def trusting(*args, **options):
    """An executor that runs whatever it is given, and so what these tests rewrite."""
    return RealKernelExecutor(*args, **({"trust": lambda _: None} | options))


def drawn(seed: int, blueprint: str = "bottleneck"):
    """An artifact whose parameters are away from birth; all of a blueprint share programs."""
    source = artifact(blueprint)
    return rewrite_artifact(source, params=random_params(source, seed))


def batch(backend: str, *lead: int, seed: int = 3) -> Any:
    x = np.random.default_rng(seed).normal(size=(*(lead or (6,)), 3)).astype(np.float32)
    return torch.tensor(x) if backend == "torch" else jnp.asarray(x)


def by_hand(source, x):
    if isinstance(x, torch.Tensor):
        program = load_torch_kernel(source).program
        return program(*(torch.tensor(p) for p in source.params.values()), x)
    kernel = load_jax_kernel(source)
    return kernel.program.apply(kernel.params, x)


# ---- what it computes ----


@pytest.mark.parametrize("blueprint", BLUEPRINTS)
@pytest.mark.parametrize("backend", ROUTES)
def test_it_computes_what_the_kernel_does_by_hand(backend, blueprint):
    source, x = drawn(1, blueprint), batch(backend)
    executor = trusting(backend=backend)
    y = executor.execute_kernel(source, x)
    assert_close(y, by_hand(source, x))
    assert float(abs(y).sum()) > 0.1
    assert executor.get_performance_stats()["routes"] == {ROUTES[backend]: 1}


def test_the_backends_agree():
    source = drawn(1)
    found = [trusting(backend=b).execute_kernel(source, batch(b)) for b in ROUTES]
    assert_close(*found)


@pytest.mark.parametrize("backend", ROUTES)
@pytest.mark.parametrize("lead", [(), (1,), (2, 4)])
def test_all_axes_before_the_example_are_batch(backend, lead):
    source = drawn(1)
    x = batch(backend, 1 if not lead else int(np.prod(lead)))
    y = trusting(backend=backend).execute_kernel(source, x.reshape(*lead, 3))
    assert_close(y, by_hand(source, x).reshape(*lead, 5))


def test_loading_gives_the_kernel_of_the_backend():
    source = drawn(2)
    kernel = trusting().load(source)
    assert isinstance(kernel, TorchKernel)
    assert (kernel.kernel_id, kernel.route) == (source.kernel_id, "torchscript")
    kernel = trusting(backend="jax").load(source)
    assert isinstance(kernel, Kernel)
    for name, value in source.params.items():
        assert_bitwise(kernel.params[name], value)


@pytest.mark.parametrize("route", ["torchscript", "bridge"])
def test_gradients_pass_through_in_torch(route):
    source = drawn(1)
    if route == "bridge":
        source = rewrite_artifact(source, torchscript=None)
    executor = trusting()
    names = list(source.params)
    params = {n: torch.tensor(p).requires_grad_() for n, p in source.params.items()}
    x = batch("torch").requires_grad_()
    # By their names, in whatever order they come.
    backwards = {n: params[n] for n in reversed(names)}
    executor.execute_kernel(source, x, params=backwards).square().sum().backward()
    assert executor.get_performance_stats()["routes"] == {route: 1}

    kernel = load_jax_kernel(source)
    wanted = jax.grad(lambda p, x: (kernel.program.apply(p, x) ** 2).sum(), argnums=(0, 1))(
        kernel.params, jnp.asarray(x.detach().numpy())
    )
    assert_close(x.grad, wanted[1])
    for name in names:
        assert_close(params[name].grad, wanted[0][name])
        assert float(params[name].grad.abs().sum()) > 0


def test_gradients_pass_through_in_jax_and_what_is_traced_is_not_timed():
    source, executor = drawn(1), trusting(backend="jax")
    x = batch("jax")
    kernel = executor.load(source)

    def loss(p, x):
        return (executor.execute_kernel(source, x, params=p) ** 2).sum()

    def plain(p, x):
        return (kernel.program.apply(p, x) ** 2).sum()

    found = jax.jit(jax.grad(loss, argnums=(0, 1)))(kernel.params, x)
    wanted = jax.grad(plain, argnums=(0, 1))(kernel.params, x)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert_close(ours, theirs)
    stats = executor.get_performance_stats()
    assert stats["execution"]["count"] == 0
    executor.execute_kernel(source, x)
    assert executor.get_performance_stats()["execution"]["count"] == 0  # the first one compiles
    executor.execute_kernel(source, x)
    assert executor.get_performance_stats()["execution"]["count"] == 1


def test_an_event_loop_runs_the_same():
    source, x = drawn(1), batch("torch")
    executor = trusting()

    async def run():
        with torch.no_grad():
            first = await executor.execute_kernel_async(source, x.clone().requires_grad_())
        second = await executor.execute_kernel_async(source, x.clone().requires_grad_())
        return first, second

    first, second = asyncio.run(run())
    assert torch.equal(first, second)
    # Whether gradients are recorded is a matter of the thread, which is the caller's.
    assert (first.requires_grad, second.requires_grad) == (False, True)
    assert executor.get_performance_stats()["cache"]["misses"] == 1


def test_what_is_trained_in_place_is_not_the_artifacts():
    source, x = drawn(1), batch("torch")
    executor = trusting()
    before = {name: p.copy() for name, p in source.params.items()}
    y = executor.execute_kernel(source, x)
    for p in executor._loader.kept(source.kernel_id).params.values():
        p.zero_()
    for name, p in before.items():
        np.testing.assert_array_equal(source.params[name], p)
    assert torch.equal(trusting().execute_kernel(source, x), y)


# ---- programs are kept ----


@pytest.mark.parametrize("route", ["stablehlo", "bridge"])
def test_another_kernel_of_the_same_program_compiles_nothing(route):
    backend = "jax" if route == "stablehlo" else "torch"
    change = {} if route == "stablehlo" else {"torchscript": None}
    kernels = [rewrite_artifact(drawn(seed), **change) for seed in range(4)]
    assert len({k.kernel_id for k in kernels}) == 4
    executor = trusting(backend=backend)
    x, other = batch(backend), batch(backend, 9)
    executor.execute_kernel(kernels[0], x)
    with count_compilations() as count:
        found = [executor.execute_kernel(k, x) for k in kernels]
        executor.execute_kernel(kernels[1], x)
    assert count() == 0
    assert len({float(y.sum()) for y in found}) == 4
    # What is loaded to be grafted elsewhere is compiled once, too.
    programs = [executor.load(k).program for k in kernels]
    assert all(program is programs[0] for program in programs)
    stats = executor.get_performance_stats()
    assert (stats["cache"]["modules_cached"], stats["cache"]["kernels_cached"]) == (1, 4)
    assert stats["execution"]["count"] == 5
    loads = stats["compilation"]["count"]
    with count_compilations() as count:
        executor.execute_kernel(kernels[0], other)
    assert count() > 0  # another shape
    assert executor.get_performance_stats()["compilation"]["count"] == loads + 1


def test_torchscript_is_loaded_once_for_all_its_kernels():
    executor = trusting()
    kernels = [executor.load(drawn(seed)) for seed in range(3)]
    assert len({id(k.program) for k in kernels}) == 1
    stats = executor.get_performance_stats()
    assert stats["compilation"]["count"] == stats["cache"]["modules_cached"] == 1
    assert stats["cache"]["memory_mb"] > 0


def test_what_was_used_longest_ago_goes():
    executor = trusting(max_kernel_cache_size=2)
    a, b, c = (drawn(1, name) for name in BLUEPRINTS[:3])
    for source in (a, b, a, c):  # b is the one to go
        executor.load(source)
    before = executor.get_performance_stats()["cache"]
    assert (before["modules_cached"], before["kernels_cached"], before["evictions"]) == (2, 2, 1)
    assert (before["hits"], before["misses"]) == (1, 3)
    executor.load(a)
    assert executor.get_performance_stats()["cache"]["misses"] == 3
    executor.load(b)
    assert executor.get_performance_stats()["cache"]["misses"] == 4
    executor.clear()
    cleared = executor.get_performance_stats()["cache"]
    assert (cleared["modules_cached"], cleared["kernels_cached"], cleared["memory_mb"]) == (0, 0, 0)
    x = batch("torch")
    assert_close(executor.execute_kernel(c, x), by_hand(c, x))


def test_what_many_threads_ask_for_at_once_is_loaded_once():
    source, x = drawn(1), batch("jax")
    executor = trusting(backend="jax")
    start, found = threading.Barrier(8), []

    def ask():
        start.wait()
        found.append(executor.execute_kernel(source, x))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    for y in found:
        assert_bitwise(y, found[0])
    assert executor.get_performance_stats()["routes"] == {"stablehlo": 1}


# ---- what it refuses ----


def refuse(source):
    raise ArtifactError(f"kernel {source.kernel_id[:12]} is refused: it is not trusted")


@pytest.mark.parametrize("backend", ROUTES)
def test_what_is_not_trusted_is_not_loaded(backend):
    # It could not be loaded either: nobody has tried.
    source = rewrite_artifact(drawn(1), torchscript=b"hostile", stablehlo=b"hostile")
    executor = trusting(backend=backend, trust=refuse)
    for call in (executor.load, partial(executor.execute_kernel, x=batch(backend))):
        with pytest.raises(ArtifactError, match="is refused: it is not trusted"):
            call(source)
    stats = executor.get_performance_stats()
    assert stats["cache"]["modules_cached"] == stats["fallbacks"] == 0
    assert stats["errors"]["by_type"]["kernel_validation"] == 2
    assert stats["errors"]["by_kernel"] == {source.kernel_id: 2}


def test_trust_is_asked_for_what_is_new_alone():
    asked = []
    executor = trusting(trust=lambda source: asked.append(source.kernel_id))
    a, b = drawn(1), drawn(2)
    for source in (a, a, b, a):
        executor.execute_kernel(source, batch("torch"))
    assert asked == [a.kernel_id, b.kernel_id]


def test_what_was_not_compiled_here_is_verified_where_nobody_says_otherwise():
    whole = drawn(1)
    odd = rewrite_artifact(whole, torchscript=whole.torchscript[:-40])
    with pytest.raises(ArtifactError, match="is refused: .*TorchScript"):
        RealKernelExecutor().load(odd)
    assert RealKernelExecutor(trust=None).load(odd) is not None


def test_damaged_torchscript_runs_over_the_bridge_and_an_event_says_so():
    bus, registry = InProcessBus(), CollectorRegistry()
    heard = bus.subscribe(Topic.ERROR, Topic.RECOVERY)
    recovery = ErrorRecoveryManager(bus=bus, registry=registry)
    whole = drawn(1)
    damaged = rewrite_artifact(whole, torchscript=whole.torchscript[:-40])
    executor = trusting(recovery=recovery)
    x = batch("torch")
    assert_close(executor.execute_kernel(damaged, x), by_hand(whole, x))
    error, told = heard.drain()
    assert error.topic is Topic.ERROR
    assert error.payload["type"] == "kernel_validation"
    assert error.payload["kernel"] == damaged.kernel_id
    assert error.payload["metadata"] == {"backend": "torch", "route": "torchscript"}
    assert told.topic is Topic.RECOVERY
    assert (told.payload["recovered"], told.payload["action"]) == (True, "fallback")
    assert told.payload["detail"] == "it runs by the route 'bridge'"
    stats = executor.get_performance_stats()
    assert (stats["routes"], stats["fallbacks"]) == ({"bridge": 1}, 1)
    assert recovery.get_recovery_stats()["total_recoveries"] == 1
    name = "esper_recoveries_total"
    labels = {"type": "kernel_validation", "strategy": "fallback", "outcome": "recovered"}
    assert registry.get_sample_value(name, labels) == 1


@pytest.mark.parametrize("backend", ROUTES)
def test_an_artifact_without_a_program_that_loads_is_refused(backend):
    source = rewrite_artifact(drawn(1), torchscript=b"no", stablehlo=b"no")
    executor = trusting(backend=backend)
    pattern = "StableHLO cannot be read"
    if backend == "torch":
        pattern = "holds no program that can be loaded: its TorchScript .* route 'bridge': its Stab"
    with pytest.raises(ArtifactError, match=pattern):
        executor.execute_kernel(source, batch(backend))
    assert executor.get_performance_stats()["cache"]["kernels_cached"] == 0
    if backend == "torch":
        assert executor.error_recovery.recoveries[-1].recovered is False


@pytest.mark.parametrize("backend", ROUTES)
def test_inputs_and_parameters_of_another_structure_are_refused(backend):
    source, executor = drawn(1), trusting(backend=backend)
    x = batch(backend)
    short = source.kernel_id[:12]
    for wrong, found in ((x[:, :2], r"float32\[6, 2\]"), (x[0, 0], r"float32\[\]")):
        with pytest.raises(
            KernelMismatchError, match=rf"{short} takes float32\[\*batch, 3\], got {found}: choose"
        ):
            executor.execute_kernel(source, wrong)
    half = x.half() if backend == "torch" else x.astype(jnp.bfloat16)
    with pytest.raises(KernelMismatchError, match=r"got b?float16\[6, 3\]"):
        executor.execute_kernel(source, half)
    with pytest.raises(KernelMismatchError, match="has the parameters .*, got none: give each"):
        executor.execute_kernel(source, x, params={})
    other = "an array of jax or numpy" if backend == "jax" else "a tensor"
    with pytest.raises(
        KernelMismatchError, match=f"takes {other} as the input, got a list: convert"
    ):
        executor.execute_kernel(source, [1.0, 2.0, 3.0])
    errors = executor.get_performance_stats()["errors"]
    assert errors["by_type"]["kernel_validation"] == errors["count"] == 5
    # Recorded, but the kernel is none the worse for it.
    assert errors["by_kernel"] == {}
    (*_, last) = executor.error_recovery.error_tracker.history
    assert (last.kernel_id, last.metadata["called"]) == (None, source.kernel_id)


@pytest.mark.parametrize("backend", ROUTES)
def test_parameters_that_torch_would_broadcast_or_cast_are_refused(backend):
    source, executor = drawn(1), trusting(backend=backend)
    x = batch(backend)
    xp = torch if backend == "torch" else jnp
    whole = {name: xp.asarray(p) for name, p in source.params.items()}
    other = jnp.asarray if backend == "torch" else torch.asarray
    short = source.kernel_id[:12]
    for name, p in whole.items():
        kind = rf"{short} takes float32\[{', '.join(map(str, p.shape))}\] as its parameter {name}"
        for wrong in (xp.ones(1), xp.ones((1, 1)), xp.asarray(1.0), p[None], p[:1]):
            found = rf"float32\[{', '.join(map(str, wrong.shape))}\]"
            with pytest.raises(KernelMismatchError, match=rf"{kind}, got {found}: give it in the"):
                executor.execute_kernel(source, x, params=whole | {name: wrong})
        half = p.half() if backend == "torch" else p.astype(jnp.float16)
        with pytest.raises(KernelMismatchError, match=rf"{kind}, got float16\["):
            executor.execute_kernel(source, x, params=whole | {name: half})
        with pytest.raises(KernelMismatchError, match=rf"as {name}, got a .*: convert it"):
            executor.execute_kernel(source, x, params=whole | {name: other(source.params[name])})
    with pytest.raises(KernelMismatchError, match=r"as the input, got a .*: convert it"):
        executor.execute_kernel(source, other(np.ones((6, 3), np.float32)))
    assert executor.get_performance_stats()["errors"]["by_kernel"] == {}
    assert_bitwise(
        executor.execute_kernel(source, x, params=whole), executor.execute_kernel(source, x)
    )


def test_jax_takes_arrays_of_numpy_as_its_own():
    source = drawn(1)
    x = batch("jax")
    for device in (None, "cpu"):
        executor = trusting(device, backend="jax")
        y = executor.execute_kernel(source, np.asarray(x), params=dict(source.params))
        assert_bitwise(y, executor.execute_kernel(source, x))


@pytest.mark.parametrize("backend", ROUTES)
def test_a_kernel_that_raises_is_an_error_of_that_kernel(backend):
    source, x = drawn(1), batch(backend)
    executor = trusting(backend=backend)
    # Its programs are those of another, and take other parameters than its manifest says.
    other = drawn(1, "gated")
    broken = rewrite_artifact(source, torchscript=other.torchscript, stablehlo=other.stablehlo)
    with pytest.raises(
        KernelExecutionError,
        match=rf"{broken.kernel_id[:12]} failed on {backend} \({ROUTES[backend]}, .*\) for"
        r" float32\[6, 3\]: (.|\n)*Leave the seed dormant",
    ) as caught:
        executor.execute_kernel(broken, x)
    assert caught.value.__cause__ is not None
    stats = executor.get_performance_stats()
    assert stats["errors"]["by_type"]["kernel_execution"] == 1
    assert stats["errors"]["by_kernel"] == {broken.kernel_id: 1}
    assert stats["execution"]["count"] == 0
    assert_close(executor.execute_kernel(source, x), by_hand(source, x))


def test_somebody_is_told_of_a_kernel_that_keeps_failing_and_not_of_wrong_calls():
    told = []
    recovery = ErrorRecoveryManager(on_escalate=told.append)
    source, executor = drawn(1), trusting(recovery=recovery)
    for _ in range(5):
        with pytest.raises(KernelMismatchError):
            executor.execute_kernel(source, batch("torch")[:, :2])
    assert not told
    for made in range(1, 6):
        with pytest.raises(KernelExecutionError):
            executor.execute_kernel(source, batch("torch") * float("nan"), check=True)
        assert [c.kernel_id for c in told] == [source.kernel_id] * (made >= 3)
    stats = recovery.get_recovery_stats()
    assert (stats["escalations"], stats["total_recoveries"]) == (1, 0)


def test_whoever_is_told_of_a_kernel_while_it_is_loaded_may_load_it():
    found = []
    tell = lambda c: found.append(executor.load(damaged))  # noqa: E731
    recovery = ErrorRecoveryManager(on_escalate=tell, problematic_after=1)
    whole = drawn(1)
    damaged = rewrite_artifact(whole, torchscript=whole.torchscript[:-40])
    executor = trusting(recovery=recovery)
    thread = threading.Thread(target=executor.load, args=(damaged,), daemon=True)
    thread.start()
    thread.join(60)
    assert [kernel.route for kernel in found] == ["bridge"]
    assert executor.load(damaged).route == "bridge"


@pytest.mark.parametrize("backend", ROUTES)
def test_what_is_not_finite_is_an_error_when_asked(backend):
    source, executor = drawn(1), trusting(backend=backend)
    x = batch(backend) * float("nan")
    y = executor.execute_kernel(source, x)
    assert not bool((y == y).any())
    assert executor.get_performance_stats()["errors"]["count"] == 0
    with pytest.raises(KernelExecutionError, match=r"returned 30 numbers that are not finite for"):
        executor.execute_kernel(source, x, check=True)
    (error,) = executor.error_recovery.error_tracker.history
    assert error.error_type is ErrorType.KERNEL_EXECUTION
    assert error.kernel_id == source.kernel_id
    executor.execute_kernel(source, batch(backend), check=True)


@pytest.mark.parametrize("transform", [jax.jit, lambda f: jax.grad(lambda x: f(x).sum())])
def test_what_is_traced_cannot_be_looked_at_and_is_not_said_to_be_finite(transform):
    source, executor = drawn(1), trusting(backend="jax")
    x = batch("jax") * float("nan")

    def run(x, check=True):
        return executor.execute_kernel(source, x, check=check)

    with pytest.raises(InputError, match=r"check=True was asked for inside of .* leave it out"):
        transform(run)(x)
    assert transform(partial(run, check=False))(x).shape[0] == 6
    # Nothing of it is the kernel's fault.
    assert executor.get_performance_stats()["errors"]["count"] == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: trusting(backend="tensorflow"), "unknown backend 'tensorflow': expected one"),
        (
            lambda: trusting(max_kernel_cache_size=0),
            "max_kernel_cache_size of an executor must be a whole number of at least 1, got 0",
        ),
        (lambda: trusting(max_kernel_cache_size=2.5), "a whole number of at least 1, got 2.5"),
        (lambda: trusting("abacus"), "'abacus' is no device of torch"),
        (lambda: trusting("abacus", backend="jax"), "'abacus' is no platform of jax"),
        (lambda: trusting(3, backend="jax"), "3 is no device of jax: expected one of"),
        # One that torch knows by name; no machine has as many.
        (
            lambda: trusting("cuda:99"),
            "torch cannot use the device 'cuda:99' here: .* Give one that is there, such as 'cpu'",
        ),
        (lambda: trusting().profile(drawn(1), 0), "batch of a profile must be .* 1, got 0"),
        (lambda: trusting().profile(drawn(1), repeats=0), "repeats of a profile .* 1, got 0"),
    ],
)
def test_what_makes_no_executor_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_jax_runs_without_torch_and_torch_is_asked_for_by_name(tmp_path):
    file = tmp_path / "kernel"
    file.write_bytes(drawn(1).data)
    script = (
        "import sys, pathlib\n"
        "sys.modules['torch'] = None\n"  # as where it is not installed
        "import numpy as np\n"
        "from esper.artifacts import read_artifact\n"
        "from esper.errors import InputError\n"
        "from esper.execution._executor import RealKernelExecutor\n"
        f"artifact = read_artifact(pathlib.Path({str(file)!r}).read_bytes())\n"
        "executor = RealKernelExecutor(backend='jax', trust=lambda _: None)\n"
        "print(executor.execute_kernel(artifact, np.ones((2, 3), np.float32)).shape)\n"
        "try:\n    RealKernelExecutor()\n"
        "except InputError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        "(2, 5)",
        (
            "the backend 'torch' needs torch, which cannot be imported: install"
            " 'esper-morphogenetic[torch]', or use the backend 'jax'"
        ),
    ]


# ---- where it runs ----


def test_jax_places_kernels_and_inputs_where_it_is_told():
    device = jax.devices("cpu")[0]
    x = np.asarray(batch("jax"))
    for given in (device, "cpu"):
        executor = trusting(given, backend="jax")
        y = executor.execute_kernel(drawn(1), x)
        assert y.devices() == {device}
        assert executor.device == str(device)


# ---- what it says of itself ----


def test_latencies_are_read_from_the_clock_it_is_given():
    now = iter(range(10_000))
    executor = trusting(clock=lambda: float(next(now)))
    for _ in range(3):
        executor.execute_kernel(drawn(1), batch("torch"))
    stats = executor.get_performance_stats()
    # Each is between two readings of the clock.
    assert stats["execution"] == {
        "count": 3, "mean_us": 1e6, "p50_us": 1e6, "p95_us": 1e6, "last_us": 1e6
    }  # fmt: skip
    assert (stats["compilation"]["count"], stats["compilation"]["last_ms"]) == (1, 1e3)
    assert (stats["device"], stats["backend"]) == ("cpu", "torch")
    json.dumps(stats)


def test_an_executor_that_has_done_nothing_says_so():
    stats = trusting(backend="jax").get_performance_stats()
    for part in ("compilation", "execution"):
        assert set(stats[part].values()) == {0}
    assert stats["cache"]["modules_cached"] == stats["errors"]["count"] == 0


def test_latencies_count_all_and_keep_the_last():
    latencies = Latencies(capacity=101)
    for value in range(1000):
        latencies.add(float(value))
    found = latencies.stats("s", 1.0)
    kept = np.arange(899.0, 1000.0)
    assert found == {
        "count": 1000,
        "mean_s": kept.mean(),
        "p50_s": np.quantile(kept, 0.5),
        "p95_s": np.quantile(kept, 0.95),
        "last_s": 999.0,
    }


@pytest.mark.parametrize("backend", ROUTES)
def test_a_profile_counts_and_measures(backend):
    source = drawn(1)
    executor = trusting(backend=backend)
    found = executor.profile(source, batch=8, repeats=5)
    # 3 -> 4 -> 5 with biases; the batch's input, hidden values (twice: before and after the
    # activation) and output.
    params = sum(p.size for p in source.params.values())
    assert found.parameter_count == params
    assert found.memory_bytes >= 4 * (2 * params + 8 * (3 + 4 + 5))
    assert found.size_bytes == len(source.data)
    assert found.flops > 0
    assert (found.backend, found.route) == (backend, ROUTES[backend])
    assert (found.batch, found.repeats, found.device) == (8, 5, executor.device)
    assert 0 < found.forward_us <= found.forward_p95_us
    assert 0 < found.forward_backward_us <= found.forward_backward_p95_us
    assert json.loads(json.dumps(found.to_dict()))["kernel_id"] == source.kernel_id
    # Of what was done for it, the statistics know only that it was loaded.
    stats = executor.get_performance_stats()
    assert (stats["execution"]["count"], stats["compilation"]["count"]) == (0, 1)
    assert (stats["cache"]["misses"], stats["routes"]) == (1, {ROUTES[backend]: 1})
    executor.profile(source, batch=8, repeats=1)
    again = executor.get_performance_stats()
    assert (again["compilation"], again["execution"]) == (stats["compilation"], stats["execution"])


def test_a_profile_of_a_kernel_that_fails_says_which():
    source = drawn(1)
    executor = trusting()
    executor.load(source)
    broken = dataclasses.replace(source, blueprint=b"{}")
    with pytest.raises(KernelExecutionError, match="could not be measured on torch") as caught:
        executor.profile(broken, repeats=1)
    assert isinstance(caught.value.__cause__, InputError)
