"""The cost of a folder's calls over all runs. Each call is recorded before it is made."""

import json
from collections.abc import Callable

from avocado_jax.errors import InputError


class Ledger:
    """Totals of calls and tokens.

    A call is recorded with its estimated tokens before it is made, and corrected afterwards. If the process is killed,
    the estimate remains.

    Args:
        append: appends a line to the file; None: no file.
        data: the content of the file.
        name: the name of the file, for messages.

    Attributes:
        calls, tokens: totals of all runs.

    Raises:
        InputError: the file has invalid lines.
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
        """Add to the totals. Raises OSError if the line cannot be written."""
        self.calls, self.tokens = self.calls + calls, self.tokens + tokens
        if self._append:
            self._append(json.dumps([calls, tokens]).encode() + b"\n")
