"""Tezzeret, the compiler: blueprints in, artifacts out."""

from esper.tezzeret._blueprint import (
    BlueprintIR,
    blueprint_names,
    load_blueprint,
    parse_blueprint,
    read_blueprint,
)
from esper.tezzeret._compile import compile_blueprint, kernel_recipe
from esper.tezzeret._cost import ArtifactCost, artifact_cost
from esper.tezzeret._function_entry import compile_equinox, compile_flax, compile_function
from esper.tezzeret._jobs import CompileJob, CompileLimits, CompileOutcome
from esper.tezzeret._kernel import kernel_from_blueprint
from esper.tezzeret._module_entry import compile_module
from esper.tezzeret._native import native_program, torch_kernel_from_blueprint
from esper.tezzeret._pool import CompilePool
from esper.tezzeret._programs import jax_program
from esper.tezzeret._recompile import is_due, recompile, recompile_job
from esper.tezzeret._resolve import Graph, GraphNode, resolve
from esper.tezzeret._summary import BlueprintSummary, summarize_blueprint

__all__ = [
    "ArtifactCost",
    "BlueprintIR",
    "BlueprintSummary",
    "CompileJob",
    "CompileLimits",
    "CompileOutcome",
    "CompilePool",
    "Graph",
    "GraphNode",
    "artifact_cost",
    "blueprint_names",
    "compile_blueprint",
    "compile_equinox",
    "compile_flax",
    "compile_function",
    "compile_module",
    "is_due",
    "jax_program",
    "kernel_from_blueprint",
    "kernel_recipe",
    "load_blueprint",
    "native_program",
    "parse_blueprint",
    "read_blueprint",
    "recompile",
    "recompile_job",
    "resolve",
    "summarize_blueprint",
    "torch_kernel_from_blueprint",
]
