"""What a run tells of each step: metrics.jsonl, TensorBoard, wandb, and a line on stderr.

metrics.jsonl holds one line a finished step. All that depends on the clock or the machine is under "perf": two runs
of one config write the same bytes otherwise.
"""

import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from avocado_jax.data import storage
from avocado_jax.errors import InputError
from avocado_jax.parallel.chips import CHIPS


class Meter:
    """Counts what a process does beside its results: time by step, compilations, memory."""

    def __init__(self) -> None:
        self.compilations, self._at = 0, time.perf_counter()
        jax.monitoring.register_event_duration_secs_listener(self._heard)
        device = jax.devices()[0]
        chip = CHIPS.get(device.device_kind)
        self._peak = chip.flops * jax.device_count() if chip else float("nan")

    def _heard(self, event: str, _: float, **__: Any) -> None:
        self.compilations += event == "/jax/core/compile/backend_compile_duration"

    def perf(self, tokens: float, flops: float, padded: float, input_wait: float) -> dict[str, Any]:
        """The "perf" of a step that ended now and began when the one before it ended.

        `seconds` is the time between two steps, `mfu` the share of the devices' peak that the model's own work
        took (null where the peak is not known), `memory_bytes` the most that was in use on a device (of the process,
        on a CPU), `compilations` those of the process so far.
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
            "compilations": self.compilations,
        }


class Log:
    """The metrics of a run, written by process 0 only.

    A folder in a bucket gets its files when `flush` is called, which comes before every checkpoint.
    """

    def __init__(self, folder: str, step: int, tensorboard: bool, wandb: str, config: dict[str, Any]) -> None:
        """Go on behind `step`: lines past it, and a line that was cut short, are removed.

        Raises:
            InputError: wandb is asked for and not installed.
        """
        self._remote = folder if storage.is_remote(folder) else None
        self._here = jax.process_index() == 0
        self._board = self._wandb = self._file = None
        if not self._here:
            return
        self._local = local = Path(tempfile.mkdtemp(prefix="avocado-")) if self._remote else Path(folder)
        self.path = local / "metrics.jsonl"
        if self._remote and storage.exists(there := storage.join(folder, self.path.name)):
            storage.download(there, self.path)
        kept = _lines(self.path, step)
        part = self.path.with_suffix(".part")
        part.write_text("".join(line + "\n" for line in kept))
        os.replace(part, self.path)
        self._file = self.path.open("a")
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(local / "tensorboard"), purge_step=step + 1, flush_secs=30)
        if wandb:
            try:
                import wandb as library
            except ImportError:
                raise InputError("wandb is not installed: pip install 'avocado-jax[wandb]'") from None
            self._wandb = library.init(project=wandb, config=config, id=Path(folder).name, resume="allow")

    def write(self, line: dict[str, Any]) -> None:
        """One finished step."""
        if not self._here:
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
        """Make what was written last: a checkpoint of this step may follow."""
        if self._here:
            self._file.flush()
            os.fsync(self._file.fileno())
            if self._board:
                self._board.flush()
            for path in self._local.rglob("*") if self._remote else ():
                if path.is_file():
                    storage.write(storage.join(self._remote, str(path.relative_to(self._local))), path.read_bytes())

    def close(self) -> None:
        """Flush and end."""
        self.flush()
        if self._here:
            self._file.close()
            if self._board:
                self._board.close()
            if self._wandb:
                self._wandb.finish()


def _lines(path: Path, step: int) -> list[str]:
    """The whole lines of steps 1 to `step`."""
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


class Teller:
    """Progress for people, on stderr: every step while they are few, then every ten seconds."""

    def __init__(self, total: int) -> None:
        self._total, self._said, self._first = total, 0.0, None

    def tell(self, line: dict[str, Any]) -> None:
        """Say how a step went, if it is time."""
        now = time.monotonic()
        self._first = self._first or (line["step"], now)
        last = line["step"] == self._total
        if jax.process_index() or (now - self._said < 10 and not last and not any("heldout" in name for name in line)):
            return
        self._said = now
        steps, spent = line["step"] - self._first[0], now - self._first[1]
        left = f", {(self._total - line['step']) * spent / steps / 60:.0f} min left" if steps and not last else ""
        shown = {"reward": "reward", "heldout_loss": "held out", "heldout_reward": "held out"}
        more = "".join(f", {word} {line[name]:.4f}" for name, word in shown.items() if line.get(name) is not None)
        loss = "not finite" if line["loss"] is None else f"{line['loss']:.4f}"
        print(
            f"step {line['step']} of {self._total}: loss {loss}{more}, lr {line['lr']:.2e}, "
            f"{line['perf']['tokens_per_second']:.0f} tokens/s{left}",
            file=sys.stderr,
            flush=True,
        )
