"""Signal handling that works while the main thread is inside a long C++ call, such as a compilation."""

import os
import signal
import sys
import threading
from collections.abc import Callable


def on_signal(numbers: tuple[int, ...], handle: Callable[[int], None]) -> Callable[[], None]:
    """Call `handle(number)` in a thread when one of these signals arrives. Returns a function to restore the handlers.

    Python runs signal handlers only between bytecodes of the main thread, but writes the signal number to the wake-up
    descriptor immediately.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = {number: signal.signal(number, lambda *_: None) for number in numbers}
    descriptor = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)

    def listen() -> None:
        while received := os.read(reading, 1):
            if received[0] in numbers:
                handle(received[0])
        os.close(reading)

    def restore() -> None:
        signal.set_wakeup_fd(descriptor)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writing)  # stops the thread

    threading.Thread(target=listen, daemon=True).start()
    return restore


def exit_unsaved(number: int) -> None:
    """Exit with 75 at once: there is nothing to save."""
    print(f"stopped by {signal.Signals(number).name}; the same command resumes", file=sys.stderr, flush=True)
    os._exit(75)
