"""Checkpoints of a training run: saved asynchronously and sharded, restored to any mesh and number of hosts.

RUN/checkpoints/STEP/params/    the parameters, in the format of `orbax.py`
RUN/checkpoints/STEP/rest/      optimizer state and counters
RUN/checkpoints/STEP/position/  the state of the run as JSON: step, batch plan, config, ...
RUN/checkpoints/STEP/metrics/   the metric for ranking the checkpoint

Orbax commits a step after writing all of it: by a rename on disk, by `commit_success.txt` in a bucket. RUN is local
(on a disk shared by all hosts) or gs://.

In a bucket, Orbax calls storage.buckets.get when it opens a folder with steps and when it deletes an old step. The
start-up check requires this permission (train/startup.py).
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

from avocado_jax.checkpoint.orbax import finished_steps, save_args
from avocado_jax.checkpoint.references import is_remote, run_path
from avocado_jax.data import storage
from avocado_jax.errors import InputError

METRIC = "metric"
UNFINISHED = ".orbax-checkpoint-tmp"  # part of the folder name of an uncommitted step
RESTORE_GB = 32  # limit of a host's memory during a restore; larger than any device's shard of a parameter
TIMEOUT = 600  # timeout of hosts waiting for each other in a save, in seconds


class Checkpoints:
    """The checkpoints of one run. Every process creates one and calls its methods in the same order.

    Args:
        folder: the run folder. Unfinished saves of earlier processes are removed.
        keep: number of newest steps to keep.
        keep_best: number of steps with the lowest metric to keep in addition.

    Raises:
        InputError: access to the bucket is denied.
        OSError: storage failed.
    """

    def __init__(self, folder: str | os.PathLike, keep: int, keep_best: int = 1) -> None:
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs tracebacks of errors that are raised here
        self.folder = run_path(folder)
        self._keep, self._keep_best = keep, keep_best
        self._opened: ocp.CheckpointManager | None = None
        with self._errors("cannot be used"):
            self._manager()

    def _manager(self) -> ocp.CheckpointManager:
        """Orbax's manager. It is recreated after a failure, which removes unfinished saves."""
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
        """Start saving a step. Returns when the arrays are copied to the host, so that they may be donated.

        Waits for the previous save first. A no-op if the step is already saved.

        Args:
            params, rest: trees of `jax.Array`; each process writes its shards.
            position: JSON, the same on every process.
            metric: value for ranking the step, lower is better; None: unranked.

        Raises:
            InputError: access to the bucket is denied.
            OSError: this save could not start, or the previous one failed. Earlier steps are intact, and the next
                save may succeed.
        """
        self.wait()
        with self._errors(f"step {step} cannot be saved"):
            if step in self._manager().all_steps():
                return
            needed = sum(leaf.nbytes for leaf in jax.tree.leaves((params, rest)))  # an upper bound: compressed on disk
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
        """The newest finished step; None if there is none. Raises as `finished_steps`."""
        return max(finished_steps(self.folder), default=None)

    def restore(self, step: int, params_like: Any, rest_like: Any) -> tuple[Any, Any, dict[str, Any]]:
        """Restore the parameters, the rest and the position of a finished step.

        Args:
            params_like, rest_like: trees of `jax.ShapeDtypeStruct` with shardings, on any mesh. Each process reads
                the shards of its devices.

        Raises:
            InputError: the checkpoint has other leaves or shapes, its files are damaged, or access is denied.
            StorageError: storage failed.
        """
        trees = {"params": params_like, "rest": rest_like}
        restore_args = {name: ocp.checkpoint_utils.construct_restore_args(like) for name, like in trees.items()}
        items = {name: ocp.args.PyTreeRestore(like, restore_args=restore_args[name]) for name, like in trees.items()}
        try:
            differences = [line for name, like in trees.items() for line in self._differences(step, name, like)]
            if not differences:
                got = self._manager().restore(step, args=ocp.args.Composite(**items, position=ocp.args.JsonRestore()))
        except jax.errors.JaxRuntimeError:  # a lost peer, or out of memory: not caused by the checkpoint
            raise
        except Exception as error:  # Orbax raises Exception for damaged files
            failed = storage.failure(str(self.folder), error) if is_remote(self.folder) else None
            raise failed or InputError(f"{self.folder}: step {step} cannot be restored: {_one_line(error)}") from error
        if differences:
            more = f" (and {len(differences) - 1} more)" if len(differences) > 1 else ""
            raise InputError(f"{self.folder}: step {step} is of another model: {differences[0]}{more}")
        return got.params, got.rest, got.position

    def wait(self) -> None:
        """Wait for the save in progress. Raises as `save`."""
        if self._opened is not None:
            with self._errors("a checkpoint was not saved"):
                self._opened.wait_until_finished()

    def close(self) -> None:
        """Wait for the save in progress and stop the threads. Raises as `save`."""
        if self._opened is not None:
            with self._errors("a checkpoint was not saved"):
                self._opened.close()
            self._opened = None

    def _differences(self, step: int, name: str, like: Any) -> list[str]:
        """List the differences between the stored tree `name` and the requested one, one line per leaf."""
        stored = _shapes(ocp.PyTreeCheckpointHandler().metadata(self.folder / "checkpoints" / str(step) / name).tree)
        wanted = _shapes(like)
        return [
            f"{name}/{path} is {stored.get(path, 'not stored')}, expected {wanted.get(path, 'nothing')}"
            for path in sorted(stored.keys() | wanted.keys())
            if stored.get(path) != wanted.get(path)
        ]

    @contextmanager
    def _errors(self, action: str) -> Iterator[None]:
        """Convert errors of Orbax and the storage libraries to one line, and discard the manager."""
        failed: Exception | None = None
        try:
            yield
        except jax.errors.JaxRuntimeError:  # a lost peer, or out of memory: handled by the caller
            raise
        except Exception as error:
            failed = storage.failure(str(self.folder), error) if is_remote(self.folder) else None
            if failed is None and not isinstance(error, OSError | ValueError | RuntimeError):
                raise
            if not isinstance(failed, InputError):
                failed = OSError(f"{self.folder / 'checkpoints'}: {action}: {_one_line(error)}")
        if failed is not None:
            self._discard_manager()
            raise failed

    def _discard_manager(self) -> None:
        """Discard the manager of a failed save, and the files that it has written."""
        failed, self._opened = self._opened, None
        if failed is not None:
            with suppress(Exception):
                failed.close()
        del failed
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # each unfinished write would log an error
        gc.collect()
        if is_remote(self.folder) or jax.process_index() != 0:
            return
        for _ in range(20):  # free the space of a full disk; pending writes may still create files
            leftovers = list((self.folder / "checkpoints").glob(f"*{UNFINISHED}"))
            if not leftovers:
                break
            for path in leftovers:
                shutil.rmtree(path, ignore_errors=True)
            time.sleep(0.1)


def _one_line(error: BaseException) -> str:
    """The reason of an error in one line, without the details that tensorstore adds to a system error."""
    text = " ".join(str(error).split())
    system = re.search(r": ([^:]+) \[os_error_code", text)
    return system[1] if system else text[:300] or type(error).__name__


def _shapes(tree: Any) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): str(list(leaf.shape)) for path, leaf in leaves}
