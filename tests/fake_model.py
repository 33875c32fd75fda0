"""A model without weights for tests of the engine: its KV is the tokens themselves, kept in a real pool of
blocks.

The next token is a digest of the request's seed and of what the pool holds for the whole context, so a wrong, stale
or overwritten block changes the answer; `expected_tokens` is what a right one gives.
"""

import asyncio
import hashlib
from collections.abc import Sequence

from baton.clock import Clock, SystemClock
from baton.config import EngineConfig
from baton.engine.batch import Batch, BatchRow, StepOutput
from baton.engine.engine import Engine
from baton.errors import OutOfMemory
from baton.kv.layout import KVLayout, LayerLayout
from baton.request import BlockId, Request, RequestId, SamplingParams

VOCAB_SIZE = 1000
TOKEN_BYTES = 4


class FakeStorage:
    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.layout = KVLayout(block_size, (LayerLayout(1, TOKEN_BYTES, 0),), "uint8", 1)
        self.num_blocks = num_blocks
        self._bytes = memoryview(bytearray(b"\xff" * (num_blocks * self.layout.block_bytes)))

    def region(self, block_id: BlockId, layer_start: int, layer_end: int) -> memoryview:
        start = block_id * self.layout.block_bytes
        return self._bytes[start : start + self.layout.block_bytes]

    def slot(self, block_table: Sequence[BlockId], position: int) -> memoryview:
        size = self.layout.block_size
        start = position % size * TOKEN_BYTES
        return self.region(block_table[position // size], 0, 1)[start : start + TOKEN_BYTES]

    def write(self, block_table: Sequence[BlockId], start: int, token_ids: Sequence[int]) -> None:
        for position, token_id in enumerate(token_ids, start):
            self.slot(block_table, position)[:] = token_id.to_bytes(TOKEN_BYTES, "little")

    def copy(self, source: BlockId, destination: BlockId) -> None:
        self.region(destination, 0, 1)[:] = self.region(source, 0, 1)

    def read(self, block_table: Sequence[BlockId], num_tokens: int) -> bytes:
        return b"".join(bytes(self.slot(block_table, position)) for position in range(num_tokens))


class FakeRunner:
    """`gate`, when set by a test, holds every step between its start and its writes; `failure` is raised by
    the next step, OutOfMemory by one of more than `room` tokens; `nan_requests` get no token. `ahead`: every step
    takes long enough for the next to be prepared."""

    def __init__(
        self, num_blocks: int, block_size: int, max_model_len: int = 10_000, *, ahead: bool = True
    ) -> None:
        self.storage = FakeStorage(num_blocks, block_size)
        self.vocab_size = VOCAB_SIZE
        self.max_model_len = max_model_len
        self.grammars = None
        self.gate: asyncio.Event | None = None
        self.started = asyncio.Event()
        self.failure: Exception | None = None
        self.room = 2**31
        self.nan_requests: set[RequestId] = set()
        self.batches: list[Batch] = []
        self.num_ahead = 0  # batches that were given before the one before them had ended
        self._ahead = ahead
        self._drawn: list[int] = []  # by the batch before
        self._turn = asyncio.Lock()  # a device does one thing after the other

    async def execute(self, batch: Batch) -> tuple[int, ...]:
        self.batches.append(batch)
        self.num_ahead += self._turn.locked()
        async with self._turn:
            self.started.set()
            if self._ahead:
                batch.prepare_next()
                for _ in range(5):
                    await asyncio.sleep(0)
            if self.gate is not None:
                await self.gate.wait()
            drawn, self._drawn = self._drawn, []
            if batch.num_tokens > self.room:
                raise OutOfMemory("too much")
            if self.failure is not None:
                failure, self.failure = self.failure, None
                raise failure
            for copy in batch.copies:
                self.storage.copy(*copy)
            self._drawn = [token for row in batch.rows if (token := self._run(row, drawn)) is not None]
            return tuple(self._drawn)

    async def aclose(self) -> None:
        pass

    def _run(self, row: BatchRow, drawn: list[int]) -> int | None:
        self.storage.write(row.block_table, row.start, known_tokens(row, drawn))
        if not row.sample:
            return None
        if row.request_id in self.nan_requests:
            return -1
        context = self.storage.read(row.block_table, row.start + len(row.token_ids))
        return _next_token(context, row.sampling.seed or 0)


def known_tokens(row: BatchRow, drawn: Sequence[int]) -> list[int]:
    """With the tokens of the batch before in place of -1 - i; 0 where it drew none."""

    def known(token: int) -> int:
        if token >= 0:
            return token
        return max(0, drawn[-1 - token]) if -1 - token < len(drawn) else 0

    return [known(token) for token in row.token_ids]


def _next_token(context: bytes, seed: int) -> int:
    digest = hashlib.blake2b(context, digest_size=8, salt=seed.to_bytes(8, "little")).digest()
    return int.from_bytes(digest, "little") % VOCAB_SIZE


def expected_tokens(prompt: Sequence[int], num_tokens: int, seed: int = 0) -> list[int]:
    context = b"".join(token.to_bytes(TOKEN_BYTES, "little") for token in prompt)
    tokens: list[int] = []
    for _ in range(num_tokens):
        tokens.append(_next_token(context, seed))
        context += tokens[-1].to_bytes(TOKEN_BYTES, "little")
    return tokens


def make_engine(
    num_blocks: int = 64,
    block_size: int = 4,
    *,
    max_model_len: int = 10_000,
    ahead: bool = True,
    clock: Clock | None = None,
    **settings: int | bool,
) -> tuple[Engine, FakeRunner]:
    """`clock`: None is the system's."""
    runner = FakeRunner(num_blocks, block_size, max_model_len, ahead=ahead)
    config = EngineConfig(**{"max_num_seqs": 16, "max_num_batched_tokens": 64, **settings})  # type: ignore[arg-type]
    return Engine(config, runner, clock or SystemClock(), "fake"), runner


def make_request(
    name: str,
    prompt: Sequence[int],
    max_tokens: int = 8,
    *,
    stop: tuple[int, ...] = (),
    cache_salt: str = "",
    seed: int | None = None,
) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens, stop_token_ids=stop, seed=seed)
    return Request(RequestId(name), tuple(prompt), sampling, cache_salt=cache_salt)


class Collected:
    """What the steps of an engine said, per request."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.finished: dict[str, str] = {}
        self.errors: dict[str, str] = {}
        self.admitted: list[str] = []
        self.corrupted: set[str] = set()
        self._first_index: dict[str, int] = {}  # 1 for a request that was handed over

    def add(self, output: StepOutput) -> None:
        self.admitted.extend(output.admitted)
        for row in output.outputs:
            tokens = self.tokens.setdefault(row.request_id, [])
            first = self._first_index.setdefault(row.request_id, row.first_index)
            assert row.request_id not in self.finished, "an output after the end"
            if row.token_ids:
                assert row.first_index == first + len(tokens), "a token is missing or came twice"
            tokens.extend(row.token_ids)
            if row.finish_reason is not None:
                self.finished[row.request_id] = row.finish_reason.value
                self.errors[row.request_id] = row.error
            if row.corrupted:
                self.corrupted.add(row.request_id)


async def run_until_idle(
    engine: Engine, collected: Collected | None = None, max_steps: int = 10_000
) -> Collected:
    """Checks the pool after every step."""
    collected = collected or Collected()
    for _ in range(max_steps):
        if not engine.has_work:
            return collected
        collected.add(await engine.step())
        engine.check_integrity()
    raise AssertionError(f"still busy after {max_steps} steps")
