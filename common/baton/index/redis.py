"""The prefix index in Redis: leases that expire by themselves, and a stream of changes for the routers'
mirrors.

    {ns}:blk:<worker>:<inc>   SET     the 16-byte hashes it claims, and a sentinel: an empty set exists too
    {ns}:pod:<worker>         HASH    inc, seq, record (JSON), replaced:<inc>...      same deadline as the set
    {ns}:pods                 ZSET    worker -> that deadline, Unix milliseconds of Redis' own clock
    {ns}:ev                   STREAM  every change, about the last 10,000

The braces are a hash tag: all keys of a namespace lie in one Cluster slot. A worker that dies takes its set
with it when the lease ends, whatever its size, without a scan. Nothing needs to be persistent: when Redis
lost everything the next `renew` says False and the worker publishes again. Nothing in Redis is trusted: what
does not parse is skipped, counted in `num_skipped` and logged.

Every round trip ends within `timeout_s`, whatever Redis does; no call is retried here.
"""

import itertools
import logging
import math
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

from redis.asyncio import Redis
from redis.asyncio.sentinel import MasterNotFoundError
from redis.commands.core import AsyncScript
from redis.exceptions import AuthenticationError, RedisError

from baton.clock import Clock
from baton.errors import ConfigError, Unavailable
from baton.index import scripts
from baton.index.base import IndexEvent, PrefixIndex
from baton.index.record import encode_record
from baton.index.redis_url import open_source, parse_redis_url
from baton.index.stream import Loaded, Op, WatchState, checked_record, parse_change
from baton.kv.block import HASH_BYTES, BlockHash
from baton.messages import WorkerRecord
from baton.request import WorkerId

log = logging.getLogger(__name__)

T = TypeVar("T")

SENTINEL = b"."  # no hash has one byte
CHUNK = 1000  # hashes per command: Redis stays answerable, and Lua's stack holds them
CHUNKS_PER_TRIP = 8
SCAN_COUNT = 4000
READ_COUNT = 500  # stream entries per read
UPLOAD_MS = 60_000  # an abandoned upload of a snapshot vanishes after this
IDLE_MS = 3_600_000  # so do the stream and the list of a namespace that nobody uses any more

# What parsing foreign data may raise.
FOREIGN = (ValueError, KeyError, TypeError, AttributeError, OverflowError)


class RedisIndex(PrefixIndex):
    """Connects on first use, reconnects by itself. Any number of calls and watches may run at once."""

    def __init__(
        self,
        url: str,
        namespace: str,
        clock: Clock,
        *,
        timeout_s: float = 1.0,
        stream_length: int = 10_000,
    ) -> None:
        """`namespace` must differ between fleets whose blocks are not interchangeable. Raises ConfigError for
        a URL that cannot be right, without repeating its password."""
        if not namespace or set(namespace) & set("{} \t\r\n"):
            raise ConfigError(f"the index namespace {namespace!r} must be one word without braces")
        self._clock = clock
        self._stream_length = stream_length
        self._prefix = f"{{{namespace}}}"
        self._pods = f"{self._prefix}:pods"
        self._ev = f"{self._prefix}:ev"
        self._server = _Server(url, self._ev, clock, timeout_s)
        self.where = self._server.where  # for logs: the URL without user and password
        self._renew = self._server.script(scripts.RENEW)
        self._publish = self._server.script(scripts.PUBLISH)
        self._commit = self._server.script(scripts.COMMIT)
        self._withdraw = self._server.script(scripts.WITHDRAW)
        self._sweep = self._server.script(scripts.SWEEP)
        self._match = self._server.script(scripts.MATCH)
        self._upload_numbers = itertools.count()
        self._incarnations: dict[WorkerId, str] = {}  # as last seen; the script checks them
        self.num_skipped = 0  # pieces of foreign data met so far

    # --- the worker's side ---

    async def renew(self, record: WorkerRecord, *, lease_s: float) -> bool:
        worker_id, incarnation = record.worker_id, record.incarnation
        keys = [self._blk(worker_id, incarnation), self._pod(worker_id), self._pods, self._ev]
        lease_ms = max(1, round(lease_s * 1000))
        told = encode_record(record)
        args = [worker_id, incarnation, lease_ms, told, SENTINEL, self._stream_length, IDLE_MS]
        known, replaced = await self._server.run(self._renew, keys, args)
        if replaced:  # its set would lapse by itself; a big one is better freed now, in the background
            await self._server.ask(("UNLINK", self._blk(worker_id, replaced.decode(errors="replace"))))
        return bool(known)

    async def publish(
        self,
        worker_id: WorkerId,
        incarnation: str,
        added: Sequence[BlockHash],
        removed: Sequence[BlockHash],
        *,
        snapshot: bool = False,
    ) -> bool:
        if snapshot and len(added) > CHUNK:
            return await self._upload(worker_id, incarnation, added)
        if snapshot:
            return await self._change(worker_id, incarnation, Op.SNAPSHOT, added, ())
        for added_part, removed_part in _parts(added, removed):
            if not await self._change(worker_id, incarnation, Op.BLOCKS, added_part, removed_part):
                return False
        return True

    async def withdraw(self, worker_id: WorkerId, incarnation: str) -> None:
        keys = [self._blk(worker_id, incarnation), self._pod(worker_id), self._pods, self._ev]
        await self._server.run(self._withdraw, keys, [worker_id, incarnation, self._stream_length])

    async def _change(
        self,
        worker_id: WorkerId,
        incarnation: str,
        op: Op,
        added: Sequence[BlockHash],
        removed: Sequence[BlockHash],
    ) -> bool:
        keys = [self._blk(worker_id, incarnation), self._pod(worker_id), self._ev]
        head = [worker_id, incarnation, op.value, SENTINEL, self._stream_length, len(removed)]
        args = [*head, _pack(removed), _pack(added), *removed, *added]
        return bool(await self._server.run(self._publish, keys, args))

    async def _upload(self, worker_id: WorkerId, incarnation: str, hashes: Sequence[BlockHash]) -> bool:
        """Fill a set beside the current one, chunk by chunk, then put it in its place in one step."""
        blk = self._blk(worker_id, incarnation)
        upload = f"{blk}:{next(self._upload_numbers)}"
        keep = ("PEXPIRE", upload, UPLOAD_MS)
        await self._server.ask(("UNLINK", upload), ("SADD", upload, SENTINEL), keep)
        for group in _slices(hashes, CHUNK * CHUNKS_PER_TRIP):
            await self._server.ask(*(("SADD", upload, *chunk) for chunk in _slices(group, CHUNK)), keep)
        keys = [blk, self._pod(worker_id), self._ev, upload]
        args = [worker_id, incarnation, SENTINEL, self._stream_length]
        return bool(await self._server.run(self._commit, keys, args))

    # --- the router's side ---

    async def workers(self) -> list[WorkerRecord]:
        pods = await self._pod_fields(await self._listed(), "inc", "record")
        found = []
        for worker_id, (incarnation, raw) in pods.items():
            try:
                found.append(checked_record(raw, worker_id, incarnation.decode()))
            except FOREIGN as error:
                self._skip(f"the record of worker {worker_id!r}", error)
        return found

    async def match(self, hashes: Sequence[BlockHash], workers: Sequence[WorkerId]) -> dict[WorkerId, int]:
        matched = dict.fromkeys(workers, 0)
        if hashes:
            changed = await self._match_known(hashes, list(matched), matched)
            for worker_id in changed:
                self._incarnations.pop(worker_id, None)
            await self._match_known(hashes, changed, matched)
        return matched

    async def _match_known(
        self, hashes: Sequence[BlockHash], workers: Sequence[WorkerId], matched: dict[WorkerId, int]
    ) -> list[WorkerId]:
        """Fill in `matched`; returns the workers of which another incarnation, or none, is there by now."""
        pods = await self._pod_fields([w for w in workers if w not in self._incarnations], "inc")
        self._incarnations.update({w: inc.decode(errors="replace") for w, (inc,) in pods.items()})
        known = [w for w in workers if w in self._incarnations]
        if not known:
            return []
        incarnations = [self._incarnations[w] for w in known]
        keys = [self._pod(w) for w in known]
        keys += [self._blk(w, incarnation) for w, incarnation in zip(known, incarnations, strict=True)]
        lengths = await self._server.run(self._match, keys, [len(known), *incarnations, *hashes])
        matched.update({w: max(0, length) for w, length in zip(known, lengths, strict=True)})
        return [w for w, length in zip(known, lengths, strict=True) if length < 0]

    async def watch(self) -> AsyncGenerator[IndexEvent, None]:
        state = WatchState()
        position = await self._tail()  # before the loads: what happens meanwhile is seen twice, not missed
        for worker_id in await self._listed():
            for event in await self._load(state, worker_id):
                yield event
        checked_at = -math.inf
        while True:
            if state.check_due(checked_at) <= self._clock.now():
                await self._reconcile(state)
                checked_at = self._clock.now()
                for event in state.lapsed(checked_at):
                    yield event
            wait_s = 0.0 if state.reconciling else state.check_due(checked_at) - self._clock.now()
            entries = await self._read(position, wait_s)
            for position, fields in entries:  # noqa: B007 -- the last one is where the next read begins
                for event in await self._apply(state, fields):
                    yield event
            if state.reconciling and len(entries) < READ_COUNT and (behind := state.behind()):
                position = await self._tail()  # not explained by the stream: it may be another one now
                for worker_id in behind:
                    for event in await self._load(state, worker_id):
                        yield event

    async def aclose(self) -> None:
        await self._server.aclose()

    # --- what a watch is made of ---

    async def _listed(self) -> list[WorkerId]:
        [names] = await self._server.ask(("ZRANGE", self._pods, 0, -1))
        return sorted(self._names(names))

    async def _tail(self) -> bytes:
        [last] = await self._server.ask(("XREVRANGE", self._ev, "+", "-", "COUNT", 1))
        return last[0][0] if last else b"0-0"

    async def _read(self, position: bytes, wait_s: float) -> list[tuple[bytes, Mapping[bytes, bytes]]]:
        block = ("BLOCK", math.ceil(wait_s * 1000)) if wait_s > 0 else ()
        command = ("XREAD", "COUNT", READ_COUNT, *block, "STREAMS", self._ev, position)
        [reply] = await self._server.ask(command, wait_s=max(0.0, wait_s))
        return reply[0][1] if reply else []

    async def _apply(self, state: WatchState, fields: Mapping[bytes, bytes]) -> list[IndexEvent]:
        try:
            change = parse_change(fields)
        except FOREIGN as error:
            self._skip("an entry of the stream", error)
            return []
        events = state.apply(change, self._clock.now())
        return await self._load(state, change.worker_id) if events is None else events

    async def _load(self, state: WatchState, worker_id: WorkerId) -> list[IndexEvent]:
        try:
            loaded = await self._fetch(worker_id)
        except FOREIGN as error:
            self._skip(f"worker {worker_id!r}", error)
            return []
        return [] if loaded is None else state.loaded(loaded, self._clock.now())

    async def _fetch(self, worker_id: WorkerId) -> Loaded | None:
        """None when it is not there. The number is read first: the set may be newer than it, never older."""
        pod = self._pod(worker_id)
        asked = (("HMGET", pod, "inc", "seq", "record"), ("PTTL", pod))
        fields, lease_ms = await self._server.ask(*asked, lenient=True)
        if isinstance(fields, RedisError):
            raise ValueError(fields)
        incarnation, seq, raw = fields
        if incarnation is None:
            return None
        record = checked_record(raw, worker_id, incarnation.decode())
        hashes = await self._held(self._blk(worker_id, record.incarnation))
        return Loaded(record, int(seq), max(0, lease_ms) / 1000, hashes)

    async def _held(self, blk: str) -> tuple[BlockHash, ...]:
        held: dict[BlockHash, None] = {}  # SSCAN may name a member twice
        cursor = 0
        while True:
            [reply] = await self._server.ask(("SSCAN", blk, cursor, "COUNT", SCAN_COUNT), lenient=True)
            if isinstance(reply, RedisError):
                raise ValueError(reply)
            cursor, members = reply
            held.update(dict.fromkeys(m for m in members if len(m) == HASH_BYTES))
            if any(len(m) != HASH_BYTES and m != SENTINEL for m in members):
                self._skip(f"members of {blk}", "not 16 bytes long")
            if cursor == 0:
                return tuple(held)

    async def _reconcile(self, state: WatchState) -> None:
        now_ms, listed = await self._server.run(self._sweep, [self._pods, self._ev], [self._stream_length])
        base = self._clock.now() - int(now_ms) / 1000
        scores = dict(zip(listed[::2], listed[1::2], strict=True))
        lease_ends = {w: base + float(scores[w.encode()]) / 1000 for w in self._names(listed[::2])}
        numbers = {}
        for worker_id, (incarnation, seq) in (await self._pod_fields(list(lease_ends), "inc", "seq")).items():
            try:
                numbers[worker_id] = (incarnation.decode(), int(seq))
            except FOREIGN as error:
                self._skip(f"worker {worker_id!r}", error)
        state.reconcile(lease_ends, numbers)

    async def _pod_fields(self, workers: Sequence[WorkerId], *fields: str) -> dict[WorkerId, list[Any]]:
        """Of the workers that are there (their first field is); the others are left out."""
        if not workers:
            return {}
        replies = await self._server.ask(*(("HMGET", self._pod(w), *fields) for w in workers), lenient=True)
        found = {}
        for worker_id, reply in zip(workers, replies, strict=True):
            if isinstance(reply, RedisError):
                self._skip(f"worker {worker_id!r}", reply)
            elif reply[0] is not None:
                found[worker_id] = reply
        return found

    def _names(self, raw: Iterable[bytes]) -> Iterator[WorkerId]:
        for name in raw:
            try:
                yield WorkerId(name.decode())
            except UnicodeDecodeError as error:
                self._skip("the name of a worker", error)

    def _blk(self, worker_id: WorkerId, incarnation: str) -> str:
        return f"{self._prefix}:blk:{worker_id}:{incarnation}"

    def _pod(self, worker_id: WorkerId) -> str:
        return f"{self._prefix}:pod:{worker_id}"

    def _skip(self, what: str, why: object) -> None:
        self.num_skipped += 1
        if self.num_skipped.bit_count() == 1:  # the 1st, 2nd, 4th, 8th...: a flood stays readable
            log.warning("skipped foreign data in Redis (%d so far): %s: %s", self.num_skipped, what, why)


class _Server:
    """The border to redis-py: round trips with a deadline; whatever goes wrong leaves as Unavailable with one
    line. Connects on first use and again after a failure."""

    def __init__(self, url: str, key: str, clock: Clock, timeout_s: float) -> None:
        place = parse_redis_url(url)
        self.where = place.where
        self._pool, self._others = open_source(place, key, timeout_s)
        self._redis = Redis(connection_pool=self._pool)
        self._clock = clock
        self._timeout_s = timeout_s
        self._closed = False

    def script(self, source: str) -> AsyncScript:
        return self._redis.register_script(scripts.PRELUDE + source)

    async def run(self, script: AsyncScript, keys: Sequence[str], args: Sequence[Any]) -> Any:
        async with self._deadline(0.0):
            return await script(keys=list(keys), args=list(args))

    async def ask(self, *commands: tuple[Any, ...], lenient: bool = False, wait_s: float = 0.0) -> list[Any]:
        """One reply per command. `lenient`: the reply to a command that Redis refused is its RedisError.
        `wait_s` is how long Redis was asked to wait before it answers."""
        async with self._deadline(wait_s), self._redis.pipeline(transaction=False) as pipeline:
            for command in commands:
                pipeline.execute_command(*command)
            replies: list[Any] = await pipeline.execute(raise_on_error=not lenient)
            return replies

    async def aclose(self) -> None:
        self._closed = True
        with suppress(RedisError, OSError):
            await self._pool.disconnect()
            for client in self._others:
                await client.aclose()

    @asynccontextmanager
    async def _deadline(self, wait_s: float) -> AsyncIterator[None]:
        if self._closed:
            raise Unavailable("the prefix index is closed")
        try:
            async with self._clock.timeout(self._timeout_s + wait_s):
                yield
        except TimeoutError:
            raise Unavailable(f"Redis at {self.where} did not answer within {self._timeout_s:g} s") from None
        except MasterNotFoundError:  # its text names clients with their options
            raise Unavailable(f"Redis at {self.where}: no Sentinel knows a master of that name") from None
        except AuthenticationError:
            raise Unavailable(f"Redis at {self.where} refused the user or password of the URL") from None
        except (RedisError, OSError) as error:
            raise Unavailable(f"Redis at {self.where}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    met = error.__context__  # where redis-py leaves what it translates
    if isinstance(met, ssl.SSLCertVerificationError):
        return f"its certificate is refused ({met.verify_message}); ssl_ca_certs in the URL names its authority's file"
    return (str(error).splitlines() or [type(error).__name__])[0]


def _pack(hashes: Sequence[BlockHash]) -> bytes:
    packed = b"".join(hashes)
    if len(packed) != HASH_BYTES * len(hashes):
        raise ValueError(f"block hashes have {HASH_BYTES} bytes")
    return packed


def _slices(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _parts(
    added: Sequence[BlockHash], removed: Sequence[BlockHash]
) -> list[tuple[Sequence[BlockHash], Sequence[BlockHash]]]:
    """(added, removed) as Redis takes them in one call: all at once, or removals first, piece by piece."""
    if max(len(added), len(removed)) <= CHUNK:
        return [(added, removed)]
    return [
        *(((), part) for part in _slices(removed, CHUNK)),
        *((part, ()) for part in _slices(added, CHUNK)),
    ]
