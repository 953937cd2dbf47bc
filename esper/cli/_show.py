"""`esper kernels list` and `esper kernels show`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from esper.cli._arguments import (
    DEFAULT_LIBRARY,
    LibraryFolder,
    blueprint_of,
    bytes_of,
    id_of,
    is_file_of_kernel,
    signature_of,
)
from esper.cli._console import Trace, counted, errors, out, show_table
from esper.errors import InputError

if TYPE_CHECKING:
    from esper.artifacts import Artifact
    from esper.urza import Library


def list_kernels(
    library: LibraryFolder = DEFAULT_LIBRARY,
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
        wanted = None if signature is None else signature_of(signature)
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
        show_table(table, whole=True)
        out.print(
            f"{counted(len(rows), 'kernel')}; {counted(len(blueprint_names()), 'blueprint')}: see"
            " --blueprints",
            highlight=False,
            soft_wrap=True,
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
    show_table(table)


def show(
    kernel: Annotated[str, typer.Argument(help="A kernel's id or file, or a blueprint.")],
    library: LibraryFolder = DEFAULT_LIBRARY,
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
            blueprint = blueprint_of(kernel)
            graph = resolve(blueprint, signature_of(signature))
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
            print(_drawing.mermaid(graph), flush=True)  # noqa: T201  (no markup, no wrapping)
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

    if is_file_of_kernel(kernel):
        return read_artifact(bytes_of(kernel)), []
    store = Library(library, create=False)
    kernel_id = id_of(kernel, store)
    return store.get(kernel_id), store.measurements(kernel_id)


def _facts(facts: dict[str, str]) -> None:
    table = Table(box=None, show_header=False)
    for name, value in facts.items():
        table.add_row(f"[dim]{name}[/]", escape(value))
    show_table(table, whole=True)


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
        parameters, flops = counted(cost.parameter_count, "parameter"), counted(cost.flops, "FLOP")
        facts["cost"] = f"{parameters}, {flops} an example"
    if manifest.ancestor:
        facts["ancestor"] = manifest.ancestor
    for m in measurements:
        facts[f"{m['backend']} on {m['device']}"] = (
            f"{m['forward_us']:.1f} µs forward, {m['forward_backward_us']:.1f} µs with gradients,"
            f" batch {m['batch']}"
        )
    _facts(facts)
