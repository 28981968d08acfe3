"""Memory and speed of `avocado serve` with the shipped captioner (run by hand).

  python tests/measure_serve.py --requests 500

Sends short clips, a third of them as data URLs, a tenth of them bad, a tenth dropped by their client. Prints the
resident memory of the server and its readers after 50 requests and at the end, and requests a second.
"""

import argparse
import asyncio
import base64
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import openai


def memory(pid: int) -> float:
    """Resident MiB of a process and its descendants."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return pages * os.sysconf("SC_PAGESIZE") / 2**20 + sum(memory(int(one)) for one in children)


async def send(client: openai.AsyncOpenAI, clips: list[Path], number: int) -> str:
    """Send one request. Returns its outcome."""
    rng = random.Random(number)
    clip = rng.choice(clips)
    content = clip.read_bytes() if number % 10 else clip.read_bytes()[:2000]
    as_data = number % 3 == 0 or not number % 10
    url = f"data:video/mp4;base64,{base64.b64encode(content).decode()}" if as_data else clip.as_uri()
    messages = [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": url}}]}]
    options = dict(model="avocado", messages=messages, max_tokens=32)
    try:
        if number % 10 == 5:
            stream = await client.chat.completions.create(stream=True, **options)
            await anext(aiter(stream))
            await stream.close()
            return "dropped"
        await client.chat.completions.create(**options)
        return "answered"
    except openai.APIStatusError as error:
        return str(error.status_code)


async def run(url: str, clips: list[Path], pid: int, count: int, together: int) -> None:
    """Send requests, `together` at a time."""
    ends: dict[str, int] = {}
    begun, early = time.monotonic(), 0.0
    async with openai.AsyncOpenAI(base_url=url, api_key="none", timeout=300, max_retries=0) as client:
        for first in range(0, count, together):
            for end in await asyncio.gather(*(send(client, clips, first + i) for i in range(together))):
                ends[end] = ends.get(end, 0) + 1
            done = first + together
            if not early and done >= 50:
                early = memory(pid)
                print(f"after {done} requests: {early:.0f} MiB, {time.monotonic() - begun:.0f} s", flush=True)
    late, seconds = memory(pid), time.monotonic() - begun
    print(f"after {count} requests: {late:.0f} MiB ({late / early - 1:+.1%})")
    print(f"{seconds:.0f} s, {count / seconds:.1f} requests a second: {ends}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--together", type=int, default=10)
    args = parser.parse_args()
    avocado = [sys.executable, "-m", "avocado_jax"]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([*avocado, "world", folder, "--clips", "4", "--seed", "5", "--level", "0"], check=True)
        clips = sorted(Path(folder, "clips").iterdir())
        command = [*avocado, "serve", "--port", "0", "--media-root", folder]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
            try:
                url = next(line for line in server.stderr if " at http://" in line).split(" at ")[1].strip()
                asyncio.run(run(url, clips, server.pid, args.requests, args.together))
            finally:
                server.terminate()


if __name__ == "__main__":
    main()
