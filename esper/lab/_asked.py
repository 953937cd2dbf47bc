"""What a user may set: the ports, and how many workers there are."""

import socket
from collections.abc import Mapping
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from esper.lab._errors import LabInputError
from esper.lab._folder import write_whole

HOST = "127.0.0.1"
"""The one address that the servers listen at."""

PORTS: Mapping[str, int] = {"postgres": 15432, "redis": 16379, "s3": 19000, "urza": 18080}
"""Where the search for a free port begins: below those that systems hand out by themselves, so
that one which is remembered is free the next time too."""

_TRIES = 200


class Asked(BaseModel):
    """The settings of a lab, as `lab.yaml` has them."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    ports: dict[str, int]
    workers: int = Field(default=2, ge=0, le=64)

    @model_validator(mode="after")
    def _whole(self) -> "Asked":
        if self.ports.keys() != PORTS.keys():
            raise ValueError(f"a port each for {', '.join(PORTS)} is wanted, and for nothing else")
        for name, port in self.ports.items():
            if not 0 < port < 65_536:
                raise ValueError(f"the port of {name} is {port}; ports go from 1 to 65535")
        if len(set(self.ports.values())) < len(self.ports):
            raise ValueError("two servers cannot have one port")
        return self


def asked_of(path: Path, *, ports: Mapping[str, int], workers: int | None) -> Asked:
    """The settings: those given here, else the file's, else free ports; written down there.

    Raises:
        LabInputError: where the file or an argument is not valid, or no port is free.
        LabError: where the file cannot be written.
    """
    unknown = ports.keys() - PORTS.keys()
    if unknown:
        raise LabInputError(
            f"there is no server {sorted(unknown)[0]!r} to give a port: there are"
            f" {', '.join(PORTS)}"
        )
    written = _read(path)
    found = {name: ports.get(name) for name in PORTS}
    if written is not None:
        found = {name: ports.get(name, written.ports[name]) for name in PORTS}
    taken = {port for port in found.values() if port is not None}
    for name, port in found.items():
        if port is None:
            found[name] = _free(PORTS[name], taken)
    if workers is None:
        workers = written.workers if written is not None else 2
    try:
        asked = Asked.model_validate({"ports": found, "workers": workers})
    except ValidationError as error:
        raise LabInputError(f"the lab cannot be as it is asked for: {_said(error)}") from None
    if asked != written:
        text = yaml.safe_dump(asked.model_dump(), sort_keys=False)
        write_whole(path, f"# What this lab is asked for; read when it comes up.\n{text}")
    return asked


def refuse_taken(name: str, port: int) -> None:
    """Raise LabInputError where another program listens at a port."""
    if not _is_free(port):
        raise LabInputError(
            f"port {port} of {HOST}, which {name} is to have, is in use by another program: end"
            f" that, or give another port by --port {name}=NUMBER"
        )


def _read(path: Path) -> Asked | None:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise LabInputError(f"{path} cannot be read: {error}") from error
    advice = "repair it, or remove it to have free ports chosen"
    try:
        return Asked.model_validate(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise LabInputError(
            f"{path} is no YAML ({' '.join(str(error).split())}): {advice}"
        ) from error
    except ValidationError as error:
        raise LabInputError(f"{path} is not valid ({_said(error)}): {advice}") from None


def _said(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    where = ".".join(map(str, first["loc"]))
    return f"{where}: {first['msg']}" if where else first["msg"].removeprefix("Value error, ")


def _free(first: int, taken: set[int]) -> int:
    for port in range(first, first + _TRIES):
        if port not in taken and _is_free(port):
            taken.add(port)
            return port
    raise LabInputError(
        f"no port from {first} to {first + _TRIES - 1} of {HOST} is free: give one by --port"
    )


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((HOST, port))
        except OSError:
            return False
        return True
