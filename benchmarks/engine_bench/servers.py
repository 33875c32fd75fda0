"""Servers under measurement: started, proved to answer, held still while others are measured, stopped.

    Spec --start--> Server: running <--resume, pause--> stopped by SIGSTOP --stop--> gone

All servers of a group are up at the same time, so that they can take turns; whoever is not measured is paused and
costs nothing, however it waits.
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

START_S = 900.0  # a compiling engine on two cores that others use, too
RESUME_S = 300.0  # what a phase that failed left behind comes first
STOP_S = 20.0
POLL_S = 0.25


@dataclass(frozen=True)
class Process:
    argv: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)  # on top of ours
    core: int | None = None  # where its threads belong that it has bound to any


@dataclass(frozen=True)
class Spec:
    name: str
    processes: tuple[Process, ...]
    urls: tuple[str, ...]  # requests go to them in turn
    model: str = "bench"  # its name in requests
    takes_token_ids: bool = True  # else the same prompt goes out as text
    takes_ignore_eos: bool = True  # the models never choose their end token, so it makes no difference
    is_ready: Callable[[str], bool] | None = None  # may raise OSError; beside that a request is tried


class Server:
    def __init__(self, spec: Spec, log_dir: Path) -> None:
        self.spec = spec
        self._log = log_dir / (re.sub(r"[^a-z0-9]+", "-", spec.name.lower()).strip("-") + ".log")
        with self._log.open("wb") as log:
            self._processes = [
                subprocess.Popen(
                    process.argv,
                    env=os.environ | process.env,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
                for process in spec.processes
            ]

    def wait_ready(self, timeout_s: float = START_S) -> None:
        """Until every URL has answered a request. Raises RuntimeError with the end of the log."""
        end_s = time.monotonic() + timeout_s
        for url in self.spec.urls:
            while not self._answers(url):
                gone = any(process.poll() is not None for process in self._processes)
                if gone or time.monotonic() > end_s:
                    why = "a process ended" if gone else f"no answer within {timeout_s:.0f} s"
                    raise RuntimeError(f"{self.spec.name}: {why}; {self._log} ends with\n{self._tail()}")
                time.sleep(POLL_S)

    def _answers(self, url: str) -> bool:
        prompt: object = [962, 963, 964] if self.spec.takes_token_ids else " aaa aab aac"
        body = {"model": self.spec.model, "prompt": prompt, "max_tokens": 2, "temperature": 0}
        request = urllib.request.Request(
            f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        try:
            if self.spec.is_ready is not None and not self.spec.is_ready(url):
                return False
            urllib.request.urlopen(request, timeout=60).close()
        except (OSError, ValueError):  # refused, no answer yet, or an error status
            return False
        return True

    def bind(self) -> None:
        """The threads that a process has bound are moved to its core; the others stay free."""
        free = os.sched_getaffinity(0)
        for spec, process in zip(self.spec.processes, self._processes, strict=True):
            for thread in _threads(process.pid) if spec.core is not None else ():
                with contextlib.suppress(ProcessLookupError):
                    if os.sched_getaffinity(thread) != free:
                        os.sched_setaffinity(thread, {spec.core})

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)
        self.wait_ready(RESUME_S)

    def cpu_s(self) -> float:
        """Of all its processes since they started."""
        seconds = 0.0
        for process in self._tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                seconds += times.user + times.system
        return seconds

    def memory_bytes(self) -> int:
        """Proportional set size: what is shared counts once."""
        return sum(p.memory_full_info().pss for p in self._tree())

    def stop(self) -> None:
        tree = self._tree()
        for process in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()
        for process in self._processes:
            process.terminate()
        _, alive = psutil.wait_procs(tree, timeout=STOP_S)
        for left in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()
        for process in self._processes:
            process.wait()

    def _signal(self, number: signal.Signals) -> None:
        for process in self._tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def _tree(self) -> list[psutil.Process]:
        return [each for process in self._processes for each in _family(process.pid)]

    def _tail(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-20:])


def _family(pid: int) -> list[psutil.Process]:
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _threads(pid: int) -> list[int]:
    found: list[int] = []
    for process in _family(pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            found += [thread.id for thread in process.threads()]
    return found


def free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def has_proven_pair(url: str) -> bool:
    """A Baton router that would send a prompt to a prefill worker."""
    with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
        return bool(json.load(response)["pairs"])


@contextlib.contextmanager
def all_running(
    specs: list[Spec], log_dir: Path, say: Callable[[str], None], failed: Callable[[Spec, str], None]
) -> Iterator[list[Server]]:
    """Started together, each paused as soon as it has answered. Those that never do are told to `failed`."""
    servers: list[Server] = []
    up: list[Server] = []
    try:
        for spec in specs:
            servers.append(Server(spec, log_dir))
        for server in servers:
            try:
                server.wait_ready()
            except RuntimeError as error:
                say(str(error))
                failed(server.spec, str(error))
                server.stop()
                continue
            server.bind()
            server.pause()
            up.append(server)
            say(f"{server.spec.name} is up, {server.memory_bytes() / 2**30:.1f} GiB")
        yield up
    finally:
        for server in servers:
            server.stop()


@contextlib.contextmanager
def awake(server: Server) -> Iterator[Server]:
    server.resume()
    try:
        yield server
    finally:
        server.pause()
