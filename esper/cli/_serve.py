"""`esper serve` and `esper token`: a library for others, and who may ask it."""

import dataclasses
import functools
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from esper.cli._arguments import DEFAULT_LIBRARY
from esper.cli._console import Trace, err, errors, out, say, show_table
from esper.cli._defaults import NO_FOLDER
from esper.errors import InputError

if TYPE_CHECKING:
    from pydantic import SecretStr

    from esper.settings import Settings
    from esper.urza import KernelLibrary
    from esper.urza.service import Scope

app = typer.Typer(
    name="token", help="Make and revoke tokens of `esper serve`.", no_args_is_help=True
)

TOKENS = "tokens.json"
DEFAULT_PORT = 8420

LibraryPlace = Annotated[Path, typer.Option("--library", help="Folder of the library.")]
TokenPlace = Annotated[
    Path | None,
    typer.Option(
        "--token-file",
        help=f"Where tokens are kept, as digests; by default {TOKENS} in the library's folder.",
        show_default=False,
    ),
]


def serve(
    context: typer.Context,
    library: LibraryPlace = DEFAULT_LIBRARY,
    database: Annotated[
        str | None,
        typer.Option(
            help="A database elsewhere: postgresql://USER:PASSWORD@HOST/NAME, or sqlite:///PATH.",
            show_default=False,
        ),
    ] = None,
    blobs: Annotated[
        str | None,
        typer.Option(help="Files elsewhere: a folder, or s3://BUCKET/FOLDER.", show_default=False),
    ] = None,
    host: Annotated[
        str, typer.Option(help="The address to listen at; others than this one open it to others.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65_535, help="Where to listen; 0 chooses a free port.")
    ] = DEFAULT_PORT,
    token_file: TokenPlace = None,
    workers: Annotated[int, typer.Option(min=1, max=64, help="Processes that answer.")] = 1,
    max_upload: Annotated[int, typer.Option(min=1, help="Largest kernel, in MiB.")] = 256,
    rate: Annotated[float, typer.Option(help="Requests a second of one token.")] = 5000.0,
    grace: Annotated[
        float, typer.Option(help="Seconds that what runs may take to end on SIGTERM.")
    ] = 20.0,
    open_metrics: Annotated[
        bool, typer.Option("--open-metrics", help="Tell /metrics to who has no token.")
    ] = False,
    certificate: Annotated[
        Path | None, typer.Option(help="For HTTPS, with --key: PEM files.", show_default=False)
    ] = None,
    key: Annotated[Path | None, typer.Option(show_default=False)] = None,
    traceback: Trace = False,
) -> None:
    """Serve a library over HTTP, to those who have a token."""
    with errors(traceback, trains=False):
        from esper.urza.service import Limits, ServiceOptions
        from esper.urza.service import serve as serve_library

        if _is_given(context, "library") and not _is_given(context, "database"):
            # What is said here counts, and not the database of the settings.
            database = None
            if not _is_given(context, "blobs"):
                blobs = None
        if (database is None) != (blobs is None):
            raise InputError(
                "a library elsewhere has a database and files: give both --database and --blobs"
            )
        if database is not None:
            from esper.urza._connections import parse_url

            parse_url(database)
        if (certificate is None) != (key is None):
            raise InputError("HTTPS takes both --certificate and --key")
        config = context.find_root().params.get("config")
        limits = dataclasses.replace(
            Limits(),
            upload_bytes=max_upload << 20,
            rate=rate,
            burst=2 * rate,
            shutdown_seconds=grace,
        )
        serve_library(
            ServiceOptions(
                functools.partial(open_served, library, database, blobs, config),
                token_file=_tokens_of(token_file, library),
                sqlite=library / "library.sqlite" if database is None else None,
                limits=limits,
                open_metrics=open_metrics,
                host=host,
                port=port,
                workers=workers,
                certificate=certificate,
                key=key,
                prepare=functools.partial(log_served, config),
            ),
            tell=lambda address: _tell(f"serving the library at {address} (Ctrl-C ends it)"),
        )
        _tell("esper: the service has ended")


def _is_given(context: typer.Context, option: str) -> bool:
    source = context.get_parameter_source(option)
    return source is not None and source.name == "COMMANDLINE"


def open_served(
    library: Path, database: str | None, blobs: str | None, config: Path | None = None
) -> "KernelLibrary":
    """Open what is served, in whichever process serves it.

    Args:
        config: the file of settings, which tell how a server of S3 is reached.
    """
    from esper.urza import Library, S3Access

    if database is None or blobs is None:
        return Library(library)
    settings = _settings(config)
    s3 = None
    if settings is not None and blobs.startswith("s3://"):
        given = settings.library.s3
        s3 = S3Access(
            endpoint=given.endpoint,
            region=given.region,
            access_key_id=given.access_key_id,
            secret_access_key=_told(given.secret_access_key),
            session_token=_told(given.session_token),
        )
    return Library.connect(database, blobs, s3=s3)


def log_served(config: Path | None) -> None:
    """Log as the settings say, in whichever process serves; where they do not, warnings alone."""
    from esper.logs import configure_logs

    settings, loggers = _settings(config), ("esper", "uvicorn")
    if settings is None:
        configure_logs(level="warning", loggers=loggers)
    else:
        logs = settings.logging
        configure_logs(logs.format, logs.level, capacity=logs.capacity, loggers=loggers)


def _settings(config: Path | None) -> "Settings | None":
    """What is configured; None where nothing is."""
    from esper.settings import is_configured, load_settings

    return load_settings(config).settings if is_configured(config, os.environ) else None


def _told(secret: "SecretStr | None") -> str | None:
    return None if secret is None else secret.get_secret_value()


@app.command("make")
def make(
    name: Annotated[str, typer.Argument(help="For logs, and to revoke it by.", show_default=False)],
    scope: Annotated[str, typer.Option(help="read, write, or admin.")] = "read",
    days: Annotated[
        float | None,
        typer.Option(help="It expires after so many days.", show_default=False),
    ] = None,
    library: LibraryPlace = DEFAULT_LIBRARY,
    token_file: TokenPlace = None,
    traceback: Trace = False,
) -> None:
    """Make a token, and print it: this once, because only its digest is kept."""
    with errors(traceback, trains=False):
        from esper.urza.service import TokenFile

        if days is not None and not days > 0:
            raise InputError(
                f"a token that expires after {days:g} days is of no use: expected more than 0 days;"
                " leave --days out for one that never expires"
            )
        expires = None if days is None else time.time() + 86_400.0 * days
        tokens = TokenFile(_tokens_of(token_file, library))
        secret, _ = tokens.make(name, _scope(scope), expires=expires)
        say(err, "green", f"the token {name} of scope {scope}; it is shown only now:")
        _tell(secret)


@app.command("list")
def list_tokens(
    library: LibraryPlace = DEFAULT_LIBRARY,
    token_file: TokenPlace = None,
    traceback: Trace = False,
) -> None:
    """List the tokens: who may ask, and for what."""
    with errors(traceback, trains=False):
        from esper.urza.service import TokenFile

        table = Table("name", "scope", "made", "expires")
        for token in TokenFile(_known_tokens_of(token_file, library)).tokens():
            table.add_row(
                token.name, token.scope.value, _moment(token.created), _moment(token.expires)
            )
        show_table(table)


@app.command("revoke")
def revoke(
    name: Annotated[str, typer.Argument(help="Of the token.", show_default=False)],
    library: LibraryPlace = DEFAULT_LIBRARY,
    token_file: TokenPlace = None,
    traceback: Trace = False,
) -> None:
    """Make a token worthless, from the next request on."""
    with errors(traceback, trains=False):
        from esper.urza.service import TokenFile

        path = _known_tokens_of(token_file, library)
        if not TokenFile(path).revoke(name):
            raise InputError(f"{path} has no token {name!r}: esper token list shows those it has")
        say(err, "green", f"the token {name} is worthless from now on")


def _tokens_of(token_file: Path | None, library: Path) -> Path:
    if token_file is None and str(library) == NO_FOLDER:
        raise InputError(
            "where are the tokens? The library of the settings is in no folder here: give"
            " --token-file FILE, the one that `esper serve` has, or --library FOLDER"
        )
    return library / TOKENS if token_file is None else token_file


def _known_tokens_of(token_file: Path | None, library: Path) -> Path:
    """The tokens of a library that is there: no folder is made, and none taken for an empty one.

    Raises:
        InputError: where their folder is not there.
    """
    path = _tokens_of(token_file, library)
    if not path.expanduser().parent.is_dir():
        raise InputError(
            f"there are no tokens in {path}: the folder {path.parent} is not there; give the"
            " --library or --token-file that `esper token make` was given"
        )
    return path


def _scope(text: str) -> "Scope":
    from esper.urza.service import Scope

    try:
        return Scope(text)
    except ValueError as error:
        known = ", ".join(Scope)
        raise InputError(f"there is no scope {text[:40]!r}: expected one of {known}") from error


def _moment(seconds: float | None) -> str:
    if seconds is None:
        return "never"
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.gmtime(seconds))
    except (OverflowError, ValueError, OSError):
        # Files of tokens hold such moments from when none was refused.
        return f"{seconds:g} s"


def _tell(text: str) -> None:
    out.print(text, highlight=False, markup=False, soft_wrap=True)
