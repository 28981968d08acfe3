"""A retry policy for google-cloud-storage whose timeout starts at the first failure."""

import time
from collections.abc import Callable
from typing import Any

from google.api_core.retry import Retry
from google.cloud.storage.retry import DEFAULT_RETRY


class PatientRetry(Retry):
    """Retries the errors of `DEFAULT_RETRY` (408, 429, 500, 502, 503, 504, broken connections) with its backoff.

    The timeout of `Retry` starts with the request, so a transfer that breaks after a longer time is not retried. Here
    the timeout starts at the first failure, and restarts when `progress` has changed since. The library calls this
    object for each request and for each chunk of a resumable upload; each call starts a new timeout.
    """

    def __init__(self, patience: float, progress: Callable[[], int] = lambda: 0) -> None:
        """
        Args:
            patience: seconds of failures without progress after which the last error is raised.
            progress: position of the transfer in bytes.
        """
        super().__init__(predicate=DEFAULT_RETRY._predicate, initial=0.1, maximum=10.0, multiplier=2.0, timeout=None)
        self._patience, self._progress = patience, progress

    def __call__(self, func: Callable[..., Any], on_error: Callable[[Exception], Any] | None = None) -> Any:
        """Wrap a request."""
        since, reached = 0.0, -1

        def check(error: Exception) -> None:
            nonlocal since, reached
            now, position = time.monotonic(), self._progress()
            if position != reached:
                since, reached = now, position
            elif now - since > self._patience:
                raise error

        return super().__call__(func, on_error or check)
