"""compose.yaml for real: images of services/Dockerfile, a network, containers that are scaled and killed.

Takes minutes and needs podman, podman-compose and the images: `make test-containers` brings all three and selects
these tests; everybody else skips them.
"""

import json
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
LONG = {
    "model": "demo",
    "messages": [{"role": "user", "content": "repeat: tea milk sugar"}],
    "max_tokens": 3000,
    "ignore_eos": True,
    "stream": True,
}

pytestmark = [
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


def ask() -> str:
    answer = httpx.post(f"{URL}/v1/chat/completions", json=QUESTION, timeout=30.0)
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["message"]["content"]
    return text


@pytest.fixture(scope="module")
def fleet() -> Iterator[None]:
    for program in ("podman", "podman-compose"):
        if shutil.which(program) is None:
            pytest.fail(f"{program} is not installed")
    os.environ["BATON_PUBLISH"] = f"127.0.0.1:{PORT}"
    compose("up", "-d", "--no-build")
    try:
        wait("the first pair", lambda: num_proven_pairs() == 1)
        yield
    finally:
        names = run("podman", "ps", "-a", "--format", "{{.Names}}").split()
        ours = [name for name in names if name.startswith(f"{PROJECT}_")]
        run(
            "podman", "rm", "-f", "--time", "5", *ours, check=False
        )  # `down` would leave those of --scale behind
        compose("down", "-v")


def test_it_answers_through_a_pair(fleet: None) -> None:
    assert ask() == "bob lima"
    assert health()["transport"] is not None


def test_it_scales(fleet: None) -> None:
    compose("up", "-d", "--no-build", "--scale", "decode=2")
    assert len(containers("decode")) == 2
    wait("the second pair", lambda: num_proven_pairs() == 2)
    assert ask() == "bob lima"


def test_a_decode_container_dies_in_the_middle_of_a_stream(fleet: None) -> None:
    events: list[dict[str, Any]] = []
    killed = ""
    with httpx.stream("POST", f"{URL}/v1/chat/completions", json=LONG, timeout=60.0) as stream:
        for line in stream.iter_lines():
            if line.startswith("data: {"):
                events.append(json.loads(line[6:]))
            if len(events) == 20 and not killed:
                served_by = httpx.get(f"{URL}/debug/requests/{stream.headers['x-request-id']}").json()
                killed = next(n for n in containers("decode") if is_host_of(n, served_by["decode_worker"]))
                run("podman", "kill", killed)
    assert killed and ("error" in events[-1] or events[-1]["choices"][0]["finish_reason"] == "length")
    # The other one serves on at once; the killed one joins again when it is started.
    assert ask() == "bob lima"
    wait("noticing", lambda: num_proven_pairs() == 1)
    run("podman", "start", killed)
    wait("the pair to be proven again", lambda: num_proven_pairs() == 2)
    assert ask() == "bob lima"


def is_host_of(container: str, worker_id: str) -> bool:
    return run("podman", "inspect", "--format", "{{.Config.Hostname}}", container).strip() in worker_id


def test_redis_may_die_and_come_back(fleet: None) -> None:
    [redis] = containers("redis")
    run("podman", "kill", redis)
    assert ask() == "bob lima"
    wait("noticing", lambda: not health()["index"]["healthy"], 60.0)
    run("podman", "start", redis)
    wait("the index", lambda: bool(health()["index"]["healthy"]), 60.0)
    assert ask() == "bob lima"


def test_processes_are_not_root_and_cannot_write(fleet: None) -> None:
    for service in ("router", "prefill", "decode"):
        name = containers(service)[0]
        assert run("podman", "exec", name, "id", "-u").strip() == "10001"
        assert "Read-only" in run("podman", "exec", name, "sh", "-c", "touch /opt/x 2>&1 || true")
    assert (
        run("podman", "exec", containers("router")[0], "sh", "-c", "ls /opt/baton/lib/*/site-packages").find(
            "torch"
        )
        < 0
    )


def test_a_container_stops_within_its_grace(fleet: None) -> None:
    name = containers("decode")[-1]
    started = time.monotonic()
    run("podman", "stop", "--time", "30", name)
    assert run("podman", "inspect", "--format", "{{.State.ExitCode}}", name).strip() == "0"
    assert time.monotonic() - started < 30.0
    assert ask() == "bob lima"
