"""Urza, the library of blueprints and kernels."""

from esper.urza._library import KernelRecord, Library

__all__ = ["KernelRecord", "Library"]
