"""One name for every leaf of a pytree, and the way back.

A name joins the keys on the path to a leaf by `|`: `params|layers|[0]|.weight`.
A string key of a dict stands as it is, an index or another key in brackets, an
attribute after a dot. A string that could be taken for something else is quoted as
in JSON, so no two paths have one name.
"""

import ast
import json
from typing import Any

from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

from esper.errors import CheckpointError

SEPARATOR = "|"
ROOT = "[]"
"""The name of a tree that is one leaf."""


def _quote(text: str) -> str:
    # A slash would make one array a folder of the other in what stores them.
    plain = text.isprintable() and not set(text) & set("|/")
    if plain and text and text[0] not in '[."':
        return text
    return json.dumps(text).replace("|", "\\u007c").replace("/", "\\u002f")


def _unquote(text: str) -> str:
    return json.loads(text) if text.startswith('"') else text


def _literal(key: Any, so_far: str) -> str:
    """A key of a dict that is no string, as Python writes it."""
    text = ascii(key)
    try:
        same = ast.literal_eval(text) == key
    except (ValueError, SyntaxError):
        same = False
    if not same:
        raise CheckpointError(
            f"a dict at {so_far or ROOT} of the tree has the key {key!r} of type"
            f" {type(key).__name__}, from which no name can be made; use strings or whole numbers"
        )
    return text.replace("|", "\\x7c").replace("/", "\\x2f")


def path_name(path: tuple[Any, ...]) -> str:
    """The name of the leaf at a key path of `jax.tree_util`.

    Raises:
        CheckpointError: for keys that have no literal form.
    """
    parts: list[str] = []
    for key in path:
        match key:
            case DictKey(key=str() as text):
                part = _quote(text)
            case DictKey(key=other):
                part = f"[{_literal(other, SEPARATOR.join(parts))}]"
            case SequenceKey(idx=index) | FlattenedIndexKey(key=index):
                part = f"[{index}]"
            case GetAttrKey(name=name):
                part = "." + _quote(name)
            case _:  # a class may have keys of its own
                part = "." + _quote(str(key))
        parts.append(part)
    return SEPARATOR.join(parts) if parts else ROOT


def _key(part: str) -> Any:
    if part.startswith("["):
        return ast.literal_eval(part[1:-1])
    return _unquote(part.removeprefix("."))


def nested(named: dict[str, Any]) -> Any:
    """Leaves by name as nested dicts: indices are whole numbers, attributes strings.

    Containers that held no leaf are not there. A tree of dicts alone comes back as it was.
    """
    if ROOT in named:
        return named[ROOT]
    tree: dict[Any, Any] = {}
    for name, leaf in named.items():
        *path, last = (_key(part) for part in name.split(SEPARATOR))
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        if last in node:
            raise CheckpointError(
                f"the leaf {name} has another beside it that is called the same in nested dicts;"
                " give `like`, the tree to restore"
            )
        node[last] = leaf
    return tree
