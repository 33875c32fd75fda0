"""compose.yaml brought up with podman-compose, for the tests that are marked `containers`."""

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

ROOT = Path(__file__).parents[2]
PROJECT = "baton-test"
PORT = 18080
URL = f"http://127.0.0.1:{PORT}"
QUESTION = {
    "model": "demo",
    "messages": [{"role": "user", "content": "ada oslo, bob lima, gus boston. bob?"}],
    "temperature": 0,
}
MARKS = [
    pytest.mark.containers,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        os.environ.get("BATON_TEST_CONTAINERS") != "1",
        reason="containers are tested by `make test-containers`",
    ),
]


def run(*command: str, check: bool = True) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0 or not check, f"{' '.join(command)}: {done.stdout}{done.stderr}"
    return done.stdout


def compose(*arguments: str) -> str:
    return run("podman-compose", "-p", PROJECT, "-f", "compose.yaml", *arguments)


@contextlib.contextmanager
def running(*up: str, **variables: str) -> Iterator[None]:
    """What `podman-compose ... up -d` with these arguments starts, under these variables of compose.yaml."""
    for program in ("podman", "podman-compose"):
        if shutil.which(program) is None:
            pytest.fail(f"{program} is not installed")
    os.environ.update(variables, BATON_PUBLISH=f"127.0.0.1:{PORT}")
    try:
        compose(*up)
        wait("the first pair", lambda: num_proven_pairs() == 1)
        yield
    finally:
        names = run("podman", "ps", "-a", "--format", "{{.Names}}").split()
        ours = [name for name in names if name.startswith(f"{PROJECT}_")]
        # `down` would leave those of --scale behind.
        run("podman", "rm", "-f", "--time", "5", *ours, check=False)
        compose("down", "-v")
        for name in variables:
            del os.environ[name]


def containers(service: str) -> list[str]:
    """Names of those that run."""
    names = run("podman", "ps", "--format", "{{.Names}}").split()
    return sorted(name for name in names if name.startswith(f"{PROJECT}_{service}_"))


def health() -> dict[str, Any]:
    answer: dict[str, Any] = httpx.get(f"{URL}/health", timeout=5.0).json()
    return answer


def wait(for_what: str, holds: Callable[[], bool], timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            if holds():
                return
        except httpx.HTTPError:
            pass
        assert time.monotonic() < deadline, f"{for_what} took longer than {timeout_s:g} s"
        time.sleep(0.5)


def num_proven_pairs() -> int:
    return len(health()["pairs"])


def ask(headers: dict[str, str] | None = None) -> str:
    answer = httpx.post(f"{URL}/v1/chat/completions", json=QUESTION, headers=headers, timeout=30.0)
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["message"]["content"]
    return text
