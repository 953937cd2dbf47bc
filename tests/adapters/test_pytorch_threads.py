"""Threads that call one model while kernels load and unload see one moment each."""

import threading
import time

import numpy as np
import torch
from torch import nn

from esper_adapters.pytorch import wrap
from esper_functional import SeedLifecycleState, fold_events, init_seeds, state_digest
from tests.adapters.kernels import torch_kernel


def make():
    torch.manual_seed(0)
    return wrap(nn.Sequential(nn.Linear(3, 5)), seeds_per_layer=2).eval()


def test_eight_threads_see_whole_moments_while_kernels_come_and_go():
    """Each output is one of those that the model has between two changes, bit by bit."""
    model, x = (
        make(),
        torch.tensor(np.random.default_rng(0).normal(size=(16, 3)), dtype=torch.float32),
    )
    kernels = [torch_kernel(1), torch_kernel(2)]
    alphas = (0.25, 1.0)

    def changes():
        model.load_kernel_sync("0", 0, kernels[0], alpha=0.25)
        yield
        model.load_kernel_sync("0", 1, kernels[1], alpha=1.0)
        yield
        model.set_seed_alpha("0", 0, 0.75)
        yield
        model.unload_kernel_sync("0", 0)
        yield
        model.unload_kernel_sync("0", 1)
        yield

    with torch.no_grad():
        allowed = {model(x).numpy().tobytes()}
        for _ in changes():
            allowed.add(model(x).numpy().tobytes())
    assert len(allowed) == len(alphas) + 3
    stop, wrong, calls, errors = threading.Event(), [], [0] * 8, []

    def call(i: int) -> None:
        try:
            with torch.no_grad():
                while not stop.is_set():
                    if model(x).numpy().tobytes() not in allowed:
                        wrong.append(i)
                    calls[i] += 1
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=call, args=(i,), daemon=True) for i in range(8)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 60
    rounds = 0
    while (rounds < 40 or min(calls) < 40) and time.monotonic() < deadline and not errors:
        for _ in changes():
            time.sleep(0)
        rounds += 1
    stop.set()
    for thread in threads:
        thread.join(timeout=30)
    assert not any(thread.is_alive() for thread in threads)
    assert errors == []
    assert wrong == []
    assert min(calls) >= 40


def test_loads_from_several_threads_are_all_kept():
    torch.manual_seed(0)
    model = wrap(nn.Sequential(*(nn.Linear(3, 5) for _ in range(8))), seeds_per_layer=4)
    heard = []
    model.seed_table.listeners.append(heard.append)
    errors = []

    def load(row: int) -> None:
        try:
            for seed in range(4):
                model.load_kernel_sync(str(row), seed, torch_kernel(seed), alpha=0.1)
            model.unload_kernel_sync(str(row), 1)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=load, args=(row,)) for row in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert errors == []
    stages = np.asarray(model.seeds.stage)
    assert (stages[:, [0, 2, 3]] == SeedLifecycleState.ACTIVE).all()
    assert (stages[:, 1] == SeedLifecycleState.DORMANT).all()
    assert state_digest(fold_events(init_seeds(8, 4), heard)) == state_digest(model.seeds)
