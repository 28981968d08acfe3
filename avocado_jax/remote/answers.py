"""Structured answers: what is asked for as a JSON schema, and read back by the same declaration."""

import json
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from avocado_jax.remote.call import Malformed

A = TypeVar("A", bound=BaseModel)
ATTEMPTS = 256  # openings of an object that are tried: a hostile answer may hold a million


def response_format(schema: type[BaseModel]) -> dict[str, Any]:
    """The field of a request that asks for an answer of this shape, and of nothing beside it."""
    named = {"name": schema.__name__, "schema": _closed(schema.model_json_schema()), "strict": True}
    return {"response_format": {"type": "json_schema", "json_schema": named}}


def read_object(text: str, schema: type[A]) -> A:
    """The last JSON object in what a model wrote that is of this shape, types strictly so.

    Words, fences and other objects around it are passed over, and so are fields that were not asked for.

    Raises:
        Malformed: there is none.
    """
    why = "no JSON object"
    for found in reversed(objects(text)):
        try:
            return schema.model_validate(found, strict=True)
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            why = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    raise Malformed(f"{why} in {text[:200]!r}", text)


def objects(text: str) -> list[dict[str, Any]]:
    """The JSON objects in a text, outermost ones, in order. One that names a field twice is none."""
    decoder = json.JSONDecoder(object_pairs_hook=_fields)
    found, place = [], 0
    for _ in range(ATTEMPTS):
        if (place := text.find("{", place)) < 0:
            break
        try:
            value, place = decoder.raw_decode(text, place)
            found.append(value)
        except (ValueError, RecursionError):
            place += 1
    return found


def _closed(schema: Any) -> Any:
    """The schema with no field but its own in any object, as strict endpoints ask for; answers may have more."""
    if isinstance(schema, list):
        return [_closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: _closed(value) for name, value in schema.items()}
    return {**closed, "additionalProperties": False} if schema.get("type") == "object" else closed


def _fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError("a field twice")
    return dict(pairs)
