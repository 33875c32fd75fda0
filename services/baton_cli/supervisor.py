"""Child processes and their common fate: they start, report that they are ready, and end together.

Every child gets a session of its own, so that Ctrl-C reaches the supervisor alone and it ends them in order,
and one end of a socket pair (see `process`): ready and error reports come up it, and a child whose supervisor
was killed sees its end of file.

    starting --{"ready": ...}--> ready --stop()--> SIGTERM --grace--> SIGKILL of the group
        \\______ exits by itself, or {"error": ...} ______/   => everything else is ended too
"""

import asyncio
import contextlib
import json
import os
import signal
import socket
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from baton.config import SUPERVISOR_FD
from baton.errors import ConfigError, InternalError

T = TypeVar("T")

TAIL_LINES = 20
MAX_LINE_BYTES = 64 * 1024
DRAIN_S = 1.0  # for the last output of a child that has ended; a grandchild may hold its pipe open


class ChildDied(InternalError):
    """A child ended by itself. `tail` is the last it said."""

    def __init__(self, name: str, code: int, tail: list[str]) -> None:
        super().__init__(f"{name} {_exit_text(code)}")
        self.child, self.tail = name, tail


class StartTimeout(InternalError):
    """A child did not get ready in time. `tail` is the last it said."""

    def __init__(self, name: str, seconds: float, tail: list[str]) -> None:
        super().__init__(f"{name} was not ready after {seconds:.0f} s")
        self.child, self.tail = name, tail


@dataclass(frozen=True)
class ChildSpec:
    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    stdin: bytes = b""
    wave: int = 0  # lower waves are ended first


@dataclass(eq=False)
class Child:
    spec: ChildSpec
    process: asyncio.subprocess.Process
    ready: asyncio.Future[dict[str, Any]]
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=TAIL_LINES))
    complaint: str | None = None  # its {"error": ...}

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def pid(self) -> int:
        return self.process.pid


class Supervisor:
    """Owns its children. `on_line(name, line)` gets each line of their output.

    Use as a context manager: leaving it ends every child, whatever the reason.
    """

    def __init__(self, on_line: Callable[[str, str], None], *, grace_s: float = 10.0) -> None:
        self._on_line = on_line
        self._grace_s = grace_s
        self._children: list[Child] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._stopping = False

    async def __aenter__(self) -> "Supervisor":
        return self

    async def __aexit__(self, *exc: object) -> None:
        stop = asyncio.create_task(self.stop())
        try:
            await asyncio.shield(stop)
        except asyncio.CancelledError:
            self.kill()
            await stop
            raise

    async def start(self, spec: ChildSpec) -> Child:
        ours, theirs = socket.socketpair()
        # A pipe of our own: asyncio's would make `process.wait` wait for every grandchild that inherited it.
        read_end, write_end = os.pipe()
        try:
            process = await asyncio.create_subprocess_exec(
                *spec.argv,
                stdin=asyncio.subprocess.PIPE,
                stdout=write_end,
                stderr=write_end,
                env={**spec.env, SUPERVISOR_FD: str(theirs.fileno())},
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        except BaseException:
            ours.close()
            os.close(read_end)
            raise
        finally:
            theirs.close()
            os.close(write_end)
        child = Child(spec, process, asyncio.get_running_loop().create_future())
        self._children.append(child)
        follow = self._follow(child, read_end, ours)
        self._tasks.append(asyncio.create_task(follow, name=f"follow {spec.name}"))
        return child

    async def ready(self, child: Child, timeout_s: float) -> dict[str, Any]:
        """What the child said when it was ready. Await it within `watch`, which sees the child die."""
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(child.ready)
        except TimeoutError:
            raise StartTimeout(child.name, timeout_s, list(child.tail)) from None

    async def watch(self, body: Awaitable[T]) -> T:
        """Await `body`; raise ChildDied, or the child's ConfigError, as soon as a child ends by itself."""
        work: asyncio.Future[Any] = asyncio.ensure_future(body)
        try:
            await asyncio.wait({work, self._failure}, return_when=asyncio.FIRST_COMPLETED)
            if self._failure.done():
                self._failure.result()
            result: T = await work
            return result
        finally:
            if not work.done():
                work.cancel()
                await asyncio.wait({work})

    async def stop(self) -> None:
        """SIGTERM wave by wave, SIGKILL after the grace period; returns when all are gone."""
        self._stopping = True
        for wave in sorted({child.spec.wave for child in self._children}):
            children = [child for child in self._children if child.spec.wave == wave]
            for child in children:
                _signal(child, signal.SIGTERM)
            exits = [asyncio.create_task(child.process.wait()) for child in children]
            await asyncio.wait(exits, timeout=self._grace_s)
            for child in children:
                _signal_group(child, signal.SIGKILL)  # what hangs, and grandchildren that were left behind
            await asyncio.gather(*exits)
        if self._tasks:
            await asyncio.wait(self._tasks)
        if self._failure.done() and not self._failure.cancelled():
            self._failure.exception()  # seen: whoever watches has raised it, or was on the way out already

    def kill(self) -> None:
        """SIGKILL to everything at once: the second Ctrl-C."""
        for child in self._children:
            _signal_group(child, signal.SIGKILL)

    async def _follow(self, child: Child, output: int, link: socket.socket) -> None:
        """One task per child, from its start to its end."""
        reading = asyncio.gather(self._read_output(child, output), _read_reports(child, link))
        try:
            await _give_input(child)
            code = await child.process.wait()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(DRAIN_S):
                    await reading
            if not self._stopping:
                self._fail(_reason(child, code))
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        if not self._failure.done():
            self._failure.set_exception(error)

    async def _read_output(self, child: Child, output: int) -> None:
        reader = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(output, "rb", buffering=0)
        )
        try:
            await self._take_lines(child, reader)
        finally:
            transport.close()

    async def _take_lines(self, child: Child, reader: asyncio.StreamReader) -> None:
        rest = b""
        while data := await reader.read(MAX_LINE_BYTES):
            *lines, rest = (rest + data).split(b"\n")
            if len(rest) > MAX_LINE_BYTES:
                lines, rest = [*lines, rest], b""
            for line in lines:
                self._take_line(child, line)
        if rest:
            self._take_line(child, rest)

    def _take_line(self, child: Child, raw: bytes) -> None:
        line = raw.decode(errors="replace").rstrip()
        child.tail.append(line)
        try:
            self._on_line(child.name, line)
        except OSError as error:  # our own output is closed; keep reading, so that the child can end in order
            self._fail(error)


async def _give_input(child: Child) -> None:
    stdin = child.process.stdin
    assert stdin is not None
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has ended; its exit code tells why
        stdin.write(child.spec.stdin)
        await stdin.drain()
    stdin.close()


async def _read_reports(child: Child, link: socket.socket) -> None:
    reader, writer = await asyncio.open_connection(sock=link)
    try:
        async for line in reader:
            report = json.loads(line)
            if "error" in report:
                child.complaint = str(report["error"])
            elif not child.ready.done():
                child.ready.set_result(report["ready"])
    finally:
        writer.close()


def _reason(child: Child, code: int) -> Exception:
    if child.complaint is not None:
        return ConfigError(child.complaint)
    return ChildDied(child.name, code, list(child.tail))


def _exit_text(code: int) -> str:
    if code >= 0:
        return f"ended by itself with exit code {code}"
    return f"was killed by {signal.Signals(-code).name}"


def _signal(child: Child, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        child.process.send_signal(number)


def _signal_group(child: Child, number: signal.Signals) -> None:
    # The child leads its group, which lives as long as any member does.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, number)
