"""`esper kernels`: compile, list, show, verify, fetch and prune."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from esper.cli._console import Trace, err, errors, out, say
from esper.errors import ArtifactError, EsperError, InputError, KernelNotFoundError

if TYPE_CHECKING:
    from esper.artifacts import Artifact, Verdict
    from esper.contracts import KernelSignature
    from esper.tezzeret import BlueprintIR, CompileJob, CompileOutcome
    from esper.urza import Library

app = typer.Typer(name="kernels", help="Compile, keep and look at kernels.", no_args_is_help=True)

_Library = Annotated[Path, typer.Option("--library", help="Folder of the library.")]
_DEFAULT = Path("runs/library")


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=err,
        transient=True,
    )


@app.command("compile")
def compile_kernels(
    blueprints: Annotated[
        list[str] | None,
        typer.Argument(help="Blueprints: names of Esper's own, or YAML or JSON files."),
    ] = None,
    in_features: Annotated[
        int | None, typer.Option("--in", min=1, max=1 << 20, help="Features of the input.")
    ] = None,
    out_features: Annotated[
        int | None, typer.Option("--out", min=1, max=1 << 20, help="Features of the output.")
    ] = None,
    signature: Annotated[
        list[str] | None,
        typer.Option(help="Shapes and dtype, such as '3x32x32->8x16x16 bfloat16'; repeatable."),
    ] = None,
    size: Annotated[
        list[str] | None, typer.Option(help="A named size, such as 'width=16'; repeatable.")
    ] = None,
    library: _Library = _DEFAULT,
    init_seed: Annotated[
        int, typer.Option(min=0, max=2**31 - 1, help="Seed of the first parameters.")
    ] = 0,
    seeds: Annotated[
        int, typer.Option(min=1, max=10_000, help="How many kernels, with seeds from there on.")
    ] = 1,
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

        store = Library(library)
        jobs = _asked(blueprints or [], in_features, out_features, signature or [])
        given = dict(_size(text) for text in size or [])
        jobs = [
            _job(blueprint, each, given, init_seed + i)
            for blueprint, each in jobs
            for i in range(seeds)
        ]
        jobs += [_anew(store, kernel_id) for kernel_id in again or []]
        if not jobs:
            raise InputError(
                "say what to compile: a blueprint with --in and --out or --signature, or --again"
                " with the id of a kernel"
            )
        failures = _compile(store, jobs, workers, measure)
        if failures:
            for _, error in failures:
                say(err, "red", str(error))
            raise typer.Exit(2 if all(isinstance(e, InputError) for _, e in failures) else 1)


def _asked(
    names: list[str], inputs: int | None, outputs: int | None, texts: list[str]
) -> list[tuple["BlueprintIR", "KernelSignature"]]:
    from esper.contracts import KernelSignature

    if (inputs is None) != (outputs is None):
        raise InputError("--in and --out go together")
    signatures = [_signature(text) for text in texts]
    if inputs is not None and outputs is not None:
        signatures.append(KernelSignature(input_shape=(inputs,), output_shape=(outputs,)))
    if bool(names) != bool(signatures):
        missing = "--in and --out, or --signature" if names else "a blueprint"
        raise InputError(f"say for what to compile: {missing} is missing")
    blueprints = [_blueprint(name) for name in names]
    return [(blueprint, each) for blueprint in blueprints for each in signatures]


def _signature(text: str) -> "KernelSignature":
    from esper.contracts import KernelSignature

    try:
        return KernelSignature.parse(text)
    except ValueError as error:
        raise InputError(str(error)) from error


def _blueprint(name: str) -> "BlueprintIR":
    """One of Esper's own, or that of a file."""
    from esper.tezzeret import load_blueprint, parse_blueprint

    path = Path(name)
    if path.suffix not in (".yaml", ".yml", ".json"):
        return load_blueprint(name)
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the blueprint file {path} cannot be read: {error}") from error
    return parse_blueprint(text, str(path))


def _size(text: str) -> tuple[str, int]:
    name, equals, value = text.partition("=")
    if not equals or not value.isdecimal():
        raise InputError(f"--size takes a name and a number, such as 'width=16'; got {text!r}")
    return name, int(value)


def _job(
    blueprint: "BlueprintIR", signature: "KernelSignature", sizes: dict[str, int], seed: int
) -> "CompileJob":
    from esper.tezzeret import CompileJob

    return CompileJob(blueprint, signature, sizes, seed)


def _anew(store: "Library", kernel_id: str) -> "CompileJob":
    from esper.tezzeret import recompile_job

    return recompile_job(store.get(store.full_id(kernel_id)))


def _compile(
    store: "Library", jobs: list["CompileJob"], workers: int | None, measure: bool
) -> list[tuple["CompileJob", EsperError]]:
    """Compile what the library has not, print what there is, and give the failures."""
    from esper.tezzeret import CompilePool, kernel_recipe

    missing: list[CompileJob] = []
    for job in jobs:
        recipe = kernel_recipe(
            job.blueprint,
            job.signature,
            sizes=job.sizes,
            init_seed=job.init_seed,
            ancestor=job.ancestor,
        )
        known = store.find(recipe=recipe)
        if known:
            out.print(known[0].kernel_id, highlight=False, soft_wrap=True)
        else:
            missing.append(job)
    failures: list[tuple[CompileJob, EsperError]] = []
    count = min(len(missing), 2) if workers is None and len(missing) > 1 else workers or 0

    def keep(outcome: "CompileOutcome") -> None:
        if outcome.artifact is None or outcome.error is not None:
            failures.append((outcome.job, outcome.error or EsperError("no kernel came of it")))
            return
        out.print(store.put(outcome.artifact), highlight=False, soft_wrap=True)
        for measurement in outcome.measurements:
            store.record_measurement(measurement)

    with _progress() as progress:
        bar = progress.add_task("compiling", total=len(missing))
        if not count:
            for job in missing:
                keep(_compile_here(job, measure))
                progress.advance(bar)
        else:
            backends = ("jax", "torch") if measure else ()
            with CompilePool(count, measure=backends) as pool:
                for outcome in pool.compile(missing):
                    keep(outcome)
                    progress.advance(bar)
    return failures


def _compile_here(job: "CompileJob", measure: bool) -> "CompileOutcome":
    from esper.execution import RealKernelExecutor
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
    measurements = [
        RealKernelExecutor(backend=backend).profile(artifact).to_dict()
        for backend in (("jax", "torch") if measure else ())
    ]
    return CompileOutcome(job, artifact, measurements=tuple(measurements))


@app.command("list")
def list_kernels(
    library: _Library = _DEFAULT,
    blueprint: Annotated[str | None, typer.Option(help="Only those of this blueprint.")] = None,
    signature: Annotated[str | None, typer.Option(help="Only those of this signature.")] = None,
    blueprints: Annotated[
        bool, typer.Option("--blueprints", help="Show the blueprints, and not the kernels.")
    ] = False,
    traceback: Trace = False,
) -> None:
    """Show the kernels of the library, or the blueprints that can be compiled."""
    with errors(traceback):
        if blueprints:
            _list_blueprints()
            return
        from esper.tezzeret import blueprint_names
        from esper.urza import Library

        table = Table(box=None)
        for heading in ("kernel", "blueprint", "signature"):
            table.add_column(heading, no_wrap=True)
        for heading in ("seed", "parameters", "FLOPs", "bytes", "µs"):
            table.add_column(heading, justify="right", no_wrap=True)
        store = Library(library, create=False)
        wanted = None if signature is None else _signature(signature)
        rows = store.find(wanted, blueprint=blueprint)
        for row in rows:
            table.add_row(
                row.kernel_id,
                row.blueprint,
                row.signature,
                str(row.init_seed),
                f"{row.parameter_count:,}",
                f"{row.flops:,}",
                f"{row.size_bytes:,}",
                _latency(store, row.kernel_id),
            )
        out.print(table, soft_wrap=True)
        out.print(
            f"{len(rows)} kernels; {len(blueprint_names())} blueprints: see --blueprints",
            highlight=False,
        )


def _latency(store: "Library", kernel_id: str) -> str:
    found = store.measurements(kernel_id)
    return " ".join(f"{m['backend']} {m['forward_us']:.0f}" for m in found)


def _list_blueprints() -> None:
    from esper.contracts import KernelSignature
    from esper.tezzeret import blueprint_names, load_blueprint, resolve

    examples = {
        "vector": "64->64",
        "sequence": "16x64->16x64",
        "signal": "16x64->16x64",
        "image": "16x16x16->16x16x16",
    }
    table = Table("blueprint", "takes", "for", box=None)
    table.add_column("parameters", justify="right")
    table.add_column("FLOPs", justify="right")
    table.add_column("birth")
    table.add_column("what it is")
    for name in blueprint_names():
        blueprint = load_blueprint(name)
        example = KernelSignature.parse(examples[blueprint.takes[0]])
        graph = resolve(blueprint, example)
        table.add_row(
            name,
            ", ".join(blueprint.takes),
            str(example).split()[0],
            f"{graph.parameter_count:,}",
            f"{graph.flops:,}",
            blueprint.birth,
            blueprint.summary,
        )
    out.print(table)


@app.command()
def show(
    kernel: Annotated[str, typer.Argument(help="A kernel's id or file, or a blueprint.")],
    library: _Library = _DEFAULT,
    signature: Annotated[
        str | None, typer.Option(help="For a blueprint: what to draw it for.")
    ] = None,
    mermaid: Annotated[bool, typer.Option("--mermaid", help="Draw for Markdown.")] = False,
    traceback: Trace = False,
) -> None:
    """Show what a kernel or a blueprint is, and draw its graph. Runs nothing of it."""
    with errors(traceback):
        from esper.cli import _drawing
        from esper.tezzeret import blueprint_names, read_blueprint, resolve

        if kernel in blueprint_names() or kernel.endswith((".yaml", ".yml", ".json")):
            if signature is None:
                raise InputError("--signature is missing: for what should the blueprint be drawn?")
            blueprint = _blueprint(kernel)
            graph = resolve(blueprint, _signature(signature))
            _facts(
                {
                    "blueprint": blueprint.name,
                    "summary": blueprint.summary,
                    "paper": blueprint.paper or "",
                    "signature": str(graph.signature),
                    "parameters": f"{graph.parameter_count:,}",
                    "FLOPs": f"{graph.flops:,} an example",
                }
            )
        else:
            artifact, measurements = _found(kernel, library)
            _show_artifact(artifact, measurements)
            if artifact.blueprint is None:
                return
            graph = resolve(
                read_blueprint(artifact.blueprint, "its blueprint"),
                artifact.manifest.signature,
                artifact.manifest.sizes,
            )
        if mermaid:
            print(_drawing.mermaid(graph))  # noqa: T201  (no markup, no wrapping)
            return
        drawn = _drawing.draw_graph(graph)
        width = max(len(lanes) for lanes, _, _ in drawn)
        text = max(len(label) for _, label, _ in drawn)
        for lanes, label, made in drawn:
            out.print(
                f"{lanes:<{width}}  {label:<{text}}  {made}",
                highlight=False, markup=False, soft_wrap=True,
            )  # fmt: skip


def _found(kernel: str, library: Path) -> tuple["Artifact", list[dict[str, Any]]]:
    """A kernel by its file, or by its id or the beginning of it."""
    from esper.artifacts import read_artifact
    from esper.urza import Library

    path = Path(kernel)
    if path.suffix == ".kernel" or path.is_file():
        try:
            return read_artifact(path.read_bytes()), []
        except OSError as error:
            raise InputError(f"the kernel file {path} cannot be read: {error}") from error
    store = Library(library, create=False)
    kernel_id = store.full_id(kernel)
    return store.get(kernel_id), store.measurements(kernel_id)


def _facts(facts: dict[str, str]) -> None:
    table = Table(box=None, show_header=False)
    for name, value in facts.items():
        table.add_row(f"[dim]{name}[/]", escape(value))
    out.print(table, soft_wrap=True)


def _show_artifact(artifact: "Artifact", measurements: list[dict[str, Any]]) -> None:
    from esper.tezzeret import artifact_cost, is_due

    manifest = artifact.manifest
    facts = {
        "kernel": artifact.kernel_id,
        "made of": f"{manifest.origin} {manifest.blueprint}",
        "signature": str(manifest.signature),
        "birth": f"{manifest.birth}, confidence {manifest.confidence}, seed {manifest.init_seed}",
        "sizes": ", ".join(f"{k} {v}" for k, v in manifest.sizes.items()) or "none",
        "programs": f"StableHLO (VJP order {manifest.vjp_order})"
        + (", TorchScript" if artifact.torchscript is not None else ""),
        "bytes": f"{len(artifact.data):,}",
        "compiled by": ", ".join(f"{k} {v}" for k, v in manifest.versions.items())
        + ("; due to be compiled anew" if is_due(artifact) else ""),
    }
    if manifest.origin == "blueprint":
        cost = artifact_cost(artifact)
        facts["cost"] = f"{cost.parameter_count:,} parameters, {cost.flops:,} FLOPs an example"
    if manifest.ancestor:
        facts["ancestor"] = manifest.ancestor
    for m in measurements:
        facts[f"{m['backend']} on {m['device']}"] = (
            f"{m['forward_us']:.1f} µs forward, {m['forward_backward_us']:.1f} µs with gradients,"
            f" batch {m['batch']}"
        )
    _facts(facts)


@app.command()
def verify(
    kernels: Annotated[list[str], typer.Argument(help="Files or ids of kernels.")],
    library: _Library = _DEFAULT,
    probation: Annotated[
        bool, typer.Option(help="Run the programs in a child process under limits.")
    ] = True,
    traceback: Trace = False,
) -> None:
    """Find out whether kernels may be used: scan them, and run them where they can do no harm.

    Exit status 1 where one is refused.
    """
    with errors(traceback):
        from esper.artifacts import verify as verify_kernel

        refused = 0
        for kernel in kernels:
            verdict = verify_kernel(_bytes(kernel, library), probation=probation)
            _show_verdict(kernel, verdict)
            refused += not verdict.accepted
        if refused:
            raise typer.Exit(1)


def _bytes(kernel: str, library: Path) -> bytes:
    """The bytes of a kernel, not parsed."""
    from esper.urza import Library

    path = Path(kernel)
    if path.suffix == ".kernel" or path.is_file():
        try:
            return path.read_bytes()
        except OSError as error:
            raise InputError(f"the kernel file {path} cannot be read: {error}") from error
    store = Library(library, create=False)
    return store.read_bytes(store.full_id(kernel))


_COLOURS = {"passed": "green", "refused": "red", "noted": "yellow", "skipped": "dim"}


def _show_verdict(kernel: str, verdict: "Verdict") -> None:
    word = "[green]accepted[/]" if verdict.accepted else "[red]refused[/]"
    known = " (its programs were run before)" if verdict.remembered else ""
    out.print(f"{escape(kernel)}: {word}{known}", highlight=False, soft_wrap=True)
    table = Table("check", "outcome", "ms", "detail", box=None)
    for check in verdict.checks:
        colour = _COLOURS[check.outcome]
        table.add_row(
            check.name,
            f"[{colour}]{check.outcome}[/]",
            f"{check.milliseconds:.1f}",
            escape(check.detail),
        )
    out.print(table)
    if verdict.protections:
        out.print(f"the child was held by {', '.join(verdict.protections)}", highlight=False)
    for missing in verdict.missing:
        out.print(f"[yellow]not to be had here:[/] {escape(missing)}", highlight=False)


@app.command()
def fetch(
    kernels: Annotated[
        list[str], typer.Argument(help="Kernel files, or ids of kernels of --from.")
    ],
    source: Annotated[
        Path | None, typer.Option("--from", help="Folder of the library to fetch from.")
    ] = None,
    library: _Library = _DEFAULT,
    traceback: Trace = False,
) -> None:
    """Verify kernels from elsewhere, and keep those that are accepted. Prints their ids."""
    with errors(traceback):
        from esper.artifacts import read_artifact
        from esper.artifacts import verify as verify_kernel
        from esper.urza import Library

        origin = None if source is None else Library(source, create=False)
        refused: list[str] = []
        store = Library(library)
        with _progress() as progress:
            bar = progress.add_task("fetching", total=len(kernels))
            for kernel in kernels:
                if origin is None or Path(kernel).is_file():
                    data = _file(kernel)
                else:
                    data = origin.read_bytes(origin.full_id(kernel))
                verdict = verify_kernel(data)
                if verdict.accepted:
                    kept = store.put(read_artifact(data))
                    out.print(kept, highlight=False, soft_wrap=True)
                else:
                    refused.append(f"{kernel} is refused: {verdict.reason}")
                progress.advance(bar)
        for text in refused:
            say(err, "red", text)
        if refused:
            raise typer.Exit(1)


def _file(kernel: str) -> bytes:
    try:
        return Path(kernel).read_bytes()
    except OSError as error:
        raise InputError(
            f"the kernel file {kernel} cannot be read: {error}. For a kernel of another library,"
            " say which by --from"
        ) from error


@app.command()
def prune(
    library: _Library = _DEFAULT,
    damaged: Annotated[bool, typer.Option(help="Those whose files are damaged or missing.")] = True,
    replaced: Annotated[
        bool, typer.Option("--replaced", help="Those that were compiled anew since.")
    ] = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="Remove them, and not only say which.")
    ] = False,
    traceback: Trace = False,
) -> None:
    """Remove kernels that are of no use from the library; without --yes, say which those are.

    Runs refer to kernels by id: one that is removed can be compiled again, from its blueprint, with
    the libraries that made it.
    """
    with errors(traceback):
        from esper.urza import Library

        store = Library(library, create=False)
        rows = store.find()
        gone: dict[str, str] = {}
        ancestors: dict[str, str] = {}
        with _progress() as progress:
            for row in progress.track(rows, description="reading"):
                try:
                    artifact = store.get(row.kernel_id)
                except (ArtifactError, KernelNotFoundError) as error:
                    if damaged:
                        missing = isinstance(error, KernelNotFoundError)
                        gone[row.kernel_id] = "its file is missing" if missing else "damaged"
                    continue
                if artifact.manifest.ancestor is not None:
                    ancestors[artifact.manifest.ancestor] = row.kernel_id
        if replaced:
            held = {row.kernel_id for row in rows}
            gone |= {
                old: f"replaced by {new[:12]}" for old, new in ancestors.items() if old in held
            }
        table = Table("kernel", "why", box=None)
        for kernel_id, why in gone.items():
            table.add_row(kernel_id, why)
            if yes:
                store.remove(kernel_id)
        if gone:
            out.print(table, soft_wrap=True)
        done = "removed" if yes else "would be removed; --yes removes them"
        out.print(f"{len(gone)} of {len(rows)} kernels {done}", highlight=False)
