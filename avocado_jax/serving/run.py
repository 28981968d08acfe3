"""Run a server until a signal arrives or the devices fail."""

import asyncio
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from aiohttp import web

from avocado_jax.data.reader import READERS
from avocado_jax.errors import InputError
from avocado_jax.serving.app import Server

OTHER_THREADS = 8  # threads besides those that wait for clip readers
AFTER = 5.0  # seconds for requests to end after `Server.stop`


async def serve(server: Server, host: str, port: int, grace: float, listening: Callable[[int], None]) -> int:
    """Serve until SIGTERM or SIGINT, or until the backend fails.

    New connections are then refused, and requests in flight have `grace` seconds to finish. After that, or on a
    second signal, they end with status 503.

    Args:
        port: 0: any free port.
        listening: called with the port when the server accepts requests.

    Returns:
        The signal number; 0: the backend failed.

    Raises:
        InputError: the server cannot listen on the address.
    """
    loop, received, stopped = asyncio.get_running_loop(), [], asyncio.Event()
    loop.set_default_executor(ThreadPoolExecutor(READERS + OTHER_THREADS))

    def on_signal(number: int) -> None:
        received.append(number)
        stopped.set()
        if len(received) > 1:
            server.stop()

    runner = web.AppRunner(
        server.application(), handler_cancellation=True, shutdown_timeout=grace + AFTER, access_log=None
    )
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port)
        try:
            await site.start()
        except (OSError, OverflowError) as error:
            raise InputError(f"--host {host} --port {port}: {error}") from error
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal, number)
        listening(runner.addresses[0][1])
        waits = [asyncio.ensure_future(event.wait()) for event in (stopped, server.backend.failed)]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for task in waits:
            task.cancel()
        loop.call_later(grace, server.stop)
    finally:
        await runner.cleanup()
    return received[0] if received else 0
