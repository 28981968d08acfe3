"""Structured answers: a pydantic model gives the JSON schema of the request and parses the answer."""

import ast
import json
import re
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from avocado_jax.remote.call import Malformed

A = TypeVar("A", bound=BaseModel)
ATTEMPTS = 256  # maximum number of "{" that are tried: a hostile answer may contain a million
LITERAL, DEPTH = 20_000, 16  # maximum characters and nesting of a Python dictionary
ESCAPE = re.compile(r"""\\(?:\\\\)*[^\\'"nrtu]""")  # escapes that Python warns about or reads differently
TOKEN = re.compile(r"""'(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*"|[{}]""")


def response_format(schema: type[BaseModel]) -> dict[str, Any]:
    """The request field that constrains the answer to this schema."""
    named = {"name": schema.__name__, "schema": _forbid_extra(schema.model_json_schema()), "strict": True}
    return {"response_format": {"type": "json_schema", "json_schema": named}}


def read_object(text: str, schema: type[A], python: bool = False) -> A:
    """Return the last JSON object in an answer that matches the schema; types are checked strictly.

    Text, code fences and other objects around it are ignored, and so are additional fields.

    Args:
        python: accept Python dictionaries too (`objects`).

    Raises:
        Malformed: no object matches.
    """
    why = "no JSON object"
    for found in reversed(objects(text, python)):
        try:
            return schema.model_validate(found, strict=True)
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            why = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    raise Malformed(f"{why} in {text[:200]!r}", text)


def objects(text: str, python: bool = False) -> list[dict[str, Any]]:
    """The outermost JSON objects in a text, in order. Objects with a duplicate field are skipped.

    Args:
        python: accept Python dictionaries too: single quotes, True, False, None and trailing commas.
    """
    decoder = json.JSONDecoder(object_pairs_hook=_fields)
    found, position = [], 0
    for _ in range(ATTEMPTS):
        if (position := text.find("{", position)) < 0:
            break
        try:
            value, position = decoder.raw_decode(text, position)
            found.append(value)
        except (ValueError, RecursionError):
            end = _closing(text, position) if python else 0
            value = _literal(text[position:end]) if end else None
            if isinstance(value, dict):
                found.append(value)
            position = end if isinstance(value, dict) else position + 1
    return found


def _closing(text: str, start: int) -> int:
    """The end of the object that begins at `start`; 0 if not found within the limits."""
    depth = 0
    for token in TOKEN.finditer(text, start, start + LITERAL):
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth == 0:
            return token.end()
        if depth > DEPTH:
            break
    return 0


def _literal(text: str) -> Any:
    """Parse a Python dictionary of literals; None if it is invalid or has a duplicate field."""
    if ESCAPE.search(text):
        return None
    try:
        tree = ast.parse(text, mode="eval")
        for node in ast.walk(tree):
            if isinstance(node, ast.Dict):
                keys = [ast.literal_eval(key) for key in node.keys if key is not None]
                if not all(isinstance(key, str) for key in keys) or len(set(keys)) < len(node.keys):
                    return None
        return ast.literal_eval(tree)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None


def last_words(text: str) -> list[str]:
    """Candidate plain-text answers: the text without reasoning and code fences, and its last line."""
    answer = text.rpartition("</think>")[2]
    lines = [line.strip() for line in answer.splitlines() if line.strip() and not line.strip().startswith("```")]
    return list(dict.fromkeys(["\n".join(lines), *lines[-1:]]))


def _forbid_extra(schema: Any) -> Any:
    """The schema with additionalProperties false in every object, as strict endpoints require."""
    if isinstance(schema, list):
        return [_forbid_extra(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: _forbid_extra(value) for name, value in schema.items()}
    return {**closed, "additionalProperties": False} if schema.get("type") == "object" else closed


def _fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError("a field twice")
    return dict(pairs)
