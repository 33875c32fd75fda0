"""A fleet in one process: the production router, workers and hand-over over in-process RPC, with whatever model
runner and transport the caller brings. Ground of the simulation (fake model, virtual clock) and of tests with real
models."""

import asyncio
import random
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from baton.clock import Clock
from baton.config import EngineConfig, RouterConfig, TransferConfig
from baton.engine.batch import ModelRunner
from baton.engine.engine import Engine
from baton.engine.policy import policy_for
from baton.engine.worker import Worker
from baton.events import Emit
from baton.handover.fetch import Fetcher
from baton.handover.owner import PrefixOwner
from baton.handover.receive import Receiver
from baton.index.memory import MemoryIndex
from baton.messages import Compatibility, Fetched, Role, WorkerRecord
from baton.request import Request, WorkerId
from baton.rpc import Handlers, InprocRpc, InprocRpcNetwork
from baton.transfer.base import Transport
from baton.transfer.report import TransferReport
from baton_decode.service import DecodeService
from baton_prefill.service import PrefillService
from baton_router.fleet import Fleet
from baton_router.mirror import PrefixMirror
from baton_router.pipeline import Pipeline

HEARTBEAT_S = 0.5


@dataclass
class LocalWorker:
    worker: Worker
    engine: Engine
    runner: ModelRunner
    receiver: Receiver
    transport: Transport
    record: WorkerRecord
    kv_address: str
    running: asyncio.Task[None]
    stop: asyncio.Event
    prefill: PrefillService | None
    fetcher: Fetcher


class LocalFleet:
    """Owns router and workers. Use inside `routing()`."""

    def __init__(
        self,
        clock: Clock,
        rpc_network: InprocRpcNetwork,
        emit: Emit,
        *,
        router: RouterConfig,
        engine: EngineConfig,
        transfer: TransferConfig,
        index_lease_s: float,
        seed: int,
        prefills_ahead: bool = True,
    ) -> None:
        """Workers of the release before did not say that they `prefills_ahead`."""
        self.clock = clock
        self.rpc_network = rpc_network
        self.index = MemoryIndex(clock)
        self._rpc = InprocRpc(rpc_network, clock)
        self._emit = emit
        self._engine_config = engine
        self._transfer_config = transfer
        self._index_lease_s = index_lease_s
        self._prefills_ahead = prefills_ahead
        self.fleet = Fleet(router, self._rpc, PrefixMirror(clock), self.index, clock, emit)
        self.pipeline = Pipeline(router, self.fleet, clock, random.Random(seed), emit)
        self.workers: dict[WorkerId, LocalWorker] = {}
        self.transfers: list[TransferReport] = []  # of both ends, in the order they ended
        self.fetches: list[Fetched] = []  # likewise
        self._num_started = 0

    @asynccontextmanager
    async def routing(self) -> AsyncGenerator[None, None]:
        following = asyncio.create_task(self.fleet.run(self.pipeline.trial))
        try:
            yield
        finally:
            for worker in self.workers.values():
                worker.stop.set()
            for worker_id in tuple(self.workers):
                await asyncio.wait([self.workers[worker_id].running])
                await self.end_worker(worker_id)
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
            await self.index.aclose()

    def next_name(self, role: Role) -> WorkerId:
        self._num_started += 1
        return WorkerId(f"{role.value}-{self._num_started}")

    async def start_worker(
        self,
        name: WorkerId,
        roles: tuple[Role, ...],
        runner: ModelRunner,
        transport: Transport,
        fingerprint: str,
        compatibility: Compatibility | None = None,
    ) -> LocalWorker:
        """Without `compatibility` workers of equal fingerprints are taken for equal."""
        compatibility = compatibility or Compatibility(weights=fingerprint)
        storage, clock, emit = runner.storage, self.clock, self._emit
        engine = Engine(self._engine_config, runner, clock, fingerprint, policy_for(roles))
        receiver = Receiver(storage, compatibility.identity, clock, emit, self.transfers.append)
        kv_address = await transport.listen(receiver)
        worker = Worker(
            WorkerRecord(
                worker_id=name,
                incarnation=f"{name}.{self._num_started}",
                roles=roles,
                address="",
                transports=transport.names,
                model="local",
                fingerprint=fingerprint,
                block_size=storage.layout.block_size,
                num_blocks=storage.num_blocks,
                max_model_len=engine.max_model_len,
                kv_block_bytes=storage.layout.block_bytes,
                compatibility=compatibility,
                prefills_ahead=self._prefills_ahead and Role.PREFILL in roles,
            ),
            engine,
            clock,
            emit,
            index=self.index,
            lease_s=self._index_lease_s,
            heartbeat_s=HEARTBEAT_S,
        )
        worker.explain(receiver.explain)
        owner = PrefixOwner(
            worker, storage, transport, self._transfer_config, clock, emit, self.transfers.append
        )
        handlers: Handlers = owner.handlers()
        fetcher = Fetcher(
            worker, receiver, self._rpc, transport, kv_address, self._transfer_config, clock, emit,
            self.fetches.append,
        )  # fmt: skip
        prefill: PrefillService | None = None
        if Role.PREFILL in roles:
            prefill = PrefillService(
                worker, storage, transport, fetcher, self._transfer_config, clock, emit, self.transfers.append
            )
            handlers |= prefill.handlers()
        if Role.DECODE in roles:
            decode = DecodeService(
                worker, receiver, transport.name, kv_address, self._transfer_config, clock, emit,
                heartbeat_s=HEARTBEAT_S,
            )  # fmt: skip
            handlers |= decode.handlers()
        stop = asyncio.Event()
        ready: asyncio.Future[WorkerRecord] = asyncio.get_running_loop().create_future()
        serving = worker.serve(
            self._rpc, f"rpc://{name}", handlers, stop=stop, grace_s=5.0, ready=ready.set_result
        )
        running = asyncio.create_task(serving)
        record = await ready
        local = LocalWorker(
            worker, engine, runner, receiver, transport, record, kv_address, running, stop, prefill, fetcher
        )
        self.workers[name] = local
        return local

    async def end_worker(self, worker_id: WorkerId) -> None:
        """Stop it where it stands. Whoever wants a SIGKILL cuts its network before."""
        worker = self.workers.pop(worker_id)
        self._emit("worker.ended", worker=worker_id)
        worker.running.cancel()
        await asyncio.gather(worker.running, return_exceptions=True)
        if worker.prefill is not None:
            await worker.prefill.aclose()
        await worker.fetcher.aclose()
        await worker.transport.aclose()
        await worker.runner.aclose()

    async def ready(self, timeout_s: float = 10.0) -> None:
        """Until every started worker is linked and every pair has proven itself."""
        async with self.clock.timeout(timeout_s):
            while len(self.fleet.ready()) < len(self.workers) or self.fleet.unproven_pairs():
                await self.clock.sleep(0.05)

    async def ask(self, request: Request, timeout_s: float = 60.0) -> list[int]:
        """All tokens of one request. Raises what the client would see."""
        return (await self.ask_samples(request, timeout_s))[0]

    async def ask_samples(self, request: Request, timeout_s: float = 60.0) -> list[list[int]]:
        """The same for each of its samples."""
        samples: list[list[int]] = [[] for _ in range(request.sampling.n)]
        async for batch in self.pipeline.generate(request, timeout_s=timeout_s):
            for item in batch:
                tokens = samples[item.sample]
                assert item.first_index == len(tokens), f"{request.request_id}: a token is missing or twice"
                tokens.extend(item.token_ids)
        return samples

    def check_conservation(self) -> None:
        """Every worker's pool adds up, whatever happened."""
        for worker in self.workers.values():
            worker.engine.check_integrity()

    def num_used_blocks(self) -> dict[WorkerId, int]:
        return {worker_id: worker.engine.num_used_blocks for worker_id, worker in self.workers.items()}
