"""A library by where it is: a folder, or a service."""

from pathlib import Path
from typing import cast

from esper.urza._library import Library
from esper.urza._protocol import KernelLibrary


def open_library(
    where: Path | str, *, token: str | None = None, create: bool = True
) -> KernelLibrary:
    """Open a library.

    Args:
        where: a folder, or the `http://` or `https://` address of a library's service.
        token: what the service asks for.
        create: make the folder where there is none.

    Raises:
        InputError: where it cannot be used, or the package of the client is not installed.
    """
    if isinstance(where, str) and where.startswith(("http://", "https://")):
        from esper.urza.client import LibraryClient

        return cast(KernelLibrary, LibraryClient(where, token=token))
    return Library(where, create=create)
