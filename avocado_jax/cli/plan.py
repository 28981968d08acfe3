"""Compile the training step of a config ahead of time and report its memory, FLOPs, communication and time.

  avocado plan configs/sft_7b.py --topology v5p:4x4x4
  avocado plan configs/sft_7b.py --topology v5e:8x16 --mesh.tensor 2 --remat offload
  avocado plan configs/sft_7b.py --topology v6e:8x8 --search 6
  avocado plan configs/grpo_7b.py --topology v6e:8x8
  avocado plan configs/sft_7b.py --topology v6e:2x4 --captions 640     # captioning instead of training

libtpu compiles the step for the slice (v5e, v5p or v6e; chips as AxB or AxBxC), which this machine need not have. For
a 7B model this takes minutes: ten of one core for a GRPO step.
Without --topology, the step is compiled for this machine. A GRPO step is five programs with an entry each: encode,
view, rollout, score, update (rewards are not compiled). Override any config field with `--a.b value`. Memory is the
compiler's figure, by part, and includes arrays that stay on the device beside the program. FLOPs follow from the
shapes, communication from the compiled program. The time is the largest of compute, memory and interconnect time at
65% of the respective ceiling. `hosts` lists the rows of a batch that each process loads. Where the checkpoint (`init`)
or the data do not exist on this machine, the config's `nominal` supplies model and shapes. Exit status 1: the step
does not fit.

With --captions, the programs of `caption` are compiled for the devices of one host: the prefill of some clips and the
decoding steps of one dispatch. The last line, or `clips_per_chip_hour`, is the rate for clips of the largest shape.
"""

import argparse
import json
import os
import signal
import sys
from typing import Any

from avocado_jax.config import GrpoConfig, RunConfig, load
from avocado_jax.errors import InputError
from avocado_jax.parallel.signals import on_signal
from avocado_jax.progress import progress

GIB = 2**30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments; unknown ones are config fields."""
    parser.add_argument("config", metavar="CONFIG", help="a Python file, or the name of one in configs/")
    parser.add_argument("--topology", metavar="SLICE", help="v5e:8x16, v5p:4x4x4, v6e:8x8 (default: this machine)")
    parser.add_argument(
        "--all-shapes", action="store_true", help="plan all shapes of the data, not only the most expensive"
    )
    parser.add_argument(
        "--search",
        type=int,
        metavar="N",
        help="compile up to N choices of mesh, remat and accumulation; print those that fit, fastest first",
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
    config = load(args.config, args.fields)
    if not isinstance(config, RunConfig):
        raise InputError(f"{args.config}: a {type(config).__name__}, not a training config")
    if args.captions is not None and (args.captions < 1 or args.search is not None):
        raise InputError("--captions must be at least 1, and excludes --search")
    if args.topology:
        os.environ["JAX_PLATFORMS"] = "cpu"  # set before jax starts: leaves this machine's accelerators free
    from avocado_jax.planning.program import devices_of, model_and_buckets, program_of
    from avocado_jax.planning.report import report
    from avocado_jax.planning.search import search

    devices = devices_of(args.topology, config.mesh.slices)
    model, buckets = model_and_buckets(config)
    topology = args.topology or f"{devices[0].device_kind} x {len(devices)}"
    plan: dict[str, Any] = {"config": args.config, "topology": topology}
    if args.captions is not None:
        return _plan_captions(args, plan, model, buckets[0].shape, devices)
    if args.search is not None:
        found = []
        for one, entries in search(config, model, buckets[0], devices, args.search):
            fields = _search_fields(one)
            fits = all(entry["fits"] for entry in entries)
            seconds = sum(entry["seconds"] or 0 for entry in entries)
            found.append({**fields, "fits": fits, "seconds": seconds or None, "steps": entries})
            if not args.json:
                print(f"tried {_choice(fields)}: {_memory(max(entries, key=_total))}", flush=True)
        choices = sorted((one for one in found if one["fits"]), key=lambda one: one["seconds"] or 0)
        if args.json:
            print(json.dumps(plan | {"fits": bool(choices), "choices": choices}))
        for one in [] if args.json else choices:
            print("\n".join([_choice(one), *(f"  {entry['name']}: {_time(entry)}" for entry in one["steps"])]))
        return 0 if choices else 1

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


def _search_fields(config: RunConfig) -> dict[str, Any]:
    """The fields that a search varies."""
    mesh = config.mesh
    fields = {"mesh": {"data": mesh.data, "fsdp": mesh.fsdp, "tensor": mesh.tensor}}
    fields |= {"remat": config.remat, "accumulate": config.accumulate}
    return fields | ({"split": config.split} if isinstance(config, GrpoConfig) else {})


def _choice(one: dict[str, Any]) -> str:
    """The same fields as command-line arguments."""
    mesh = " ".join(f"--mesh.{name} {size}" for name, size in one["mesh"].items())
    split = f" --split {one['split']}" if "split" in one else ""
    return f"{mesh} --remat {one['remat']} --accumulate {one['accumulate']}{split}"


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
