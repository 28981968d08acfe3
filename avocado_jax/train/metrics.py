"""Metrics of a run: metrics.jsonl, TensorBoard, W&B, and progress lines on stderr.

metrics.jsonl has one line per finished step. All values that depend on the clock or the machine are under "perf". The
other bytes are reproducible.
"""

import hashlib
import json
import os
import resource
import sys
import tempfile
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import jax

from avocado_jax.data import storage
from avocado_jax.errors import InputError
from avocado_jax.parallel.chips import CHIPS
from avocado_jax.parallel.compiled import counts

UPLOAD_SECONDS = 30.0  # interval between uploads of changed files to a bucket
BOARD_SECONDS = 10  # interval between writes of TensorBoard files
RECENT_STEPS = 20  # steps for the estimate of the remaining time


class Meter:
    """Measures the performance of steps: time, compilations, memory."""

    def __init__(self) -> None:
        self._at = time.perf_counter()
        device = jax.devices()[0]
        chip = CHIPS.get(device.device_kind)
        self._peak = chip.flops * jax.device_count() if chip else float("nan")

    def perf(self, tokens: float, flops: float, padded: float, input_wait: float) -> dict[str, Any]:
        """Compute the "perf" entry of a step that has just finished.

        `seconds` is the time since the previous call, `mfu` the model FLOPs per second relative to the peak of the
        devices (null if unknown), `memory_bytes` the peak memory of a device (on CPU, of the process), `compilations`
        the number of compilations in this process so far, without programs read from the cache.
        """
        now = time.perf_counter()
        seconds, self._at = now - self._at, now
        mfu = flops / seconds / self._peak
        stats = jax.local_devices()[0].memory_stats() or {}
        memory = stats.get("peak_bytes_in_use") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {
            "seconds": round(seconds, 4),
            "tokens_per_second": round(tokens / seconds, 1),
            "mfu": round(mfu, 4) if mfu == mfu else None,
            "padded": round(padded, 4),
            "input_wait": round(input_wait, 4),
            "memory_bytes": memory,
            "compilations": counts().compiled,
        }


class Log:
    """The metrics of a run, written by process 0 only.

    For a run in a bucket, the files are local and a background thread uploads changed files every `UPLOAD_SECONDS`.
    `flush` uploads them immediately. Call it before saving a checkpoint, so that a resumed run has the metrics of
    every step up to its checkpoint.
    """

    def __init__(self, folder: str, step: int, tensorboard: bool, wandb: str, config: dict[str, Any]) -> None:
        """Resume after `step`. Removes lines of later steps and an incomplete last line.

        Args:
            folder: the run folder, local or gs://.
            step: the last finished step.
            tensorboard: whether to write TensorBoard events.
            wandb: a W&B project; empty: none.
            config: the config shown in W&B.

        Raises:
            InputError: wandb is not installed.
        """
        self._remote = folder if storage.is_remote(folder) else None
        self._active = jax.process_index() == 0
        self._board = self._wandb = None
        if not self._active:
            return
        self._local = local = Path(tempfile.mkdtemp(prefix="avocado-")) if self._remote else Path(folder)
        self.path = local / "metrics.jsonl"
        if self._remote and storage.exists(stored := storage.join(folder, self.path.name)):
            storage.download(stored, self.path)
        kept = _complete_lines(self.path, step)
        part = self.path.with_suffix(".part")
        part.write_text("".join(line + "\n" for line in kept))
        os.replace(part, self.path)
        self._file = self.path.open("a")
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(local / "tensorboard"), purge_step=step + 1, flush_secs=BOARD_SECONDS)
        if wandb:
            try:
                import wandb as library
            except ImportError:
                raise InputError("wandb is not installed: pip install 'avocado-jax[wandb]'") from None
            name = Path(folder).name
            self._wandb = library.init(project=wandb, config=config, id=wandb_id(folder), name=name, resume="allow")
        self._uploaded: dict[Path, tuple[int, int]] = {}  # (size, modification time) of each uploaded file
        self._uploading, self._closed = threading.Lock(), threading.Event()
        if self._remote:
            threading.Thread(target=self._upload_regularly, name="metrics upload", daemon=True).start()

    def write(self, line: dict[str, Any]) -> None:
        """Write the metrics of a finished step. Does not block on uploads."""
        if not self._active:
            return
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        scalars = {name: value for name, value in (line | line["perf"]).items() if isinstance(value, int | float)}
        if self._board:
            for name, value in scalars.items():
                self._board.add_scalar(name, value, line["step"])
        if self._wandb:
            self._wandb.log(scalars, step=line["step"])

    def flush(self) -> None:
        """Make all written steps durable, including uploads. Call before saving a checkpoint.

        Raises:
            InputError, OSError: the upload failed.
        """
        if not self._active:
            return
        self._file.flush()
        os.fsync(self._file.fileno())
        if self._board:
            self._board.flush()
        if self._remote:
            self._upload()

    def close(self) -> None:
        """Flush and close the files. Raises as `flush`."""
        if not self._active:
            return
        self._closed.set()
        try:
            self.flush()
        finally:
            self._file.close()
            if self._board:
                self._board.close()
            if self._wandb:
                self._wandb.finish()

    def _upload(self) -> None:
        """Upload the files that have changed since their last upload."""
        with self._uploading:  # an older version must not replace a newer one
            for path in self._local.rglob("*"):
                if not path.is_file():
                    continue
                version = (path.stat().st_size, path.stat().st_mtime_ns)
                if self._uploaded.get(path) == version:
                    continue
                data = path.read_bytes()
                if path == self.path:
                    data = data[: data.rfind(b"\n") + 1]  # drop a partially written line
                storage.write(storage.join(self._remote, str(path.relative_to(self._local))), data)
                self._uploaded[path] = version

    def _upload_regularly(self) -> None:
        while not self._closed.wait(UPLOAD_SECONDS):
            try:
                self._upload()
            except (InputError, OSError) as error:
                print(f"metrics are not uploaded, will retry: {error}", file=sys.stderr, flush=True)


def wandb_id(folder: str) -> str:
    """The W&B run id of a folder: stable over restarts, and distinct for folders with the same name."""
    where = folder.rstrip("/") if storage.is_remote(folder) else str(Path(folder).resolve())
    return hashlib.sha256(where.encode()).hexdigest()[:16]


def _complete_lines(path: Path, step: int) -> list[str]:
    """The lines of steps 1 to `step`, up to the first damaged line."""
    if not path.exists():
        return []
    kept = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            if json.loads(line)["step"] != len(kept) + 1:
                break
        except (ValueError, KeyError, TypeError):
            break
        kept.append(line)
    return kept[:step]


class ProgressLog:
    """Prints progress to stderr on process 0, at most one line every ten seconds.

    The remaining time is estimated from the mean of recent steps without compilation, and the latest evaluation.
    """

    def __init__(self, total: int, eval_every: int) -> None:
        self._total, self._eval_every, self._printed = total, eval_every, 0.0
        self._recent: deque[float] = deque(maxlen=RECENT_STEPS)  # seconds
        self._evaluation, self._compilations = 0.0, -1

    def write(self, line: dict[str, Any]) -> None:
        """Print a step's metrics if ten seconds have passed, or for the last step or with held-out metrics."""
        now = time.monotonic()
        last, evaluated = line["step"] == self._total, any("heldout" in name for name in line)
        self._measure(line["perf"], evaluated)
        if jax.process_index() or (now - self._printed < 10 and not last and not evaluated):
            return
        self._printed = now
        left = f", {_duration(self._seconds_left(line['step']))} left" if self._recent and not last else ""
        shown = {"reward": "reward", "heldout_loss": "held-out loss", "heldout_reward": "held-out reward"}
        more = "".join(f", {word} {line[name]:.4f}" for name, word in shown.items() if line.get(name) is not None)
        loss = "not finite" if line["loss"] is None else f"{line['loss']:.4f}"
        print(
            f"step {line['step']} of {self._total}: loss {loss}{more}, lr {line['lr']:.2e}, "
            f"{line['perf']['tokens_per_second']:.0f} tokens/s{left}",
            file=sys.stderr,
            flush=True,
        )

    def _measure(self, perf: dict[str, Any], evaluated: bool) -> None:
        """Record the seconds of a step. The first step and steps with a compilation are excluded."""
        typical = self._compilations == perf["compilations"]
        self._compilations = perf["compilations"]
        if evaluated:
            step = sum(self._recent) / len(self._recent) if self._recent else 0.0
            self._evaluation = max(0.0, perf["seconds"] - step)
        elif typical:
            self._recent.append(perf["seconds"])

    def _seconds_left(self, step: int) -> float:
        """Estimate the time of the remaining steps and evaluations after `step`."""
        evaluations = 0
        if self._evaluation:  # evaluations run every `eval_every` steps and after the last step
            every = self._eval_every or self._total
            evaluations = -(-self._total // every) - step // every
        return (self._total - step) * sum(self._recent) / len(self._recent) + evaluations * self._evaluation


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
