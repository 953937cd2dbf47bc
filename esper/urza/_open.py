"""A library by where it is: a folder, or a service."""

import re
from pathlib import Path
from typing import cast

from esper.errors import InputError
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
        InputError: where it cannot be used, is an address of something else, or the package of
            the client is not installed.
    """
    if isinstance(where, str) and where.startswith(("http://", "https://")):
        from esper.urza.client import LibraryClient

        return cast(KernelLibrary, LibraryClient(where, token=token))
    check_folder(str(where))
    return Library(where, create=create)


_IS_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/").match
"""Of one letter it would be a drive."""


def check_folder(
    text: str, *, others: str = ", or the http:// or https:// address of a service"
) -> None:
    """Refuse what is an address and not a folder, which would be made under that name.

    Args:
        others: what may be given besides.

    Raises:
        InputError: with the scheme alone, because a password may come after it.
    """
    if found := _IS_ADDRESS(text):
        raise InputError(
            f"a library is not opened by {found[1]}:// here: expected a folder{others}. A database"
            " is named in the settings, as library.database"
        )
