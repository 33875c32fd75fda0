"""What every process does around its work: signals, exit codes, the link to the `baton up` that started it.

The link is one end of a socket pair, inherited by file descriptor. Upwards go JSON lines, {"ready": {...}} or
{"error": "..."}. Nothing comes down; its end of file means that the supervisor is gone, however it died. Then
the process stops: by itself within `LOST_GRACE_S`, else it is killed with its whole process group.

Exit codes: 0 stopped on request, 2 a setting is wrong (one line on stderr), 1 anything else.
"""

import asyncio
import contextlib
import errno
import json
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Coroutine, MutableMapping
from typing import Any

from baton.config import SUPERVISOR_FD
from baton.errors import BatonError, ConfigError

log = logging.getLogger("baton.process")

LOST_GRACE_S = 15.0

Ready = Callable[[dict[str, Any]], None]
Main = Callable[[asyncio.Event, Ready], Coroutine[Any, Any, None]]


class SupervisorLink:
    """Absent (`sock` is None) when nobody supervises this process; then nothing happens here."""

    def __init__(self, sock: socket.socket | None) -> None:
        self._sock = sock
        self._lost = threading.Event()
        self._stop: Callable[[], None] = lambda: None
        if sock is not None:
            threading.Thread(target=self._watch, args=(sock,), name="supervisor-link", daemon=True).start()

    @classmethod
    def from_env(cls, env: MutableMapping[str, str]) -> "SupervisorLink":
        fd = env.pop(SUPERVISOR_FD, None)
        if fd is None:
            return cls(None)
        sock = socket.socket(fileno=int(fd))
        sock.set_inheritable(False)
        return cls(sock)

    @property
    def present(self) -> bool:
        return self._sock is not None

    def report(self, kind: str, content: Any) -> None:
        if self._sock is not None:
            with contextlib.suppress(OSError):
                self._sock.sendall(json.dumps({kind: content}, default=str).encode() + b"\n")

    def on_lost(self, stop: Callable[[], None]) -> None:
        """`stop` is called once the supervisor is gone, from another thread."""
        self._stop = stop
        if self._lost.is_set():
            stop()

    def _watch(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while sock.recv(1024):
                pass
        self._lost.set()
        self._stop()
        # The main thread may hang in a library; a process that nobody supervises must not stay.
        threading.Event().wait(LOST_GRACE_S)
        os.killpg(0, signal.SIGKILL)


def run(import_main: Callable[[], Main], link: SupervisorLink, *, new_loop: Any = None) -> int:
    """Run one process until it is told to stop; returns its exit code. Never raises.

    `import_main` does the slow imports, so that their failures are reported like any other.
    """
    try:
        main = import_main()
        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(_serve(main, link))
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception as error:
        return _report_failure(error, link)
    return 0


async def _serve(main: Main, link: SupervisorLink) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    def on_signal(number: int) -> None:
        if stop.is_set():
            os._exit(128 + number)
        stop.set()

    def on_lost() -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended by itself
            loop.call_soon_threadsafe(stop.set)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    link.on_lost(on_lost)
    await main(stop, lambda info: link.report("ready", info))


def _report_failure(error: Exception, link: SupervisorLink) -> int:
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        error = ConfigError(f"address already in use: {error}")
    if isinstance(error, ConfigError):
        link.report("error", error.message)
        complain(error.message)
        return 2
    if isinstance(error, BatonError):
        complain(error.message)
    else:
        log.critical("stopped by an unexpected error", exc_info=error)
    return 1


def complain(message: str) -> None:
    """One line to the user."""
    sys.stderr.write(f"baton: {message}\n")
    sys.stderr.flush()
