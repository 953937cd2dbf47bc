"""`esper kernels compile`."""

import re
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from esper.cli._arguments import (
    DEFAULT_LIBRARY,
    FirstSeed,
    InFeatures,
    LibraryFolder,
    OutFeatures,
    SeedCount,
    Signatures,
    Sizes,
    blueprint_of,
    id_of,
    signature_of,
)
from esper.cli._arguments import progress as progress_bar
from esper.cli._console import Trace, err, errors, out, say, status_of
from esper.cli._interrupt import end_at_once, raise_again
from esper.errors import ArtifactError, EsperError, InputError, LibraryError

if TYPE_CHECKING:
    from esper.artifacts import Artifact
    from esper.contracts import KernelSignature
    from esper.tezzeret import BlueprintIR, CompileJob, CompileOutcome
    from esper.urza import Library

_BACKENDS: tuple[Literal["jax", "torch"], ...] = ("jax", "torch")


def compile_kernels(
    blueprints: Annotated[
        list[str] | None,
        typer.Argument(help="Blueprints: names of Esper's own, or YAML or JSON files."),
    ] = None,
    in_features: InFeatures = None,
    out_features: OutFeatures = None,
    signature: Signatures = None,
    size: Sizes = None,
    library: LibraryFolder = DEFAULT_LIBRARY,
    init_seed: FirstSeed = 0,
    seeds: SeedCount = 1,
    again: Annotated[
        list[str] | None,
        typer.Option(help="Compile a kernel's blueprint anew with the libraries of today."),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=0, max=64, help="Processes that compile; 0 for this one."),
    ] = None,
    measure: Annotated[
        bool, typer.Option(help="Time each kernel here, and keep that beside it.")
    ] = False,
    traceback: Trace = False,
) -> None:
    """Compile blueprints for signatures and keep the kernels in the library.

    Prints the id of each, one a line.
    """
    with errors(traceback):
        from esper.urza import Library

        jobs = jobs_asked(
            blueprints or [],
            in_features,
            out_features,
            signature or [],
            size or [],
            init_seed,
            seeds,
        )
        if not jobs and not again:
            raise InputError(
                "say what to compile: a blueprint with --in and --out or --signature, or --again"
                " with the id of a kernel"
            )
        # Only now: what was asked wrongly leaves no folder behind.
        store = Library(library, create=not again)
        jobs += [_anew(store, kernel_id) for kernel_id in again or []]
        failures = _compile(store, jobs, workers, measure)
        if failures:
            for error in failures:
                say(err, "red", str(error))
            raise typer.Exit(status_of(failures))


def jobs_asked(
    names: list[str],
    inputs: int | None,
    outputs: int | None,
    signatures: list[str],
    sizes: list[str],
    init_seed: int,
    seeds: int,
) -> list["CompileJob"]:
    """What the options ask to be compiled: each blueprint for each signature and seed.

    Raises:
        InputError: for options that do not go together, or cannot be read.
    """
    given = dict(_size(text) for text in sizes)
    return [
        _job(blueprint, each, given, init_seed + i)
        for blueprint, each in _asked(names, inputs, outputs, signatures)
        for i in range(seeds)
    ]


def _asked(
    names: list[str], inputs: int | None, outputs: int | None, texts: list[str]
) -> list[tuple["BlueprintIR", "KernelSignature"]]:
    from esper.contracts import KernelSignature

    if (inputs is None) != (outputs is None):
        raise InputError("--in and --out go together")
    signatures = [signature_of(text) for text in texts]
    if inputs is not None and outputs is not None:
        signatures.append(KernelSignature(input_shape=(inputs,), output_shape=(outputs,)))
    if bool(names) != bool(signatures):
        missing = "--in and --out, or --signature" if names else "a blueprint"
        raise InputError(f"say for what to compile: {missing} is missing")
    blueprints = [blueprint_of(name) for name in names]
    return [(blueprint, each) for blueprint in blueprints for each in signatures]


def _size(text: str) -> tuple[str, int]:
    name, equals, value = text.partition("=")
    if not equals or not re.fullmatch("[0-9]{1,9}", value):
        raise InputError(
            "--size takes a name and a number of at most 9 digits, such as 'width=16'; got"
            f" {text[:40]!r}"
        )
    return name, int(value)


def _job(
    blueprint: "BlueprintIR", signature: "KernelSignature", sizes: dict[str, int], seed: int
) -> "CompileJob":
    from esper.tezzeret import CompileJob

    return CompileJob(blueprint, signature, sizes, seed)


def _anew(store: "Library", kernel_id: str) -> "CompileJob":
    from esper.tezzeret import recompile_job

    return recompile_job(store.get(id_of(kernel_id, store)))


def _compile(
    store: "Library", jobs: list["CompileJob"], workers: int | None, measure: bool
) -> list[EsperError]:
    """Compile what the library has not, print what there is, and give the failures."""
    from esper.tezzeret import CompilePool

    missing: list[CompileJob] = []
    failures: list[EsperError] = []
    for job in jobs:
        known = _known(store, job)
        if known is None:
            missing.append(job)
            continue
        out.print(known.kernel_id, highlight=False, soft_wrap=True)
        if measure:
            failures += _measure(store, known)
    count = min(len(missing), 2) if workers is None and len(missing) > 1 else workers or 0
    if missing and not count:
        _import_torch()

    def keep(outcome: "CompileOutcome") -> None:
        if outcome.artifact is not None:
            try:
                kernel_id = store.put(outcome.artifact)
            except EsperError as error:
                failures.append(error)
                return
            out.print(kernel_id, highlight=False, soft_wrap=True)
            try:
                for measurement in outcome.measurements:
                    store.record_measurement(measurement)
            except EsperError as error:
                failures.append(error)
        if outcome.error is not None:
            failures.append(outcome.error)

    with progress_bar() as progress:
        bar = progress.add_task("compiling", total=len(missing))
        if not count:
            for job in missing:
                outcome = _compile_here(job)
                keep(outcome)
                if measure and outcome.artifact is not None:
                    failures += _measure(store, outcome.artifact)
                progress.advance(bar)
        else:
            with CompilePool(count, measure=_BACKENDS if measure else ()) as pool:
                for outcome in pool.compile(missing):
                    keep(outcome)
                    progress.advance(bar)
    return failures


def _known(store: "Library", job: "CompileJob") -> "Artifact | None":
    """The kernel of a job, where the library has it whole."""
    from esper.tezzeret import kernel_recipe

    recipe = kernel_recipe(
        job.blueprint,
        job.signature,
        sizes=job.sizes,
        init_seed=job.init_seed,
        ancestor=job.ancestor,
    )
    for row in store.find(recipe=recipe):
        try:
            return store.get(row.kernel_id)
        except (ArtifactError, LibraryError):
            # Putting it again mends it, or says why it cannot be.
            continue
    return None


def _compile_here(job: "CompileJob") -> "CompileOutcome":
    from esper.tezzeret import CompileOutcome, compile_blueprint

    try:
        artifact = compile_blueprint(
            job.blueprint,
            job.signature,
            sizes=job.sizes,
            init_seed=job.init_seed,
            ancestor=job.ancestor,
        )
    except EsperError as error:
        return CompileOutcome(job, error=error)
    return CompileOutcome(job, artifact)


def _measure(store: "Library", artifact: "Artifact") -> list[EsperError]:
    """Time a kernel on each backend on which it was not timed here, and give the failures."""
    from esper.execution import RealKernelExecutor

    _import_torch()
    known = {(m["backend"], m["device"]) for m in store.measurements(artifact.kernel_id)}
    failures: list[EsperError] = []
    for backend in _BACKENDS:
        try:
            executor = RealKernelExecutor(backend=backend)
            if (backend, executor.device) not in known:
                store.record_measurement(executor.profile(artifact).to_dict())
        except EsperError as error:
            failures.append(error)
    return failures


def _import_torch() -> None:
    end_at_once()
    import torch  # noqa: F401

    raise_again()
