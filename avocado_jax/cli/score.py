"""Score captions with the rewards that train captioners: whoever wrote the captions.

  avocado score captions.jsonl --tokenizer REF --json
  avocado score captions.jsonl --terms dialogue,repetition --json --explain

FILE holds lines {"id", "caption", "reference": {"caption"?, "dialogues"?, "keypoints"?, "events"?, "probes"?}}:
dialogues are {"speaker", "text"}, keypoints {"text", "dimension"?}, events {"start", "end"} in seconds, probes
{"question", "choices", "answer"}. One line of JSON a caption, in order:

  R_C        share of the keypoints that the caption states, as --judge sees it; "keypoints" has its answers
  R_D        lines of dialogue and their speakers; without "dialogues" those of reference.caption count
  R_L        1 up to 2048 tokens, 0 from 4096, counted with the tokenizer of --tokenizer
  repcol     whether the caption falls into repetition
  truncated  whether something did not fit and was left out
  timing     with --terms ...,timing: F1 of the time IoU of "[start - end]" scenes with the events
  probes     with --terms ...,probes: share of the probes that --judge lm or remote answers rightly from the caption

A term without a reference, or that is not among --terms, is null. The words of all references in the file tell which
words say much. avocado_jax/rewards/README.md says what each term sees and what it does not.
"""

import argparse
import json
import math
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from avocado_jax.checkpoint.references import tokenizer_folder
from avocado_jax.data.probes import read_probe
from avocado_jax.data.words import Words, load_words
from avocado_jax.errors import InputError
from avocado_jax.eval.captioner import computing_dtype
from avocado_jax.jsonl import NUMBER, read_lines
from avocado_jax.remote.chat import Endpoint
from avocado_jax.rewards.combine import (
    ALWAYS,
    DEFAULTS,
    JUDGES,
    PROBE_JUDGES,
    TERMS,
    References,
    make_references,
    score,
)
from avocado_jax.rewards.explain import explain
from avocado_jax.rewards.text import Limits, parse
from avocado_jax.rewards.vocabulary import MARKS, Table, code_points, make_table, word_weights, words_of

BATCH = 32  # captions at once
EXTRA = ("timing", "probes")  # terms with a field only if they are among --terms


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command."""
    parser.add_argument("file", type=Path, metavar="FILE", help="captions with their references, JSON lines")
    parser.add_argument(
        "--terms",
        default=",".join(ALWAYS),
        metavar="A,B",
        help="of checklist, dialogue, length, repetition, timing, probes (default: the first four)",
    )
    parser.add_argument(
        "--judge", choices=JUDGES, default="lexical", help="of keypoints and probes (default: %(default)s)"
    )
    parser.add_argument("--judge-model", default="", metavar="MODEL", help="its folder, or its name at the endpoint")
    parser.add_argument("--judge-url", default="", metavar="URL", help="of an OpenAI-compatible API: https://HOST/v1")
    parser.add_argument(
        "--judge-key", default="OPENAI_API_KEY", metavar="VARIABLE", help="holds the API key (default: %(default)s)"
    )
    parser.add_argument("--judge-cache", type=Path, metavar="DIR", help="keeps the endpoint's answers")
    parser.add_argument(
        "--judge-patience",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="what is not answered by then is missing (default: %(default)g)",
    )
    parser.add_argument("--tokenizer", metavar="REF", help="counts the tokens of captions")
    parser.add_argument("--explain", action="store_true", help="say what matched, in words")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")


def run(args: argparse.Namespace) -> int:
    """Read, score, print."""
    terms = args.terms.split(",")
    if unknown := [name for name in terms if name not in TERMS]:
        raise InputError(f'--terms: no term "{unknown[0]}"; there are {", ".join(TERMS)}')
    lines = [checked(where, line) for where, line in read_lines(args.file, {"id": str, "caption": str})]
    tokenizer = load_words(tokenizer_folder(args.tokenizer)) if args.tokenizer else None
    told_missing(lines, terms, tokenizer)
    answers = asked(args, lines)
    references = [line["reference"] for line in lines]
    table = make_table(None, word_weights([document(reference) for reference in references]))
    limits = fitting(lines)
    events = max(1, *(len(one["events"] or ()) for one in references), *(line["caption"].count("[") for line in lines))
    made, cut = make_references(table, references, limits, events=rounded(events, 8) if "timing" in terms else 0)
    lengths = [float(len(tokenizer.encode(line["caption"]))) if tokenizer else math.nan for line in lines]
    for first in range(0, len(lines), BATCH):
        part = slice(first, first + BATCH)
        own = jax.tree.map(lambda leaf, part=part: leaf[part], made)
        given = {term: scores[part] for term, scores in answers.items()}
        captions, scored = scored_batch(table, lines[part], np.array(lengths[part]), own, given, limits)
        for number, line in enumerate(lines[part]):
            caption, reference, result = jax.tree.map(lambda leaf, n=number: leaf[n], (captions, own, scored))
            told = row(line, terms, reference, result, bool(cut[first + number]))
            if args.explain:
                told["explain"] = explain(caption, reference, result, line["reference"].get("keypoints") or ())
            show(told, args.json)
    return 0


def asked(args: argparse.Namespace, lines: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Scores of a judge for the terms that need one, [n, most keypoints or probes], NaN without an answer."""
    terms = args.terms.split(",")
    items = {}
    if "checklist" in terms and args.judge != "lexical":
        items["checklist"] = [[one["text"] for one in line["reference"]["keypoints"] or ()] for line in lines]
    if "probes" in terms:
        if args.judge not in PROBE_JUDGES:
            raise InputError(f"--terms probes: --judge {args.judge} is none of {', '.join(PROBE_JUDGES)}")
        items["probes"] = [line["reference"]["probes"] or [] for line in lines]
    if not items:
        return {}
    if not args.judge_model:
        raise InputError(f"--judge {args.judge} needs --judge-model")
    from avocado_jax.train.judges import open_judge  # models and network: the lexical judge needs neither

    endpoint = Endpoint(
        args.judge_url, args.judge_model, args.judge_key, args.judge_cache, patience=args.judge_patience
    )
    answers = {}
    with open_judge(args.judge, args.judge_model, computing_dtype(None), endpoint) as judge:
        for term, each in items.items():
            scores = (judge if term == "checklist" else judge.probes)([line["caption"] for line in lines], each)()
            answers[term] = np.full((len(lines), max(1, scores.shape[1])), np.nan, np.float32)
            answers[term][:, : scores.shape[1]] = scores
            total = sum(map(len, each))
            if missing := total - int((~np.isnan(scores)).sum()):
                noun = "keypoints" if term == "checklist" else "probes"
                print(f"avocado score: {missing} of {total} {noun} have no answer", file=sys.stderr)
    return answers


def checked(where: str, line: dict[str, Any]) -> dict[str, Any]:
    """The line with a reference whose parts are as they must be; keypoints may be strings."""
    reference = line.get("reference") or {}
    if not isinstance(reference, dict) or not isinstance(reference.get("caption") or "", str):
        raise InputError(f'{where}: "reference" must be an object, and its "caption" a string')
    made = {"caption": reference.get("caption")}
    for name, fields in (("dialogues", ("speaker", "text")), ("keypoints", ("text",))):
        entries = reference.get(name)
        if entries is not None and not isinstance(entries, list):
            raise InputError(f'{where}: "reference.{name}" must be a list')
        if name == "keypoints" and entries is not None:
            entries = [{"text": one} if isinstance(one, str) else one for one in entries]
        for one in entries or ():
            if not isinstance(one, dict) or not all(isinstance(one.get(field), str) for field in fields):
                raise InputError(f'{where}: each of "reference.{name}" must have {" and ".join(fields)}, strings')
        made[name] = entries
    made["events"] = checked_events(where, reference.get("events"))
    try:
        probes = reference.get("probes")
        made["probes"] = None if probes is None else [read_probe(one) for one in listed(where, "probes", probes)]
    except InputError as error:
        raise InputError(str(error) if str(error).startswith(where) else f"{where}: {error}") from None
    return {"id": line["id"], "caption": line["caption"], "reference": made}


def listed(where: str, name: str, held: Any) -> list[Any]:
    """A part of a reference that must be a list."""
    if not isinstance(held, list):
        raise InputError(f'{where}: "reference.{name}" must be a list')
    return held


def checked_events(where: str, held: Any) -> list[dict[str, Any]] | None:
    """Events with their times; None without a list."""
    if held is None:
        return None
    for one in listed(where, "events", held):
        if not isinstance(one, dict) or not all(isinstance(one.get(field), NUMBER) for field in ("start", "end")):
            raise InputError(f'{where}: each of "reference.events" must have start and end, numbers')
    return held


def told_missing(lines: list[dict[str, Any]], terms: list[str], tokenizer: Words | None) -> None:
    """Say on stderr which terms have no reference, and for how many clips."""
    without = {
        "checklist": [line["id"] for line in lines if not line["reference"]["keypoints"]],
        "dialogue": [
            line["id"]
            for line in lines
            if line["reference"]["dialogues"] is None and line["reference"]["caption"] is None
        ],
        "length": [] if tokenizer else [line["id"] for line in lines],
        "timing": [line["id"] for line in lines if not line["reference"]["events"]],
        "probes": [line["id"] for line in lines if not line["reference"]["probes"]],
    }
    for term in terms:
        if names := without.get(term):
            why = "no --tokenizer" if term == "length" else "no reference"
            told = f"{term}: {why} for {len(names)} of {len(lines)} captions, such as {names[0]}"
            print(f"avocado score: {told}", file=sys.stderr)


def document(reference: dict[str, Any]) -> str:
    """All words of a reference."""
    lines = [f"{one['speaker']} {one['text']}" for one in reference["dialogues"] or ()]
    return "\n".join([reference["caption"] or "", *lines, *(one["text"] for one in reference["keypoints"] or ())])


def fitting(lines: list[dict[str, Any]]) -> Limits:
    """Limits that all texts of the file stay within, lines of dialogue of more than 2,048 characters aside."""
    texts = [text for line in lines for text in (line["caption"], line["reference"]["caption"] or "")]
    spoken = [line["reference"]["dialogues"] or () for line in lines]
    between = [piece for text in texts for piece in re.split(f"[{''.join(MARKS)}\n]", text)]  # quoted or not
    longest = max(len(text) for text in (*between, *(one["text"] for own in spoken for one in own)))
    marks = max(sum(letter in MARKS for letter in text) for text in texts)
    quotes = max(marks, *(len(own) for own in spoken), 1)  # marks that close nothing open a line each
    return Limits(
        rounded(max(map(len, texts)), 256),
        rounded(max(len(words_of(text)) for text in texts), 64),
        rounded(quotes, 8),
        min(rounded(longest, 64), 2048),
    )


def rounded(number: int, step: int) -> int:
    """The next multiple of a step, steps growing with the number, so that few shapes are compiled."""
    step = max(step, 2 ** (max(number, 1).bit_length() - 2))
    return max(step, -(-number // step) * step)


@partial(jax.jit, static_argnames="limits")
def _score(
    table: Table,
    points: jax.Array,
    sizes: jax.Array,
    lengths: jax.Array,
    references: References,
    answers: dict[str, jax.Array],
    limits: Limits,
) -> Any:
    def one(
        points: jax.Array, size: jax.Array, length: jax.Array, reference: References, judged: dict[str, jax.Array]
    ) -> Any:
        caption = parse(table, points, size, limits)
        return caption, score(caption, length, reference, DEFAULTS, judged.get("checklist"), judged.get("probes"))

    return jax.vmap(one)(points, sizes, lengths, references, answers)


def scored_batch(
    table: Table,
    lines: list[dict[str, Any]],
    lengths: np.ndarray,
    references: References,
    answers: dict[str, np.ndarray],
    limits: Limits,
) -> Any:
    """(Caption, Scored) of captions, as numpy arrays with a leading axis; short batches are filled up."""
    points, sizes = code_points([line["caption"] for line in lines], limits.characters)
    full = np.minimum(np.arange(BATCH), len(lines) - 1)
    given = jax.tree.map(lambda leaf: leaf[full], (points, sizes, lengths, references, answers))
    return jax.tree.map(np.asarray, _score(table, *given, limits=limits))


def row(line: dict[str, Any], terms: list[str], reference: References, scored: Any, cut: bool) -> dict[str, Any]:
    """The result of one caption."""

    def value(term: str) -> float | None:
        number = float(scored.terms[term])
        return None if term not in terms or math.isnan(number) else number

    answers = [float(one) for one in scored.keypoints[: max(int(reference.keypoints.count), 0)]]
    return {
        "id": line["id"],
        "R_C": value("checklist"),
        "R_D": value("dialogue"),
        "R_L": value("length"),
        "repcol": bool(scored.terms["repetition"] < 0) if "repetition" in terms else None,
        "keypoints": [None if math.isnan(one) else one for one in answers]
        if "checklist" in terms and answers
        else None,
        "truncated": bool(scored.terms["truncated"] > 0) or cut,
        **{term: value(term) for term in EXTRA if term in terms},
    }


def show(told: dict[str, Any], as_json: bool) -> None:
    """Print one result."""
    if as_json:
        print(json.dumps(told, ensure_ascii=False))
        return
    numbers = ("unknown" if told[name] is None else f"{told[name]:.3f}" for name in ("R_C", "R_D", "R_L"))
    extra = [f"{name} {'unknown' if told[name] is None else f'{told[name]:.3f}'}" for name in EXTRA if name in told]
    marks = [*extra, *(name for name in ("repcol", "truncated") if told[name])]
    print("  ".join([told["id"], *(f"{name} {one}" for name, one in zip(("R_C", "R_D", "R_L"), numbers)), *marks]))
    for sentence in told.get("explain", ()):
        print(f"    {sentence}")
