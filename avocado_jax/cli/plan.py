"""Compile the training step of a config ahead of time and report its memory, FLOPs, communication and time.

  avocado plan configs/sft_7b.py --topology v5p:4x4x4
  avocado plan configs/sft_7b.py --topology v5e:8x16 --mesh.tensor 2 --remat offload
  avocado plan configs/grpo_7b.py --topology v6e:8x8
  avocado plan configs/sft_7b.py --topology v6e:8x8 --search 4         # which mesh, remat and accumulation
  avocado plan configs/grpo_7b.py --topology v6e:4x4,v6e:8x8,v5p:2x2x4 --search 0     # which slice: no compilation
  avocado plan configs/sft_7b.py --topology v6e:2x4 --captions 640     # captioning instead of training

libtpu compiles the step for the slice (v5e, v5p or v6e; chips as AxB or AxBxC), which this machine need not have. For
a 7B model this takes minutes of one core: five to eight for fine-tuning, ten for GRPO. Without --topology, the step is
compiled for this machine. A GRPO step is five programs with an entry each: encode, view, rollout, score, update
(rewards are not compiled). Override any config field with `--a.b value`. Memory is the compiler's figure, by part, and
includes arrays that stay on the device beside the program. FLOPs follow from the shapes, communication from the
compiled program. The time is the largest of compute, memory and interconnect time at 65% of the respective ceiling.
`hosts` lists the rows of a batch that each process loads. Where the checkpoint (`init`) or the data do not exist on
this machine, the config's `nominal` supplies model and shapes. Exit status 1: the step does not fit.

With --search N, choices of mesh, remat, accumulation and split (GRPO: rows of a clip) are ranked on one or several
slices, separated by commas, by an estimate of their chip-seconds per step: devices x seconds, as compute, memory and
interconnect bound them. FLOPs and bytes follow from the shapes, so nothing is compiled; a GRPO config of a 7B model
takes one or two minutes. Choices that agree to three digits are ordered by their time without overlap, and those that
offload activations to the host are last. A choice is left out if its arrays, gradients, saved activations and KV
caches alone exceed the memory. The best N of all slices are compiled, each as long as a plan, and those that fit are
printed, cheapest first. --search 0 prints the ranking only: the best choice of every slice, or the best ten of one
slice. These may not fit: a step needs more than this lower bound of the memory. Chips differ in price, which
chip-seconds leave out.

With --captions, the programs of `caption` are compiled for the devices of one host: the prefill of some clips and the
decoding steps of one dispatch. The last line, or `clips_per_chip_hour`, is the rate for clips of the largest shape.
"""

import argparse
import json
import os
import signal
import sys
from typing import Any

from avocado_jax.config import RunConfig, load
from avocado_jax.errors import InputError
from avocado_jax.parallel.signals import on_signal
from avocado_jax.progress import progress

GIB = 2**30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments; unknown ones are config fields."""
    parser.add_argument("config", metavar="CONFIG", help="a Python file, or the name of one in configs/")
    parser.add_argument(
        "--topology",
        metavar="SLICE[,SLICE...]",
        help="v5e:8x16, v5p:4x4x4, v6e:8x8 (default: this machine); several with --search only",
    )
    parser.add_argument(
        "--all-shapes", action="store_true", help="plan all shapes of the data, not only the most expensive"
    )
    parser.add_argument(
        "--search",
        type=int,
        metavar="N",
        help="rank choices of mesh, remat, accumulation and split; compile the best N and print those that fit, "
        "fewest chip-seconds first; 0: print the ranking",
    )
    parser.add_argument("--captions", type=int, metavar="N", help="plan captioning, with captions of N tokens")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.set_defaults(fields=[])


def run(args: argparse.Namespace) -> int:
    """Run the command. Returns 0, or 1 if the step, or every choice of a search, does not fit."""
    restore = on_signal((signal.SIGINT, signal.SIGTERM), _stop)  # also inside the compiler, which takes minutes
    try:
        return _run(args)
    finally:
        restore()


def _stop(number: int) -> None:
    print("avocado plan: stopped", file=sys.stderr, flush=True)
    os._exit(130 if number == signal.SIGINT else 75)


def _run(args: argparse.Namespace) -> int:
    if workdir := next((one for one in args.fields if one.split("=")[0].replace("_", "") == "--workdir"), None):
        raise InputError(f"{workdir}: a plan runs nothing and has no run folder; leave it out")
    config = load(args.config, args.fields)
    if not isinstance(config, RunConfig):
        raise InputError(f"{args.config}: a {type(config).__name__}, not a training config")
    if args.all_shapes and (args.search is not None or args.captions is not None):
        raise InputError("--all-shapes excludes --search and --captions")
    if args.captions is not None and (args.captions < 1 or args.search is not None):
        raise InputError("--captions must be at least 1, and excludes --search")
    if args.search is not None and args.search < 0:
        raise InputError(f"--search {args.search}: a number of choices to compile, or 0")
    topologies = args.topology.split(",") if args.topology else [None]
    if len(topologies) > 1 and args.search is None:
        raise InputError(f"--topology {args.topology}: several slices need --search N (0 compiles nothing)")
    if args.topology:
        os.environ["JAX_PLATFORMS"] = "cpu"  # set before jax starts: leaves this machine's accelerators free
    from avocado_jax.planning.program import devices_of, model_and_buckets, program_of
    from avocado_jax.planning.report import report

    slices = {}
    for topology in topologies:
        devices = devices_of(topology, config.mesh.slices)
        slices[topology or f"{devices[0].device_kind} x {len(devices)}"] = devices
    model, buckets = model_and_buckets(config)
    topology = ",".join(slices)
    plan: dict[str, Any] = {"config": args.config, "topology": topology}
    if args.captions is not None:
        return _plan_captions(args, plan, model, buckets[0].shape, devices)
    if args.search is not None:
        return _search(args, plan, config, model, buckets[0], slices)

    steps = []
    for bucket in buckets if args.all_shapes else buckets[:1]:
        program = program_of(config, model, bucket, devices)
        for phase in progress(program.phases, "compiled"):
            print(f"compiling {phase.name} for {topology}: this may take minutes", file=sys.stderr, flush=True)
            entry = report(program, phase)
            steps.append(entry)
            if not args.json:
                _print(entry, topology, program.rows)
    hosts = [{"process": process, "rows": rows} for process, rows in program.hosts.items()]
    fits = all(entry["fits"] for entry in steps)
    if args.json:
        print(json.dumps(plan | {"fits": fits, "steps": steps, "hosts": hosts}))
    else:
        print(hosts_line(hosts))
    return 0 if fits else 1


def _search(
    args: argparse.Namespace, plan: dict[str, Any], config: RunConfig, model: Any, bucket: Any, slices: dict[str, list]
) -> int:
    """Returns 0, or 1 if no choice fits: of those compiled, or with --search 0 by the lower bound of the memory."""
    from avocado_jax.planning.report import memory_of
    from avocado_jax.planning.search import compile_ranked, rank, varied

    print(f"ranking choices of {', '.join(slices)}: a 7B config takes a minute or two", file=sys.stderr, flush=True)
    ranking = rank(config, model, bucket, slices)

    def entry(one: Any, seconds: float | None) -> dict[str, Any]:
        chips = {"topology": one.topology, "devices": one.devices, "fields": varied(one.config), "seconds": seconds}
        return chips | {"chip_seconds": seconds and one.devices * seconds}

    limits = {topology: memory_of(devices[0]) for topology, devices in slices.items()}
    estimates = [
        entry(one, one.seconds) | {"hbm_bytes": one.least_bytes, "hbm_limit_bytes": limits[one.topology]}
        for one in ranking
    ]
    found = []
    if args.search:
        print(_table(estimates[: args.search], "least GiB"), file=sys.stderr, flush=True)
    for one, steps in progress(compile_ranked(ranking[: args.search], model, bucket, slices), "compiled", args.search):
        fits, largest = all(step["fits"] for step in steps), max(steps, key=_total)
        tried = entry(one, sum(step["seconds"] for step in steps) if fits and one.seconds else None)
        tried |= {"hbm_bytes": _total(largest), "hbm_limit_bytes": largest["hbm_limit_bytes"]}
        found.append(tried | {"fits": fits, "steps": steps})
        print(f"{_arguments(tried)}\n  {largest['name']} {_memory(largest)}", file=sys.stderr, flush=True)
    choices = sorted((one for one in found if one["fits"]), key=lambda one: one["chip_seconds"] or 0)
    fits = bool(choices if args.search else estimates)
    if args.json:
        print(json.dumps(plan | {"fits": fits, "choices": choices, "estimates": estimates}))
    elif args.search:
        print(_table(choices, "GiB") if choices else "no choice that was compiled fits")
    else:
        best = {one["topology"]: one for one in reversed(estimates)}
        shown = estimates[:10] if len(slices) == 1 else sorted(best.values(), key=estimates.index)
        print(_table(shown, "least GiB"))
        for topology in slices.keys() - best.keys():
            print(f"{topology}: no choice fits")
    return 0 if fits else 1


def _table(choices: list[dict[str, Any]], memory: str) -> str:
    """A line for each choice."""
    lines = [f"{'chip-seconds':>12} {'seconds':>8} {memory:>9} {'of':>3}  (times of a step, memory of a chip)"]
    for one in choices:
        times = [_number(one[name]) for name in ("chip_seconds", "seconds")]
        limit = f"{one['hbm_limit_bytes'] / GIB:.0f}"
        lines.append(f"{times[0]:>12} {times[1]:>8} {one['hbm_bytes'] / GIB:>9.1f} {limit:>3}  {_arguments(one)}")
    return "\n".join(lines)


def _number(seconds: float | None) -> str:
    return "unknown" if seconds is None else f"{seconds:,.0f}" if seconds >= 100 else f"{seconds:.3g}"


def _arguments(one: dict[str, Any]) -> str:
    """A choice as command-line arguments."""
    topology = f"--topology {one['topology']} " if ":" in one["topology"] else ""
    return topology + " ".join(f"--{name} {value}" for name, value in one["fields"].items())


def _plan_captions(args: argparse.Namespace, plan: dict[str, Any], model: Any, shape: Any, devices: list[Any]) -> int:
    """Returns 0, or 1 if a program does not fit."""
    from avocado_jax.planning.captioning import caption_plan

    *steps, summary = progress(caption_plan(model, shape, args.captions, devices), "compiled")
    fits = all(entry["fits"] for entry in steps)
    if args.json:
        print(json.dumps(plan | {"fits": fits, "steps": steps} | summary))
        return 0 if fits else 1
    for entry in steps:
        _print(entry, plan["topology"], entry["bucket"]["captions"])
    mesh, rate = summary["mesh"], summary["clips_per_chip_hour"]
    speed = f"about {rate:.0f} clips per chip-hour" if rate else "no ceilings are known for these devices"
    print(f"{summary['slots']} slots on data {mesh['data']} x tensor {mesh['tensor']}: {speed}")
    return 0 if fits else 1


def _print(entry: dict[str, Any], topology: str, rows: int) -> None:
    sizes = ", ".join(f"{value} {name}" for name, value in entry["bucket"].items())
    print(f"{entry['name']} on {topology}: {rows} rows of {sizes}\n  {_memory(entry)}\n  {_time(entry)}", flush=True)
    if not entry["fits"]:
        print(f"  {entry['advice']}", flush=True)


def hosts_line(hosts: list[dict[str, Any]]) -> str:
    """The rows of the first process in compact form; those of all processes are in the JSON output."""
    first, *_ = hosts
    ranges: list[list[int]] = []
    for row in first["rows"]:
        if ranges and row == ranges[-1][1] + 1:
            ranges[-1][1] = row
        else:
            ranges.append([row, row])
    text = ", ".join(f"{start}-{end}" if end > start else str(start) for start, end in ranges)
    return f"{len(hosts)} hosts load {len(first['rows'])} rows each; host {first['process']}: {text}"


def _total(entry: dict[str, Any]) -> int:
    return entry["hbm_bytes"]["total"]


def _memory(entry: dict[str, Any]) -> str:
    hbm, limit = entry["hbm_bytes"], entry["hbm_limit_bytes"]
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in hbm.items() if name != "total")
    if entry["residual_bytes_estimate"]:
        parts += f"; of which kept activations about {entry['residual_bytes_estimate'] / GIB:.2f}"
    return (
        f"{'fits' if entry['fits'] else 'does not fit'}: {hbm['total'] / GIB:.2f} of {limit / GIB:.2f} GiB a device "
        f"({parts})"
    )


def _time(entry: dict[str, Any]) -> str:
    text = f"{entry['flops'] / 1e15:.1f} PFLOP"
    if entry["collective_bytes"] is not None:
        text += f", {sum(entry['collective_bytes'].values()) / GIB:.2f} GiB sent by a device"
    if entry["seconds"] is not None:
        times = ", ".join(f"{name} {value:.2f}" for name, value in entry["roofline_seconds"].items())
        text += f"; ceilings {times} s: bound by {entry['bound']}, about {entry['seconds']:.2f} s a step"
        text += f", MFU {entry['mfu']:.0%}"
    return f"{text}; compiled in {entry['compile_seconds']:.0f} s"
