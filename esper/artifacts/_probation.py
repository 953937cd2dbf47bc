"""The first run of an artifact's programs, in a child process that `esper.sandbox` restricts.

This module is imported by the child. What it finds goes back as JSON; whoever reads it keeps in
mind that a program which took the child over could have written it.
"""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from esper.artifacts._artifact import Artifact, read_artifact
from esper.artifacts._growth import GROWTH, TORCH_GROWTH, check_stablehlo, check_torchscript
from esper.artifacts._scan import scan_program, scan_sources
from esper.artifacts._stablehlo import load as load_stablehlo
from esper.artifacts._torchscript import load as load_torchscript
from esper.artifacts._verdict import Check, Result
from esper.errors import ArtifactError, BlueprintError
from esper.tensors import from_torch, to_torch
from esper.tezzeret import jax_program, read_blueprint, resolve
from esper.tezzeret._parity import DRAWS, run_jax, run_torch
from esper_functional import difference

try:
    import torch as _torch
except ImportError:
    _torch = None
torch: Any = _torch

BATCHES = (1, 7)
"""Batch sizes: with the artifact's own parameters, and with drawn ones."""

Named = dict[str, np.ndarray]


class Refused(Exception):
    """A reason not to accept a kernel."""


class _Noted(Exception):
    pass


class _Checks:
    """Runs checks one after the other, and stops at the first refusal."""

    def __init__(self) -> None:
        self.done: list[Check] = []

    @contextlib.contextmanager
    def named(self, name: str) -> Iterator[list[str]]:
        started = time.perf_counter()
        outcome: Result = "passed"
        detail: list[str] = []
        try:
            yield detail
        except _Noted as note:
            outcome, detail = "noted", [str(note)]
        except (Refused, ArtifactError) as refusal:
            outcome, detail = "refused", [str(refusal)]
        taken = 1e3 * (time.perf_counter() - started)
        self.done.append(Check(name, outcome, " ".join(detail)[:2000], taken))
        if outcome == "refused":
            raise Refused

    def skip(self, name: str, why: str) -> None:
        self.done.append(Check(name, "skipped", why))


def probate(data: bytes) -> bytes:
    """Run the programs of an artifact forward and backward, and compare them.

    Returns:
        The checks made, as JSON.
    """
    checks = _Checks()
    with contextlib.suppress(Refused):
        _probate(read_artifact(data), checks)
    return json.dumps([vars(check) for check in checks.done]).encode()


def _probate(artifact: Artifact, checks: _Checks) -> None:
    with checks.named("scan"):
        scan_sources(artifact)
        cost = scan_program(artifact)
    program = load_stablehlo(artifact.stablehlo).call
    with checks.named("cost") as told:
        with _raising_refused(f"batches {GROWTH}"):
            flops = check_stablehlo(program, lambda n: _inputs(artifact, artifact.params, n))
        told.append(f"{flops:.4g} floating-point operations for one example, forward and backward,")
        told.append(f"{cost.ops} operations")
    with checks.named("stablehlo"):
        own = _run_checked(artifact, program, run_jax, artifact.params, BATCHES[0])
        _run_checked(artifact, program, run_jax, _draw(artifact), BATCHES[1])
    with checks.named("finite"):
        odd = sorted(name for name, value in own.items() if not np.all(np.isfinite(value)))
        if odd:
            raise _Noted(f"with its own parameters these are not finite: {', '.join(odd)}")
    _probate_torch(artifact, checks, own, program)
    with checks.named("blueprint"):
        if artifact.blueprint is None:
            raise _Noted(f"it was made of a {artifact.manifest.origin}, and holds none")
        _agree_on_draws(
            artifact, program, _twin(artifact, artifact.blueprint), run_jax, "its blueprint"
        )


def _probate_torch(artifact: Artifact, checks: _Checks, own: Named, program: Any) -> None:
    if artifact.torchscript is None:
        checks.skip("torchscript", "it holds none; torch runs it over the bridge to jax")
        return
    if torch is None:
        checks.skip("torchscript", "torch is not installed")
        return
    with checks.named("torchscript"):
        script = load_torchscript(artifact.torchscript)
        theirs_own = _run_torch_checked(artifact, script)
    with checks.named("agreement"):
        _agree_on_draws(artifact, program, script, run_torch, "its TorchScript")
    with checks.named("agreement with its own parameters"):
        # Trained parameters may be large where rounding counts, so this is told, no more.
        try:
            _agree(own, theirs_own, "its TorchScript")
        except Refused as found:
            raise _Noted(str(found)) from found


def _run_torch_checked(artifact: Artifact, script: Any) -> Named:
    def tensors(batch: int) -> list[Any]:
        params, x, _ = _inputs(artifact, artifact.params, batch)
        return [to_torch(value) for value in (*params.values(), x)]

    for batch in BATCHES:
        _run_checked(artifact, script, _run_and_keep, _draw(artifact), batch)
    with _raising_refused(f"batches {TORCH_GROWTH}"):
        check_torchscript(script, tensors)
    return _run_checked(artifact, script, run_torch, artifact.params, BATCHES[0])


def _inputs(
    artifact: Artifact, params: Named, batch: int, seed: int = 0
) -> tuple[Named, np.ndarray, np.ndarray]:
    """Parameters, input and cotangent."""
    signature = artifact.manifest.signature
    random = np.random.default_rng([batch, seed])
    dtype = jnp.dtype(signature.dtype)
    x = random.standard_normal((batch, *signature.input_shape)).astype(dtype)
    return params, x, random.standard_normal((batch, *signature.output_shape)).astype(dtype)


def _draw(artifact: Artifact, seed: int = 0) -> Named:
    """Parameters at random, as large as those of layers at birth.

    An artifact's own may be zero, so that its programs agree whatever they compute.
    """
    random = np.random.default_rng(seed)
    return {
        name: (
            random.standard_normal(p.shape) / math.sqrt(max(1, p.size // max(1, *p.shape[:1], 1)))
        ).astype(p.dtype)
        for name, p in artifact.params.items()
    }


def _run_checked(
    artifact: Artifact,
    program: Any,
    run: Callable[[Any, Named, np.ndarray, np.ndarray], Named],
    params: Named,
    batch: int,
) -> Named:
    params, x, cotangent = _inputs(artifact, params, batch)
    with _raising_refused(f"batch {batch}"):
        found = run(program, params, x, cotangent)
    expected = {"output": cotangent, "gradient of x": x}
    expected |= {f"gradient of {name}": p for name, p in params.items()}
    for name, like in expected.items():
        given = found.get(name)
        shape, dtype = (None, None) if given is None else (given.shape, given.dtype)
        if (shape, dtype) != (like.shape, like.dtype):
            raise Refused(
                f"at batch {batch} its {name} has shape {shape} and dtype {dtype}; its manifest"
                f" says {like.shape} and {like.dtype}"
            )
    return found


@contextlib.contextmanager
def _raising_refused(where: str) -> Iterator[None]:
    try:
        yield
    except (MemoryError, Refused, ArtifactError):
        raise
    except Exception as error:  # jax and torch raise whatever the program leads them to
        text = f"{type(error).__name__}: {error}"
        if "memory" in text.lower():
            raise
        raise Refused(f"at {where} it raises {text[:500]}") from error


def _run_and_keep(program: Any, params: Named, x: np.ndarray, cotangent: np.ndarray) -> Named:
    _check_inputs_kept(program, params, x)
    return run_torch(program, params, x, cotangent)


def _check_inputs_kept(program: Any, params: Named, x: np.ndarray) -> None:
    given = {**params, "x": x}
    tensors = {name: to_torch(value) for name, value in given.items()}
    drawn = torch.get_rng_state()
    with torch.no_grad(), torch.jit.optimized_execution(False):
        program(*tensors.values())
    for name, value in given.items():
        if from_torch(tensors[name]).tobytes() != value.tobytes():
            raise Refused(f"it changes {name}, which it was given")
    if not torch.equal(drawn, torch.get_rng_state()):
        raise Refused("it draws random numbers")


def _agree(ours: Named, theirs: Named, whose: str) -> None:
    for name, value in ours.items():
        gap = difference(theirs[name], value)
        if not gap.within:
            raise Refused(
                f"its StableHLO and {whose} disagree: the {name} differs by {gap.largest:.3g}, at"
                f" most {gap.allowed:.3g} is allowed"
            )


def _agree_on_draws(
    artifact: Artifact, program: Any, other: Any, run: Callable[..., Named], whose: str
) -> None:
    """Compare two programs as the compiler does: on one of a few sets of random data."""
    for seed in range(DRAWS):
        inputs = _inputs(artifact, _draw(artifact, seed), BATCHES[1], seed)
        try:
            return _agree(run_jax(program, *inputs), run(other, *inputs), whose)
        except Refused:
            if seed == DRAWS - 1:
                raise
    return None


def _twin(artifact: Artifact, source: bytes) -> Any:
    manifest = artifact.manifest
    try:
        blueprint = read_blueprint(source, "its blueprint")
        return jax_program(resolve(blueprint, manifest.signature, manifest.sizes))
    except (BlueprintError, ValueError) as error:
        # It says of itself that it was compiled from this.
        raise Refused(f"nothing can be built of it: {error}") from error
