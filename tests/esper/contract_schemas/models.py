"""Every public model of the contracts, and their JSON schemas.

`python -m tests.esper.contract_schemas.models` writes the schemas anew. Do so when a model was
changed on purpose: what is stored or sent under the old one must still be read, by an entry of
`UPGRADES` and a greater `schema_version`, or because the new one only has a new key with a default.
"""

import json
from pathlib import Path
from typing import Any

import esper.contracts
from esper.contracts import BlueprintRecord, Columns, Data, KernelRecord, Page

FOLDER = Path(__file__).parent


def _models() -> dict[str, type[Data]]:
    exported = {name: getattr(esper.contracts, name) for name in esper.contracts.__all__}
    found = {
        name: value
        for name, value in exported.items()
        if isinstance(value, type) and issubclass(value, Data)
    }
    for base in (Data, Columns, Page):
        del found[base.__name__]
    pages = {f"PageOf{item.__name__}": Page[item] for item in (BlueprintRecord, KernelRecord)}
    return found | pages


MODELS = _models()

PARTS = {"KernelSignature", "TensorSpec"}
"""Those that are only ever part of another."""


def schema_text(model: type[Data]) -> str:
    """Without titles and descriptions, which change nothing of what is valid."""
    schema = _without(model.model_json_schema(), {"title", "description"})
    return json.dumps(schema, indent=1, sort_keys=True, ensure_ascii=True) + "\n"


def _without(schema: Any, keys: set[str], *, named: bool = False) -> Any:
    if isinstance(schema, list):
        return [_without(item, keys) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: _without(value, keys, named=key in ("properties", "$defs"))
        for key, value in schema.items()
        if named or key not in keys
    }


if __name__ == "__main__":
    for old in FOLDER.glob("*.json"):
        old.unlink()
    for name, model in MODELS.items():
        (FOLDER / f"{name}.json").write_text(schema_text(model))
