"""Tezzeret, the compiler: blueprints in, artifacts out."""

from esper.tezzeret._blueprint import (
    BlueprintIR,
    blueprint_names,
    load_blueprint,
    parse_blueprint,
)
from esper.tezzeret._compile import compile_blueprint, kernel_recipe
from esper.tezzeret._function_entry import compile_equinox, compile_flax, compile_function
from esper.tezzeret._kernel import kernel_from_blueprint
from esper.tezzeret._module_entry import compile_module
from esper.tezzeret._native import native_program, torch_kernel_from_blueprint
from esper.tezzeret._programs import jax_program
from esper.tezzeret._resolve import Graph, GraphNode, resolve

__all__ = [
    "BlueprintIR",
    "Graph",
    "GraphNode",
    "blueprint_names",
    "compile_blueprint",
    "compile_equinox",
    "compile_flax",
    "compile_function",
    "compile_module",
    "jax_program",
    "kernel_from_blueprint",
    "kernel_recipe",
    "load_blueprint",
    "native_program",
    "parse_blueprint",
    "resolve",
    "torch_kernel_from_blueprint",
]
