"""Profile a window of steps with jax.profiler into RUN/profile."""

import sys
import tempfile
from pathlib import Path
from typing import Any

import jax

from avocado_jax.data import storage
from avocado_jax.errors import InputError


class Profile:
    """Traces the steps `window[0]` to `window[-1]`.

    A run that resumes inside the window traces its remaining steps. `close` stops and keeps a running trace, for
    example after SIGTERM.

    Args:
        window: the first and the last step; empty: no trace.
        folder: output folder, local or gs://.
    """

    def __init__(self, window: tuple[int, ...], folder: str) -> None:
        self._window, self._folder = window, folder
        self._local: str | None = None  # folder of the running trace

    def before_step(self, number: int) -> None:
        """Start the trace if the step is in the window."""
        if self._local is None and self._window and self._window[0] <= number <= self._window[-1]:
            remote = storage.is_remote(self._folder)  # jax only writes local files
            self._local = tempfile.mkdtemp(prefix="avocado-") if remote else self._folder
            jax.profiler.start_trace(self._local)

    def after_step(self, number: int, outputs: Any) -> None:
        """Wait for the step and stop the trace if the step is the last of the window."""
        if self._local is not None and number >= self._window[-1]:
            jax.block_until_ready(outputs)
            self.close()

    def close(self) -> None:
        """Stop a running trace, and upload it if the folder is remote. A failed upload prints a warning."""
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
