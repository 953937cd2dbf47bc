"""Urza, the library of blueprints and kernels."""

from esper.contracts import KernelRecord
from esper.urza._blobs import S3Access
from esper.urza._library import Library
from esper.urza._open import open_library
from esper.urza._protocol import KernelLibrary

__all__ = ["KernelLibrary", "KernelRecord", "Library", "S3Access", "open_library"]
