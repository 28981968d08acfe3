"""Score captions of any origin with the training rewards.

  avocado score captions.jsonl --tokenizer REF --json
  avocado score captions.jsonl --manifest clips.jsonl --json            # captions.jsonl of `caption --out`
  avocado score captions.jsonl --terms dialogue,repetition --json --explain

FILE has lines {"id", "caption", "reference": {"caption"?, "dialogues"?, "keypoints"?, "events"?, "probes"?}}:
dialogues are {"speaker", "text"}, keypoints {"text", "dimension"?}, events {"start", "end"} in seconds, probes
{"question", "choices", "answer"}. Output of `caption --out` is accepted; --manifest gives its references. The result is
one JSON line per caption:

  R_C        share of the keypoints that the caption states according to --judge; "keypoints" has its answers
  R_D        lines of dialogue and their speakers; without "dialogues" those of reference.caption count
  R_L        1 up to 2048 tokens, 0 from 4096, counted with the tokenizer of --tokenizer
  repcol     whether the caption repeats itself
  truncated  whether the text exceeded a limit and was truncated
  timing     with --terms ...,timing: F1 of the time IoU of "[start - end]" scenes with the events
  probes     with --terms ...,probes: share of the probes that --judge lm or remote answers rightly from the caption

A term that has no reference or is not among --terms is null. Words are weighted as in training: all content words
equally, or with --idf by their rarity in the captions of a file. Text beyond 32,768 characters, 64 quotes, 2,048
characters of a quote, or 512 scenes or events is truncated. avocado_jax/rewards/README.md describes each term.

Texts of one size share programs, which take up to half a minute to compile. They are kept in ~/.cache/avocado/compiled
or in the folder that JAX_COMPILATION_CACHE_DIR names.
"""

import argparse
import json
import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from avocado_jax.checkpoint.references import tokenizer_folder
from avocado_jax.data.probes import read_probe
from avocado_jax.data.words import Words, load_words
from avocado_jax.errors import InputError
from avocado_jax.eval.captioner import computing_dtype
from avocado_jax.eval.marks import as_compared
from avocado_jax.eval.rewarded import Entry, scores
from avocado_jax.jsonl import NUMBER, read_captions, read_lines
from avocado_jax.parallel.compiled import use_user_cache
from avocado_jax.remote.chat import Endpoint
from avocado_jax.rewards.combine import ALWAYS, JUDGES, PROBE_JUDGES, TERMS
from avocado_jax.rewards.explain import explain
from avocado_jax.rewards.extra import load_terms
from avocado_jax.rewards.vocabulary import make_table, word_weights
from avocado_jax.train.rewards import caption_texts

FIXED = ("id", "R_C", "R_D", "R_L", "repcol", "keypoints", "truncated", "explain")  # fields of every result
EXTRA = ("timing", "probes")  # terms with a field only if they are among --terms


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("file", type=Path, metavar="FILE", help="captions with their references, JSON lines")
    parser.add_argument(
        "--manifest",
        type=Path,
        metavar="FILE",
        help="clips with the same fields, as for prepare: references of lines without any, by id or name of the video",
    )
    parser.add_argument(
        "--terms",
        default=",".join(ALWAYS),
        metavar="A,B",
        help="terms: checklist, dialogue, length, repetition, timing, probes (default: the first four)",
    )
    parser.add_argument(
        "--judge", choices=JUDGES, default="lexical", help="judge of keypoints and probes (default: %(default)s)"
    )
    parser.add_argument(
        "--judge-model", default="", metavar="MODEL", help="folder of the judge, or its name at the endpoint"
    )
    parser.add_argument(
        "--judge-url", default="", metavar="URL", help="base URL of an OpenAI-compatible API: https://HOST/v1"
    )
    parser.add_argument(
        "--judge-key",
        default="OPENAI_API_KEY",
        metavar="VARIABLE",
        help="environment variable of the API key (default: %(default)s)",
    )
    parser.add_argument("--judge-cache", type=Path, metavar="DIR", help="cache folder of the endpoint's answers")
    parser.add_argument(
        "--judge-patience",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="time limit of the judge; later answers count as missing (default: %(default)g)",
    )
    parser.add_argument("--idf", metavar="FILE", help="JSON lines of captions from which word rarity is computed")
    parser.add_argument("--merge", action="store_true", help="compare consecutive lines of one speaker as one line")
    parser.add_argument(
        "--extra", action="append", default=[], metavar="TERM", help="jax:MODULE:FUNCTION or host:MODULE:FUNCTION"
    )
    parser.add_argument("--tokenizer", metavar="REF", help="tokenizer for caption lengths")
    parser.add_argument("--explain", action="store_true", help="add what matched, in words")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")


def run(args: argparse.Namespace) -> int:
    """Read the captions, score them and print the results."""
    terms = args.terms.split(",")
    if unknown := [name for name in terms if name not in TERMS]:
        raise InputError(f'--terms: no term "{unknown[0]}"; there are {", ".join(TERMS)}')
    known = manifest_lines(args.manifest) if args.manifest else {}
    lines = [checked(where, with_reference(line, known)) for where, line in read_captions(args.file)]
    tokenizer = load_words(tokenizer_folder(args.tokenizer)) if args.tokenizer else None
    extra = load_terms(args.extra, (*TERMS, *FIXED))
    captions, references = [line["caption"] for line in lines], [line["reference"] for line in lines]
    host = {term.name: term.values(captions, references) for term in extra if term.kind == "host"}
    use_user_cache()  # each shape of texts takes seconds to compile
    answers = judge_scores(args, lines)
    warn_of_missing(lines, terms, tokenizer)
    table = make_table(None, word_weights(caption_texts(args.idf)) if args.idf else None)
    on_device = [term for term in extra if term.kind == "jax"]
    texts = (caption.encode(errors="replace").decode() for caption in captions)  # tokenizers reject lone surrogates
    lengths = [float(len(tokenizer.encode(text))) if tokenizer else math.nan for text in texts]
    results: dict[int, dict[str, Any]] = {}
    timing = "timing" in terms
    for entry in scores(table, captions, references, lengths, answers, args.merge, extra=on_device, timing=timing):
        line = lines[entry.number]
        results[entry.number] = row(line, terms, entry)
        for name in (term.name for term in extra):
            value = float(host[name][entry.number] if name in host else entry.scored.terms[name])
            results[entry.number][name] = None if math.isnan(value) else value
        if args.explain:
            points = line["reference"].get("keypoints") or ()
            spoken = as_compared(table, [line["reference"]], entry.limits)[0]["dialogues"] or ()
            results[entry.number]["explain"] = explain(entry.caption, entry.reference, entry.scored, points, spoken)
    for number in range(len(lines)):
        show(results[number], args.json)
    if truncated := sum(result["truncated"] for result in results.values()):
        print(f"avocado score: {truncated} of {len(lines)} captions or references were truncated", file=sys.stderr)
    return 0


def judge_scores(args: argparse.Namespace, lines: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Query the judge: term -> scores [n, most keypoints or probes], NaN without an answer."""
    terms = args.terms.split(",")
    items = {}
    if "checklist" in terms and args.judge != "lexical":
        items["checklist"] = [[point["text"] for point in line["reference"]["keypoints"] or ()] for line in lines]
    if "probes" in terms:
        if args.judge not in PROBE_JUDGES:
            raise InputError(f"--terms probes: --judge {args.judge} is not one of {', '.join(PROBE_JUDGES)}")
        items["probes"] = [line["reference"]["probes"] or [] for line in lines]
    if not items:
        return {}
    if not args.judge_model:
        raise InputError(f"--judge {args.judge} needs --judge-model")
    from avocado_jax.train.judges import open_judge  # imports models, which the lexical judge does not need

    endpoint = Endpoint(
        args.judge_url, args.judge_model, args.judge_key, args.judge_cache, patience=args.judge_patience
    )
    answers = {}
    with open_judge(args.judge, args.judge_model, computing_dtype(None), endpoint) as judge:
        for term, questions in items.items():
            ask = judge if term == "checklist" else judge.probes
            scores = ask([line["caption"] for line in lines], questions)()
            answers[term] = np.full((len(lines), max(1, scores.shape[1])), np.nan, np.float32)
            answers[term][:, : scores.shape[1]] = scores
            total = sum(map(len, questions))
            if missing := total - int((~np.isnan(scores)).sum()):
                noun = "keypoints" if term == "checklist" else "probes"
                print(f"avocado score: {missing} of {total} {noun} have no answer", file=sys.stderr)
    return answers


def manifest_lines(path: Path) -> dict[str, dict[str, Any]]:
    """Map ids, and unique video names without folder and suffix, to the lines of a manifest.

    Raises:
        InputError: see `read_lines`.
    """
    lines = [line for _, line in read_lines(path, {"id": str, "video": str})]
    names = Counter(Path(line["video"]).stem for line in lines)
    by_name = {name: line for line in lines if names[name := Path(line["video"]).stem] == 1}
    return by_name | {line["id"]: line for line in lines}


def with_reference(line: dict[str, Any], known: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Add the reference of the clip in `known` to a line without one."""
    name = next((name for name in (line["id"], Path(line["id"]).stem) if name in known), None)
    return line if "reference" in line or name is None else line | {"reference": known[name]}


def checked(where: str, line: dict[str, Any]) -> dict[str, Any]:
    """Validate and normalise the reference of a line. Keypoints may be strings."""
    reference = line.get("reference") or {}
    if not isinstance(reference, dict) or not isinstance(reference.get("caption") or "", str):
        raise InputError(f'{where}: "reference" must be an object, and its "caption" a string')
    made = {**reference, "caption": reference.get("caption")}  # user terms may read other fields
    for name, fields in (("dialogues", ("speaker", "text")), ("keypoints", ("text",))):
        entries = reference.get(name)
        if entries is not None and not isinstance(entries, list):
            raise InputError(f'{where}: "reference.{name}" must be a list')
        if name == "keypoints" and entries is not None:
            entries = [{"text": entry} if isinstance(entry, str) else entry for entry in entries]
        for entry in entries or ():
            if not isinstance(entry, dict) or not all(isinstance(entry.get(field), str) for field in fields):
                raise InputError(f'{where}: each of "reference.{name}" must have {" and ".join(fields)}, strings')
        made[name] = entries
    made["events"] = checked_events(where, reference.get("events"))
    try:
        probes = reference.get("probes")
        made["probes"] = None if probes is None else [read_probe(probe) for probe in listed(where, "probes", probes)]
    except InputError as error:
        raise InputError(str(error) if str(error).startswith(where) else f"{where}: {error}") from None
    return {"id": line["id"], "caption": line["caption"], "reference": made}


def listed(where: str, name: str, value: Any) -> list[Any]:
    """Check that a part of a reference is a list, and return it."""
    if not isinstance(value, list):
        raise InputError(f'{where}: "reference.{name}" must be a list')
    return value


def checked_events(where: str, value: Any) -> list[dict[str, Any]] | None:
    """Check that events have times; None without events."""
    if value is None:
        return None
    for event in listed(where, "events", value):
        times = [event.get(field) for field in ("start", "end")] if isinstance(event, dict) else [None]
        if not all(isinstance(time, NUMBER) and abs(time) < 1e9 for time in times):  # False for NaN
            raise InputError(f'{where}: each of "reference.events" must have start and end in seconds')
    return value


def warn_of_missing(lines: list[dict[str, Any]], terms: list[str], tokenizer: Words | None) -> None:
    """Print the terms without a reference, with the number of captions."""
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
            message = f"{term}: {why} for {len(names)} of {len(lines)} captions, such as {names[0]}"
            print(f"avocado score: {message}", file=sys.stderr)


def row(line: dict[str, Any], terms: list[str], entry: Entry) -> dict[str, Any]:
    """The output of one caption."""
    scored, reference = entry.scored, entry.reference

    def value(term: str) -> float | None:
        number = float(scored.terms[term])
        return None if term not in terms or math.isnan(number) else number

    answers = [float(score) for score in scored.keypoints[: max(int(reference.keypoints.count), 0)]]
    return {
        "id": line["id"],
        "R_C": value("checklist"),
        "R_D": value("dialogue"),
        "R_L": value("length"),
        "repcol": bool(scored.terms["repetition"] < 0) if "repetition" in terms else None,
        "keypoints": [None if math.isnan(score) else score for score in answers]
        if "checklist" in terms and answers
        else None,
        "truncated": bool(scored.terms["truncated"] > 0) or entry.truncated,
        **{term: value(term) for term in EXTRA if term in terms},
    }


def show(result: dict[str, Any], as_json: bool) -> None:
    """Print one result."""
    if as_json:
        print(json.dumps(result, ensure_ascii=False).encode(errors="replace").decode())
        return
    numbers = ("unknown" if result[name] is None else f"{result[name]:.3f}" for name in ("R_C", "R_D", "R_L"))
    more = {name: value for name, value in result.items() if name not in FIXED}  # optional and user terms
    extra = [f"{name} {'unknown' if number is None else f'{number:.3f}'}" for name, number in more.items()]
    marks = [*extra, *(name for name in ("repcol", "truncated") if result[name])]
    named = [f"{name} {number}" for name, number in zip(("R_C", "R_D", "R_L"), numbers)]
    for line in ("  ".join([result["id"], *named, *marks]), *(f"    {text}" for text in result.get("explain", ()))):
        print(line.encode(errors="replace").decode())
