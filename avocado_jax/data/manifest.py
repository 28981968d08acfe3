"""Manifests: JSONL lines, DESIGN's own or ms-swift's, to entries to prepare and lines to reject."""

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from avocado_jax.data.records import LISTS
from avocado_jax.errors import InputError

MARK = re.compile("<video>|<audio>|<image>")  # media placeholders of ms-swift


class Entry(NamedTuple):
    """One good line."""

    line: int  # from 1
    video: str  # as given
    fields: dict[str, Any]  # the rest: id, caption, ...


class Reject(NamedTuple):
    """A line or a clip that is left out."""

    line: int
    id: str | None
    video: str | None
    reason: str


def parse_manifest(text: bytes) -> tuple[list[Entry], list[Reject]]:
    """Good entries in order, and bad lines with the reason; of lines with one id the first is good.

    A line is `{"id", "video", "caption", ...}` or ms-swift's `{"messages": [...], "videos": [path]}`, told apart
    line by line. Empty lines count in the numbering only.
    """
    entries, rejects, taken = [], [], {}
    for number, line in enumerate(text.split(b"\n"), start=1):
        if not line.strip():
            continue
        held: Any = None
        try:
            held = _loaded(line)
            fields = _from_swift(held, number) if "messages" in held else dict(held)
            video = _checked(fields)
            if fields["id"] in taken:
                raise InputError(f"its id is that of line {taken[fields['id']]}")
        except InputError as error:
            known = [held.get(key) if isinstance(held, dict) else None for key in ("id", "video")]
            rejects.append(Reject(number, *(part if isinstance(part, str) else None for part in known), str(error)))
        else:
            taken[fields["id"]] = number
            entries.append(Entry(number, video, fields))
    return entries, rejects


def _loaded(line: bytes) -> dict[str, Any]:
    try:
        held = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 ({error.reason} at byte {error.start})") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"not JSON ({error})") from error
    if not isinstance(held, dict):
        raise InputError("not a JSON object")
    return held


def _checked(fields: dict[str, Any]) -> str:
    """Check the fields' types, and take the video out of them."""
    for name in ("id", "video", "caption"):
        if name not in fields:
            raise InputError(f"has no '{name}'")
        if not isinstance(fields[name], str) or not fields[name].strip():
            raise InputError(f"its '{name}' is not a text, or empty")
    prompt_fields(fields)
    for name in LISTS:
        kind = str if name == "references" else dict
        held = fields.get(name, [])
        if not isinstance(held, list) or not all(isinstance(item, kind) for item in held):
            raise InputError(f"its '{name}' is not a list of {'texts' if kind is str else 'objects'}")
    try:
        json.dumps(fields, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InputError("a text in it holds half of a surrogate pair") from error
    return fields.pop("video")


def prompt_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """`prompt`, `system` and `media_first` of a line, those that it has.

    Raises:
        InputError: one of them has another type.
    """
    kinds = {"prompt": str, "system": str, "media_first": bool}
    for name, kind in kinds.items():
        if name in fields and not isinstance(fields[name], kind):
            raise InputError(f"its '{name}' is not {'a text' if kind is str else 'true or false'}")
    return {name: fields[name] for name in kinds if name in fields}


def _from_swift(held: dict[str, Any], number: int) -> dict[str, Any]:
    """The same clip, question and answer as a line of our own; the id is made of the video and the line's number."""
    videos, messages = held.get("videos"), held["messages"]
    if not isinstance(videos, list) or len(videos) != 1 or not isinstance(videos[0], str):
        raise InputError("'videos' is not a list of one path")
    if held.get("audios") or held.get("images"):
        raise InputError("separate sound or pictures beside the video are not supported")
    if not isinstance(messages, list) or not all(
        isinstance(part, dict) and isinstance(part.get("content"), str) for part in messages
    ):
        raise InputError("'messages' is not a list of {role, content} with texts")
    roles = [part.get("role") for part in messages]
    said = dict(zip(roles, (part["content"] for part in messages)))
    if roles not in (["user", "assistant"], ["system", "user", "assistant"]):
        raise InputError(f"messages by {roles}: one question and one answer are supported")
    # The placeholders stand where the media go: before the question, or behind it.
    before, *inner, after = MARK.split(said["user"]) if MARK.search(said["user"]) else ("", said["user"])
    if (before.strip() and after.strip()) or any(part.strip() for part in inner):
        raise InputError("the video stands in the middle of the question: before and behind it are supported")
    fields = {"id": held.get("id", f"{videos[0]}#{number}"), "video": videos[0], "caption": said["assistant"]}
    if prompt := before.strip() or after.strip():
        fields["prompt"] = prompt
    if "system" in said:  # empty: none
        fields["system"] = said["system"]
    return fields | ({"media_first": False} if before.strip() else {})
