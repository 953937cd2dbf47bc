"""The cache before a library that comes and goes, behind a breaker, under a wrapped model."""

import numpy as np
import pytest
import torch

import esper
from esper.cache import KernelCache
from esper.contracts import KernelSignature
from esper.errors import KernelNotFoundError, LibraryError
from esper.execution import ErrorRecoveryManager, ErrorType
from esper.recovery import CircuitState
from esper.tezzeret import compile_blueprint, load_blueprint
from esper.urza import Library

SIGNATURE = KernelSignature(input_shape=(3,), output_shape=(4,))


class Away:
    """A library that is not there at times."""

    def __init__(self, library: Library) -> None:
        self.library = library
        self.down = False
        self.asked = 0

    def get(self, kernel_id: str):
        self.asked += 1
        if self.down:
            raise LibraryError("the library is not there: no route to it")
        return self.library.get(kernel_id)


class Clock:
    """Turned by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def kept(tmp_path):
    store = Library(tmp_path / "library")
    blueprint = load_blueprint("low_rank")
    ids = [store.put(compile_blueprint(blueprint, SIGNATURE, init_seed=seed)) for seed in range(3)]
    return Away(store), ids


def test_a_library_that_is_down_is_left_alone_and_what_is_at_hand_goes_on_being_served(kept):
    library, ids = kept
    clock = Clock()
    manager = ErrorRecoveryManager(clock=clock, sleep=clock.sleep, max_retries=2)
    cache = KernelCache(library, guard=manager.guard("library"))
    assert cache.load_kernel_sync(ids[0]) is not None
    library.down = True
    before = library.asked
    for _ in range(10):
        with pytest.raises(LibraryError, match="At hand: 1 in memory"):
            cache.load_kernel_sync(ids[1])
        assert cache.load_kernel_sync(ids[0]) is not None
    # Each ask is tried again; after five failures the breaker is open, and nobody asks.
    assert library.asked - before == 5
    assert manager.breaker("library").state is CircuitState.OPEN
    library.down = False
    with pytest.raises(LibraryError):
        cache.load_kernel_sync(ids[1])
    clock.now += 60.0
    assert cache.load_kernel_sync(ids[1]) is not None
    assert cache.load_kernel_sync(ids[2]) is not None
    assert manager.breaker("library").state is CircuitState.CLOSED


def test_what_is_not_found_trips_nothing(kept):
    library, _ = kept
    manager = ErrorRecoveryManager(max_retries=3)
    cache = KernelCache(library, guard=manager.guard("library"))
    for i in range(20):
        assert cache.load_kernel_sync(f"{i:064x}") is None
    assert library.asked == 20
    assert manager.breaker("library").state is CircuitState.CLOSED
    assert manager.error_tracker.get_error_rate(ErrorType.NETWORK_ERROR) == 0.0


def test_a_wrapped_model_loads_through_the_cache(kept):
    library, ids = kept
    cache = KernelCache(library)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4))
    model = esper.wrap(net, seeds_per_layer=2, library=cache)
    assert model.load_kernel_sync("0", 0, ids[0])
    assert cache.get_cache_stats()["entries"] == 1
    library.down = True
    again = esper.wrap(net, library=cache)
    assert again.load_kernel_sync("0", 0, ids[0])
    x = torch.ones(2, 3)
    np.testing.assert_array_equal(again(x).detach().numpy(), model(x).detach().numpy())
    with pytest.raises(LibraryError):
        again.load_kernel_sync("0", 1, ids[1])
    library.down = False
    assert not again.load_kernel_sync("0", 2, "0" * 64)


def test_a_jax_model_loads_through_the_cache_and_says_what_that_has_not(kept):
    import equinox as eqx
    import jax

    library, ids = kept
    net = eqx.nn.Sequential([eqx.nn.Linear(3, 4, key=jax.random.key(0))])
    model = esper.wrap(net, library=KernelCache(library))
    (layer,) = model.sites
    assert model.load_kernel(layer, 0, ids[0]) is not None
    library.down = True
    assert model.load_kernel(layer, 1, ids[0]) is not None
    library.down = False
    with pytest.raises(KernelNotFoundError, match="neither the cache nor its library holds"):
        model.load_kernel(layer, 0, "0" * 64)
