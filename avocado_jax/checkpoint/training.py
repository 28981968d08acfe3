"""Checkpoints of a training run: saved while training goes on, sharded, restored onto any mesh and host count.

RUN/checkpoints/STEP/params/    the parameters, as `orbax.py` reads them
RUN/checkpoints/STEP/rest/      everything else on the devices: optimizer state, counters
RUN/checkpoints/STEP/position/  where the run stands, as JSON: step, batch plan, config, ...
RUN/checkpoints/STEP/metrics/   what a checkpoint is ranked by

A step is finished when Orbax has committed the whole of STEP: by a rename on disk, by `commit_success.txt` in a
bucket. RUN is local (on a disk that all hosts share) or gs://.
"""

import gc
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from operator import itemgetter
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from avocado_jax.checkpoint.orbax import finished_steps, is_remote, run_path, save_args
from avocado_jax.errors import InputError

METRIC = "metric"
UNFINISHED = ".orbax-checkpoint-tmp"  # how Orbax calls a step until it is renamed
RESTORE_GB = 32  # of what is restored, in a host's memory at once; more than the part of any parameter on a device
TIMEOUT = 600  # seconds that hosts wait for each other in a save


class Checkpoints:
    """The checkpoints of the run in `folder`. Every process makes one and calls its methods in the same order.

    Args:
        folder: of the run. What killed saves left in it is removed.
        keep: how many of the newest steps stay.
        keep_best: how many more stay that have the lowest metric.
    """

    def __init__(self, folder: str | os.PathLike, keep: int, keep_best: int = 1) -> None:
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs the traceback of what we tell in a line
        self.folder = run_path(folder)
        self._keep, self._keep_best = keep, keep_best
        self._opened: ocp.CheckpointManager | None = None
        with self._told("cannot be used"):
            self._manager()

    def _manager(self) -> ocp.CheckpointManager:
        """Orbax's manager; a new one after a failure, which removes what was left half-written."""
        if self._opened is None:
            rank = itemgetter(METRIC)
            best = BestN(get_metric_fn=rank, reverse=True, n=self._keep_best, keep_checkpoints_without_metrics=False)
            options = ocp.CheckpointManagerOptions(
                best_fn=rank,
                best_mode="min",
                preservation_policy=AnyPreservationPolicy([LatestN(self._keep), best]),
                cleanup_tmp_directories=True,
                save_root_metadata=False,
                async_options=ocp.options.AsyncOptions(timeout_secs=TIMEOUT),
            )
            items = ocp.handlers.DefaultCheckpointHandlerRegistry()
            for item in ("params", "rest"):
                handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=RESTORE_GB)
                items.add(item, ocp.args.PyTreeSave, handler)
                items.add(item, ocp.args.PyTreeRestore, handler)
            steps = self.folder / "checkpoints"
            self._opened = ocp.CheckpointManager(steps, options=options, handler_registry=items)
        return self._opened

    def save(self, step: int, params: Any, rest: Any, position: dict[str, Any], metric: float | None = None) -> None:
        """Begin to save a step: returns when the arrays are copied off the devices, and may then be donated.

        A save still going on is waited for. A step that is already saved stays as it is.

        Args:
            params, rest: trees of `jax.Array`; each process writes the shards that it holds.
            position: JSON, the same on every process.
            metric: what the step is ranked by, lower is better; None takes no part.

        Raises:
            OSError: this save could not begin, or the one before it failed, in one line. What was saved earlier is
                whole, and the next save may work.
        """
        self.wait()
        with self._told(f"step {step} cannot be saved"):
            if step in self._manager().all_steps():
                return
            needed = sum(leaf.nbytes for leaf in jax.tree.leaves((params, rest)))  # at most: they are compressed
            free = needed if is_remote(self.folder) else shutil.disk_usage(self.folder).free
            if free < needed:
                raise OSError(
                    f"the disk has {free / 1e6:,.0f} MB left, a checkpoint takes up to {needed / 1e6:,.0f} MB"
                )
            layout = jax.tree_util.tree_map_with_path(
                lambda path, _: save_args("layers" in jax.tree_util.keystr(path)), params
            )
            items = ocp.args.Composite(
                params=ocp.args.PyTreeSave(params, save_args=layout),
                rest=ocp.args.PyTreeSave(rest),
                position=ocp.args.JsonSave(position),
            )
            metrics = None if metric is None else {METRIC: float(metric)}
            self._manager().save(step, args=items, metrics=metrics, force=True)

    def latest(self) -> int | None:
        """The newest finished step on disk; None where there is none."""
        return max(finished_steps(self.folder), default=None)

    def restore(self, step: int, params_like: Any, rest_like: Any) -> tuple[Any, Any, dict[str, Any]]:
        """The parameters, the rest and the position of a finished step.

        Args:
            params_like, rest_like: trees of `jax.ShapeDtypeStruct` with shardings, on any mesh: each process reads
                what its devices hold.

        Raises:
            InputError: what is stored has other leaves or shapes, or its files are damaged.
        """
        trees = {"params": params_like, "rest": rest_like}
        restore_args = {name: ocp.checkpoint_utils.construct_restore_args(like) for name, like in trees.items()}
        items = {name: ocp.args.PyTreeRestore(like, restore_args=restore_args[name]) for name, like in trees.items()}
        try:
            differences = [line for name, like in trees.items() for line in self._differences(step, name, like)]
            if not differences:
                got = self._manager().restore(step, args=ocp.args.Composite(**items, position=ocp.args.JsonRestore()))
        except Exception as error:  # what tensorstore says of damaged files comes as a bare Exception
            raise InputError(f"{self.folder}: step {step} cannot be restored: {_one_line(error)}") from error
        if differences:
            more = f" (and {len(differences) - 1} more)" if len(differences) > 1 else ""
            raise InputError(f"{self.folder}: step {step} is of another model: {differences[0]}{more}")
        return got.params, got.rest, got.position

    def wait(self) -> None:
        """Wait until the save that is going on is finished. Raises as `save` does."""
        if self._opened is not None:
            with self._told("a checkpoint was not saved"):
                self._opened.wait_until_finished()

    def close(self) -> None:
        """Wait, and end the threads. Raises as `save` does."""
        if self._opened is not None:
            with self._told("a checkpoint was not saved"):
                self._opened.close()
            self._opened = None

    def _differences(self, step: int, name: str, like: Any) -> list[str]:
        """How the stored tree `name` differs from the one asked for, a leaf a line."""
        stored = _shapes(ocp.PyTreeCheckpointHandler().metadata(self.folder / "checkpoints" / str(step) / name).tree)
        asked = _shapes(like)
        return [
            f"{name}/{path} is {stored.get(path, 'not stored')}, asked for as {asked.get(path, 'nothing')}"
            for path in sorted(stored.keys() | asked.keys())
            if stored.get(path) != asked.get(path)
        ]

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """What Orbax and tensorstore raise when storage fails, as one line."""
        reason = None
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            reason = _one_line(error)
        if reason is not None:
            self._give_up()
            raise OSError(f"{self.folder / 'checkpoints'}: {what}: {reason}")

    def _give_up(self) -> None:
        """Let go of a failed save, whose error is told. Its unfinished writes would complain one by one."""
        failed, self._opened = self._opened, None
        if failed is not None:
            with suppress(Exception):
                failed.close()
        del failed
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        gc.collect()
        if is_remote(self.folder) or jax.process_index() != 0:
            return
        for _ in range(20):  # a full disk gets its space back; writes under way may make files a moment longer
            leftovers = list((self.folder / "checkpoints").glob(f"*{UNFINISHED}"))
            if not leftovers:
                break
            for path in leftovers:
                shutil.rmtree(path, ignore_errors=True)
            time.sleep(0.1)


def _one_line(error: BaseException) -> str:
    """The reason of an error; tensorstore buries the system's own, such as a full disk, in pages of detail."""
    text = " ".join(str(error).split())
    system = re.search(r": ([^:]+) \[os_error_code", text)
    return system[1] if system else text[:300] or type(error).__name__


def _shapes(tree: Any) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): str(list(leaf.shape)) for path, leaf in leaves}
