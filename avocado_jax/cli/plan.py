"""Compile a config's step ahead of time and say what it takes of its devices, without having them.

  avocado plan configs/sft_7b.py --topology v5p:4x4x4
  avocado plan configs/sft_7b.py --topology v5e:8x16 --mesh.tensor 2 --remat offload
  avocado plan configs/sft_7b.py --topology v6e:8x8 --search 6

The real step is compiled by libtpu for the named slice (v5e, v5p or v6e; chips as AxB or AxBxC), or, without
--topology, for this machine. Any field of the config is changed as `--a.b value`. Memory is what the compiler says,
by part; FLOPs come from the shapes, bytes between devices from the compiled program, and the time is the slowest of
compute, memory and interconnect at 65% of its ceiling. Where the checkpoint (`init`) or the data are not at hand, the
config's `nominal` says what to assume. Exit status 1: it does not fit.
"""

import argparse
import json
import os
from typing import Any

from avocado_jax.config import SftConfig, load
from avocado_jax.errors import InputError

GIB = 2**30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command; what it does not know are fields of the config."""
    parser.add_argument("config", metavar="CONFIG", help="a Python file that defines `config`, as in configs/")
    parser.add_argument("--topology", metavar="SLICE", help="v5e:8x16, v5p:4x4x4, v6e:8x8 (default: this machine)")
    parser.add_argument("--all-shapes", action="store_true", help="every shape of the data, not only the dearest")
    parser.add_argument(
        "--search",
        type=int,
        metavar="N",
        help="compile up to N choices of mesh, remat and accumulation; print those that fit, the fastest first",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.set_defaults(fields=[])


def run(args: argparse.Namespace) -> int:
    """Plan. Returns 0, or 1 if a step (or every one searched) does not fit."""
    config = load(args.config, args.fields)
    if not isinstance(config, SftConfig):
        raise InputError(f"{args.config}: a {type(config).__name__}; plan takes an SftConfig")
    if args.topology:
        os.environ["JAX_PLATFORMS"] = "cpu"  # before jax looks for devices: this machine's own are left alone
    from avocado_jax.planning.program import devices_of, model_and_buckets, program_of
    from avocado_jax.planning.report import report
    from avocado_jax.planning.search import search

    devices = devices_of(args.topology, config.mesh.slices)
    model, buckets = model_and_buckets(config)
    topology = args.topology or f"{devices[0].device_kind} x {len(devices)}"
    told: dict[str, Any] = {"config": args.config, "topology": topology}
    if args.search is not None:
        found = []
        for one, entry in search(config, model, buckets[0], devices, args.search):
            mesh = dict(data=1, fsdp=one.mesh.fsdp, tensor=one.mesh.tensor)
            found.append({"mesh": mesh, "remat": one.remat, "accumulate": one.accumulate, **entry})
            if not args.json:
                print(f"tried {_choice(found[-1])}: {_memory(entry)}", flush=True)
        fitting = sorted((one for one in found if one["fits"]), key=lambda one: one["seconds"] or 0)
        if args.json:
            print(json.dumps(told | {"fits": bool(fitting), "choices": fitting}))
        for one in [] if args.json else fitting:
            print(f"{_choice(one)}\n  {_time(one)}")
        return 0 if fitting else 1

    steps, lines = [], []
    for bucket in buckets if args.all_shapes else buckets[:1]:
        entry = report(config, program_of(config, model, bucket, devices))
        steps.append(entry)
        sizes = ", ".join(f"{value} {name}" for name, value in entry["bucket"].items())
        lines += [
            f"{entry['name']} on {topology}: {config.batch} rows of {sizes}",
            f"  {_memory(entry)}",
            f"  {_time(entry)}",
        ]
        if not entry["fits"]:
            lines.append(f"  {entry['advice']}")
    fits = all(entry["fits"] for entry in steps)
    print(json.dumps(told | {"fits": fits, "steps": steps}) if args.json else "\n".join(lines))
    return 0 if fits else 1


def _choice(one: dict[str, Any]) -> str:
    mesh = " ".join(f"--mesh.{name} {size}" for name, size in one["mesh"].items())
    return f"{mesh} --remat {one['remat']} --accumulate {one['accumulate']}"


def _memory(entry: dict[str, Any]) -> str:
    hbm, limit = entry["hbm_bytes"], entry["hbm_limit_bytes"]
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in hbm.items() if name != "total")
    return (
        f"{'fits' if entry['fits'] else 'does not fit'}: {hbm['total'] / GIB:.2f} of {limit / GIB:.2f} GiB a device "
        f"({parts}; of which kept activations about {entry['residual_bytes_estimate'] / GIB:.2f})"
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
