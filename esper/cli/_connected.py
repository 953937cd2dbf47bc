"""The library and the bus that a command works with, wherever they are."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import TYPE_CHECKING, Annotated, TypeGuard, TypeVar, cast

import typer

from esper.cli._arguments import DEFAULT_LIBRARY
from esper.errors import EsperError, ServiceUnavailableError

if TYPE_CHECKING:
    from pydantic import SecretStr

    from esper.oona import Broker
    from esper.settings import Settings
    from esper.urza import KernelLibrary
    from esper.urza.client import LibraryClient

T = TypeVar("T")

LibraryPlace = Annotated[
    str | None,
    typer.Option(
        "--library",
        metavar="FOLDER|URL",
        help="The library: a folder, or the address of `esper serve`.",
        show_default=str(DEFAULT_LIBRARY),
    ),
]
BusAddress = Annotated[
    str | None,
    typer.Option("--bus", metavar="URL", help="The bus, such as redis://host or sqlite:PATH."),
]


def settings_of(context: typer.Context) -> "Settings | None":
    """What is configured for a command; None where nothing is."""
    from esper.settings import is_configured

    config = context.find_root().params.get("config")
    if not is_configured(config, os.environ):
        return None
    from esper.settings import load_settings

    return load_settings(config).settings


def library_at(
    where: str | None, settings: "Settings | None", *, create: bool = True
) -> "tuple[KernelLibrary, str]":
    """A library, and where it is, for messages.

    Args:
        where: a folder or a service; None for what is configured.
        create: make it where there is none, and it is no service's.

    Raises:
        InputError: where it cannot be used as it is given.
        ServiceUnavailableError: where a server of it is away.
    """
    from esper.urza import Library, S3Access, open_library

    configured = None if settings is None else settings.library
    if where is None and configured is not None and configured.database is not None:
        s3, blobs = configured.s3, str(configured.blobs)
        access = S3Access(
            endpoint=s3.endpoint,
            access_key_id=s3.access_key_id,
            secret_access_key=_value(s3.secret_access_key),
            session_token=_value(s3.session_token),
            region=s3.region,
        )
        database = configured.database.get_secret_value()
        return Library.connect(database, blobs, s3=access, create=create), blobs
    place = where or str(DEFAULT_LIBRARY)
    return open_library(place, token=token_for(place, settings), create=create), place


@contextmanager
def opened(
    context: typer.Context, where: str | None, *, create: bool = True
) -> "Iterator[KernelLibrary]":
    """The library of a command, which is closed at its end; see `library_at`.

    A service is asked whether it is there before anything else. What it says is wrong is told with
    its address: it knows its library by another name than who asks it.
    """
    with closing(_found(context, where, create)) as library, _address_told(where):
        yield library


@contextmanager
def opened_with(
    besides: Callable[[], T], context: typer.Context, where: str | None, *, create: bool = True
) -> "Iterator[tuple[KernelLibrary, T]]":
    """The library of a command, and what it needs besides: what is wrong with either is told first.

    A folder is made last, because nothing is left behind where the other is wrong; a service is
    asked first, because nobody waits for the other where there is no library.
    """
    if _is_service(where):
        with closing(_found(context, where, create)) as library:
            other = besides()
            with _address_told(where):
                yield library, other
        return
    other = besides()
    with opened(context, where, create=create) as library:
        yield library, other


def _found(context: typer.Context, where: str | None, create: bool) -> "KernelLibrary":
    """A library that is there."""
    with ExitStack() as failed:
        try:
            library, _ = library_at(where, settings_of(context), create=create)
            failed.callback(library.close)
            if _is_service(where):
                with _address_told(where):
                    cast("LibraryClient", library).about()
        except ServiceUnavailableError as error:
            raise ServiceUnavailableError(f"{str(error).rstrip('.')}. Nothing was done.") from error
        failed.pop_all()
    return library


def _is_service(where: str | None) -> TypeGuard[str]:
    return where is not None and where.startswith(("http://", "https://"))


@contextmanager
def _address_told(where: str | None) -> Iterator[None]:
    """Name a service in the errors that do not name it."""
    try:
        yield
    except EsperError as error:
        if _is_service(where) and (address := where.rstrip("/")) not in str(error):
            error.args = (f"{error}; the library is at {address}",)
        raise


def token_for(place: str, settings: "Settings | None") -> str | None:
    """The token of a library.

    One that is configured beside an address is for that address alone; one without an address is
    for whichever is named.
    """
    if settings is None:
        return None
    where = settings.library.where
    if where is not None and place.rstrip("/") != where.rstrip("/"):
        return None
    return _value(settings.library.token)


def bus_at(url: str | None, *, opening_seconds: float | None = None) -> "Broker | None":
    """The bus of that address, if any.

    Args:
        opening_seconds: for how long a server that is away is asked.

    Raises:
        InputError: where it is none.
        ServiceUnavailableError, BusError: where it cannot be opened now.
    """
    if url is None:
        return None
    from esper.oona import open_broker

    return open_broker(url, opening_seconds=opening_seconds)


def _value(secret: "SecretStr | None") -> str | None:
    return None if secret is None else secret.get_secret_value()
