"""Two processes under torchrun: what is decided on one happens on both, and weights stay equal."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from esper_adapters.pytorch import kernel_from_function, replicate_kernels, share_events, wrap
from esper_functional import KasminaException
from tests.adapters.distributed_process import SCENARIOS

SCRIPT = Path(__file__).with_name("distributed_process.py")
ROOT = SCRIPT.parents[2]


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """What each rank saw in each scenario; all of them run in one start of torchrun."""
    out = tmp_path_factory.mktemp("ranks")
    paths = os.pathsep.join(str(ROOT / part) for part in ("", "functional", "adapters"))
    given = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
    torchrun = (sys.executable, "-W", "error", "-m", "torch.distributed.run", "--standalone")
    done = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", str(SCRIPT), str(out)],
        env=os.environ | given,
        capture_output=True,
        text=True,
        check=False,
        timeout=150,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    ranks = [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]
    assert all(report.keys() == SCENARIOS.keys() for report in ranks)
    return ranks


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_rank_sees_the_same(reports, name):
    first, second = (report[name] for report in reports)
    assert "error" not in first, first["error"]
    assert "error" not in second, second["error"]
    assert first["alike"] == second["alike"]


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("ddp_dormant", "bitwise"),
        ("fsdp_dormant", "bitwise"),
        ("ddp_life", "whole batch"),
        ("ddp_life", "states"),
        ("fsdp_life", "whole batch"),
        ("fsdp_life", "states"),
        ("ddp_decisions", "told"),
        ("ddp_faults", "as alone"),
        ("ddp_unreached", "mean"),
        ("ddp_accumulation", "whole batch"),
        ("ddp_incubates", "whole batch"),
        ("ddp_resumes", "both ways"),
        ("ddp_copies", "alone"),
        ("ddp_compiled", "eager"),
        ("fsdp_state_dict", "states"),
        ("fsdp_state_dict", "sharded"),
        ("fsdp_state_dict", "whole"),
    ],
)
def test_it_is_what_it_is_held_against(reports, name, what):
    assert all(report[name][what] is True for report in reports)


def test_every_step_was_looked_at(reports):
    first = reports[0]
    for name in ("ddp_life", "fsdp_life", "ddp_decisions", "fsdp_decisions"):
        digests = [step[2] for step in first[name]["alike"]]
        assert len(set(digests)) == len(digests) == 12
    assert first["ddp_decisions"]["events"] == 11


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("unknown", r"nothing is changed on any rank: rank 1: LookupError: no such kernel"),
        ("unreadable", r"rank 1: OSError: the disk is broken"),
        ("misfit", r"rank 1: KernelMismatchError: kernel bbbbbbbbbbbb does not fit layer '0'"),
        ("two of an id", r"seeds or kernels of ranks \[1\] are not those of rank 0.*two kernels"),
        ("not found", r"rank 0: KeyError.*rank 1: KeyError"),
        ("illegal", r"rank 0: SeedLifecycleError: seed 0 of layer '0' is DORMANT"),
        ("not there", r"rank 1: SeedIndexError: no layer 5"),
        ("over", r"rank 0: KasminaException: step 1 is over"),
        ("no event", r"rank 0: TypeError: events are esper_functional.Event; got str$"),
        ("no events", r"rank 0: TypeError: 'int' object is not iterable$"),
        ("fold", r"rank 1: FoldError: fold: an event before it changes layer '2' too"),
        ("not wrapped", r"DistributedDataParallel is not a wrapped model.*its `module`"),
        ("replicate what is not wrapped", r"^KasminaException: replicate_kernels.*its `module`"),
        ("unlike", r"^KernelMismatchError: the kernels that layer '0' gets on ranks \[1\]"),
        ("thread", r"^KasminaException: load_kernel: the kernels are replicated"),
        ("ddp alone", r"call replicate_kernels\(model\) before"),
    ],
)
def test_what_one_rank_cannot_do_none_does(reports, name, message):
    found, unchanged = reports[0]["ddp_refusals"]["alike"][name]
    assert re.search(message, found), found
    assert unchanged


def test_all_refusals_are_looked_at(reports):
    assert len(reports[0]["ddp_refusals"]["alike"]) == 16


def test_a_load_by_id_fails_on_all_ranks_or_on_none(reports):
    absent, broken, there, stages, _ = reports[0]["ddp_loads"]["alike"]
    assert (absent, there) == (False, True)
    assert broken == "KasminaException: load_kernel: rank 1: OSError: the disk is broken"
    assert stages == [[0, 3], [2, 0]]


def test_failures_are_counted_as_for_the_whole_batch(reports):
    seen = reports[0]["ddp_faults"]["seen"]
    counts = [own for own in seen if len(own) == 3]
    assert [errors for errors, _, _ in counts] == [1, 2, 0, 1, 2, 3, 3]
    assert [working for _, working, _ in counts] == [True] * 5 + [False] * 2
    assert not any(other for _, _, other in counts)
    # Failures of fossils too, of which no gradient tells.
    assert reports[0]["fsdp_faults"]["seen"] == [1, 2, 3]


def test_failures_without_gradients_come_together_when_they_are_absorbed(reports):
    assert [report["ddp_counts"]["counts"] for report in reports] == [0, 2]
    assert reports[0]["ddp_counts"]["events"] == 1


def test_a_gradient_that_no_rank_has_stays_none(reports):
    none = reports[0]["ddp_unreached"]["none"]
    assert [any(step) for step in none] == [all(step) for step in none]
    assert [all(step) for step in none] == [False, False, False, True]


def test_health_is_the_mean_over_the_ranks_that_have_measured(reports):
    assert reports[0]["ddp_health"]["scores"] == [0.75, 1.0]


def test_seeds_that_differ_are_found_out(reports):
    absorbed, shared, replicated = reports[1]["ddp_differing"]["alike"]
    assert "absorb: step or seeds of ranks [1] are not those of rank 0" in absorbed
    assert "step, seeds or kernels of ranks [1]" in shared
    assert "step, seeds or kernels of ranks [1]" in replicated


def test_a_rank_alone_waits_as_long_as_it_was_told(reports):
    assert "imed out" in reports[0]["ddp_alone"]["waited"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("unguarded", r"^KasminaException: layer '0' is sharded.*replicate_kernels\(model\)"),
        ("fold", r"^FoldError: fold: the weight of layer '0' is spread over processes"),
        ("fold of what is whole for now", r"^FoldError: fold: the weight of layer '0' is spread"),
        ("unwrap", r"^KasminaException: unwrap: \w+ is sharded by FSDP.*wrap before fully_shard"),
        ("export", r"^KasminaException: export_plain: \w+ is sharded by FSDP"),
        ("to jax", r"^KasminaException: to_functional: \w+ is sharded by FSDP"),
        ("copy", r"^AssertionError: FSDP does not support deepcopy"),
        ("pickle", r"^KasminaException: pickle: \w+ is sharded by FSDP"),
        ("pickle a layer", r"^KasminaException: pickle: \w+ is sharded by FSDP"),
        ("wrap", r"^KasminaException: wrap: \w+ is sharded by FSDP"),
        ("shadow", r"^KasminaException: shadow_forward: \w+ is sharded by FSDP"),
    ],
)
def test_what_takes_whole_tensors_is_refused(reports, name, message):
    found = reports[0]["fsdp_refusals"]["alike"]
    assert re.search(message, found[name]), found[name]
    assert len(found) == 11


def test_its_whole_moment_is_one(reports):
    """FSDP's root holds whole tensors after a forward pass, which it takes back."""
    assert reports[0]["fsdp_refusals"]["kind"] == "Tensor"
    assert reports[0]["fsdp_life"]["name"] == "MorphableSequential"


@pytest.mark.parametrize("call", [replicate_kernels, share_events])
def test_without_a_process_group_there_is_nobody_to_tell(call):
    with pytest.raises(KasminaException, match="there is no process group: call torch.distrib"):
        call(wrap(nn.Linear(2, 2)))


def test_what_a_host_asks_ddp_to_ignore_is_ignored():
    host = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    ignore = nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
    ignore(host, ["1.weight"])
    model = wrap(host, seeds_per_layer=1)
    counted = [f"{i}.kernel_0.{name}" for i in (0, 1) for name in ("errors", "working")]
    assert model._ddp_params_and_buffers_to_ignore == ["1.weight", *counted]
    kernel = kernel_from_function(torch.matmul, {"w": torch.ones(2, 2)})
    model.load_kernel_sync("1", 0, kernel)
    assert model._ddp_params_and_buffers_to_ignore == ["1.weight", *counted, "1.kernel_0.w"]
    ignore(model, ["0.bias"])
    assert model._ddp_params_and_buffers_to_ignore == ["0.bias", *counted, "1.kernel_0.w"]
    layer = wrap(nn.Linear(2, 2), seeds_per_layer=1)
    assert layer._ddp_params_and_buffers_to_ignore == ["kernel_0.errors", "kernel_0.working"]
