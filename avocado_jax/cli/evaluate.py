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

Files and folders are local or in a bucket (gs://). The prompt of a clip is the question of its benchmark or manifest
line, else one of --prompt-file, else the checkpoint's own.

All have dialogue_f1 (where there are reference captions with dialogue), repcol, both of a hundred, and length, and
need no judge for them. The judge is an OpenAI-compatible endpoint (--judge URL, its key in the environment), or with
--judge-model DIR alone a text or thinker checkpoint on this machine. Answers are checked; what is not answered as it
was asked is counted under "missing" and left out of the figures. With --rounds N (7 for video-salmonn-2, as published)
the judge is asked as often, and the round of the median is reported with the spread of all. The judge's prompts are
our own words; --prompts DIR takes others, without which figures are not comparable to published ones.

Into --out DIR go captions.jsonl, answers/ (raw answers: no question is asked again; answers.jsonl in a bucket),
result.json, table.md beside the published figures, items.jsonl and page.html, to read captions with their verdicts. In
a bucket, captions and answers are appended every 30 s. On several hosts with one --out, --shard I/N (I from 0, or auto)
makes captions only; a run without it then continues from them.
`avocado report DIR...` puts results together.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from avocado_jax.checkpoint.load import identity, named_checkpoint, open_language_model
from avocado_jax.checkpoint.references import fetched, run_path, tokenizer_folder
from avocado_jax.data import storage
from avocado_jax.data.manifest import prompt_fields
from avocado_jax.data.prompt import choose_prompt, read_prompts
from avocado_jax.data.reader import CLIP_SECONDS
from avocado_jax.data.shard import parse_shard
from avocado_jax.data.words import load_words
from avocado_jax.errors import InputError
from avocado_jax.eval.answer_log import AnswerLog
from avocado_jax.eval.benchmarks import BENCHMARKS
from avocado_jax.eval.benchmarks.benchmark import Benchmark, Record
from avocado_jax.eval.captioner import computing_dtype, load_captioner
from avocado_jax.eval.judging import Judge, judge_captions
from avocado_jax.eval.judging import read_prompts as read_judge_prompts
from avocado_jax.eval.local_judge import LocalJudge
from avocado_jax.eval.metrics import world_metrics
from avocado_jax.eval.public import find_video, results, write
from avocado_jax.eval.runner import (
    Caption,
    How,
    Item,
    Outcome,
    TooManyFailed,
    Videos,
    caption_items,
    digest,
    read_captions,
)
from avocado_jax.eval.tables import result_table
from avocado_jax.remote.chat import ChatClient, Endpoint
from avocado_jax.world.truth import read_truth

T = TypeVar("T")
EMPTY = Caption("", 0)
JUDGED = ("videos", "judge", "judge_model", "prompts", "rounds", "shard")  # of the public benchmarks alone


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command."""
    names = ("world", *BENCHMARKS)
    parser.add_argument("benchmark", choices=names, metavar="BENCHMARK", help=", ".join(names))
    parser.add_argument(
        "--data", required=True, metavar="FILE", help="clips.jsonl of `avocado world`, or the official file"
    )
    parser.add_argument("--checkpoint", metavar="REF", help="the model (default: the one that is shipped)")
    parser.add_argument("--captions", metavar="FILE", help="measure these instead of asking a model")
    parser.add_argument(
        "--out",
        metavar="PATH",
        help="world: the file of captions (default: captions-*.jsonl beside the data), and PATH.result.json; else a "
        "folder for all that is made (default: BENCHMARK-* beside the data)",
    )
    parser.add_argument("--videos", metavar="DIR", help="holds the clips of a public benchmark")
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
    parser.add_argument("--prompts", metavar="DIR", help="of the judge: see eval/prompts/README.md")
    parser.add_argument(
        "--prompt-file",
        metavar="FILE",
        help="prompts, one a line, for clips without a question; the id of a clip decides which one it gets",
    )
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
    every = _read(args.data, lambda file: read_truth(file, None if args.captions else {"video": str}))
    records = dict(list(every.items())[: args.limit])
    if args.captions:
        outcome = _given(args, every, list(records))
    else:
        videos, prompts = Videos(_folder(args.data)), _prompts(args)
        items = []
        for one in records.values():
            try:
                items.append(_item(videos, prompts, one["id"], storage.join(videos.folder, one["video"]), one))
            except InputError as error:
                raise InputError(f"{args.data}: {one['id']}: {error}") from error
        how = How(args.max_new_tokens, computing_dtype(args.dtype), not args.no_audio, not args.no_picture)
        outcome = _made(
            args, items, how, lambda known: args.out or storage.join(videos.folder, f"captions-{known}.jsonl")
        )
    captions = [outcome.captions.get(name, EMPTY) for name in records]
    texts, lengths = zip(*captions)
    metrics = world_metrics(texts, lengths, list(records.values()))
    _told(outcome, len(records))
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


def _public(args: argparse.Namespace, benchmark: Benchmark) -> int:
    if args.judge and not args.judge_model:
        raise InputError("--judge needs --judge-model, the model's name there")
    if args.captions is None and args.videos is None:
        raise InputError("--videos DIR is asked for, where the clips are, or --captions FILE")
    if args.captions and args.shard:
        raise InputError("--shard is for captions that are made, --captions for such as there are")
    own = args.prompts and fetched(run_path(args.prompts) if storage.is_remote(args.prompts) else Path(args.prompts))
    prompts = read_judge_prompts(benchmark, own or None)
    if args.judge:  # its mistakes are told before hours of captioning
        ChatClient(Endpoint(args.judge, args.judge_model)).close()
    elif args.judge_model:
        open_language_model(args.judge_model)
    every = _read(args.data, benchmark.read)
    records = every[: args.limit]
    videos = Videos(args.videos) if args.videos else None
    places = {one.id: find_video(videos, one) for one in records} if videos else {}
    if args.captions:
        name = PurePosixPath(args.captions).stem
        folder = args.out or storage.join(_folder(args.data), f"{benchmark.name}-{name}")
        outcome = _given(args, {one.id: one for one in every}, [one.id for one in records])
        model = name.encode(errors="replace").decode()
    else:
        outcome, folder = _captioned(args, benchmark, records, videos, places)
        model = args.checkpoint or "the shipped captioner"
        if args.shard:
            return 0
    _told(outcome, len(records))
    captions = {one.id: outcome.captions.get(one.id, EMPTY) for one in records}
    texts = {name: caption.text for name, caption in captions.items()}
    rounds, asked = [], None
    if args.judge_model:
        asked = {"model": args.judge_model, "prompts": args.prompts or "our own"}
        count = args.rounds or (benchmark.rounds if args.judge else 1)
        with ExitStack() as stack:
            judge = stack.enter_context(_judge(args, folder, stack))
            rounds = judge_captions(benchmark, records, texts, judge, prompts, count)
    result, lines = results(benchmark, records, captions, list(outcome.failed), rounds, asked, model)
    write(folder, result, lines, places)
    print(json.dumps(result) if args.json else result_table(result) + f"\n{storage.join(folder, 'page.html')}")
    if asked and result["missing"] == result["asked"]:
        why = next(iter(result["why"]), "nothing was asked")
        print(f"avocado evaluate: no answer of the judge is valid: {why}", file=sys.stderr)
        return 1
    return 0


def _captioned(
    args: argparse.Namespace, benchmark: Benchmark, records: Sequence[Record], videos: Videos, places: dict[str, str]
) -> tuple[Outcome, str]:
    """Captions of the checkpoint, those that other hosts made among them, and the folder they are kept in."""
    sound = benchmark.sound and not args.no_audio
    how = How(args.max_new_tokens, computing_dtype(args.dtype), sound, not args.no_picture)
    prompts = _prompts(args)
    items = [
        _item(videos, prompts, one.id, places[one.id], {"prompt": one.prompt} if one.prompt else {}) for one in records
    ]
    part, parts = parse_shard(args.shard)
    name = f"captions.{part}-of-{parts}.jsonl" if args.shard else "captions.jsonl"
    made: list[str] = []

    def file(known: str) -> str:
        made.append(args.out or storage.join(_folder(args.data), f"{benchmark.name}-{known}"))
        return storage.join(made[0], name)

    outcome = _made(args, items[part::parts], how, file, benchmark.frames)
    return outcome, made[0]


def _read(path: str, read: Callable[[Path], T]) -> T:
    """What `read` makes of a file, local or gs://."""
    with storage.here(path) as local:
        try:
            return read(local)
        except InputError as error:
            raise InputError(str(error).replace(str(local), path)) from error


def _folder(path: str) -> str:
    """The folder of a file, local or gs://."""
    return path.rpartition("/")[0] if storage.is_remote(path) else str(Path(path).parent)


def _prompts(args: argparse.Namespace) -> tuple[str, ...]:
    return read_prompts(args.prompt_file) if args.prompt_file else ()


def _item(videos: Videos, prompts: tuple[str, ...], name: str, video: str, fields: Mapping[str, Any]) -> Item:
    """A clip with the fields that decide its prompt.

    Raises:
        InputError: one of the fields has another type.
    """
    stated = prompt_fields(fields)
    if prompts and not stated.get("prompt"):
        stated["prompt"] = choose_prompt(prompts, name)
    return Item(name, video, stated, videos.size(video))


def _judge(args: argparse.Namespace, folder: str, stack: ExitStack) -> AbstractContextManager[Judge]:
    """The judge: the endpoint, or a checkpoint here."""
    remote = storage.is_remote(folder)
    cache = AnswerLog(storage.join(folder, "answers.jsonl"), stack) if remote else Path(folder, "answers")
    if not args.judge:
        return LocalJudge(args.judge_model, computing_dtype(args.dtype), cache, args.batch)
    return ChatClient(Endpoint(args.judge, args.judge_model, args.judge_key, cache, patience=args.judge_patience))


def _made(args: argparse.Namespace, items: list[Item], how: How, file: Any, frames: int | None = None) -> Outcome:
    """Captions of the checkpoint, kept in `file(digest of what makes them)`; clips of so many frames at most."""
    if items and all(item.bytes is None for item in items):
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

    folder = _folder(place)
    beside = storage.names(folder) if args.benchmark != "world" else []
    kept = [name for name in beside if name.startswith("captions") and name.endswith(".jsonl")]
    others = [path for path in (storage.join(folder, name) for name in kept) if path != place]
    return caption_items(items, load, known, how, place, args.batch, args.max_failed, others, args.clip_seconds)


def _given(args: argparse.Namespace, every: dict[str, Any], wanted: list[str]) -> Outcome:
    """Captions made elsewhere."""
    captions = _read(args.captions, lambda file: read_captions(file, every))
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
