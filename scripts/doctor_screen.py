"""Makes docs/doctor.md: what `baton doctor` says while a prefill worker is stopped with KV on its way.

    python scripts/doctor_screen.py > docs/doctor.md

Starts a fleet of its own on this machine, sends it prompts, and stops the prefill worker with SIGSTOP.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx

PORT = 18765
URL = f"http://127.0.0.1:{PORT}"
BATON = [sys.executable, "-m", "baton_cli"]
UP = ["up", "--port", str(PORT), "--index", "memory", "--transport", "tcp", "--max-num-batched-tokens", "64"]
COMMAND = ["doctor", "--base-url", URL]
NUM_PROMPTS = 16
PROMPT_TOKENS = 1800
AFTER_S = (0.0, 4.0)  # after the stop: before the router has noticed it, and then


def main() -> None:
    fleet = subprocess.Popen([*BATON, *UP], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_until_ready()
        for _ in range(3):
            _complete(500)
        print(_page(fleet.pid))
    finally:
        fleet.terminate()
        fleet.wait(30)


def _page(fleet: int) -> str:
    clients = [threading.Thread(target=_complete, args=(PROMPT_TOKENS + n,)) for n in range(NUM_PROMPTS)]
    healthy = _doctor()
    for client in clients:
        client.start()
    time.sleep(0.5)
    victim = _child(fleet, "prefill")
    os.kill(victim, signal.SIGSTOP)
    stopped_s = time.monotonic()
    screens = []
    try:
        for after_s in AFTER_S:
            time.sleep(max(0.0, stopped_s + after_s - time.monotonic()))
            screens.append((after_s, _doctor()))
    finally:
        os.kill(victim, signal.SIGCONT)
    for client in clients:
        client.join()
    parts = [
        "# What `baton doctor` says during a fault",
        f"Made by `python scripts/doctor_screen.py > docs/doctor.md`: `baton {' '.join(UP)}`, {NUM_PROMPTS} prompts of "
        f"{PROMPT_TOKENS:,} tokens, and SIGSTOP for the prefill worker half a second later. "
        "The doctor waits two seconds for a worker that is silent. GB/s is what a pair really gets while KV is on its "
        "wire, acknowledgements included: pieces as small as these mostly wait for each other.",
        f"## Before it\n```\n{healthy}```",
        *(f"## {after_s:g} s after the stop\n```\n{screen}```" for after_s, screen in screens),
    ]
    return "\n\n".join(parts)


def _doctor() -> str:
    env = os.environ | {"COLUMNS": "150", "NO_COLOR": "1"}
    done = subprocess.run([*BATON, *COMMAND], capture_output=True, text=True, env=env, check=False)
    lines = [line.rstrip() for line in (done.stdout + done.stderr).splitlines()]
    return "\n".join([f"$ baton {' '.join(COMMAND)}", *lines, f"$ echo $?\n{done.returncode}\n"])


def _complete(num_tokens: int) -> None:
    body = {
        "model": "demo",
        "prompt": [5 + (num_tokens + i) % 490 for i in range(num_tokens)],
        "max_tokens": 30,
    }
    httpx.post(f"{URL}/v1/completions", json=body, timeout=60)


def _wait_until_ready() -> None:
    deadline_s = time.monotonic() + 120
    while time.monotonic() < deadline_s:
        try:
            body = httpx.get(f"{URL}/health").json()
        except httpx.HTTPError:
            body = {}
        if body.get("pairs"):
            return
        time.sleep(0.2)
    raise TimeoutError("the fleet did not become ready within 120 s")


def _child(parent: int, word: str) -> int:
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            stat = (directory / "stat").read_text().rpartition(")")[2].split()
            command = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(stat[1]) == parent and f" {word} " in command:
            return int(directory.name)
    raise RuntimeError(f"no {word} process below {parent}")


if __name__ == "__main__":
    main()
