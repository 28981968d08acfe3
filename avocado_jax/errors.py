"""Exit statuses of failures: 1 a retry may help, 2 bad input, 3 a retry fails in the same way."""

import re
import sys
import traceback

# JAX raises runtime errors as JaxRuntimeError, and some as ValueError or RuntimeError. The message begins with the
# status code. The transient codes come from a lost peer or a busy service.
TRANSIENT = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED")
CODES = re.compile(
    "(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|UNKNOWN|INVALID_ARGUMENT|NOT_FOUND|ALREADY_EXISTS|PERMISSION_DENIED"
    "|RESOURCE_EXHAUSTED|FAILED_PRECONDITION|OUT_OF_RANGE|UNIMPLEMENTED|INTERNAL|DATA_LOSS|UNAUTHENTICATED): "
)


class InputError(Exception):
    """Bad input from outside. The message is one line that names the problem and its location.

    The command line prints it to stderr without a traceback and exits with status 2.
    """


def exit_status(error: BaseException) -> int:
    """The exit status of a command that ends with `error`.

    Libraries are looked up in `sys.modules`, not imported: without the import, their errors cannot occur.
    """
    if isinstance(error, InputError):
        return 2
    if (code := runtime_code(error)) is not None:
        return 1 if code in TRANSIENT else 3
    if _is_instance(error, "google.api_core.exceptions", "ServerError", "TooManyRequests", "RetryError"):
        return 1
    if _is_instance(error, "google.api_core.exceptions", "Forbidden", "Unauthorized", "NotFound"):
        return 2
    if _is_instance(error, "google.auth.exceptions", "GoogleAuthError"):
        return 1 if getattr(error, "retryable", False) else 2
    return 1 if isinstance(error, OSError) else 3  # OSError: storage, network, a full disk


def runtime_code(error: BaseException) -> str | None:
    """The status code of a JAX runtime error, such as "INTERNAL"; None for other errors."""
    found = CODES.match(str(error)) if isinstance(error, RuntimeError | ValueError) else None
    return found[1] if found else None


def first_line(error: BaseException) -> str:
    """The first line of an error message, or the error's type if the message is empty."""
    return (str(error).splitlines() or [type(error).__name__])[0][:500]


def report(error: BaseException, command: str) -> int:
    """Print an error to stderr and return its exit status. The last line has its type and message.

    The traceback is printed first, unless the message alone is sufficient.
    """
    status = exit_status(error)
    if isinstance(error, InputError | OSError | FloatingPointError):
        text = str(error) or type(error).__name__
    else:
        traceback.print_exception(error)
        text = f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"
    print(f"avocado {command}: {text}", file=sys.stderr, flush=True)
    return status


def _is_instance(error: BaseException, module: str, *names: str) -> bool:
    known = sys.modules.get(module)
    return known is not None and isinstance(error, tuple(getattr(known, name) for name in names))
