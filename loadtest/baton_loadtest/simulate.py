"""A whole fleet in one process on a virtual clock: the production router, workers, hand-over and engine, with a fake
model, in-process RPC and transport, and a seed for everything.

The fake model keeps the promises that matter: it writes KV bytes that depend on token and position into the worker's
real pool, and draws each next token from a hash of all KV bytes of the sequence as it finds them through the block
table. A block that is missing, stale or another request's changes the answer, and `expected_tokens` says what is right.
"""

import asyncio
import hashlib
import random
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

from baton.clock import Clock, VirtualClock
from baton.config import EngineConfig, RouterConfig, TransferConfig
from baton.engine.batch import Batch, BatchRow
from baton.engine.engine import Engine
from baton.engine.worker import Worker
from baton.errors import BatonError
from baton.events import EventLines
from baton.index.memory import MemoryIndex
from baton.kv.block import num_blocks_for
from baton.kv.layout import KVLayout, LayerLayout
from baton.messages import Role, WorkerRecord
from baton.request import BlockId, Request, RequestId, SamplingParams, WorkerId
from baton.rpc import InprocNetwork as RpcNetwork
from baton.rpc import InprocRpc
from baton.transfer.inproc import InprocNetwork, InprocTransport
from baton_decode.receive import Receiver
from baton_decode.service import DecodeService
from baton_prefill.service import PrefillService
from baton_router.fleet import Fleet
from baton_router.mirror import PrefixMirror
from baton_router.pipeline import Pipeline

VOCAB_SIZE = 997
KV_BYTES_PER_TOKEN = 16  # per layer


class FakeStorage:
    """Plain bytes behind the same contract as the tensor pool."""

    def __init__(self, layout: KVLayout, num_blocks: int) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        self._bytes = memoryview(bytearray(layout.block_bytes * num_blocks))

    def region(self, block_id: BlockId, layer_start: int, layer_end: int) -> memoryview:
        base = block_id * self.layout.block_bytes
        offsets = self.layout.layer_offsets
        return self._bytes[base + offsets[layer_start] : base + offsets[layer_end]]

    def token(self, block_table: Sequence[BlockId], position: int, layer: int) -> memoryview:
        """The KV bytes of one position in one layer. They lie together here: one head of K, no V."""
        block_size = self.layout.block_size
        region = self.region(block_table[position // block_size], layer, layer + 1)
        start = position % block_size * KV_BYTES_PER_TOKEN
        return region[start : start + KV_BYTES_PER_TOKEN]

    def next_token(self, block_table: Sequence[BlockId], num_tokens: int) -> int:
        """Drawn from every KV byte of the first num_tokens positions, block by block."""
        state = hashlib.blake2b()
        num_full, num_rest = divmod(num_tokens, self.layout.block_size)
        for block_id in block_table[:num_full]:
            state.update(self.region(block_id, 0, self.layout.num_layers))
        for layer in range(self.layout.num_layers if num_rest else 0):
            region = self.region(block_table[num_full], layer, layer + 1)
            state.update(region[: num_rest * KV_BYTES_PER_TOKEN])
        return int.from_bytes(state.digest()[:8], "little") % VOCAB_SIZE


def _kv_bytes(token_id: int, position: int, layer: int) -> bytes:
    return hashlib.blake2b(b"%d/%d/%d" % (token_id, position, layer), digest_size=KV_BYTES_PER_TOKEN).digest()


def expected_tokens(prompt: Sequence[int], num_tokens: int, layout: KVLayout) -> list[int]:
    """What a fleet that is never wrong answers: the same model on a pool of its own, in one piece."""
    num_blocks = num_blocks_for(len(prompt) + num_tokens, layout.block_size)
    storage = FakeStorage(layout, num_blocks)
    table = [BlockId(index) for index in range(num_blocks)]
    tokens = list(prompt)
    done = 0
    for _ in range(num_tokens):
        for position in range(done, len(tokens)):
            for layer in range(layout.num_layers):
                storage.token(table, position, layer)[:] = _kv_bytes(tokens[position], position, layer)
        done = len(tokens)
        tokens.append(storage.next_token(table, done))
    return tokens[len(prompt) :]


@dataclass(frozen=True)
class Speed:
    """Of a simulated device."""

    step_s: float = 0.008
    prefill_token_s: float = 0.0002
    decode_row_s: float = 0.0001


class FakeModelRunner:
    """Takes simulated time; the pool it reads and writes is real."""

    def __init__(self, storage: FakeStorage, clock: Clock, speed: Speed, max_model_len: int) -> None:
        self.storage = storage
        self.vocab_size = VOCAB_SIZE
        self.max_model_len = max_model_len
        self._clock = clock
        self._speed = speed

    async def execute(self, batch: Batch) -> tuple[int, ...]:
        speed = self._speed
        num_prefill = sum(len(row.token_ids) for row in batch.rows if len(row.token_ids) > 1)
        num_decode = len(batch.rows)
        await self._clock.sleep(
            speed.step_s + num_prefill * speed.prefill_token_s + num_decode * speed.decode_row_s
        )
        return tuple(token for row in batch.rows if (token := self._run(row)) is not None)

    def _run(self, row: BatchRow) -> int | None:
        num_layers = self.storage.layout.num_layers
        end = row.start + len(row.token_ids)
        for position, token_id in enumerate(row.token_ids, row.start):
            for layer in range(num_layers):
                self.storage.token(row.block_table, position, layer)[:] = _kv_bytes(token_id, position, layer)
        return self.storage.next_token(row.block_table, end) if row.sample else None

    async def aclose(self) -> None:
        pass


@dataclass(frozen=True)
class FleetConfig:
    seed: int = 0
    num_prefill: int = 2
    num_decode: int = 2
    num_layers: int = 2
    max_model_len: int = 512
    engine: EngineConfig = field(
        default_factory=lambda: EngineConfig(num_blocks=256, max_num_batched_tokens=128)
    )
    transfer: TransferConfig = field(default_factory=lambda: TransferConfig(lease_s=2.0, push_timeout_s=1.0))
    router: RouterConfig = field(default_factory=lambda: RouterConfig(session_timeout_s=2.0))
    speed: Speed = field(default_factory=Speed)
    rpc_latency_s: float = 0.0005
    link_latency_s: float = 0.0002
    link_bytes_per_s: float = 1e9
    index_lease_s: float = 3.0

    @property
    def layout(self) -> KVLayout:
        layer = LayerLayout(num_kv_heads=1, k_dim=KV_BYTES_PER_TOKEN, v_dim=0)
        return KVLayout(self.engine.block_size, (layer,) * self.num_layers, "uint8", 1)


@dataclass
class SimulatedWorker:
    """One worker 'process': cancelling `running` after cutting its network is its SIGKILL."""

    worker: Worker
    engine: Engine
    receiver: Receiver
    record: WorkerRecord
    kv_address: str
    running: asyncio.Task[None]
    stop: asyncio.Event


class SimulatedFleet:
    """Everything that runs, and the switches of its network."""

    def __init__(self, config: FleetConfig, clock: VirtualClock) -> None:
        self.config = config
        self.clock = clock
        self.events = EventLines(clock)
        self.rng = random.Random(config.seed)
        self.rpc_network = RpcNetwork(clock, config.seed, latency_s=config.rpc_latency_s)
        self.kv_network = InprocNetwork(
            clock, config.seed, latency_s=config.link_latency_s, bytes_per_s=config.link_bytes_per_s
        )
        self.index = MemoryIndex(clock)
        self.mirror = PrefixMirror(clock)
        self.fleet = Fleet(
            config.router, InprocRpc(self.rpc_network, clock), self.mirror, self.index, clock, self.events
        )
        self.pipeline = Pipeline(
            config.router, self.fleet, clock, random.Random(config.seed + 1), self.events
        )
        self.workers: dict[WorkerId, SimulatedWorker] = {}
        self._num_started = 0

    async def start_worker(self, role: Role) -> SimulatedWorker:
        config, clock = self.config, self.clock
        self._num_started += 1
        name = WorkerId(f"{role.value}-{self._num_started}")
        layout = config.layout
        storage = FakeStorage(layout, config.engine.num_blocks or 256)
        runner = FakeModelRunner(storage, clock, config.speed, config.max_model_len)
        fingerprint = f"fake/{layout.describe()}"
        engine = Engine(config.engine, runner, clock, fingerprint)
        transport = InprocTransport(self.kv_network, clock, f"kv://{name}")
        receiver = Receiver(storage, clock, self.events)
        kv_address = await transport.listen(receiver)
        record = WorkerRecord(
            worker_id=name,
            incarnation=f"{name}.1",
            roles=(role,),
            address="",
            transports=(transport.name,),
            model="fake",
            fingerprint=fingerprint,
            block_size=layout.block_size,
            num_blocks=storage.num_blocks,
            max_model_len=config.max_model_len,
            kv_block_bytes=layout.block_bytes,
        )
        worker = Worker(
            record, engine, clock, self.events,
            index=self.index, lease_s=config.index_lease_s, heartbeat_s=0.5,
        )  # fmt: skip
        if role is Role.PREFILL:
            service = PrefillService(worker, storage, transport, config.transfer, clock, self.events)
            handlers = service.handlers()
        else:
            handlers = DecodeService(
                worker,
                receiver,
                transport.name,
                kv_address,
                config.transfer,
                clock,
                self.events,
                heartbeat_s=0.5,
            ).handlers()
        stop = asyncio.Event()
        serving = asyncio.get_running_loop().create_future()
        running = asyncio.create_task(
            worker.serve(
                InprocRpc(self.rpc_network, clock), f"rpc://{name}", handlers,
                stop=stop, grace_s=5.0, ready=lambda told: serving.set_result(told),
            )
        )  # fmt: skip
        told = await serving
        simulated = SimulatedWorker(worker, engine, receiver, told, kv_address, running, stop)
        self.workers[name] = simulated
        return simulated

    async def kill(self, worker_id: WorkerId) -> None:
        """SIGKILL: the network forgets it first, so none of its last words get out."""
        worker = self.workers.pop(worker_id)
        self.events("chaos.kill", worker=worker_id)
        self.rpc_network.kill(worker.record.address)
        self.kv_network.kill(worker.kv_address)
        worker.running.cancel()
        await asyncio.gather(worker.running, return_exceptions=True)

    async def ready(self, timeout_s: float = 10.0) -> None:
        """Until every started worker is linked."""
        async with self.clock.timeout(timeout_s):
            while len(self.fleet.ready()) < len(self.workers):
                await self.clock.sleep(0.05)

    async def ask(self, request: Request, timeout_s: float = 60.0) -> list[int]:
        """All tokens of one request. Raises what the client would see."""
        tokens: list[int] = []
        async for batch in self.pipeline.generate(request, timeout_s=timeout_s):
            for item in batch:
                assert item.first_index == len(tokens), (
                    f"{request.request_id}: a token is missing or came twice"
                )
                tokens.extend(item.token_ids)
        return tokens

    def check_conservation(self) -> None:
        """Every worker's pool adds up, whatever happened."""
        for worker in self.workers.values():
            worker.engine.check_integrity()

    def num_used_blocks(self) -> dict[WorkerId, int]:
        return {worker_id: worker.engine.num_used_blocks for worker_id, worker in self.workers.items()}


@asynccontextmanager
async def running_fleet(config: FleetConfig, clock: VirtualClock) -> AsyncGenerator[SimulatedFleet, None]:
    fleet = SimulatedFleet(config, clock)
    routing = asyncio.create_task(fleet.fleet.run())
    try:
        for role, number in ((Role.PREFILL, config.num_prefill), (Role.DECODE, config.num_decode)):
            for _ in range(number):
                await fleet.start_worker(role)
        await fleet.ready()
        yield fleet
    finally:
        for worker in fleet.workers.values():
            worker.stop.set()
        await asyncio.gather(*(worker.running for worker in fleet.workers.values()), return_exceptions=True)
        routing.cancel()
        await asyncio.gather(routing, return_exceptions=True)
        await fleet.index.aclose()


@dataclass(frozen=True)
class SimulationResult:
    num_requests: int
    num_correct: int
    num_failed: int
    simulated_s: float
    events: tuple[str, ...]

    @property
    def num_wrong(self) -> int:
        return self.num_requests - self.num_correct - self.num_failed


def simulate(
    config: FleetConfig,
    *,
    duration_s: float,
    rate: float,
    max_prompt_tokens: int = 200,
    max_output_tokens: int = 40,
) -> SimulationResult:
    """Poisson arrivals at `rate` per second for `duration_s` of virtual time, each answer held against the truth."""
    clock = VirtualClock()
    return clock.run(_simulate(config, clock, duration_s, rate, max_prompt_tokens, max_output_tokens))


async def _simulate(
    config: FleetConfig, clock: VirtualClock, duration_s: float, rate: float, max_prompt: int, max_output: int
) -> SimulationResult:
    rng = random.Random(config.seed)
    outcomes: list[str] = []

    async def one(number: int, prompt: tuple[int, ...], num_tokens: int) -> None:
        request = Request(
            RequestId(f"r{number}"),
            prompt,
            SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True),
        )
        try:
            tokens = await fleet.ask(request)
        except BatonError as error:
            outcomes.append("failed")
            fleet.events("client.error", request=request.request_id, code=error.code)
            return
        right = tokens == expected_tokens(prompt, num_tokens, config.layout)
        outcomes.append("right" if right else "wrong")
        fleet.events("client.done", request=request.request_id, right=right, tokens=len(tokens))

    async with running_fleet(config, clock) as fleet:
        async with asyncio.TaskGroup() as clients:
            number, end_s = 0, clock.now() + duration_s
            while True:
                await clock.sleep(rng.expovariate(rate))
                if clock.now() >= end_s:
                    break
                prompt = tuple(rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, max_prompt)))
                clients.create_task(one(number, prompt, rng.randint(1, max_output)))
                number += 1
        await clock.sleep(1.0)
        fleet.check_conservation()
        for worker_id, num_used in fleet.num_used_blocks().items():
            assert num_used == 0, f"{worker_id} still holds {num_used} blocks"
        now = clock.now()
    return SimulationResult(
        number, outcomes.count("right"), outcomes.count("failed"), now, tuple(fleet.events.lines)
    )


def with_seed(config: FleetConfig, seed: int) -> FleetConfig:
    return replace(config, seed=seed)
