"""Measure what a checkpoint can do.

  avocado evaluate world --checkpoint DIR --data OUT/clips.jsonl --json

captions the clips of `avocado world OUT` (greedily, each clip's own question) and compares the captions with the
truth, with no judge. One JSON line: {"metrics": {...}, "n"}, means over n captions:

  event_recall    share of what is true that the caption says      hallucination  share of its claims that are not
  order           share of pairs told in the order they happen     dialogue_f1    lines and their speakers (R_D)
  repcol          share of captions that fall into repetition      length         tokens of a caption

Captions are kept in a file as they are made, with a digest of the checkpoint and the options; a run that was stopped
goes on with the same command. A clip that cannot be captioned is listed, on stderr and under "failed", and counts as
an empty caption; past the share --max-failed the run stops with exit status 3.

With --captions FILE, lines {"id", "caption"} that were made elsewhere are measured, and no model is needed; those of
`avocado caption --manifest` have the id of the manifest as "clip". `length`
is then the mean of their "tokens" if they have it, else counted with the tokenizer of --checkpoint if it is named,
else null. A clip without a caption counts as one that failed.

  avocado evaluate daily-omni --checkpoint DIR --data daily_omni.json --videos DIR --judge https://HOST/v1 \\
      --judge-model gpt-4.1

The public benchmarks: --data is their official file, --videos the folder of their clips.

  video-salmonn-2  miss, hallucination, total per hundred events    worldsense  as daily-omni
  ugc-videocap     audio, visual, detail, average of a hundred      vdc         accuracy of a hundred, score 0 to 5
  daily-omni       accuracy of a hundred, by type and duration      dream-1k    f1, precision, recall of a hundred

All have dialogue_f1 (where there are reference captions with dialogue), repcol, both of a hundred, and length, and
need no judge for them. The judge is an OpenAI-compatible endpoint (--judge URL, its key in the environment), or with
--judge-model DIR alone a text or thinker checkpoint on this machine. Answers are checked; what is not answered as it
was asked is counted under "missing" and left out of the figures. With --rounds N (7 for video-salmonn-2, as published)
the judge is asked as often, and the round of the median is reported with the spread of all. The judge's prompts are
our own words; --prompts DIR takes others, without which figures are not comparable to published ones.

Into --out DIR go captions.jsonl, answers/ (raw answers: no question is asked again), result.json, table.md beside the
published figures, items.jsonl and page.html, to read captions with their verdicts. On several
hosts with one --out, --shard I/N (I from 0, or auto) makes captions only; a run without it then continues from them.
`avocado report DIR...` puts results together.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from avocado_jax.checkpoint.load import identity, named_checkpoint, open_language_model
from avocado_jax.checkpoint.references import tokenizer_folder
from avocado_jax.data.manifest import prompt_fields
from avocado_jax.data.reader import CLIP_SECONDS
from avocado_jax.data.shard import parse_shard
from avocado_jax.data.words import load_words
from avocado_jax.errors import InputError
from avocado_jax.eval.benchmarks import BENCHMARKS
from avocado_jax.eval.benchmarks.benchmark import Benchmark, Record
from avocado_jax.eval.captioner import computing_dtype, load_captioner
from avocado_jax.eval.judging import Judge, judge_captions, read_prompts
from avocado_jax.eval.local_judge import LocalJudge
from avocado_jax.eval.metrics import world_metrics
from avocado_jax.eval.public import find_video, results, write
from avocado_jax.eval.runner import Caption, How, Item, Outcome, TooManyFailed, caption_items, digest, read_captions
from avocado_jax.eval.tables import result_table
from avocado_jax.remote.chat import ChatClient, Endpoint
from avocado_jax.world.truth import read_truth

EMPTY = Caption("", 0)
JUDGED = ("videos", "judge", "judge_model", "prompts", "rounds", "shard")  # of the public benchmarks alone


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command."""
    names = ("world", *BENCHMARKS)
    parser.add_argument("benchmark", choices=names, metavar="BENCHMARK", help=", ".join(names))
    parser.add_argument(
        "--data", required=True, type=Path, metavar="FILE", help="clips.jsonl of `avocado world`, or the official file"
    )
    parser.add_argument("--checkpoint", metavar="REF", help="the model (default: the one that is shipped)")
    parser.add_argument("--captions", type=Path, metavar="FILE", help="measure these instead of asking a model")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="PATH",
        help="world: the file of captions (default: captions-*.jsonl beside the data); else a folder for all that is "
        "made (default: BENCHMARK-* beside the data)",
    )
    parser.add_argument("--videos", type=Path, metavar="DIR", help="holds the clips of a public benchmark")
    parser.add_argument("--judge", metavar="URL", help="of an OpenAI-compatible API: https://HOST/v1")
    parser.add_argument("--judge-model", metavar="MODEL", help="its name there, or a checkpoint's folder here")
    parser.add_argument(
        "--judge-key", default="OPENAI_API_KEY", metavar="VARIABLE", help="holds the API key (default: %(default)s)"
    )
    parser.add_argument(
        "--judge-patience",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="after which a question without an answer is missing (default: %(default)g)",
    )
    parser.add_argument("--prompts", type=Path, metavar="DIR", help="of the judge: see eval/prompts/README.md")
    parser.add_argument("--rounds", type=int, metavar="N", help="of the judge (default: as published, 1 for a folder)")
    parser.add_argument(
        "--shard",
        metavar="I/N",
        help="caption every Nth clip from clip I on (from 0), and stop",
    )
    parser.add_argument("--no-audio", action="store_true", help="look without listening")
    parser.add_argument("--no-picture", action="store_true", help="listen without looking: every frame is grey")
    parser.add_argument("--max-new-tokens", type=int, default=2048, metavar="N", help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="clips at once (default: %(default)s)")
    parser.add_argument(
        "--clip-seconds", type=float, default=CLIP_SECONDS, metavar="S", help="to read one clip (default: %(default)g)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="the first N clips only")
    parser.add_argument(
        "--max-failed", type=float, default=0.05, metavar="SHARE", help="of the clips (default: %(default)s)"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on accelerators, float32 on a CPU"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(args: argparse.Namespace) -> int:
    """Caption, measure, print. Returns the exit status."""
    for name in ("max_new_tokens", "batch", "limit", "rounds"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} is {value}, at least 1 is asked for")
    if not args.clip_seconds > 0:
        raise InputError(f"--clip-seconds: {args.clip_seconds:g} is not a positive number of seconds")
    if not 0 <= args.max_failed <= 1:
        raise InputError(f"--max-failed is {args.max_failed}, a share from 0 to 1 is asked for")
    try:
        return _world(args) if args.benchmark == "world" else _public(args, BENCHMARKS[args.benchmark])
    except TooManyFailed as error:
        print(f"avocado evaluate: {error}", file=sys.stderr)
        return 3  # a retry fails in the same way


def _world(args: argparse.Namespace) -> int:
    if given := [name for name in JUDGED if getattr(args, name) is not None]:
        raise InputError(f"--{given[0].replace('_', '-')} is for the public benchmarks, world needs no judge")
    if args.captions and args.out:
        raise InputError("--out is for captions that are made, --captions for such as there are")
    every = read_truth(args.data, None if args.captions else {"video": str})
    records = dict(list(every.items())[: args.limit])
    if args.captions:
        outcome = _given(args, every, list(records))
    else:
        folder = args.data.parent
        items = []
        for one in records.values():
            try:
                items.append(Item(one["id"], folder / one["video"], prompt_fields(one)))
            except InputError as error:
                raise InputError(f"{args.data}: {one['id']}: {error}") from error
        how = How(args.max_new_tokens, computing_dtype(args.dtype), not args.no_audio, not args.no_picture)
        outcome = _made(args, items, how, lambda known: args.out or folder / f"captions-{known}.jsonl")
    captions = [outcome.captions.get(name, EMPTY) for name in records]
    texts, lengths = zip(*captions)
    metrics = world_metrics(texts, lengths, list(records.values()))
    _told(outcome, len(records))
    if args.json:
        failed = {"failed": list(outcome.failed)} if outcome.failed else {}
        print(json.dumps({"metrics": metrics, "n": len(records), **failed}))
    else:
        for name, value in metrics.items():
            print(f"{name:14} {'unknown' if value is None else f'{value:.3f}'}")
        print(f"{'n':14} {len(records)}")
    return 0


def _public(args: argparse.Namespace, benchmark: Benchmark) -> int:
    if args.judge and not args.judge_model:
        raise InputError("--judge needs --judge-model, the model's name there")
    if args.captions is None and args.videos is None:
        raise InputError("--videos DIR is asked for, where the clips are, or --captions FILE")
    if args.captions and args.shard:
        raise InputError("--shard is for captions that are made, --captions for such as there are")
    prompts = read_prompts(benchmark, args.prompts)
    if args.judge:  # its mistakes are told before hours of captioning
        ChatClient(Endpoint(args.judge, args.judge_model)).close()
    elif args.judge_model:
        open_language_model(args.judge_model)
    every = benchmark.read(args.data)
    records = every[: args.limit]
    videos = {one.id: find_video(args.videos, one) for one in records} if args.videos else {}
    if args.captions:
        named = args.captions.with_suffix("")
        folder = args.out or args.data.parent / f"{benchmark.name}-{named.name}"
        outcome = _given(args, {one.id: one for one in every}, [one.id for one in records])
        model = named.name.encode(errors="replace").decode()
    else:
        outcome, folder = _captioned(args, benchmark, records, videos)
        model = args.checkpoint or "the shipped captioner"
        if args.shard:
            return 0
    _told(outcome, len(records))
    folder.mkdir(parents=True, exist_ok=True)
    captions = {one.id: outcome.captions.get(one.id, EMPTY) for one in records}
    texts = {name: caption.text for name, caption in captions.items()}
    rounds, asked = [], None
    if args.judge_model:
        asked = {"model": args.judge_model, "prompts": str(args.prompts) if args.prompts else "our own"}
        count = args.rounds or (benchmark.rounds if args.judge else 1)
        with _judge(args, folder) as judge:
            rounds = judge_captions(benchmark, records, texts, judge, prompts, count)
    result, lines = results(benchmark, records, captions, list(outcome.failed), rounds, asked, model)
    write(folder, result, lines, videos)
    print(json.dumps(result) if args.json else result_table(result) + f"\n{folder / 'page.html'}")
    if asked and result["missing"] == result["asked"]:
        why = next(iter(result["why"]), "nothing was asked")
        print(f"avocado evaluate: no answer of the judge is valid: {why}", file=sys.stderr)
        return 1
    return 0


def _captioned(
    args: argparse.Namespace, benchmark: Benchmark, records: Sequence[Record], videos: dict[str, Path]
) -> tuple[Outcome, Path]:
    """Captions of the checkpoint, those that other hosts made among them, and the folder they are kept in."""
    sound = benchmark.sound and not args.no_audio
    how = How(args.max_new_tokens, computing_dtype(args.dtype), sound, not args.no_picture)
    items = [Item(one.id, videos[one.id], {"prompt": one.prompt} if one.prompt else {}) for one in records]
    part, parts = parse_shard(args.shard)
    name = f"captions.{part}-of-{parts}.jsonl" if args.shard else "captions.jsonl"
    made: list[Path] = []

    def file(known: str) -> Path:
        made.append(args.out or args.data.parent / f"{benchmark.name}-{known}")
        return made[0] / name

    outcome = _made(args, items[part::parts], how, file, benchmark.frames)
    return outcome, made[0]


def _judge(args: argparse.Namespace, folder: Path) -> AbstractContextManager[Judge]:
    """Who is asked: the endpoint, or a checkpoint here."""
    cache = folder / "answers"
    if not args.judge:
        return LocalJudge(args.judge_model, computing_dtype(args.dtype), cache, args.batch)
    return ChatClient(Endpoint(args.judge, args.judge_model, args.judge_key, cache, patience=args.judge_patience))


def _made(args: argparse.Namespace, items: list[Item], how: How, file: Any, frames: int | None = None) -> Outcome:
    """Captions of the checkpoint, kept in `file(digest of what makes them)`; clips of so many frames at most."""
    if items and not any(item.video.exists() for item in items):
        raise InputError(f"{items[0].video}: no such file, nor any other video of {args.data}")
    checkpoint = named_checkpoint(args.checkpoint)
    known = identity(checkpoint)
    if frames:
        known = f"{known} {frames}"
    place = file(digest([known, vars(how)])[:8])

    def load():
        captioner = load_captioner(checkpoint, None, how.dtype)
        reading = captioner.reading
        most = min(reading.most_frames, frames or reading.most_frames)
        return captioner._replace(reading=replace(reading, most_frames=most))

    others = [] if args.benchmark == "world" else sorted(set(place.parent.glob("captions*.jsonl")) - {place})
    return caption_items(items, load, known, how, place, args.batch, args.max_failed, others, args.clip_seconds)


def _given(args: argparse.Namespace, every: dict[str, Any], wanted: list[str]) -> Outcome:
    """Captions made elsewhere."""
    captions = read_captions(args.captions, every)
    tokenizer = load_words(tokenizer_folder(args.checkpoint)) if args.checkpoint else None
    if tokenizer:
        captions = {
            name: Caption(one.text, len(tokenizer.encode(one.text)) if one.tokens is None else one.tokens)
            for name, one in captions.items()
        }
    failed = {name: "no caption" for name in wanted if name not in captions}
    if len(failed) > args.max_failed * len(wanted):
        raise TooManyFailed(
            f"{args.captions}: no caption of {len(failed)} of {len(wanted)} clips, such as {next(iter(failed))}; "
            f"the share of {args.max_failed:g} is allowed (--max-failed)"
        )
    return Outcome(captions, failed)


def _told(outcome: Outcome, count: int) -> None:
    if outcome.failed:
        told = f"{len(outcome.failed)} of {count} clips failed; their captions count as empty"
        print(f"avocado evaluate: {told}", file=sys.stderr)
