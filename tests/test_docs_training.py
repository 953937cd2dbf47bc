"""What the pages on training, controllers, comparing and replaying list is what the code has."""

import ast
import inspect
import sys
from pathlib import Path
from typing import Any

import pytest

from esper.tamiyo import CONTROLLERS, RULES, TRIGGERS, Action
from esper.tolaria import (
    GrowConfig,
    Hooks,
    InitialGraft,
    SafetyConfig,
    ScheduledDecision,
    ServiceConfig,
)
from esper.tolaria._divergence import REMEDIES
from esper.tolaria.comparison import ARMS, Word
from esper.tolaria.initialisations import INITIALISATIONS
from esper.tolaria.worth import components_table

ROOT = Path(__file__).parents[1]


def text_of(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


def table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def described(owner: type) -> dict[str, str]:
    """The string behind each field of a class, in one line; "" where there is none."""
    (tree,) = ast.parse(inspect.getsource(owner)).body
    assert isinstance(tree, ast.ClassDef)
    found: dict[str, str] = {}
    name = ""
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name = node.target.id
            found[name] = ""
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and name:
            found[name] = " ".join(str(node.value.value).split())
            name = ""
        else:
            name = ""
    return found


TITLES = {"task": "What is trained", "threads": "The process and its files"}
"""Of groups that no comment in the class begins."""


def groups(owner: type) -> dict[str, list[str]]:
    """The fields of a class by the comments, or the empty lines, that divide them."""
    found: dict[str, list[str]] = {}
    title, parted = "", False
    for line in inspect.getsource(owner).splitlines():
        text = line.strip()
        name = text.partition(":")[0]
        if text.startswith("# "):
            title = text[2:].rstrip(".")
        elif line.startswith("    ") and name in getattr(owner, "model_fields", {}):
            title = TITLES[name] if parted and name in TITLES else title
            found.setdefault(title, []).append(name)
        parted = not text
    return found


def allowed(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    """What a key takes, as its JSON schema says."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        target = definitions[name]
        return allowed(target, definitions) if "enum" in target else f"keys of `{name}`"
    if "anyOf" in schema:
        return " or ".join(allowed(part, definitions) for part in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    kind = schema.get("type")
    if kind == "array":
        return f"list of {allowed(schema['items'], definitions)}"
    if kind == "object":
        return f"names and {allowed(schema['additionalProperties'], definitions)}"
    if kind == "string" and schema.get("format") == "path":
        return "path"
    names = {"integer": "whole number", "number": "number", "string": "text", "boolean": "yes, no"}
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    told = [f"{sign} {schema[key]:,}" for key, sign in bounds.items() if key in schema]
    return " ".join([names.get(str(kind), str(kind)), *told])


def default(owner: Any, name: str) -> str:
    field = owner.model_fields[name]
    if field.is_required():
        return ""
    value = field.get_default(call_default_factory=True)
    if isinstance(value, SafetyConfig):
        return ""
    return "null" if value is None else f"`{str(value).lower()}`".replace("'", "")


def keys_table(owner: Any, names: list[str] | None = None) -> str:
    schema, meaning = owner.model_json_schema(), described(owner)
    definitions = schema.get("$defs", {})
    rows = [
        (f"`{name}`", default(owner, name), allowed(schema["properties"][name], definitions),
         meaning[name])
        for name in names or list(owner.model_fields)
    ]  # fmt: skip
    return table(("key", "default", "takes", "meaning"), rows)


def config_tables() -> str:
    parts = [f"### {title}\n\n{keys_table(GrowConfig, names)}"
             for title, names in groups(GrowConfig).items()]  # fmt: skip
    return "\n\n".join(parts)


def grafts_table() -> str:
    return keys_table(InitialGraft)


def decisions_table() -> str:
    return keys_table(ScheduledDecision)


def service_keys_table() -> str:
    return keys_table(ServiceConfig)


def safety_keys_table() -> str:
    return keys_table(SafetyConfig)


def hooks_table() -> str:
    return table(("hook", "when"), [(f"`{name}`", told) for name, told in described(Hooks).items()])


def remedies_list() -> str:
    return "\n".join(f"{i}. {remedy}" for i, remedy in enumerate(REMEDIES, 1))


def module_line(cls: type | None) -> str:
    if cls is None:
        return "trains without growing"
    line = (sys.modules[cls.__module__].__doc__ or "").partition("\n")[0].rstrip(".")
    return line.removeprefix("A trigger: ").removeprefix("A control: ")


def triggers_table() -> str:
    rows = [(f"`{name}`", f"`{cls.__name__}`", module_line(cls)) for name, cls in TRIGGERS.items()]
    return table(("trigger", "class", "fires when"), rows)


def controllers_table() -> str:
    rows = [
        (f"`{name}`", f"`{cls.__name__}`" if cls else "", module_line(cls))
        for name, cls in CONTROLLERS.items()
    ]
    return table(("controller", "class", "what it does"), rows)


def rules_table() -> str:
    rows = [
        (f"`{rule}`", *("yes" if action in actions else "" for action in Action))
        for rule, actions in RULES.items()
    ]
    return table(("rule", *(action.value for action in Action)), rows)


def initialisations_table() -> str:
    rows = [
        (f"`{name}`", own.summary, "yes" if own.preserves else "no", own.source)
        for name, own in INITIALISATIONS.items()
    ]
    return table(("initialisation", "first parameters", "output unchanged", "source"), rows)


def arms_table() -> str:
    return table(("arm", "what it is"), [(f"`{name}`", told) for name, told in ARMS.items()])


def words_table() -> str:
    meaning = {
        Word.BETTER: "the test, corrected, is at most alpha, and the interval is above 0",
        Word.WORSE: "the same, below 0",
        Word.EQUIVALENT: "the test of equivalence, corrected, is at most alpha, and the inner"
        " interval lies within the smallest effect",
        Word.UNDECIDED: "none of these: nothing is said",
    }
    return table(("word", "when"), [(word.value, meaning[word]) for word in Word])


PARTS = {
    "training.md": [config_tables, grafts_table, decisions_table, service_keys_table,
                    safety_keys_table, hooks_table, remedies_list],
    "controllers.md": [triggers_table, controllers_table, rules_table, initialisations_table,
                       components_table],
    "comparing.md": [arms_table, words_table],
}  # fmt: skip


@pytest.mark.parametrize(
    ("page", "part"),
    [(page, part) for page, parts in PARTS.items() for part in parts],
    ids=lambda value: value.__name__ if callable(value) else value,
)
def test_what_it_lists_is_the_codes(page, part):
    assert part() in text_of(page), part()


@pytest.mark.parametrize(
    "owner", [GrowConfig, InitialGraft, ScheduledDecision, ServiceConfig, SafetyConfig]
)
def test_every_key_says_what_it_means(owner):
    assert [name for name, meaning in described(owner).items() if not meaning] == []


def test_every_key_of_a_configuration_is_in_one_group():
    listed = [name for names in groups(GrowConfig).values() for name in names]
    assert listed == list(GrowConfig.model_fields)
