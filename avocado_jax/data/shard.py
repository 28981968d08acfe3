"""`--shard I/N`: which part of the work a process does, given or read from the platform."""

import os
from collections.abc import Mapping

from avocado_jax.errors import InputError

# Environment variables of a process's index and of the number of processes, by platform.
PLATFORMS = {
    "SkyPilot": ("SKYPILOT_NODE_RANK", "SKYPILOT_NUM_NODES"),
    "Slurm": ("SLURM_PROCID", "SLURM_NTASKS"),
    "a JobSet or an indexed Job": ("JOB_COMPLETION_INDEX", "JOB_COMPLETIONS"),
    "a TPU slice": ("TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES"),  # the second is a list of names
}


def parse_shard(text: str | None, environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """(I, N) of `I/N` with I from 0; of "auto": from the platform's variables; (0, 1) of None.

    Raises:
        InputError: it is not of this form, or no platform is found.
    """
    if text is None:
        return 0, 1
    if text == "auto":
        for index, count in PLATFORMS.values():
            if index in environment and count in environment:
                hosts = environment[count].split(",")
                if hosts == ["localhost"]:  # of a slice of one host: the platform around it may have several
                    continue
                total = hosts[0] if len(hosts) == 1 and hosts[0].isdecimal() else str(len(hosts))
                return parse_shard(f"{environment[index]}/{total}")
        names = "; ".join(f"{' and '.join(names)} ({platform})" for platform, names in PLATFORMS.items())
        raise InputError(f"--shard auto: none of these is set: {names}")
    index, _, count = text.partition("/")
    if index.isdecimal() and count.isdecimal() and int(index) < int(count):
        return int(index), int(count)
    raise InputError(f"--shard {text}: not I/N with I from 0 to N - 1, nor 'auto'")
