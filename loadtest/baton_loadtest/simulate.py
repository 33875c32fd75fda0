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
from baton.errors import BatonError
from baton.events import EventLines
from baton.kv.block import num_blocks_for
from baton.kv.layout import KVLayout, LayerLayout
from baton.messages import Role
from baton.request import BlockId, Request, RequestId, SamplingParams, WorkerId
from baton.rpc import InprocRpcNetwork
from baton.transfer.inproc import InprocNetwork, InprocTransport
from baton_loadtest.local_fleet import LocalFleet, LocalWorker

VOCAB_SIZE = 997
KV_BYTES_PER_TOKEN = 16  # per layer
NUM_SAMPLES = (1, 1, 1, 1, 1, 1, 1, 3)  # of a request: one of these


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

    def copy(self, source: BlockId, destination: BlockId) -> None:
        num_layers = self.layout.num_layers
        self.region(destination, 0, num_layers)[:] = self.region(source, 0, num_layers)

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
        self.grammars = None
        self._clock = clock
        self._speed = speed
        self._drawn: tuple[int, ...] = ()  # by the batch before
        self._turn = asyncio.Lock()  # a device does one thing after the other

    async def execute(self, batch: Batch) -> tuple[int, ...]:
        async with self._turn:
            drawn, self._drawn = self._drawn, ()
            self._drawn = await self._execute(_resolved(batch, drawn))
            return self._drawn

    async def _execute(self, batch: Batch) -> tuple[int, ...]:
        """Layer by layer, and as long as each takes: whoever listens can send a layer while the next is computed."""
        speed, listener = self._speed, batch.listener
        num_prefill = sum(len(row.token_ids) for row in batch.rows if len(row.token_ids) > 1)
        num_decode = len(batch.rows)
        step_s = speed.step_s + num_prefill * speed.prefill_token_s + num_decode * speed.decode_row_s
        for copy in batch.copies:
            self.storage.copy(*copy)
        num_layers, start = self.storage.layout.num_layers, 0
        late, told = num_layers * 3 // 4, listener.ends if listener else ()
        for end in sorted({*told, late, num_layers}):
            await self._clock.sleep(step_s * (end - start) / num_layers)
            for row in batch.rows:
                self._write(row, range(start, end))
            if listener and end in told:
                listener.written(end)
            if end == late:
                batch.prepare_next()
            start = end
        return tuple(
            self.storage.next_token(row.block_table, row.start + len(row.token_ids))
            for row in batch.rows
            if row.sample
        )

    def _write(self, row: BatchRow, layers: range) -> None:
        for position, token_id in enumerate(row.token_ids, row.start):
            for layer in layers:
                self.storage.token(row.block_table, position, layer)[:] = _kv_bytes(token_id, position, layer)

    async def aclose(self) -> None:
        pass


def _resolved(batch: Batch, drawn: tuple[int, ...]) -> Batch:
    """With the tokens of the batch before in place of -1 - i; 0 where it drew none."""

    def known(token: int) -> int:
        return token if token >= 0 else drawn[-1 - token] if -1 - token < len(drawn) else 0

    rows = tuple(row._replace(token_ids=tuple(map(known, row.token_ids))) for row in batch.rows)
    return replace(batch, rows=rows)


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
    transfer: TransferConfig = field(
        default_factory=lambda: TransferConfig(lease_s=2.0, push_timeout_s=1.0, min_piece_bytes=1)
    )
    router: RouterConfig = field(default_factory=lambda: RouterConfig(session_timeout_s=2.0))
    speed: Speed = field(default_factory=Speed)
    rpc_latency_s: float = 0.0005
    link_latency_s: float = 0.0002
    link_bytes_per_s: float = 1e9
    index_lease_s: float = 3.0
    prefills_ahead: bool = True  # False: workers of the release before

    @property
    def layout(self) -> KVLayout:
        layer = LayerLayout(num_kv_heads=1, k_dim=KV_BYTES_PER_TOKEN, v_dim=0)
        return KVLayout(self.engine.block_size, (layer,) * self.num_layers, "uint8", 1)


class SimulatedFleet(LocalFleet):
    """A LocalFleet of fake models on a simulated network."""

    def __init__(self, config: FleetConfig, clock: VirtualClock) -> None:
        self.config = config
        self.events = EventLines(clock)
        self.kv_network = InprocNetwork(
            clock, config.seed, latency_s=config.link_latency_s, bytes_per_s=config.link_bytes_per_s
        )
        super().__init__(
            clock,
            InprocRpcNetwork(clock, config.seed, latency_s=config.rpc_latency_s),
            self.events,
            router=config.router,
            engine=config.engine,
            transfer=config.transfer,
            index_lease_s=config.index_lease_s,
            seed=config.seed,
            prefills_ahead=config.prefills_ahead,
        )

    async def start(self, role: Role, speed: Speed | None = None) -> LocalWorker:
        layout = self.config.layout
        storage = FakeStorage(layout, self.config.engine.num_blocks or 256)
        runner = FakeModelRunner(storage, self.clock, speed or self.config.speed, self.config.max_model_len)
        name = self.next_name(role)
        transport = InprocTransport(
            self.kv_network,
            self.clock,
            f"kv://{name}",
            piece_timeout_s=1.5 * self.config.transfer.push_timeout_s,
        )
        return await self.start_worker(name, (role,), runner, transport, f"fake/{layout.describe()}")

    async def kill(self, worker_id: WorkerId) -> None:
        """SIGKILL: the network forgets it first, so none of its last words get out."""
        worker = self.workers[worker_id]
        self.rpc_network.kill(worker.record.address)
        self.kv_network.kill(worker.kv_address)
        await self.end_worker(worker_id)


@asynccontextmanager
async def running_fleet(config: FleetConfig, clock: VirtualClock) -> AsyncGenerator[SimulatedFleet, None]:
    fleet = SimulatedFleet(config, clock)
    async with fleet.routing():
        for role, number in ((Role.PREFILL, config.num_prefill), (Role.DECODE, config.num_decode)):
            for _ in range(number):
                await fleet.start(role)
        await fleet.ready()
        fleet.transfers.clear()  # those of the canary
        yield fleet


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
    """Poisson arrivals at `rate` per second for `duration_s` of virtual time; answers are checked."""
    clock = VirtualClock()
    return clock.run(_simulate(config, clock, duration_s, rate, max_prompt_tokens, max_output_tokens))


async def _simulate(
    config: FleetConfig, clock: VirtualClock, duration_s: float, rate: float, max_prompt: int, max_output: int
) -> SimulationResult:
    rng = random.Random(config.seed)
    outcomes: list[str] = []

    async def one(number: int, prompt: tuple[int, ...], num_tokens: int, num_samples: int) -> None:
        request = Request(
            RequestId(f"r{number}"),
            prompt,
            SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True, n=num_samples),
        )
        try:
            samples = await fleet.ask_samples(request)
        except BatonError as error:
            outcomes.append("failed")
            fleet.events("client.error", request=request.request_id, code=error.code)
            return
        right = samples == [expected_tokens(prompt, num_tokens, config.layout)] * num_samples
        outcomes.append("right" if right else "wrong")
        fleet.events("client.done", request=request.request_id, right=right, tokens=len(samples[0]))

    async with running_fleet(config, clock) as fleet:
        async with asyncio.TaskGroup() as clients:
            number, end_s = 0, clock.now() + duration_s
            while True:
                await clock.sleep(rng.expovariate(rate))
                if clock.now() >= end_s:
                    break
                prompt = tuple(rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, max_prompt)))
                num_samples = rng.choice(NUM_SAMPLES)
                clients.create_task(one(number, prompt, rng.randint(1, max_output), num_samples))
                number += 1
        await clock.sleep(1.0)
        fleet.check_conservation()
        for worker_id, num_used in fleet.num_used_blocks().items():
            assert num_used == 0, f"{worker_id} still holds {num_used} blocks"
        now = clock.now()
    return SimulationResult(
        number, outcomes.count("right"), outcomes.count("failed"), now, tuple(fleet.events.lines)
    )
