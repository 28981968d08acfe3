"""The cost of a folder's calls over all runs: each call is appended before it is made."""

import json
from collections.abc import Callable

from avocado_jax.errors import InputError


class Ledger:
    """Sums of calls and tokens.

    A call is added with its estimated tokens before it is made, and corrected afterwards: a killed process leaves the
    estimate.

    Args:
        append: appends a line to the file; None: there is no file.
        data: the lines that the file has.
        name: of the file, for messages.

    Attributes:
        calls, tokens: of all runs.

    Raises:
        InputError: there are other lines.
    """

    def __init__(self, append: Callable[[bytes], None] | None = None, data: bytes = b"", name: str = ""):
        self.calls = self.tokens = 0
        self._append = append
        for number, line in enumerate(data.splitlines(), start=1):
            try:
                calls, tokens = json.loads(line)
                self.calls, self.tokens = self.calls + int(calls), self.tokens + int(tokens)
            except (ValueError, TypeError) as error:
                raise InputError(f"{name}:{number}: not a line of calls and tokens") from error

    def add(self, calls: int, tokens: int) -> None:
        """Add to the sums. Raises OSError if the line cannot be written."""
        self.calls, self.tokens = self.calls + calls, self.tokens + tokens
        if self._append:
            self._append(json.dumps([calls, tokens]).encode() + b"\n")
