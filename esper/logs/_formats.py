"""How a record is written: a line of JSON, a plain line, or lines for people."""

import json
from collections.abc import Callable
from typing import Any

from esper.logs._record import Entry

Format = Callable[[Entry], str]
"""A record as text that ends with a newline."""


def as_json(entry: Entry) -> str:
    """One object on one line; a field that is called as one of its own keys gets a `_`."""
    content: dict[str, Any] = {
        "time": _time(entry),
        "level": entry.level,
        "logger": entry.logger,
        "message": entry.message,
    }
    for name, value in entry.fields.items():
        content[f"{name}_" if name in content or name == "error" else name] = value
    if entry.error is not None:
        content["error"] = entry.error
    return json.dumps(content) + "\n"


def as_plain(entry: Entry) -> str:
    """One line; what would begin another, or steer a terminal, is written as an escape."""
    parts = [_time(entry), entry.level.upper().ljust(7), entry.logger, _one_line(entry.message)]
    parts += [f"{_one_line(name)}={_value(value)}" for name, value in entry.fields.items()]
    line = " ".join(parts)
    error = entry.error
    while error is not None:
        line += f" <- {error['type']}: {_one_line(error['message'])}"
        line += f" at {_one_line(error['stack'][-1])}" if error["stack"] else ""
        error = error.get("cause")
    return line + "\n"


def rich_format(width: int | None = None) -> Format:
    """Lines with colours, for a terminal."""
    import io

    from rich.console import Console
    from rich.text import Text

    colours = {"debug": "dim", "info": "green", "warning": "yellow", "error": "red"}

    def write(entry: Entry) -> str:
        console = Console(file=io.StringIO(), force_terminal=True, width=width or 200)
        colour = colours.get(entry.level, "bold red")
        text = Text.assemble(
            (f"{entry.time.astimezone():%H:%M:%S} ", "dim"),
            (f"{entry.level.upper():<7} ", colour),
            (_lines(entry.message), "bold" if entry.error is not None else ""),
        )
        for name, value in entry.fields.items():
            text.append(f" {_one_line(name)}=", "cyan").append(_value(value))
        text.append(f"  {entry.logger}", "dim")
        error, lead = entry.error, ""
        while error is not None:
            text.append(f"\n    {lead}{error['type']}: ", "red").append(_lines(error["message"]))
            text.append("".join(f"\n      {_one_line(own)}" for own in error["stack"]), "dim")
            error, lead = error.get("cause"), "from "
        console.print(text, soft_wrap=True, markup=False, highlight=False, emoji=False)
        output = console.file
        assert isinstance(output, io.StringIO)
        return output.getvalue()

    return write


def _time(entry: Entry) -> str:
    return f"{entry.time:%Y-%m-%dT%H:%M:%S}.{entry.time.microsecond // 1000:03d}Z"


def _one_line(text: str) -> str:
    """A text in which control characters are escapes."""
    if text.isprintable():
        return text
    return "".join(own if own.isprintable() else _escape(own) for own in text)


def _lines(text: str) -> str:
    """The same, but for line breaks, after which it is indented."""
    return "\n    ".join(map(_one_line, text.split("\n")))


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()


def _value(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    shown = _one_line(text)
    return (
        json.dumps(text, ensure_ascii=False) if not text or shown != text or " " in text else text
    )
