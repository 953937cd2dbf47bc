"""The service's own description, for those who write other clients."""

from collections.abc import Sequence
from typing import Any

from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic.json_schema import models_json_schema

from esper.urza._wire import Problem
from esper.urza.service._gate import needs_of

_CONTROL = r"\p{C}\p{Zl}\p{Zp}"
_CONTROL_NAMED = r"\u0000-\u001f\u007f-\u009f\u2028\u2029\ud800-\udfff"
_REF = "#/components/schemas/{model}-Input"


def describe(routes: Sequence[APIRoute], version: str) -> dict[str, Any]:
    """OpenAPI of an application, with its bodies, scopes and problems."""
    found = get_openapi(
        title="Urza, Esper's library of kernels",
        version=version,
        description="Kernels, blueprints that wait to be compiled, and what became of them.",
        routes=routes,
    )
    bodies = {body for route in routes if (body := needs_of(route).body) is not None}
    models = sorted({*bodies, Problem}, key=lambda model: model.__name__)
    names, schemas = models_json_schema(
        [(model, "validation") for model in models], ref_template=_REF
    )
    components = found.setdefault("components", {})
    components.setdefault("schemas", {}).update(
        {f"{name}-Input": schema for name, schema in schemas.get("$defs", {}).items()}
    )
    components["schemas"].pop("HTTPValidationError", None)
    components["schemas"].pop("ValidationError", None)
    components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    refused = {
        "description": "What is wrong, and what to do about it.",
        "content": {"application/problem+json": {"schema": names[Problem, "validation"]}},
    }
    for route in routes:
        for method in (route.methods or ()) if route.include_in_schema else ():
            operation = found["paths"][route.path_format][method.lower()]
            operation["responses"].pop("422", None)
            operation["responses"] |= {"4XX": refused, "5XX": refused}
            scope, body, *_ = needs_of(route)
            if scope is not None:
                operation["security"] = [{"token": []}]
                operation["x-scope"] = scope.value
            if body is not None:
                schema = names[body, "validation"]
                operation["requestBody"] = {
                    "required": True,
                    "content": {"application/json": {"schema": schema}},
                }
    return _portable(found)


def _portable(schema: Any) -> Any:
    """A schema whose patterns JavaScript's regular expressions know without a flag.

    What remains is a little wider: not every character that steers a terminal is named.
    """
    if isinstance(schema, list):
        return [_portable(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: value.replace(_CONTROL, _CONTROL_NAMED)
        if key == "pattern" and isinstance(value, str)
        else _portable(value)
        for key, value in schema.items()
    }
