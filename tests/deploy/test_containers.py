"""compose.yaml for real: images of services/Dockerfile, a network, containers that are scaled and killed.

Takes minutes and needs podman, podman-compose and the images: `make test-containers` brings all three and selects
these tests; everybody else skips them.
"""

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from containers import MARKS, URL, ask, compose, containers, health, num_proven_pairs, run, running, wait

import baton

LONG = {
    "model": "demo",
    "messages": [{"role": "user", "content": "repeat: tea milk sugar"}],
    "max_tokens": 3000,
    "ignore_eos": True,
    "stream": True,
}
BUILD_TOOLS = "gcc g++ cc c++ clang ld as make cmake git pip pip3"

pytestmark = MARKS


@pytest.fixture(scope="module")
def fleet() -> Iterator[None]:
    with running("up", "-d", "--no-build"):
        yield


def test_it_answers_through_a_pair(fleet: None) -> None:
    assert ask() == "bob lima"
    assert health()["transport"] is not None


def test_it_scales(fleet: None) -> None:
    for scale in ("decode=2", "prefill=2"):  # podman-compose takes one at a time
        compose("up", "-d", "--no-build", "--scale", scale)
    assert len(containers("decode")) == len(containers("prefill")) == 2
    wait("four pairs", lambda: num_proven_pairs() == 4)
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
    wait("noticing", lambda: num_proven_pairs() == 2)
    run("podman", "start", killed)
    wait("its pairs to be proven again", lambda: num_proven_pairs() == 4)
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


def test_a_worker_may_start_before_redis(fleet: None) -> None:
    [redis] = containers("redis")
    worker = containers("decode")[0]
    run("podman", "kill", redis, worker)
    run("podman", "start", worker)
    assert ask() == "bob lima"  # by the other one
    wait("noticing", lambda: num_proven_pairs() == 2)
    run("podman", "start", redis)
    wait("its pairs to be proven again", lambda: num_proven_pairs() == 4)


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


@pytest.mark.parametrize("image", ["baton-router", "baton-worker"])
def test_nothing_that_builds_or_installs_is_in_the_images(image: str) -> None:
    look = ["podman", "run", "--rm", "--entrypoint", "sh", image, "-c"]
    assert run(*look, f"for tool in {BUILD_TOOLS}; do command -v $tool; done; true") == ""
    for python in ("python", "/opt/baton/bin/python"):
        for module in ("pip", "ensurepip"):
            assert "No module named" in run(*look, f"{python} -m {module} 2>&1; true")


@pytest.mark.parametrize("image", ["baton-router", "baton-worker"])
def test_the_images_say_what_they_are(image: str) -> None:
    [config] = json.loads(run("podman", "inspect", image))
    labels = {name.removeprefix("org.opencontainers.image."): v for name, v in config["Labels"].items()}
    assert labels["title"] == "baton" and labels["version"] == baton.__version__
    assert labels["licenses"] == "Apache-2.0" and labels["description"]
    assert labels["source"] and len(labels["revision"]) == 40
