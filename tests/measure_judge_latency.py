"""What a slow judge costs: seconds per update with answers after the time of one step, against instant answers.

  python tests/measure_judge_latency.py INIT FOLDER [--rollout_batches K ...]

Trains configs/quickstart_grpo.py from the checkpoint INIT twice, with a judge on this machine. The second judge answers
the captions of a rollout together, one step's time after it received the first. The first rollout is left out.
"""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).parent / "train"))
sys.path.append(str(Path(__file__).parent))

from chat import chat_server
from test_grpo_judge import fields, verdict

from avocado_jax.config import load

CONFIG = "configs/quickstart_grpo.py"
QUIET = 0.5  # seconds without a request, after which the next one belongs to another rollout


def measure(init: str, folder: Path, latency: float, options: list[str]) -> tuple[float, float]:
    """Mean seconds per step, and of these the time that the devices waited for the judge."""
    lock, answered, last = threading.Lock(), [0.0], [0.0]

    def delayed(number: int, request: dict) -> str:
        with lock:
            now = time.monotonic()
            if now - last[0] > QUIET:
                answered[0] = now + latency
            last[0] = max(now, answered[0])  # the client waits for answers before it sends all requests
        time.sleep(max(0.0, answered[0] - now))
        return verdict(number, request)

    with chat_server(delayed) as server:
        command = ["avocado", "grpo", CONFIG, "--init", init, "--workdir", str(folder), *fields(server)]
        shared = ["--tensorboard", "false", "--data.workers", "0", "--eval_every", "1000", *options]
        subprocess.run([Path(sys.executable).parent / command[0], *command[1:], *shared], check=True)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    perf = [line["perf"] for line in lines[load(CONFIG, options).rollout_batches :]]
    return tuple(float(np.mean([one.get(name, 0.0) for one in perf])) for name in ("seconds", "judge_wait_seconds"))


def main() -> None:
    """Print the seconds per update of both runs."""
    init, folder, *options = sys.argv[1:]
    instant, _ = measure(init, Path(folder) / "instant", 0.0, options)
    slow, waited = measure(init, Path(folder) / "slow", instant, options)
    print(
        f"instant answers: {instant:.2f} s a step; after {instant:.2f} s: {slow:.2f} s, waiting {waited:.2f} s of them"
    )
    print(f"{slow / instant - 1:+.1%}")


if __name__ == "__main__":
    main()
