"""Evaluate a checkpoint on a benchmark.

  avocado evaluate world --checkpoint DIR --data OUT/clips.jsonl --json

captions the clips of `avocado world OUT` (greedily, each clip's own question) and compares the captions with the
truth, with no judge. One JSON line: {"metrics": {...}, "n"}, means over n captions:

  event_recall    share of true events that the caption states     hallucination  share of its claims that are false
  order           share of event pairs in chronological order      dialogue_f1    lines and their speakers (R_D)
  repcol          share of captions that repeat themselves         length         tokens of a caption

Captions are appended to a file, with a digest of the checkpoint and the options: the same command resumes a stopped
run. A clip that cannot be captioned is listed, on stderr and under "failed", and counts as an empty caption. If the
share of such clips exceeds --max-failed, the run stops with exit status 3.

--captions FILE evaluates existing lines {"id", "caption"} without a model; those of `avocado caption --manifest` have
the id of the manifest as "clip". `length` is then the mean of their "tokens" if present, otherwise counted with the
tokenizer of --checkpoint if given, otherwise null. A clip without a caption counts as failed.

  avocado evaluate daily-omni --checkpoint DIR --data daily_omni.json --videos DIR --judge https://HOST/v1 \\
      --judge-model gpt-4.1

The public benchmarks: --data is their official file, --videos the folder of their clips.

  video-salmonn-2  miss, hallucination, total per hundred events    worldsense  as daily-omni
  ugc-videocap     audio, visual, detail, average of a hundred      vdc         accuracy of a hundred, score 0 to 5
  daily-omni       accuracy of a hundred, by type and duration      dream-1k    f1, precision, recall of a hundred

Files and folders are local or in a bucket (gs://). The prompt of a clip is the question of its benchmark or manifest
line, else one of --prompt-file, else the checkpoint's own.

  avocado evaluate probes --data my_questions.jsonl --checkpoint DIR --judge https://HOST/v1 --judge-model M

Your own questions: lines {"id", "video", "probes": [{"question", "choices", "answer", "category"?}]}, clips beside the
file or in --videos. The judge answers all questions of a caption in one call; accuracy of a hundred, by category.

All have dialogue_f1 (where there are reference captions with dialogue), repcol, both of a hundred, and length, and
these need no judge. The judge is an OpenAI-compatible endpoint (--judge URL, its key in the environment), or with
--judge-model DIR alone a text or thinker checkpoint on this machine. Answers are validated; invalid answers are
counted under "missing" and excluded from the figures. With --rounds N (7 for video-salmonn-2, as published) the judge
answers N times; the median round is reported with the spread of all rounds. The judge's prompts are our own wording;
figures are comparable to published ones only with the official prompts (--prompts DIR). Answers in the forms of the
official prompts are also read, and --official counts them as the official scripts do.

--dry-run prints the calls and tokens of the judge. --budget-calls and --budget-tokens limit them over all runs in one
--out; when a budget is exhausted, the run stops with exit status 3. After 16 consecutive questions without an answer
it stops with 75. The same command resumes: answers are kept. Proxies of the environment (HTTPS_PROXY, NO_PROXY) are
used.

--out DIR contains captions.jsonl, answers/ (raw answers, so that no request is repeated; answers.jsonl in a bucket),
result.json, table.md (beside the published figures), items.jsonl and page.html (captions with their verdicts). In
a bucket, captions and answers are appended every 30 s. On several hosts with one --out, --shard I/N (I from 0, or auto)
makes captions only; a run without it then continues from them.
`avocado report DIR...` combines results.
"""

import argparse
import json
import sys

from avocado_jax.cli.evaluate_benchmark import run_benchmark
from avocado_jax.cli.evaluate_captions import (
    EMPTY,
    clip_prompts,
    folder_of,
    given_captions,
    make_captions,
    make_item,
    print_failed,
    read_file,
)
from avocado_jax.data import storage
from avocado_jax.data.reader import CLIP_SECONDS
from avocado_jax.errors import InputError
from avocado_jax.eval.benchmarks import BENCHMARKS
from avocado_jax.eval.captioner import computing_dtype
from avocado_jax.eval.metrics import world_metrics
from avocado_jax.eval.runner import CaptionOptions, TooManyFailed, Videos
from avocado_jax.world.truth import read_truth

JUDGED = ("videos", "judge", "judge_model", "prompts", "official", "request", "budget_calls", "budget_tokens")
JUDGED += ("dry_run", "rounds", "shard")  # options of benchmarks with a judge
NO_FIELDS = "{}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    names = ("world", *BENCHMARKS)
    parser.add_argument("benchmark", choices=names, metavar="BENCHMARK", help=", ".join(names))
    parser.add_argument(
        "--data", required=True, metavar="FILE", help="clips.jsonl of `avocado world`, or the official file"
    )
    parser.add_argument("--checkpoint", metavar="REF", help="the model (default: the one that is shipped)")
    parser.add_argument("--captions", metavar="FILE", help="evaluate these captions instead of a model's")
    parser.add_argument(
        "--out",
        metavar="PATH",
        help="world: the file of captions (default: captions-*.jsonl beside the data), and PATH.result.json; else a "
        "folder for all outputs (default: BENCHMARK-* beside the data)",
    )
    parser.add_argument("--videos", metavar="DIR", help="folder with the clips of a public benchmark")
    parser.add_argument("--judge", metavar="URL", help="base URL of an OpenAI-compatible API: https://HOST/v1")
    parser.add_argument(
        "--judge-model", metavar="MODEL", help="name of the model at the endpoint, or a local checkpoint"
    )
    parser.add_argument(
        "--judge-key",
        default="OPENAI_API_KEY",
        metavar="VARIABLE",
        help="environment variable of the API key (default: %(default)s)",
    )
    parser.add_argument(
        "--judge-patience",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="time limit of a question with its retries; then it counts as missing (default: %(default)g)",
    )
    parser.add_argument("--prompts", metavar="DIR", help="the judge's prompts (see eval/prompts/README.md)")
    parser.add_argument(
        "--prompt-file",
        metavar="FILE",
        help="prompts, one per line, for clips without a question; the id of a clip decides which one it gets",
    )
    parser.add_argument(
        "--official", action="store_true", help="treat answers as the official scripts do (eval/README.md)"
    )
    parser.add_argument(
        "--request",
        default=NO_FIELDS,
        metavar="JSON",
        help='additional fields of every request to the judge; null removes one: {"temperature": null}',
    )
    parser.add_argument(
        "--budget-calls", type=int, metavar="N", help="limit of the judge's calls, over all runs in --out"
    )
    parser.add_argument(
        "--budget-tokens", type=int, metavar="N", help="limit of the judge's tokens, over all runs in --out"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the judge's calls and tokens without requests or output files"
    )
    parser.add_argument(
        "--rounds", type=int, metavar="N", help="rounds of judging (default: as published; 1 for a local judge)"
    )
    parser.add_argument(
        "--shard",
        metavar="I/N",
        help="caption every Nth clip from clip I on (from 0), and stop",
    )
    parser.add_argument("--no-audio", action="store_true", help="ignore the sound")
    parser.add_argument("--no-picture", action="store_true", help="ignore the picture: every frame is grey")
    parser.add_argument("--max-new-tokens", type=int, default=2048, metavar="N", help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="clips per batch (default: %(default)s)")
    parser.add_argument(
        "--clip-seconds",
        type=float,
        default=CLIP_SECONDS,
        metavar="S",
        help="time limit for reading a clip (default: %(default)g)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="the first N clips only")
    parser.add_argument(
        "--max-failed",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="maximum share of failed clips (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on accelerators, float32 on a CPU"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(args: argparse.Namespace) -> int:
    """Caption, evaluate and print. Returns the exit status."""
    for name in ("max_new_tokens", "batch", "limit", "rounds"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} is {value}: it must be at least 1")
    if not args.clip_seconds > 0:
        raise InputError(f"--clip-seconds: {args.clip_seconds:g} is not a positive number of seconds")
    if not 0 <= args.max_failed <= 1:
        raise InputError(f"--max-failed is {args.max_failed}, not a share from 0 to 1")
    try:
        return _world(args) if args.benchmark == "world" else run_benchmark(args, BENCHMARKS[args.benchmark])
    except TooManyFailed as error:
        print(f"avocado evaluate: {error}", file=sys.stderr)
        return 3  # a retry fails in the same way


def _world(args: argparse.Namespace) -> int:
    if given := [name for name in JUDGED if getattr(args, name) not in (None, False, NO_FIELDS)]:
        raise InputError(f"--{given[0].replace('_', '-')} is for the public benchmarks, world needs no judge")
    if args.captions and args.out:
        raise InputError("--out and --captions exclude each other: --captions names existing captions")
    every = read_file(args.data, lambda file: read_truth(file, None if args.captions else {"video": str}))
    records = dict(list(every.items())[: args.limit])
    if args.captions:
        outcome = given_captions(args, every, list(records))
    else:
        videos, prompts = Videos(folder_of(args.data)), clip_prompts(args)
        items = []
        for record in records.values():
            video = storage.join(videos.folder, record["video"])
            try:
                items.append(make_item(videos, prompts, record["id"], video, record))
            except InputError as error:
                raise InputError(f"{args.data}: {record['id']}: {error}") from error
        options = CaptionOptions(
            args.max_new_tokens, computing_dtype(args.dtype), not args.no_audio, not args.no_picture
        )
        outcome = make_captions(
            args, items, options, lambda known: args.out or storage.join(videos.folder, f"captions-{known}.jsonl")
        )
    captions = [outcome.captions.get(name, EMPTY) for name in records]
    texts, lengths = zip(*captions)
    metrics = world_metrics(texts, lengths, list(records.values()))
    print_failed(outcome, len(records))
    failed = {"failed": list(outcome.failed)} if outcome.failed else {}
    line = json.dumps({"metrics": metrics, "n": len(records), **failed})
    if args.out:
        storage.write(f"{args.out}.result.json", line.encode() + b"\n")
    if args.json:
        print(line)
    else:
        for name, value in metrics.items():
            print(f"{name:14} {'unknown' if value is None else f'{value:.3f}'}")
        print(f"{'n':14} {len(records)}")
    return 0
