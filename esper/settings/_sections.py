"""All that can be configured, and its defaults."""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SecretStr
from pydantic import model_validator as _model_validator

from esper.settings._password import without_password
from esper.settings._secret import SecretUrl

DEFAULT_LIBRARY = "runs/library"


def _no_truth_value(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("expected a number, and not true or false")
    return value


def _no_password(text: str) -> str:
    if (
        re.match(r"[A-Za-z][A-Za-z0-9+.-]*://[^/?#]*@", text)
        or without_password(text, whole=True) != text
    ):
        raise ValueError("an address without a user and password is expected here")
    return text


def _of_a_database(url: SecretUrl) -> SecretUrl:
    known = ("postgresql://", "postgresql+psycopg://", "sqlite:///")
    if not url.get_secret_value().startswith(known):
        raise ValueError(
            "the address of a database is postgresql://USER:PASSWORD@HOST/DATABASE or"
            " sqlite:///PATH"
        )
    return url


def _of_a_bus(url: SecretUrl) -> SecretUrl:
    known = ("memory:", "sqlite:", "redis://", "rediss://", "unix://")
    if not url.get_secret_value().startswith(known):
        raise ValueError(
            "the address of a bus is memory:, sqlite:PATH or redis://HOST:PORT, or unix://PATH of a"
            " Redis server's socket"
        )
    return url


_Text = Annotated[str, Field(min_length=1)]
_Place = Annotated[_Text, AfterValidator(_no_password)]
_Password = Annotated[SecretStr, Field(min_length=1)]
_Port = Annotated[int, BeforeValidator(_no_truth_value), Field(ge=0, le=65_535)]
_Positive = Annotated[float, BeforeValidator(_no_truth_value), Field(gt=0, allow_inf_nan=False)]
_Workers = Annotated[int, BeforeValidator(_no_truth_value), Field(ge=1, le=64)]
_Capacity = Annotated[int, BeforeValidator(_no_truth_value), Field(ge=1, le=10_000_000)]


class Section(BaseModel):
    """Some settings that belong together."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class S3Settings(Section):
    """How a server of S3 is reached; what is not given is taken from `AWS_` variables."""

    endpoint: _Place | None = None
    """The server's address, such as https://s3.example.org."""
    region: _Text | None = None
    """The bucket's region."""
    access_key_id: _Text | None = None
    """Who asks."""
    secret_access_key: _Password | None = None
    """A secret."""
    session_token: _Password | None = None
    """A secret, of keys that expire."""


class LibrarySettings(Section):
    """Where kernels are: a folder or a service, or a database and a place for files."""

    where: _Place | None = None
    """A folder, or the address of `esper serve`; by default `runs/library`."""
    database: Annotated[SecretUrl, AfterValidator(_of_a_database)] | None = None
    """Instead of `where`, and with `blobs`: postgresql://… or sqlite:///…"""
    blobs: _Place | None = None
    """A folder, or s3://BUCKET/FOLDER."""
    token: _Password | None = None
    """A secret: what a service asks for."""
    s3: S3Settings = S3Settings()

    @property
    def place(self) -> str | None:
        """The folder or address; None where there is a database."""
        return None if self.database is not None else self.where or DEFAULT_LIBRARY

    @_model_validator(mode="after")
    def _check_place(self) -> Self:
        if (self.database is None) != (self.blobs is None):
            raise ValueError("a library has both `database` and `blobs`, or neither")
        if self.where is not None and self.database is not None:
            raise ValueError("a library has either `where` or `database` and `blobs`")
        return self


class BusSettings(Section):
    """What carries messages between processes."""

    url: Annotated[SecretUrl, AfterValidator(_of_a_bus)] | None = None
    """memory:, sqlite:PATH or redis://…; by default there is none."""


class ServeSettings(Section):
    """`esper serve`; what these are, its options say."""

    host: _Text = "127.0.0.1"
    """The address to listen at."""
    port: _Port = 8420
    """Where to listen; 0 chooses a free port."""
    token_file: _Text | None = None
    """Where tokens are kept, as digests."""
    workers: _Workers = 1
    """Processes that answer."""
    max_upload: Annotated[int, BeforeValidator(_no_truth_value), Field(ge=1)] = 256
    """Largest kernel, in MiB."""
    rate: _Positive = 5_000.0
    """Requests a second of one token."""
    grace: _Positive = 20.0
    """Seconds that what runs may take to end."""
    open_metrics: bool = False
    """Tell /metrics to who has no token."""
    certificate: _Text | None = None
    """For HTTPS, with `key`: the name of a PEM file."""
    key: _Text | None = None
    """The name of a PEM file."""

    @_model_validator(mode="after")
    def _check_files(self) -> Self:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("HTTPS takes both `certificate` and `key`")
        return self


class WorkerSettings(Section):
    """`esper worker`; what these are, its options say."""

    workers: _Workers = 1
    """Processes that compile."""
    name: _Text | None = None
    """By which claims are known; by default the machine's."""
    lease: Annotated[_Positive, Field(ge=1, le=3_600)] = 60.0
    """Seconds after which what a lost worker had is free."""
    grace: Annotated[float, BeforeValidator(_no_truth_value), Field(ge=0, le=3_600)] = 20.0
    """Seconds for what is begun, when it is to end."""
    measure: bool = False
    """Time each kernel that was compiled."""
    metrics: _Port | None = None
    """A port for Prometheus."""
    metrics_host: _Text = "127.0.0.1"
    """The address that it is at."""


class TamiyoSettings(Section):
    """`esper tamiyo serve`; what these are, its options say."""

    host: _Text = "127.0.0.1"
    """The address of health and metrics."""
    port: _Port = 8430
    """Where to listen; 0 chooses a free port."""
    shadow: bool = False
    """Advise, on a topic that nobody acts upon."""
    learn: bool = False
    """Learn from what came of decisions."""
    policy: _Text | None = None
    """The name of a policy's file; by default there are rules."""
    folder: _Text | None = None
    """Where what is learned is kept, and goes on from; by default it is gone at the end."""
    most_kl: Annotated[float, BeforeValidator(_no_truth_value), Field(ge=0)] = 0.1
    """How far learning may lead from the policy's file, in nats."""
    save_every: Annotated[int, BeforeValidator(_no_truth_value), Field(ge=1)] = 500
    """Updates of the policy after which what is learned is written."""
    safety: _Text | None = None
    """The name of a file of the rules of safety; by default there are none."""
    sample: Annotated[float, BeforeValidator(_no_truth_value), Field(ge=0, le=1)] = 0.1
    """The share of normal health that is looked at."""
    capacity: _Capacity = 65_536
    """Rows of health that may wait; what must pass is merged beyond, and not dropped."""


class TelemetrySettings(Section):
    """What a training run tells a bus."""

    capacity: _Capacity = 65_536
    """Messages that may wait to be sent; what comes beyond is dropped, and counted."""


class LoggingSettings(Section):
    """What services log."""

    format: Literal["auto", "rich", "json", "plain"] = "auto"
    """`auto`: rich on a terminal, and plain elsewhere."""
    level: Literal["debug", "info", "warning", "error"] = "info"
    """The least that is written."""
    capacity: _Capacity = 10_000
    """Records that may wait to be written; what comes beyond is dropped, and counted."""
