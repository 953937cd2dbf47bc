"""A file of settings: YAML, read as data, with the line of every value."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from esper.errors import InputError

MOST_BYTES = 1 << 20
_DEEPEST = 20
CUT = "…"
"""What a key ends with, of which not all is shown."""
# Where quotes were forgotten, a secret that begins with ! is read as such a name.
_NAMED = re.compile(r"(?P<what>tag|tag handle) ('.*'|\".*\")")


class FileContent(NamedTuple):
    """What a file says, and on which line."""

    data: dict[str, Any]
    lines: dict[str, int]
    """By dotted name; of sections too."""


def read_settings_file(path: Path) -> FileContent:
    """Read a file of settings; its content is in no message, because it may hold secrets.

    Raises:
        InputError: where it cannot be read, is not YAML, repeats a key, or is no mapping: in one
            line, with the place.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MOST_BYTES + 1)
        if len(raw) > MOST_BYTES:
            raise InputError(
                f"the settings file {path} has more than {MOST_BYTES} bytes: it is something else"
            )
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"the settings file {path} is not YAML: byte {error.start} is not UTF-8"
        ) from None
    except IsADirectoryError as error:
        raise InputError(
            f"the settings file {path} cannot be read: {error.strerror}, where a YAML file is"
            " expected; move it away, or name another file by --config"
        ) from error
    except OSError as error:
        told = error.strerror or str(error)
        raise InputError(f"the settings file {path} cannot be read: {told}") from error
    loader = yaml.SafeLoader("")
    try:
        loader = yaml.SafeLoader(text)
        _refuse_what_swells(path, text)
        node = loader.get_single_node()
        if node is None:
            return FileContent({}, {})
        lines: dict[str, int] = {}
        _walk(path, node, "", lines)
        data = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = "" if mark is None else f" at line {mark.line + 1}, column {mark.column + 1}"
        # The problem names characters, never values; the error itself quotes the line.
        told = str(error.problem or error.context)
        problem = _NAMED.sub(r"\g<what>", told)
        if problem != told:
            problem += (
                " (put a text that begins with ! into quotes; tags such as"
                " !!python/object are not read)"
            )
        raise InputError(f"the settings file {path} is not YAML{place}: {problem}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError(f"the settings file {path} is not YAML: {type(error).__name__}") from None
    except ValueError:  # PyYAML makes numbers and dates by Python's own types
        raise InputError(
            f"the settings file {path} holds a number or a date that is none: put texts into quotes"
        ) from None
    except (KeyError, AttributeError):  # so PyYAML fails at `!!bool x` and `!!timestamp x`
        raise InputError(
            f"the settings file {path} holds a value that is not what its tag says: put texts into"
            " quotes, and leave tags such as !!bool out"
        ) from None
    finally:
        loader.dispose()
    if data is None:
        return FileContent({}, {})
    if not isinstance(data, dict):
        raise InputError(
            f"the settings file {path} is no mapping of sections such as `library:`, but a"
            f" {type(data).__name__}"
        )
    return FileContent(data, lines)


def shown_key(key: str) -> str:
    """A key as it may be shown: a secret may follow on what no setting's name has.

    In `{token:secret}` the whole of it is a key, because there is no space after the colon.
    """
    return re.sub(r"[^\w.?-].*", CUT, key, flags=re.DOTALL)[:200]


def _refuse_what_swells(path: Path, text: str) -> None:
    """Aliases stand for any amount of data, and the parser takes long over deep nesting."""
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            line = event.start_mark.line + 1
            raise InputError(
                f"the settings file {path} is nested deeper than {_DEEPEST} levels at line {line}:"
                " it is something else"
            )
        if isinstance(event, yaml.AliasEvent):
            line = event.start_mark.line + 1
            raise InputError(
                f"the settings file {path} has an alias at line {line}: write out what it stands"
                " for, or put a text that begins with * into quotes"
            )


def _walk(path: Path, node: yaml.Node, prefix: str, lines: dict[str, int]) -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        name = f"{prefix}{key.value}" if isinstance(key, yaml.ScalarNode) else f"{prefix}?"
        line = key.start_mark.line + 1
        if name in lines:
            raise InputError(
                f"the settings file {path} has {shown_key(name)} twice, at lines {lines[name]} and"
                f" {line}: keep one"
            )
        lines[name] = line
        _walk(path, value, f"{name}.", lines)
