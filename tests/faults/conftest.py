"""The fixtures of the platform's tests."""

from tests.esper.conftest import small_disk

__all__ = ["small_disk"]
