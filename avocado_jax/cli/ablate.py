"""Measure the effect of each reward term: train arms with subsets of the terms, several seeds each, on AVWorld.

  avocado ablate configs/grpo_world.py --out runs/ablation
  avocado ablate configs/grpo_world.py --out OUT --arm "SFT=init" --arm "R_C=checklist" --arm "half=checklist:0.5"
  avocado ablate configs/grpo_7b.py --init gs://B/sft --data.train gs://B/shards --out gs://B/ablation --configs

An arm is NAME=init (the captioner that `init` names, without training), NAME=sft (fine-tuned on the same clips for as
many steps) or NAME=TERM[:WEIGHT],... of checklist, dialogue, length, repetition, timing, probes, and of a user's terms,
jax:MODULE:FUNCTION[=WEIGHT] or host:MODULE:FUNCTION[=WEIGHT] (avocado_jax/rewards/README.md). By default they are the
paper's five rows.
The seeds are the config's and the following ones. Arms share them and are compared seed by seed; differences beyond two
standard errors are bold. Every run is a run folder, OUT/ARM/SEED. The greedy captions of all clips of `data.heldout`
(world:...) are compared with the truth. After an interruption, the same command resumes.

The table has a column for each user-defined term of any arm.
OUT/table.md, arms.png, curves.png and results.json contain the results; OUT/ARM/SEED/heldout.json has the captions
of each run. --configs runs nothing: it prints the commands that train the arms, as JSON lines, for a launcher.
"""

import argparse
import json
import shlex
import sys
from dataclasses import replace
from typing import Any, NamedTuple

import jax

from avocado_jax.checkpoint.load import open_checkpoint
from avocado_jax.config import GrpoConfig, as_json, as_sft, load, refuse_another
from avocado_jax.data import storage
from avocado_jax.errors import InputError
from avocado_jax.eval.ablation import IN_SOME, METRICS, PAPER, Arm, parse_arms, summary, table
from avocado_jax.parallel.backend import use_gpu_memory
from avocado_jax.parallel.compiled import use_cache
from avocado_jax.rewards.combine import TERMS
from avocado_jax.rewards.extra import Term, load_terms

TOGETHER = 25  # held-out clips per batch


class Job(NamedTuple):
    """The run of an arm with a seed."""

    arm: Arm
    seed: int
    folder: str
    fields: list[str]  # overridden config fields


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments; unknown ones are config fields."""
    parser.add_argument(
        "config", metavar="CONFIG", help="a Python file that defines a GrpoConfig, or the name of one in configs/"
    )
    parser.add_argument("--out", metavar="OUT", required=True, help="folder of all runs and of the results")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="runs of each arm (default: %(default)s)")
    parser.add_argument("--arm", action="append", metavar="ARM", help="an arm; may be repeated")
    parser.add_argument("--configs", action="store_true", help="print the commands that train the arms, and exit")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    parser.set_defaults(fields=[])


def run(args: argparse.Namespace) -> int:
    """Run all unfinished runs, then compare the arms. Returns the exit status."""
    use_gpu_memory()
    config = load(args.config, args.fields)
    if not isinstance(config, GrpoConfig):
        raise InputError(f"{args.config}: a {type(config).__name__}; ablate takes a GrpoConfig")
    if args.seeds < 1:
        raise InputError(f"--seeds is {args.seeds}, must be at least 1")
    arms = parse_arms(args.arm or PAPER)
    user_terms = dict.fromkeys(text.partition("=")[0] for arm in arms for text in extra_of(arm))
    terms = load_terms(list(user_terms), (*TERMS, *METRICS, *IN_SOME))
    jobs = [_job(arm, config.seed + seed, args.out) for seed in range(args.seeds) for arm in arms]
    jobs = [job for job in jobs if job.arm.stage != "init" or job.seed == config.seed]
    if args.configs:
        for job in jobs:
            if job.arm.stage != "init":
                command = ["avocado", job.arm.stage, args.config, "--workdir", job.folder, *args.fields, *job.fields]
                print(json.dumps({"arm": job.arm.name, "seed": job.seed, "command": shlex.join(command)}))
        return 0
    if not config.data.heldout.startswith("world:"):
        raise InputError(
            f"data.heldout: {config.data.heldout!r} has no known truth: arms are measured on world:...; for other "
            "data --configs prints the runs"
        )
    if not config.init:
        raise InputError("init: no checkpoint to begin with")
    open_checkpoint(config.init)  # report a mistake before the config is written to the folder
    _open_folder(config, args.out)
    measured: dict[str, list[dict[str, Any]]] = {arm.name: [] for arm in arms}
    for number, job in enumerate(jobs, start=1):
        where = storage.join(job.folder, "heldout.json")
        if not storage.exists(where):
            print(f"ablate: run {number} of {len(jobs)}: {job.arm.name}, seed {job.seed}", file=sys.stderr)
            run_config = load(args.config, [*args.fields, *job.fields])
            if status := _train(job, run_config):
                return status
            result = _evaluate(run_config, config.init if job.arm.stage == "init" else job.folder)
            storage.write(where, json.dumps(result, ensure_ascii=False).encode())
            jax.clear_caches()  # the next run uses other programs
        measured[job.arm.name].append(json.loads(storage.read(where)))
    if terms:
        _add_means(terms, config, [result for results in measured.values() for result in results])
    rows = _write(args.out, arms, jobs, measured)
    print(json.dumps({"arms": rows}) if args.json else table(rows), end="\n" if args.json else "")
    return 0


def _job(arm: Arm, seed: int, out: str) -> Job:
    fields = ["--seed", str(seed)]
    if arm.stage == "grpo":
        fields += [part for term in TERMS for part in (f"--rewards.{term}", f"{arm.weights.get(term, 0.0):g}")]
        fields += ["--rewards.extra", ",".join(extra_of(arm))]
    return Job(arm, seed, storage.join(out, f"{arm.slug}/{seed}"), fields)


def extra_of(arm: Arm) -> list[str]:
    """The user terms of an arm, in the format of `rewards.extra`."""
    return [f"{term}={weight:g}" for term, weight in arm.weights.items() if term not in TERMS]


def _open_folder(config: GrpoConfig, out: str) -> None:
    """Create the folder, or check that it belongs to this config. Compiled programs are shared by its runs."""
    where = storage.join(out, "ablation.json")
    if storage.exists(where):
        refuse_another(config, json.loads(storage.read(where)), out)
    else:
        storage.write(where, json.dumps(as_json(config), indent=2).encode())
    use_cache(out)


def _train(job: Job, config: GrpoConfig) -> int:
    """Start, resume or finish the run of a job. Returns its exit status."""
    from avocado_jax.train.run import sft
    from avocado_jax.train.run_grpo import grpo

    if job.arm.stage == "init":
        return 0
    return grpo(config, job.folder) if job.arm.stage == "grpo" else sft(as_sft(config), job.folder)


def _evaluate(config: GrpoConfig, checkpoint: str) -> dict[str, Any]:
    """Caption all held-out clips greedily. Returns the metrics and the captions."""
    from avocado_jax.eval.captioner import load_captioner
    from avocado_jax.eval.metrics import world_metrics
    from avocado_jax.sampling.engine import caption_records
    from avocado_jax.train.inputs import open_source

    source, _ = open_source(config.data.heldout, replace(config.data, references=0))
    records = [source[number] for number in range(len(source.index.ids))]
    captioner = load_captioner(open_checkpoint(checkpoint), None, config.dtype)
    captions = caption_records(captioner, records, config.sampling.tokens, TOGETHER)
    lengths = [len(captioner.tokenizer.encode(caption)) for caption in captions]
    metrics = world_metrics(captions, lengths, [record.fields for record in records])
    by_id = {record.fields["id"]: caption for record, caption in zip(records, captions)}
    return {"metrics": metrics, "captions": by_id}


def _add_means(terms: list[Term], config: GrpoConfig, measured: list[dict[str, Any]]) -> None:
    """Add the means of user terms to the metrics of all runs, including runs trained without them."""
    from avocado_jax.eval.rewarded import mean_values
    from avocado_jax.train.inputs import open_source

    source, _ = open_source(config.data.heldout, replace(config.data, references=0))
    fields = {name: source[number].fields for number, name in enumerate(source.index.ids)}
    for result in measured:
        references = [fields[name] for name in result["captions"]]
        result["metrics"] |= mean_values(terms, list(result["captions"].values()), references)


def _write(out: str, arms: list[Arm], jobs: list[Job], measured: dict[str, list[dict[str, Any]]]) -> list[dict]:
    """Write the result files; return the summary."""
    from avocado_jax.eval.plots import arms_plot, curves_plot

    results = {name: [run["metrics"] for run in runs] for name, runs in measured.items()}
    curves: dict[str, list[list[dict[str, Any]]]] = {}
    for job in jobs:
        if job.arm.stage == "grpo":
            lines = storage.read(storage.join(job.folder, "metrics.jsonl")).splitlines()
            curves.setdefault(job.arm.name, []).append([json.loads(line) for line in lines])
    rows = summary(arms, results)
    seeds = {arm.name: [job.seed for job in jobs if job.arm == arm] for arm in arms}
    raw = {"summary": rows, "seeds": seeds, "results": results}
    storage.write(storage.join(out, "results.json"), json.dumps(raw, indent=1).encode())
    storage.write(storage.join(out, "table.md"), table(rows).encode())
    storage.write(storage.join(out, "arms.png"), arms_plot(arms, results))
    storage.write(storage.join(out, "curves.png"), curves_plot(arms, curves))
    return rows
