"""Captions for `avocado evaluate`: made by a checkpoint, or read from a file."""

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from avocado_jax.checkpoint.load import identity, named_checkpoint
from avocado_jax.checkpoint.references import tokenizer_folder
from avocado_jax.data import storage
from avocado_jax.data.manifest import prompt_fields
from avocado_jax.data.prompt import choose_prompt, read_prompts
from avocado_jax.data.words import load_words
from avocado_jax.errors import InputError
from avocado_jax.eval.captioner import load_captioner
from avocado_jax.eval.runner import (
    Caption,
    CaptionOptions,
    Item,
    Outcome,
    TooManyFailed,
    Videos,
    caption_items,
    digest,
    read_captions,
)

T = TypeVar("T")
EMPTY = Caption("", 0)


def read_file(path: str, read: Callable[[Path], T]) -> T:
    """Apply `read` to a file, local or gs://."""
    with storage.local_copy(path) as local:
        try:
            return read(local)
        except InputError as error:
            raise InputError(str(error).replace(str(local), path)) from error


def folder_of(path: str) -> str:
    """The folder of a file, local or gs://."""
    return path.rpartition("/")[0] if storage.is_remote(path) else str(Path(path).parent)


def clip_prompts(args: argparse.Namespace) -> tuple[str, ...]:
    """The prompts of --prompt-file."""
    return read_prompts(args.prompt_file) if args.prompt_file else ()


def make_item(videos: Videos, prompts: tuple[str, ...], name: str, video: str, fields: Mapping[str, Any]) -> Item:
    """Build an item from a clip and the fields of its prompt.

    Raises:
        InputError: a field has the wrong type.
    """
    stated = prompt_fields(fields)
    if prompts and not stated.get("prompt"):
        stated["prompt"] = choose_prompt(prompts, name)
    return Item(name, video, stated, videos.size(video))


def make_captions(
    args: argparse.Namespace, items: list[Item], options: CaptionOptions, file: Any, frames: int | None = None
) -> Outcome:
    """Caption items with the checkpoint. Captions are stored in `file(digest)`, with a digest of all settings.

    Args:
        frames: maximum frames of a clip; None: no additional limit.
    """
    if items and all(item.bytes is None for item in items):
        raise InputError(f"{items[0].video}: no such file, nor any other video of {args.data}")
    checkpoint = named_checkpoint(args.checkpoint)
    known = identity(checkpoint)
    if frames:
        known = f"{known} {frames}"
    target = file(digest([known, vars(options)])[:8])

    def load():
        captioner = load_captioner(checkpoint, None, options.dtype)
        reading = captioner.reading
        most = min(reading.most_frames, frames or reading.most_frames)
        return captioner._replace(reading=replace(reading, most_frames=most))

    folder = folder_of(target)
    beside = storage.names(folder) if args.benchmark != "world" else []
    kept = [name for name in beside if name.startswith("captions") and name.endswith(".jsonl")]
    others = [path for path in (storage.join(folder, name) for name in kept) if path != target]
    return caption_items(items, load, known, options, target, args.batch, args.max_failed, others, args.clip_seconds)


def given_captions(args: argparse.Namespace, every: dict[str, Any], wanted: list[str]) -> Outcome:
    """Read captions from --captions."""
    captions = read_file(args.captions, lambda file: read_captions(file, every))
    tokenizer = load_words(tokenizer_folder(args.checkpoint)) if args.checkpoint else None
    if tokenizer:

        def tokens(caption: Caption) -> int:  # tokenizers reject lone surrogates
            return len(tokenizer.encode(caption.text.encode(errors="replace").decode()))

        captions = {
            name: Caption(caption.text, tokens(caption) if caption.tokens is None else caption.tokens)
            for name, caption in captions.items()
        }
    failed = {name: "no caption" for name in wanted if name not in captions}
    if len(failed) > args.max_failed * len(wanted):
        raise TooManyFailed(
            f"{args.captions}: no caption of {len(failed)} of {len(wanted)} clips, such as {next(iter(failed))}; "
            f"the share of {args.max_failed:g} is allowed (--max-failed)"
        )
    return Outcome(captions, failed)


def print_failed(outcome: Outcome, count: int) -> None:
    """Print the number of clips without a caption."""
    if outcome.failed:
        message = f"{len(outcome.failed)} of {count} clips failed; their captions count as empty"
        print(f"avocado evaluate: {message}", file=sys.stderr)
