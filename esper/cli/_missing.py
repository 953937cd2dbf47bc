"""What to do where a kernel of a run is gone from its library."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from esper.errors import KernelNotFoundError


@contextmanager
def fetching_told(library: Path) -> Iterator[None]:
    """Say of a kernel that a library does not hold how it is fetched from another one.

    Raises:
        KernelNotFoundError: with the advice.
    """
    try:
        yield
    except KernelNotFoundError as error:
        raise KernelNotFoundError(
            f"{error}; from another library it comes by esper kernels fetch ID --from FOLDER"
            f" --library {library}"
        ) from error
