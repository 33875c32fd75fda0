"""The router's mirror of the index: against a naive oracle, on a virtual clock, and behind a real Redis."""

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from redis_server import RedisServer

from baton.clock import Clock, SystemClock, VirtualClock
from baton.errors import Unavailable
from baton.index.base import BlocksChanged, IndexEvent, PrefixIndex, WorkerJoined, WorkerLeft
from baton.index.memory import MemoryIndex
from baton.index.redis import RedisIndex
from baton.kv.block import BlockHash, block_hashes, root_hash
from baton.messages import Role, WorkerRecord
from baton.request import WorkerId
from baton_router.mirror import PrefixMirror

W1, W2, W3 = WorkerId("w1"), WorkerId("w2"), WorkerId("w3")
CHAIN = block_hashes(root_hash("f", 4, ""), range(80), 4)
LEASE_S = 10.0
PATIENCE_S = 30.0


def record_of(worker_id: WorkerId, incarnation: str = "a", *, draining: bool = False) -> WorkerRecord:
    return WorkerRecord(
        worker_id=worker_id,
        incarnation=incarnation,
        roles=(Role.DECODE,),
        address="127.0.0.1:9000",
        transports=("tcp",),
        model="demo",
        fingerprint="f",
        block_size=4,
        num_blocks=100,
        max_model_len=2048,
        kv_block_bytes=4096,
        draining=draining,
    )


def snapshot(worker_id: WorkerId, held: Sequence[BlockHash], incarnation: str = "a") -> BlocksChanged:
    return BlocksChanged(worker_id, incarnation, tuple(held), (), snapshot=True)


def mirror_of(*events: IndexEvent) -> PrefixMirror:
    mirror = PrefixMirror(SystemClock())
    for event in events:
        mirror.apply(event)
    return mirror


def _naive_match(held: set[BlockHash], hashes: Sequence[BlockHash]) -> int:
    return next((i for i, block_hash in enumerate(hashes) if block_hash not in held), len(hashes))


class TestView:
    def test_match_counts_leading_blocks_of_every_worker(self) -> None:
        mirror = mirror_of(
            *(WorkerJoined(record_of(w)) for w in (W1, W2, W3)),
            snapshot(W1, CHAIN),
            snapshot(W2, CHAIN[:4] + CHAIN[5:]),
        )
        assert mirror.match(CHAIN) == {W1: 20, W2: 4, W3: 0}
        assert mirror.match(CHAIN[5:7]) == {W1: 2, W2: 2, W3: 0}
        assert mirror.match([]) == {W1: 0, W2: 0, W3: 0}
        assert mirror_of().match(CHAIN) == {}

    def test_a_worker_that_left_is_forgotten_with_its_blocks(self) -> None:
        mirror = mirror_of(WorkerJoined(record_of(W1)), snapshot(W1, CHAIN), WorkerLeft(W1, "a"))
        assert mirror.match(CHAIN) == {}
        assert mirror.records() == []
        assert mirror.num_blocks == 0
        mirror.apply(WorkerJoined(record_of(W2)))
        assert mirror.match(CHAIN) == {W2: 0}, "the place of the one before is clean"

    def test_a_new_incarnation_starts_with_nothing(self) -> None:
        mirror = mirror_of(WorkerJoined(record_of(W1)), snapshot(W1, CHAIN), WorkerJoined(record_of(W1, "b")))
        assert mirror.match(CHAIN) == {W1: 0}
        mirror.apply(snapshot(W1, CHAIN, "a"))
        mirror.apply(BlocksChanged(W1, "a", tuple(CHAIN), ()))
        mirror.apply(WorkerLeft(W1, "a"))
        assert mirror.match(CHAIN) == {W1: 0}, "news of the old incarnation do not count"
        assert mirror.records() == [record_of(W1, "b")]

    def test_new_facts_keep_the_claims(self) -> None:
        mirror = mirror_of(WorkerJoined(record_of(W1)), snapshot(W1, CHAIN))
        mirror.apply(WorkerJoined(record_of(W1, draining=True)))
        assert mirror.match(CHAIN) == {W1: 20}
        assert mirror.record(W1) == record_of(W1, draining=True)
        assert mirror.record(W2) is None

    def test_a_snapshot_replaces_and_changes_remove_first(self) -> None:
        mirror = mirror_of(WorkerJoined(record_of(W1)), snapshot(W1, CHAIN), snapshot(W1, CHAIN[:6]))
        assert mirror.match(CHAIN) == {W1: 6}
        mirror.apply(BlocksChanged(W1, "a", (CHAIN[2],), tuple(CHAIN[2:4])))
        assert mirror.match(CHAIN) == {W1: 3}

    def test_blocks_of_an_unknown_worker_do_not_count(self) -> None:
        mirror = mirror_of(snapshot(W1, CHAIN), WorkerLeft(W2, "a"))
        assert mirror.match(CHAIN) == {}
        assert mirror.num_blocks == 0

    def test_a_ticket_corrects_stale_claims_of_that_worker_only(self) -> None:
        mirror = mirror_of(
            WorkerJoined(record_of(W1)), snapshot(W1, CHAIN[:10]),
            WorkerJoined(record_of(W2)), snapshot(W2, CHAIN[:10]),
        )  # fmt: skip
        mirror.confirm(W1, CHAIN, 10)
        assert mirror.num_stale_claims == 0
        mirror.confirm(W1, CHAIN, 4)
        assert mirror.match(CHAIN) == {W1: 4, W2: 10}
        assert mirror.num_stale_claims == 6
        mirror.confirm(W1, CHAIN, 12)
        assert mirror.match(CHAIN) == {W1: 4, W2: 10}, "what it holds beyond is its own news to tell"
        mirror.confirm(W3, CHAIN, 0)

    def test_any_order_of_events_matches_a_naive_oracle(self) -> None:
        rng = random.Random(7)
        mirror = mirror_of()
        truth: dict[WorkerId, tuple[str, set[BlockHash]]] = {}
        ids = [WorkerId(f"w{i}") for i in range(70)]  # more than a machine word of bits
        for step in range(4000):
            worker_id = rng.choice(ids)
            incarnation, held = truth.get(worker_id, ("", set()))
            match rng.randrange(8):
                case 0 | 1:
                    truth[worker_id] = (str(step), set())
                    mirror.apply(WorkerJoined(record_of(worker_id, str(step))))
                case 2:
                    truth.pop(worker_id, None)
                    mirror.apply(WorkerLeft(worker_id, incarnation))
                case 3 if worker_id in truth:
                    length = rng.randrange(21)
                    truth[worker_id] = (incarnation, set(CHAIN[:length]))
                    mirror.apply(snapshot(worker_id, CHAIN[:length], incarnation))
                case _ if worker_id in truth:
                    added, removed = rng.sample(CHAIN, 4), rng.sample(CHAIN, 2)
                    truth[worker_id] = (incarnation, (held - set(removed)) | set(added))
                    mirror.apply(BlocksChanged(worker_id, incarnation, tuple(added), tuple(removed)))
            if step % 20 == 0:
                start = rng.randrange(20)
                expected = {w: _naive_match(h, CHAIN[start:]) for w, (_, h) in truth.items()}
                assert mirror.match(CHAIN[start:]) == expected
                assert mirror.num_blocks == len(set().union(*(h for _, h in truth.values())))
        for worker_id, (incarnation, _) in truth.items():
            mirror.apply(WorkerLeft(worker_id, incarnation))
        assert mirror.num_blocks == 0


class FlakyIndex(MemoryIndex):
    """A MemoryIndex that can go away, and come back without some of its workers."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self.is_away = False
        self.asked: list[float] = []

    def go_away(self) -> None:
        self.is_away = True
        self._wake()

    def come_back(self, *, without: Sequence[WorkerId] = ()) -> None:
        for worker_id in without:
            del self._entries[worker_id]
        self.is_away = False

    async def workers(self) -> list[WorkerRecord]:
        self.asked.append(round(self._clock.now(), 6))
        return await super().workers()

    def _begin(self) -> None:
        if self.is_away:
            raise Unavailable("gone")
        super()._begin()


@asynccontextmanager
async def running(mirror: PrefixMirror, index: PrefixIndex) -> AsyncIterator[None]:
    task = asyncio.create_task(mirror.run(index))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()


class TestFollowing:
    def test_it_follows_the_index_and_wakes_who_waits(self) -> None:
        clock = VirtualClock()

        async def story() -> None:
            index, mirror = MemoryIndex(clock), PrefixMirror(clock)
            async with running(mirror, index):
                assert await mirror.wait_for(lambda: mirror.healthy, 1.0)
                waiting = asyncio.create_task(mirror.wait_for(lambda: len(mirror.records()) == 2, 100.0))
                await clock.sleep(5.0)
                await index.renew(record_of(W1), lease_s=LEASE_S)
                await clock.sleep(5.0)
                assert not waiting.done()
                await index.renew(record_of(W2), lease_s=LEASE_S)
                assert await waiting
                assert clock.now() == pytest.approx(10.0)
                await index.publish(W2, "a", CHAIN, [])
                assert await mirror.wait_for(lambda: mirror.match(CHAIN).get(W2) == 20, 1.0)
                assert await mirror.wait_for(lambda: not mirror.records(), 100.0)
                assert clock.now() == pytest.approx(20.0)

        clock.run(story())

    def test_waiting_ends_by_its_deadline(self) -> None:
        clock = VirtualClock()

        async def story() -> None:
            mirror = PrefixMirror(clock)
            assert await mirror.wait_for(lambda: bool(mirror.records()), 3.0) is False
            assert clock.now() == pytest.approx(3.0)
            assert await mirror.wait_for(lambda: True, 0.0) is True

        clock.run(story())

    def test_an_outage_keeps_the_view_and_ends_by_itself(self) -> None:
        clock = VirtualClock()

        async def story() -> None:
            index, mirror = FlakyIndex(clock), PrefixMirror(clock, grace_s=15.0)
            for worker_id in (W1, W2):
                await index.renew(record_of(worker_id), lease_s=1000.0)
                await index.publish(worker_id, "a", CHAIN, [])
            async with running(mirror, index):
                await mirror.wait_for(lambda: mirror.match(CHAIN) == {W1: 20, W2: 20}, 1.0)
                index.go_away()
                assert await mirror.wait_for(lambda: not mirror.healthy, 1.0)
                assert mirror.last_error == "gone"
                await clock.sleep(600.0)
                assert mirror.match(CHAIN) == {W1: 20, W2: 20}
                index.come_back(without=[W2])
                assert await mirror.wait_for(lambda: mirror.healthy, 5.0)
                assert mirror.last_error == ""
                back_at = clock.now()
                await clock.sleep(14.0)
                assert mirror.match(CHAIN) == {W1: 20, W2: 20}, "it may be about to renew"
                assert await mirror.wait_for(lambda: mirror.match(CHAIN) == {W1: 20}, 5.0)
                assert clock.now() - back_at == pytest.approx(15.0)

        clock.run(story())

    def test_an_index_that_comes_back_empty_empties_nothing_that_renews(self) -> None:
        clock = VirtualClock()

        async def story() -> None:
            index, mirror = FlakyIndex(clock), PrefixMirror(clock, grace_s=15.0)
            await index.renew(record_of(W1), lease_s=1000.0)
            await index.publish(W1, "a", CHAIN, [])
            seen: list[int] = []
            async with running(mirror, index):
                await mirror.wait_for(lambda: mirror.match(CHAIN) == {W1: 20}, 1.0)
                index.go_away()
                await mirror.wait_for(lambda: not mirror.healthy, 1.0)
                index.come_back(without=[W1])  # as after a restart of Redis
                await mirror.wait_for(lambda: mirror.healthy, 5.0)
                for _ in range(40):
                    seen.append(len(mirror.records()))
                    await index.renew(record_of(W1), lease_s=LEASE_S)
                    await index.publish(W1, "a", CHAIN[:5], [], snapshot=True)
                    await clock.sleep(1.0)
                assert seen == [1] * 40
                assert mirror.match(CHAIN) == {W1: 5}

        clock.run(story())

    def test_retries_back_off(self) -> None:
        clock = VirtualClock()

        async def story() -> None:
            index, mirror = FlakyIndex(clock), PrefixMirror(clock)
            index.go_away()
            async with running(mirror, index):
                await clock.sleep(9.6)
                assert index.asked == [0.0, 0.1, 0.3, 0.7, 1.5, 3.1, 5.1, 7.1, 9.1]
                index.come_back()
                await clock.sleep(5.0)
                index.go_away()
                index.asked.clear()
                await clock.sleep(0.2)
                assert len(index.asked) == 1, "after a good time the first retry comes soon again"

        clock.run(story())


class TestBehindRedis:
    async def test_it_survives_a_restart_of_the_server(self) -> None:
        clock = SystemClock()
        with RedisServer() as server:
            index, mirror = RedisIndex(server.url, "mirror", clock), PrefixMirror(clock)
            await index.renew(record_of(W1), lease_s=LEASE_S)
            await index.publish(W1, "a", CHAIN, [], snapshot=True)
            async with running(mirror, index):
                assert await mirror.wait_for(lambda: mirror.match(CHAIN) == {W1: 20}, PATIENCE_S)
                server.kill()
                assert await mirror.wait_for(lambda: not mirror.healthy, PATIENCE_S)
                assert str(server.port) in mirror.last_error
                assert mirror.match(CHAIN) == {W1: 20}
                server.start()
                assert await mirror.wait_for(lambda: mirror.healthy, PATIENCE_S)
                assert mirror.records() == [record_of(W1)]
                assert await index.renew(record_of(W1), lease_s=LEASE_S) is False
                assert await index.publish(W1, "a", CHAIN[:3], [], snapshot=True)
                assert await mirror.wait_for(lambda: mirror.match(CHAIN) == {W1: 3}, PATIENCE_S)
            await index.aclose()

    async def test_a_frozen_server_is_noticed_and_its_waking_too(self) -> None:
        clock = SystemClock()
        with RedisServer() as server:
            index, mirror = RedisIndex(server.url, "mirror", clock, timeout_s=0.3), PrefixMirror(clock)
            async with running(mirror, index):
                assert await mirror.wait_for(lambda: mirror.healthy, PATIENCE_S)
                with server.frozen():
                    assert await mirror.wait_for(lambda: not mirror.healthy, PATIENCE_S)
                assert await mirror.wait_for(lambda: mirror.healthy, PATIENCE_S)
                other = RedisIndex(server.url, "mirror", clock, timeout_s=PATIENCE_S)
                await other.renew(replace(record_of(W1), address="127.0.0.1:1"), lease_s=LEASE_S)
                assert await mirror.wait_for(lambda: len(mirror.records()) == 1, PATIENCE_S)
                await other.aclose()
            await index.aclose()
