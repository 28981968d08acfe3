"""Parse `--shard I/N`, the share of the work of a process, or detect it from the platform."""

import os
from collections.abc import Mapping

from avocado_jax.errors import InputError

# Environment variables with the process index and the number of processes, by platform.
PLATFORMS = {
    "SkyPilot": ("SKYPILOT_NODE_RANK", "SKYPILOT_NUM_NODES"),
    "Slurm": ("SLURM_PROCID", "SLURM_NTASKS"),
    "a JobSet or an indexed Job": ("JOB_COMPLETION_INDEX", "JOB_COMPLETIONS"),
    "a TPU slice": ("TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES"),  # the second is a list of host names
}


def parse_shard(text: str | None, environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Parse `I/N` (I from 0) to (I, N); detect both from the platform for "auto"; (0, 1) for None.

    Raises:
        InputError: the text has another form, or no platform is detected.
    """
    if text is None:
        return 0, 1
    if text == "auto":
        for index, count in PLATFORMS.values():
            if index in environment and count in environment:
                hosts = environment[count].split(",")
                if hosts == ["localhost"]:  # a slice of one host; the platform may have several such slices
                    continue
                total = hosts[0] if len(hosts) == 1 and hosts[0].isdecimal() else str(len(hosts))
                return parse_shard(f"{environment[index]}/{total}")
        names = "; ".join(f"{' and '.join(names)} ({platform})" for platform, names in PLATFORMS.items())
        raise InputError(f"--shard auto: none of these is set: {names}")
    index, _, count = text.partition("/")
    if index.isdecimal() and count.isdecimal() and int(index) < int(count):
        return int(index), int(count)
    raise InputError(f"--shard {text}: not I/N with I from 0 to N - 1, nor 'auto'")
