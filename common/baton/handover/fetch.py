"""The beginning of a prompt comes from a worker that holds it, instead of being computed: a multi-turn chat's last
answer, which only a decode worker has.

    engine.reserve_prefix --admitted--> Receiver.expect --> Prefix.Fetch on the owner, who pushes to our ticket
         everything arrived and matched its digest --> engine.keep_prefix: a prefix hit for the prompt that follows
         the owner holds less                      --> once more, for what it holds
         late, failed, cancelled                   --> given back once no write can land any more; nobody waits for that

The prefix is a reservation of its own, so the prompt never depends on it: it finds the prefix in the cache, or does
not. It waits for blocks like any other, holds none while the prompt waits for its own, and is given up when computing
would have been faster, or sooner when the owner's lease ends.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable

from baton.clock import Clock
from baton.config import TransferConfig
from baton.engine.batch import StepOutput
from baton.engine.sequence import Sequence
from baton.engine.worker import Worker
from baton.errors import BatonError, DeadlineExceeded, InternalError
from baton.events import Emit, about
from baton.handover.receive import Receiver
from baton.messages import FetchCall, Fetched, FetchOutcome, FetchResult, PrefixSource, Ticket
from baton.request import Request, RequestId, prefix_of
from baton.rpc import FETCH, Channel, Rpc
from baton.transfer.base import Transport

MAX_CHANNELS = 32  # to owners; the one that was used least recently is closed
OnFetched = Callable[[Fetched], None]


class Fetcher:
    """Owns the prefixes on their way to this worker. Built once per process, closed with `aclose`."""

    def __init__(
        self,
        worker: Worker,
        receiver: Receiver,
        rpc: Rpc,
        transport: Transport,
        kv_address: str,
        config: TransferConfig,
        clock: Clock,
        emit: Emit,
        on_fetched: OnFetched,
    ) -> None:
        """`on_fetched` hears of every fetch once it has ended."""
        self._worker = worker
        self._receiver = receiver
        self._rpc = rpc
        self._transport = transport
        self._kv_address = kv_address
        self._config = config
        self._clock = clock
        self._emit = emit
        self._on_fetched = on_fetched
        self._channels: OrderedDict[str, Channel] = OrderedDict()
        self._admitted: dict[RequestId, asyncio.Event] = {}
        self._closing: set[asyncio.Task[None]] = set()
        worker.listen(self._on_step)

    async def fetch(self, request: Request, source: PrefixSource) -> Fetched:
        """When it returns, the next prompt that begins alike finds what came in the prefix cache. Only cancelling it
        raises."""
        started_s, attempt = self._clock.now(), _Fetch(source)
        outcome, reason = FetchOutcome.CANCELLED, "nobody wanted it any more"
        try:
            async with self._clock.timeout(source.timeout_s):
                num_tokens = await self._attempt(request, source.num_tokens, attempt)
                if num_tokens < attempt.num_tokens:
                    await self._attempt(request, num_tokens, attempt)
            outcome, reason = attempt.outcome, ""
        except (TimeoutError, DeadlineExceeded):
            outcome, reason = FetchOutcome.LATE, f"it did not come within {source.timeout_s:.3g} s"
        except BatonError as error:
            outcome, reason = FetchOutcome.FAILED, error.message
        finally:
            fetched = Fetched(
                outcome,
                source.worker_id,
                attempt.num_received_tokens,
                attempt.num_held_tokens,
                self._clock.now() - started_s,
                attempt.num_mismatches,
                reason,
            )
            self._tell(request, fetched)
        return fetched

    async def aclose(self) -> None:
        """No fetch is under way any more."""
        self._worker.unlisten(self._on_step)
        await asyncio.gather(*self._closing, return_exceptions=True)
        for channel in self._channels.values():
            await channel.aclose()

    async def _attempt(self, request: Request, num_tokens: int, state: "_Fetch") -> int:
        """How much the owner holds; all of what was asked for has come unless it is less."""
        block_size = self._worker.record.block_size
        prefix = prefix_of(request, num_tokens // block_size * block_size)
        if not prefix.num_prompt_tokens:
            return 0
        state.num_tokens = prefix.num_prompt_tokens
        state.epoch += 1
        try:
            sequence = await self._reserve(prefix)
            # It has come by itself meanwhile, but for a block that costs as much to ask for.
            if prefix.num_prompt_tokens - sequence.num_cached_tokens <= block_size:
                return state.num_tokens
            return await self._receive(prefix, sequence, state)
        finally:
            self._give_back(prefix.request_id)

    async def _reserve(self, prefix: Request) -> Sequence:
        """Blocks for it, those among them that are in the cache already."""
        admitted = self._admitted[prefix.request_id] = asyncio.Event()
        self._worker.engine.reserve_prefix(prefix)
        self._worker.admit()
        await admitted.wait()
        sequence = self._worker.engine.sequence(prefix.request_id)
        if sequence is None:
            raise InternalError(f"{prefix.request_id} vanished from the engine")
        return sequence

    async def _receive(self, prefix: Request, sequence: Sequence, state: "_Fetch") -> int:
        num_cached_tokens = sequence.num_cached_tokens
        self._receiver.expect(
            prefix,
            state.epoch,
            sequence.block_table,
            num_cached_tokens,
            self._config.lease_s,
            state.source.worker_id,
            is_prefix=True,
        )
        call = FetchCall(prefix, self._ticket(prefix, num_cached_tokens, state.epoch), state.source.timeout_s)
        try:
            result = await self._ask(call, state.source)
            state.num_held_tokens = result.num_held_tokens
            if result.num_held_tokens >= prefix.num_prompt_tokens:
                hand_over = await self._receiver.wait_verified(prefix.request_id)
                self._receiver.go_live(prefix.request_id)
                self._worker.engine.keep_prefix(prefix.request_id)
                state.num_received_tokens = prefix.num_prompt_tokens - num_cached_tokens
                state.num_mismatches += hand_over.num_mismatches
            return result.num_held_tokens
        finally:
            if not state.num_received_tokens:
                state.num_mismatches += self._receiver.num_mismatches(prefix.request_id)

    async def _ask(self, call: FetchCall, source: PrefixSource) -> FetchResult:
        """The owner's answer. Raises TransferError once nothing can come any more: the lease of an owner that hangs
        ends long before the call to it does."""
        channel, request_id = self._channel(source.address), call.prefix.request_id
        asking = asyncio.create_task(channel.unary(FETCH, call, timeout_s=source.timeout_s))
        arriving = asyncio.create_task(self._receiver.wait_verified(request_id))
        try:
            await asyncio.wait((asking, arriving), return_when=asyncio.FIRST_COMPLETED)
            if arriving.done():
                arriving.result()
            return await asking
        finally:
            asking.cancel()
            arriving.cancel()
            await asyncio.gather(asking, arriving, return_exceptions=True)

    def _ticket(self, prefix: Request, num_cached_tokens: int, epoch: int) -> Ticket:
        return Ticket.of(
            self._worker.record, self._transport.name, self._kv_address, self._config.lease_s,
            handle=0, request_id=prefix.request_id, epoch=epoch, num_cached_tokens=num_cached_tokens,
        )  # fmt: skip

    def _give_back(self, request_id: RequestId) -> None:
        """Whatever is still reserved. A hung owner may write for a while: only these blocks wait for it."""
        self._admitted.pop(request_id, None)
        if self._worker.engine.sequence(request_id) is None:
            return
        if self._receiver.end_if_idle(request_id, "nobody waits for it any more"):
            self._release(request_id)
            return
        task = asyncio.create_task(self._drain(request_id))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _drain(self, request_id: RequestId) -> None:
        await self._receiver.end(request_id, "nobody waits for it any more")
        self._release(request_id)

    def _release(self, request_id: RequestId) -> None:
        self._worker.engine.abort(request_id)
        self._worker.admit()

    def _channel(self, address: str) -> Channel:
        channel = self._channels.get(address) or self._rpc.connect(address)
        self._channels[address] = channel
        self._channels.move_to_end(address)
        if len(self._channels) > MAX_CHANNELS:
            _, oldest = self._channels.popitem(last=False)
            task = asyncio.create_task(oldest.aclose())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
        return channel

    def _tell(self, request: Request, fetched: Fetched) -> None:
        self._emit(
            "prefix.fetched", **about(request), outcome=fetched.outcome.value, source=fetched.source_id,
            tokens=fetched.num_tokens, seconds=fetched.seconds, why=fetched.reason,
        )  # fmt: skip
        self._on_fetched(fetched)

    def _on_step(self, output: StepOutput) -> None:
        for request_id in output.admitted:
            if (admitted := self._admitted.get(request_id)) is not None:
                admitted.set()


class _Fetch:
    """What is known of one fetch so far."""

    def __init__(self, source: PrefixSource) -> None:
        self.source = source
        self.epoch = 0  # a second try refuses the pieces of the first one
        self.num_tokens = 0  # asked for, in this worker's full blocks
        self.num_received_tokens = 0
        self.num_held_tokens = source.num_tokens  # until the owner says
        self.num_mismatches = 0

    @property
    def outcome(self) -> FetchOutcome:
        return FetchOutcome.OK if self.num_held_tokens >= self.num_tokens else FetchOutcome.EVICTED
