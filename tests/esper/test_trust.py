"""Verdicts, the store that remembers them, and what a process trusts."""

import dataclasses
import gc
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esper.artifacts import (
    Artifact,
    VerdictStore,
    _trust,
    distrust_all,
    ensure_trusted,
    is_trusted,
    load_stablehlo,
    programs_digest,
    read_artifact,
    rewrite_artifact,
    trust,
    verify,
    verify_file,
)
from esper.artifacts import _verdict as verdict_module
from esper.artifacts._growth import check_stablehlo
from esper.errors import ArtifactError
from esper.sandbox import Limits
from tests.esper import hostile


@pytest.fixture
def verdicts(tmp_path: Path) -> Iterator[VerdictStore]:
    with VerdictStore(tmp_path / "verdicts") as store:
        yield store


@pytest.fixture(autouse=True)
def nothing_trusted(artifact: Artifact) -> Iterator[None]:
    # The session's kernel is asked for: were it first compiled within a test here, it would be
    # forgotten with what that test trusted.
    kernels, programs = set(_trust._KERNELS), set(_trust._PROGRAMS)
    distrust_all()
    yield
    distrust_all()
    # Other tests of this process go on trusting what they compiled.
    _trust._KERNELS.update(kernels)
    _trust._PROGRAMS.update(programs)


def sibling(artifact: Artifact, seed: int) -> Artifact:
    """A kernel with other parameters."""
    random = np.random.default_rng(seed)
    params = {
        n: random.standard_normal(p.shape).astype(p.dtype) for n, p in artifact.params.items()
    }
    return rewrite_artifact(artifact, params=params, init_seed=seed)


NO_CHILD = Limits(wall_seconds=1e-6)
"""Under which a child is killed at once: what is accepted under it was not run."""


# Verdicts


def test_an_honest_kernel_is_accepted_with_all_that_was_looked_at(
    artifact: Artifact, verdicts: VerdictStore
):
    verdict = verify(artifact.data, verdicts=verdicts)
    assert verdict.accepted, verdict.reason
    assert (verdict.kernel_id, verdict.reason) == (artifact.kernel_id, "")
    found = {check.name: check.outcome for check in verdict.checks}
    assert found == dict.fromkeys(
        ["file", "torchscript source", "stablehlo scan", "scan", "cost", "stablehlo", "finite",
         "torchscript", "agreement", "agreement with its own parameters", "blueprint",
         "probation"],
        "passed",
    )  # fmt: skip
    assert all(check.milliseconds >= 0 for check in verdict.checks)
    assert {"jax", "jaxlib", "torch"} <= set(verdict.versions)
    assert verdict.protections
    assert not verdict.remembered
    # And with no child at all the second time.
    again = verify(artifact, verdicts=verdicts, limits=NO_CHILD)
    assert again.accepted
    assert again.remembered
    assert (again.versions, again.protections) == (verdict.versions, verdict.protections)


def test_kernels_that_differ_in_parameters_need_one_child(
    artifact: Artifact, verdicts: VerdictStore
):
    assert verify(artifact, verdicts=verdicts).accepted
    for seed in range(50):
        own = sibling(artifact, seed)
        assert own.kernel_id != artifact.kernel_id
        verdict = verify(own.data, verdicts=verdicts, limits=NO_CHILD)
        assert verdict.accepted
        assert verdict.remembered
        assert verdict.kernel_id == own.kernel_id
    assert len(verdicts) == 1
    # A file that contradicts itself is refused all the same.
    damaged = bytearray(sibling(artifact, 1).data)
    damaged[len(damaged) // 2] ^= 1
    refused = verify(bytes(damaged), verdicts=verdicts, limits=NO_CHILD)
    assert not refused.accepted
    assert refused.reason.startswith("file: kernel")


def test_what_depends_on_programs_has_another_digest(artifact: Artifact):
    assert artifact.torchscript is not None
    assert artifact.blueprint is not None
    digest = programs_digest(artifact)
    assert programs_digest(sibling(artifact, 1)) == digest
    others = [
        rewrite_artifact(artifact, torchscript=None),
        rewrite_artifact(artifact, stablehlo=artifact.stablehlo + b"\0"),
        rewrite_artifact(artifact, blueprint=artifact.blueprint + b"\n"),
        rewrite_artifact(artifact, sizes={"width": 9}),
        rewrite_artifact(artifact, vjp_order=1),
        rewrite_artifact(
            artifact, params={n: p.astype(np.float64) for n, p in artifact.params.items()}
        ),
        rewrite_artifact(artifact, params=dict(reversed(artifact.params.items()))),
    ]
    digests = [programs_digest(other) for other in others]
    assert len({digest, *digests}) == 1 + len(others)


def test_a_promise_that_programs_do_not_keep_is_no_others(
    artifact: Artifact, verdicts: VerdictStore
):
    once = bytes(load_stablehlo(artifact.stablehlo).serialize(vjp_order=1))
    honest = rewrite_artifact(artifact, stablehlo=once, vjp_order=1)
    liar = rewrite_artifact(honest, vjp_order=2)
    assert "VJPs of order 1, the manifest promises 2" in verify(liar, verdicts=verdicts).reason
    assert verdicts.get(programs_digest(honest)) is None
    # Nor the other way round.
    trust(honest, verdicts)
    assert verify(honest, verdicts=verdicts, limits=NO_CHILD).accepted
    assert not is_trusted(liar)
    assert not verify(liar, verdicts=verdicts, limits=NO_CHILD).accepted


def test_other_versions_make_other_digests(artifact: Artifact, monkeypatch: pytest.MonkeyPatch):
    before = programs_digest(artifact)
    for change in (
        lambda: monkeypatch.setattr(verdict_module, "CHECKS_VERSION", 99),
        lambda: monkeypatch.setattr(verdict_module, "library_versions", lambda: {"jax": "99"}),
    ):
        with monkeypatch.context():
            change()
            verdict_module._checked_by.cache_clear()
            assert programs_digest(artifact) != before
        monkeypatch.undo()
        verdict_module._checked_by.cache_clear()
    assert programs_digest(artifact) == before


def test_without_torchscript_the_other_program_is_run_alone(
    artifact: Artifact, verdicts: VerdictStore
):
    verdict = verify(rewrite_artifact(artifact, torchscript=None), verdicts=verdicts)
    assert verdict.accepted, verdict.reason
    found = {check.name: check for check in verdict.checks}
    assert found["torchscript"].outcome == "skipped"
    assert "over the bridge" in found["torchscript"].detail
    assert found["stablehlo"].outcome == found["blueprint"].outcome == "passed"
    assert "agreement" not in found


def test_a_blueprint_that_is_no_graph_is_refused(artifact: Artifact, verdicts: VerdictStore):
    verdict = verify(rewrite_artifact(artifact, blueprint=b"{}").data, verdicts=verdicts)
    assert not verdict.accepted
    assert "nothing can be built of it" in verdict.reason


def test_parameters_that_are_not_finite_are_noted(artifact: Artifact, verdicts: VerdictStore):
    params = {n: np.full_like(p, np.nan) for n, p in artifact.params.items()}
    verdict = verify(rewrite_artifact(artifact, params=params), verdicts=verdicts)
    assert verdict.accepted, verdict.reason
    found = {check.name: check for check in verdict.checks}
    assert found["finite"].outcome == "noted"
    assert "these are not finite: gradient of" in found["finite"].detail
    # Which is of that kernel alone.
    other = verify(artifact, verdicts=verdicts, limits=NO_CHILD)
    assert "finite" not in {check.name for check in other.checks}


def test_a_limit_refuses_for_now_and_is_not_remembered(artifact: Artifact, verdicts: VerdictStore):
    verdict = verify(artifact, verdicts=verdicts, limits=NO_CHILD)
    assert not verdict.accepted
    assert verdict.reason.startswith("probation: the child process stopped at its wall limit")
    assert verdict.missing == ("all: it ended before it had restricted itself",)
    assert len(verdicts) == 0


def test_a_refusal_is_remembered(artifact: Artifact, verdicts: VerdictStore):
    odd = rewrite_artifact(artifact, stablehlo=hostile.crafted(hostile.SORT, as_vjp=1))
    first = verify(odd, verdicts=verdicts)
    assert not first.accepted
    second = verify(odd, verdicts=verdicts, limits=NO_CHILD)
    assert (second.accepted, second.remembered) == (False, True)
    assert second.reason == first.reason
    assert "scan: its StableHLO uses stablehlo.sort, which is not on the list" in first.reason


def test_without_probation_nothing_runs_and_nothing_is_remembered(
    artifact: Artifact, verdicts: VerdictStore
):
    verdict = verify(artifact.data, verdicts=verdicts, probation=False, limits=NO_CHILD)
    assert verdict.accepted
    assert [c.name for c in verdict.checks] == ["file", "torchscript source", "stablehlo scan"]
    assert len(verdicts) == 0


def test_files(artifact: Artifact, verdicts: VerdictStore, tmp_path: Path):
    path = tmp_path / "a.kernel"
    path.write_bytes(artifact.data)
    assert verify_file(path, verdicts=verdicts, probation=False).accepted
    path.write_bytes(b"nothing")
    verdict = verify_file(str(path), verdicts=verdicts)
    assert not verdict.accepted
    assert "is not a kernel artifact" in verdict.reason
    assert len(verdict.kernel_id) == 64
    with pytest.raises(ArtifactError, match=r"the kernel file .*absent.* cannot be read"):
        verify_file(tmp_path / "absent")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ArtifactError, match=r"pipe cannot be read: it is not a file"):
        verify_file(tmp_path / "pipe")
    with path.open("wb") as sparse:
        sparse.truncate(1 << 40)
    with pytest.raises(ArtifactError, match=r"it has 1099511627776 bytes, at most 10737746.. are"):
        verify_file(path)


CHANGES = {
    "it changes up.weight, which it was given": "p0_up_weight.add_(1)",
    # Which needs more than one example.
    "it changes x, which it was given": (
        "torch.batch_norm(x, None, None, x.detach()[0], torch.ones(2), x.size(0) > 1, 1.0, 1e-5,"
        " False)"
    ),
    "it draws random numbers": "x = x + torch.rand(1)",
    # More than in proportion to the batch, in memory or in time alone.
    "its aten.mul.Tensor grow from 16 at batch 4 to 256": (
        "c = x[:, 0]\nx = x + torch.einsum('a,b,c,d,e->abcde', [c, c, c, c, c]).sum()"
    ),
    "its aten.mm.default grow from 64 at batch 4 to 1024": "x = x + (x @ x.t()).sum()",
    "its aten.convolution.default grow from": (
        "w = x.reshape([1, 1, -1])\nx = x + torch.conv1d(torch.cat([w, w], 2), w).sum()"
    ),
    "attention_for_cpu.default grow from 32 at batch 4 to 512": (
        "q = x.reshape([1, 1, -1, 2])\nx = x + torch.nn.functional.scaled_dot_product_attention("
        "q, q, q, None, 0.0, False).sum()"
    ),
    r"at batches \(4, 16\) it raises RuntimeError": (
        "x = x + x.reshape([-1, 1 if x.size(0) < 8 else 64]).sum()"
    ),
}


@pytest.mark.parametrize("message", CHANGES)
def test_what_torchscript_does_to_its_host_is_refused(artifact: Artifact, message: str):
    """By a program that no scan has seen, for those functions that a scan should have refused."""
    from esper.artifacts import _probation
    from esper.tezzeret import read_blueprint, resolve
    from esper.tezzeret._programs import script_method, torch_source

    assert artifact.blueprint is not None
    blueprint = read_blueprint(artifact.blueprint, "its blueprint")
    source = torch_source(resolve(blueprint, artifact.manifest.signature, {"width": 8}))
    _probation._run_torch_checked(artifact, script_method(source))
    change = CHANGES[message].replace("\n", "\n    ")
    changing = source.replace(" -> Tensor:\n", f" -> Tensor:\n    {change}\n")
    with pytest.raises((_probation.Refused, ArtifactError), match=message):
        _probation._run_torch_checked(artifact, script_method(changing))


def test_gradients_that_cost_more_than_in_proportion_to_the_batch():
    @jax.custom_vjp
    def program(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return x * params["a"]

    def backward(kept: Any, cotangent: jax.Array) -> Any:
        params, x = kept
        many = jnp.sum(jnp.cos(jnp.arange(len(x) ** 3, dtype=x.dtype) + cotangent[0, 0]))
        return {"a": jnp.sum(cotangent * x, 0) + many}, cotangent * params["a"]

    def inputs(batch: int) -> Any:
        return {"a": np.ones(2, np.float32)}, *np.ones((2, batch, 2), np.float32)

    check_stablehlo(lambda params, x: x * params["a"], inputs)
    program.defvjp(lambda params, x: (program(params, x), (params, x)), backward)
    with pytest.raises(ArtifactError, match="its flops grow from .* more than in proportion"):
        check_stablehlo(program, inputs)


@pytest.mark.parametrize("odd", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_agrees_with_itself_and_excuses_nothing(odd: float):
    from esper.artifacts import _probation

    ours = {"output": np.array([odd, 0.0], np.float32)}
    for theirs in ([odd, 100.0], [0.0, 0.0], [-odd, 0.0]):
        other = {"output": np.array(theirs, np.float32)}
        with pytest.raises(_probation.Refused, match="disagree: the output differs by"):
            _probation._agree(ours, other, "its twin")
        with pytest.raises(_probation.Refused, match="disagree: the output differs by"):
            _probation._agree(other, ours, "its twin")
    if not np.isnan(odd):
        _probation._agree(ours, ours, "its twin")


def test_reports_of_a_child_are_read_as_those_of_a_stranger():
    from esper.artifacts._verify import _report
    from esper.sandbox import Outcome

    for result, message in (
        (b"", "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        (b'[{"name": "scan"}]', "cannot be read"),
        (b"[1]", "cannot be read"),
        (b"[]", "lacks"),
        (b'[{"name": "scan", "outcome": "fine", "detail": "", "milliseconds": 1}]', "outcomes"),
        (b'[{"name": "scan", "outcome": "passed", "detail": "", "milliseconds": 1}]', "lacks"),
    ):
        (check,) = _report(Outcome("finished", result))
        assert check.outcome == "refused"
        assert message in check.detail
    (check,) = _report(
        Outcome(
            "finished",
            f'[{{"name": "scan", "outcome": "passed", "detail": "",'
            f' "milliseconds": 1{"0" * 400}}}]'.encode(),
        )
    )
    assert "its report cannot be read (int too large" in check.detail
    (check,) = _report(Outcome("signal", signal=40))
    assert check.detail == "the child process died by signal 40"
    (check,) = _report(Outcome("signal", signal=11, output="first\nlast \x1b[2Jline\n"))
    assert check.detail == "the child process died by SIGSEGV; it printed last: last  [2Jline"


# Trust


def test_what_was_compiled_here_is_trusted(artifact: Artifact, verdicts: VerdictStore):
    assert not is_trusted(artifact)
    trust(artifact)
    assert is_trusted(artifact)
    ensure_trusted(artifact, verdicts, limits=NO_CHILD)
    # With all that share its programs, and with nothing else.
    ensure_trusted(sibling(artifact, 3), verdicts, limits=NO_CHILD)
    assert not is_trusted(rewrite_artifact(artifact, torchscript=None))
    assert len(verdicts) == 0


def test_trust_that_is_recorded_outlives_the_process(artifact: Artifact, verdicts: VerdictStore):
    trust(artifact, verdicts)
    distrust_all()
    assert not is_trusted(artifact)
    ensure_trusted(artifact, verdicts, limits=NO_CHILD)
    verdict = verify(artifact, verdicts=verdicts, limits=NO_CHILD)
    assert verdict.accepted
    assert "compiled on this machine" in verdict.checks[-1].detail


def test_what_is_not_known_is_verified_once(artifact: Artifact, verdicts: VerdictStore):
    ensure_trusted(artifact, verdicts)
    assert len(verdicts) == 1
    verdicts.close()
    ensure_trusted(artifact, verdicts, limits=NO_CHILD)  # the store is not even asked
    ensure_trusted(sibling(artifact, 4), verdicts, limits=NO_CHILD)
    with pytest.raises(ValueError, match="the store of verdicts in .* is closed"):
        ensure_trusted(rewrite_artifact(artifact, torchscript=None), verdicts, limits=NO_CHILD)
    # Nor is anything kept of the turns that were waited for, once the last error is forgotten.
    gc.collect()
    assert not _trust._TURNS


def test_what_is_refused_raises_with_the_reason(artifact: Artifact, verdicts: VerdictStore):
    odd = rewrite_artifact(artifact, stablehlo=hostile.crafted(hostile.CALLBACK, as_vjp=1))
    for _ in range(2):
        with pytest.raises(
            ArtifactError, match=rf"kernel {odd.kernel_id[:12]} is refused: scan: its StableHLO"
            r" calls the custom target .*compile its blueprint anew",
        ):  # fmt: skip
            ensure_trusted(odd, verdicts)
        assert not is_trusted(odd)


def test_many_threads_that_ask_at_once_start_one_child(
    artifact: Artifact, verdicts: VerdictStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    started: set[str] = set()
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.001):
            started.update(p.name for p in tmp_path.glob("esper-sandbox-*"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    kernels = [sibling(artifact, seed) for seed in range(8)]
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda kernel: ensure_trusted(kernel, verdicts), kernels))
    finally:
        over.set()
        watcher.join()
    assert len(started) == 1
    assert all(is_trusted(kernel) for kernel in kernels)


def test_an_artifact_is_what_its_bytes_are(artifact: Artifact, verdicts: VerdictStore):
    """One put together by hand, whose programs are not those of its bytes, gets no trust of it."""
    odd = dataclasses.replace(read_artifact(artifact.data), data=artifact.data[:-1] + b"\1")
    verdict = verify(odd, verdicts=verdicts)
    assert not verdict.accepted
