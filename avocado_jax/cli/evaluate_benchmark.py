"""`avocado evaluate NAME` of a benchmark with a judge: captions, the judge's answers, figures and a page."""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from avocado_jax.checkpoint.load import open_language_model
from avocado_jax.checkpoint.references import fetched, run_path
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
from avocado_jax.data.appended import open_lines
from avocado_jax.data.shard import parse_shard
from avocado_jax.errors import InputError
from avocado_jax.eval.answer_log import AnswerLog
from avocado_jax.eval.benchmarks.benchmark import Benchmark, Record, officially
from avocado_jax.eval.captioner import computing_dtype
from avocado_jax.eval.judging import DryJudge, Judge, JudgeEnded, Prompt, judge_captions, read_prompts
from avocado_jax.eval.local_judge import LocalJudge
from avocado_jax.eval.public import find_video, results, write
from avocado_jax.eval.runner import Caption, CaptionOptions, Outcome, Videos
from avocado_jax.eval.tables import result_table
from avocado_jax.remote.chat import ChatClient, Endpoint, request_fields
from avocado_jax.remote.ledger import Ledger

DEFAULTS = {"temperature": 0}  # fields of every request
SILENCE = 16  # consecutive questions without an answer that stop a run
UNLIMITED = 10**9  # calls


def run_benchmark(args: argparse.Namespace, benchmark: Benchmark) -> int:
    """Caption, judge, compute the figures and print. Returns the exit status."""
    _check(args, benchmark)
    prompt_folder = args.prompts and fetched(
        run_path(args.prompts) if storage.is_remote(args.prompts) else Path(args.prompts)
    )
    prompts = read_prompts(benchmark, prompt_folder or None)
    options = request_fields(args.request, DEFAULTS)
    if args.judge:  # detect mistakes before hours of captioning
        ChatClient(Endpoint(args.judge, args.judge_model)).close()
    elif args.judge_model:
        open_language_model(args.judge_model)
    every = read_file(args.data, benchmark.read)
    records = every[: args.limit]
    video_folder = args.videos or (folder_of(args.data) if benchmark.beside else None)
    videos = Videos(video_folder) if video_folder and not args.dry_run else None
    places = {record.id: find_video(videos, record) for record in records} if videos else {}
    if args.dry_run:
        return _dry_run(args, benchmark, every, records, prompts, options)
    decoding = None
    if args.captions:
        folder, model = _given_folder(args, benchmark), PurePosixPath(args.captions).stem
        outcome = given_captions(args, {record.id: record for record in every}, [record.id for record in records])
        model = model.encode(errors="replace").decode()
    else:
        outcome, folder, decoding = _captioned(args, benchmark, records, videos, places)
        model = args.checkpoint or "the shipped captioner"
        if args.shard:
            return 0
    print_failed(outcome, len(records))
    captions = {record.id: outcome.captions.get(record.id, EMPTY) for record in records}
    rounds, about = [], None
    if args.judge_model:
        with ExitStack() as stack:
            judge = stack.enter_context(_judge(args, folder, options, stack))
            try:
                rounds = _answers(args, benchmark, records, captions, judge, prompts)
            except JudgeEnded as error:
                print(
                    f"avocado evaluate: stopped: {error}; answers are kept, the same command continues", file=sys.stderr
                )
                return 3 if judge.exhausted else 75
            about = _judge_settings(args, benchmark, prompts, options) | {"returned": dict(judge.returned)}
    measured = officially(benchmark) if args.official else benchmark
    result, lines = results(measured, records, captions, list(outcome.failed), rounds, about, model, decoding)
    write(folder, result, lines, places)
    print(json.dumps(result) if args.json else result_table(result) + f"\n{storage.join(folder, 'page.html')}")
    if about and result["missing"] == result["asked"]:
        why = next(iter(result["why"]), "nothing was asked")
        print(f"avocado evaluate: no answer of the judge is valid: {why}", file=sys.stderr)
        return 1
    return 0


def _check(args: argparse.Namespace, benchmark: Benchmark) -> None:
    """Raises InputError if options contradict each other."""
    if args.judge and not args.judge_model:
        raise InputError("--judge needs --judge-model, the name of the model at the endpoint")
    if args.captions is None and args.videos is None and not benchmark.beside and not args.dry_run:
        raise InputError("one of --videos DIR (the clips) and --captions FILE is required")
    if args.captions and args.shard:
        raise InputError("--shard and --captions exclude each other: --captions names existing captions")
    for name in ("budget_calls", "budget_tokens", "dry_run"):
        if getattr(args, name) not in (None, False) and not args.judge:
            raise InputError(f"--{name.replace('_', '-')} needs --judge URL")
    for name in ("budget_calls", "budget_tokens"):
        if (getattr(args, name) or 0) < 0:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(args, name)}: it must be at least 0")


def _judge_settings(
    args: argparse.Namespace, benchmark: Benchmark, prompts: dict[str, Prompt], options: dict[str, Any]
) -> dict[str, Any]:
    """The settings that determine the judge's answers."""
    return {
        "model": args.judge_model,
        "prompts": args.prompts or "our own",
        "digests": {name: prompt.digest for name, prompt in prompts.items()},
        "request": options if args.judge else {"temperature": 0},
        "official": list(benchmark.official.notes) if args.official else [],
    }


def _answers(
    args: argparse.Namespace,
    benchmark: Benchmark,
    records: Sequence[Record],
    captions: dict[str, Caption],
    judge: Judge,
    prompts: dict[str, Prompt],
) -> list[list[Any]]:
    """The answers of all rounds. Official preprocessing applies only to the texts that the judge receives."""
    texts = {name: caption.text for name, caption in captions.items()}
    shown = list(records)
    if args.official:
        text = benchmark.official.text
        texts = {name: text(caption) for name, caption in texts.items()}
        shown = [replace(record, reference=record.reference and text(record.reference)) for record in records]
    rounds = args.rounds or (benchmark.rounds if args.judge else 1)
    return judge_captions(benchmark, shown, texts, judge, prompts, rounds, not args.prompts, args.dry_run)


def _captioned(
    args: argparse.Namespace, benchmark: Benchmark, records: Sequence[Record], videos: Videos, places: dict[str, str]
) -> tuple[Outcome, str, dict[str, Any]]:
    """Captions of the checkpoint, including those of other hosts; their folder; and the decoding settings."""
    sound = benchmark.sound and not args.no_audio
    options = CaptionOptions(args.max_new_tokens, computing_dtype(args.dtype), sound, not args.no_picture)
    prompts = clip_prompts(args)
    items = [
        make_item(videos, prompts, record.id, places[record.id], {"prompt": record.prompt} if record.prompt else {})
        for record in records
    ]
    part, parts = parse_shard(args.shard)
    name = f"captions.{part}-of-{parts}.jsonl" if args.shard else "captions.jsonl"
    made: list[str] = []

    def file(known: str) -> str:
        made.append(args.out or storage.join(folder_of(args.data), f"{benchmark.name}-{known}"))
        return storage.join(made[0], name)

    outcome = make_captions(args, items[part::parts], options, file, benchmark.frames)
    return outcome, made[0], {"temperature": 0, **vars(options), "frames": benchmark.frames}


def _given_folder(args: argparse.Namespace, benchmark: Benchmark) -> str:
    return args.out or storage.join(folder_of(args.data), f"{benchmark.name}-{PurePosixPath(args.captions).stem}")


def _judge(
    args: argparse.Namespace, folder: str, options: dict[str, Any], stack: ExitStack
) -> AbstractContextManager[ChatClient | LocalJudge]:
    """Open the judge: the endpoint or a local checkpoint. Its answers and costs are stored in the folder."""
    remote = storage.is_remote(folder)
    cache = AnswerLog(storage.join(folder, "answers.jsonl"), stack) if remote else Path(folder, "answers")
    if not args.judge:
        return LocalJudge(args.judge_model, computing_dtype(args.dtype), cache, args.batch)
    spent = storage.join(folder, "spent.jsonl")
    lines, data = open_lines(spent, stack)
    return ChatClient(
        Endpoint(
            args.judge,
            args.judge_model,
            args.judge_key,
            cache,
            patience=args.judge_patience,
            max_calls=UNLIMITED if args.budget_calls is None else args.budget_calls,
            max_tokens=args.budget_tokens,
            ledger=Ledger(lines.append, data, spent),
            breaker=SILENCE,
            options=options,
        )
    )


def _dry_run(
    args: argparse.Namespace,
    benchmark: Benchmark,
    every: Sequence[Record],
    records: Sequence[Record],
    prompts: dict[str, Prompt],
    options: dict[str, Any],
) -> int:
    """Print the calls and tokens of the judge. Missing captions are assumed to have the maximum length."""
    captions, folder = {}, args.out
    if args.captions:
        folder = _given_folder(args, benchmark)
        by_id = {record.id: record for record in every}
        captions = given_captions(args, by_id, [record.id for record in records]).captions
    else:
        longest = " so" * args.max_new_tokens
        captions = {record.id: Caption(record.id + longest, args.max_new_tokens) for record in records}
    cache = Path(folder, "answers") if folder and not storage.is_remote(folder) else None
    judge = DryJudge(Endpoint(args.judge, args.judge_model, cache=cache, options=options))
    complete = {record.id: captions.get(record.id, EMPTY) for record in records}
    _answers(args, benchmark, records, complete, judge, prompts)
    tries = Endpoint(args.judge, args.judge_model).tries
    counts = {"clips": len(records), **judge.counts, "calls_at_most": tries * judge.counts["calls"]}
    if args.json:
        print(json.dumps(counts))
    else:
        for name, value in counts.items():
            print(f"{name.replace('_', ' '):16} {value}")
    return 0
