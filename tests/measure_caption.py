"""Caption a bucket of AVWorld clips and bad files: with five kills, in four shards, and undisturbed.

python tests/measure_caption.py --clips 200 --bad 20

Prints the seconds of each run and whether the outputs are equal. With --before COMMAND, an `avocado` of another
version, it also times `COMMAND caption --out` against this version's on the local clips, in turn.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gcs import Proxy, storage_server

AVOCADO = [sys.executable, "-m", "avocado_jax"]


def caption(*arguments: str, command: list[str] = AVOCADO, kill_after: float | None = None) -> float:
    """Run `avocado caption` to its end, or kill it. Returns the run time in seconds."""
    begun = time.monotonic()
    process = subprocess.Popen([*command, "caption", *arguments], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        status = process.wait(kill_after)
        assert status in (0, 1), status
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
    return time.monotonic() - begun


def lines(folder: Path) -> list[str]:
    return sorted(line for path in folder.glob("*-of-*.jsonl") for line in path.read_text().splitlines())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--clips", type=int, default=200)
    parser.add_argument("--bad", type=int, default=20)
    parser.add_argument("--before", nargs="+")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name, "root")
        (root / "bucket").mkdir(parents=True)
        subprocess.run([*AVOCADO, "world", f"{name}/world", "--clips", str(args.clips), "--seed", "5"], check=True)
        clips = sorted(Path(name, "world", "clips").iterdir())
        if args.before:
            made = {}
            for what, command in (("before", args.before), ("now", AVOCADO)) * 2:
                out = Path(name, f"{what}.jsonl")
                out.unlink(missing_ok=True)
                Path(f"{out}.options.json").unlink(missing_ok=True)
                seconds = caption(*map(str, clips), "--json", "--out", str(out), command=command)
                print(f"{what}: {len(clips)} clips, {seconds:.1f} s, {60 * len(clips) / seconds:.1f} a minute")
                made[what] = {
                    (one := json.loads(line))["clip"]: one["caption"] for line in out.read_text().splitlines()
                }
            made = list(made.values())
            print(f"equal captions: {sum(made[0][clip] == made[1][clip] for clip in made[0])} of {len(clips)}")
        with storage_server(root) as port:
            os.environ["STORAGE_EMULATOR_HOST"] = f"http://127.0.0.1:{port}"
            from avocado_jax.data import storage

            for number, clip in enumerate(clips):
                storage.write(f"gs://bucket/clips/{clip.name}", clip.read_bytes())
                if number < args.bad:
                    storage.write(f"gs://bucket/clips/{clip.stem}-bad.mp4", clip.read_bytes()[: 200 * (number % 3)])
            given = ["gs://bucket/clips/", "--out"]
            whole = caption(*given, "gs://bucket/whole/")
            print(f"undisturbed: {whole:.1f} s")
            proxy = Proxy(port)
            proxy.faulty, proxy.every = (lambda method, path: "clips" in path or "killed" in path), 7
            os.environ["STORAGE_EMULATOR_HOST"] = proxy.url
            rng = random.Random(0)
            for _ in range(5):
                seconds = caption(*given, "gs://bucket/killed/", kill_after=rng.uniform(0.2, 0.5) * whole)
                print(f"killed after {seconds:.1f} s")
            print(f"resumed: {caption(*given, 'gs://bucket/killed/'):.1f} s, faults {dict(proxy.hits)}")
            os.environ["STORAGE_EMULATOR_HOST"] = f"http://127.0.0.1:{port}"
            for shard in range(4):
                caption(*given, "gs://bucket/shards/", "--shard", f"{shard}/4")
            whole, killed, shards = (root / "bucket" / one for one in ("whole", "killed", "shards"))
            for kind in ("captions", "rejects"):
                first, second = ((one / f"{kind}-0-of-1.jsonl").read_bytes() for one in (whole, killed))
                print(f"{kind}: {len(first.splitlines())} lines, equal bytes after kills: {first == second}")
            print(f"four shards equal one: {lines(shards) == lines(whole)}")


if __name__ == "__main__":
    main()
