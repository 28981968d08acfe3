"""The profile of a run: a window of steps traced by jax.profiler into RUN/profile."""

import sys
import tempfile
from pathlib import Path
from typing import Any

import jax

from avocado_jax.data import storage
from avocado_jax.errors import InputError


class Profile:
    """Traces the steps `window[0]` to `window[-1]`.

    A run that resumes inside the window traces the rest of it. `close` ends a trace that is still going on, after a
    SIGTERM for example, and keeps it.

    Args:
        window: the first and the last step; empty: nothing is traced.
        folder: for the trace, local or gs://.
    """

    def __init__(self, window: tuple[int, ...], folder: str) -> None:
        self._window, self._folder = window, folder
        self._local: str | None = None  # the folder of the trace that is going on

    def before_step(self, number: int) -> None:
        """Start to trace if the step is in the window."""
        if self._local is None and self._window and self._window[0] <= number <= self._window[-1]:
            remote = storage.is_remote(self._folder)  # jax writes local files only
            self._local = tempfile.mkdtemp(prefix="avocado-") if remote else self._folder
            jax.profiler.start_trace(self._local)

    def after_step(self, number: int, outputs: Any) -> None:
        """Wait for the step and end the trace if the step is the last of the window."""
        if self._local is not None and number >= self._window[-1]:
            jax.block_until_ready(outputs)
            self.close()

    def close(self) -> None:
        """End the trace, if there is one, and upload it to a bucket. A failed upload is a warning."""
        if self._local is None:
            return
        local, self._local = Path(self._local), None
        jax.profiler.stop_trace()
        if not storage.is_remote(self._folder):
            return
        try:
            for path in [path for path in local.rglob("*") if path.is_file()]:
                storage.upload(path, storage.join(self._folder, str(path.relative_to(local))))
        except (InputError, OSError) as error:
            print(f"the profile stays in {local}: {error}", file=sys.stderr)
