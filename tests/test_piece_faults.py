"""Ten thousand pieces that went wrong on the way: each is noticed, nothing of it counts, and its repeat is taken."""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import pytest
from kv_pools import IDENTITY, Pool, digested, fill, layout_of, pool_for, request_of, table, whole

from baton.clock import VirtualClock
from baton.errors import TransferError, TransferRefused
from baton.handover.receive import Receiver
from baton.request import BlockId, Request
from baton.transfer import adapt
from baton.transfer.session import State
from baton.transfer.wire import PieceHeader

NUM_TOKENS = 40
NUM_FAULTS = 10_000
LAYOUT = layout_of(16, "bfloat16", heads=2, num_layers=2)
OTHER = layout_of(32, "float32", heads=2, num_layers=2)
SPANS = ((0, 32, 0, 1), (0, 32, 1, 2), (32, 40, 0, 1), (32, 40, 1, 2))


class Piece(NamedTuple):
    header: PieceHeader
    payload: bytes

    @property
    def wire(self) -> bytes:
        return self.header.encode() + self.payload


def pieces(request: Request, seed: int, epoch: int = 1) -> list[Piece]:
    source, ids = pool_for(LAYOUT, NUM_TOKENS), table(LAYOUT, NUM_TOKENS)
    fill(source, ids, NUM_TOKENS, seed)
    found = []
    for sequence, (start, end, first, last) in enumerate(SPANS):
        header = whole(
            LAYOUT, end, start, sequence=sequence, layer_start=first, layer_end=last, epoch=epoch,
            num_pieces=4 if sequence == 3 else 0, first_token=9 if sequence == 3 else -1,
        )  # fmt: skip
        header = digested(header, source, ids, request)
        found.append(Piece(header, b"".join(adapt.payload(source, ids, header))))
    return found


REQUEST = request_of(NUM_TOKENS)
GOOD = pieces(REQUEST, seed=0)
LATER_PROMPT = pieces(request_of(NUM_TOKENS, seed=5), seed=0)  # the same bytes, said to be of other tokens
OTHER_KV = pieces(REQUEST, seed=3)
STALE = pieces(REQUEST, seed=0, epoch=0)


class Target:
    """A receiver whose pool was in use before."""

    def __init__(self, rng: random.Random) -> None:
        self.pool: Pool = pool_for(rng.choice([LAYOUT, OTHER]), NUM_TOKENS)
        self.ids: list[BlockId] = table(self.pool.layout, NUM_TOKENS, seed=1)
        fill(self.pool, self.ids, NUM_TOKENS, seed=7)
        self.receiver = Receiver(self.pool, IDENTITY, VirtualClock(), lambda kind, /, **fields: None)
        self.receiver.expect(REQUEST, 1, self.ids, 0, 10.0)
        self.hand_over = self.receiver._expected[REQUEST.request_id].hand_over

    def take(self, header: PieceHeader, payload: bytes, num_written: int | None = None) -> None:
        """As a transport does it; `num_written` bytes arrive before it believes that all have, and the others are what
        was there, wrong ones."""
        left = len(payload) if num_written is None else num_written
        at = 0
        for buffer in self.receiver.open(header):
            if num_written is not None:
                buffer[:] = bytes(255 - byte for byte in payload[at : at + len(buffer)])
            part = payload[at : at + min(len(buffer), left)]
            buffer[: len(part)] = part
            at, left = at + len(buffer), left - len(part)
        self.receiver.close(header, None)

    def content(self) -> bytes:
        header = whole(self.pool.layout, NUM_TOKENS, run_tokens=0)
        return b"".join(adapt.payload(self.pool, self.ids, header))


Fault = Callable[[Target, int, random.Random], None]


def flipped_payload(target: Target, number: int, rng: random.Random) -> None:
    header, payload = GOOD[number]
    target.take(header, flipped(payload, rng))


def flipped_header(target: Target, number: int, rng: random.Random) -> None:
    header, payload = GOOD[number]
    wrong = PieceHeader.decode(flipped(header.encode(), rng))
    target.take(wrong, payload + bytes(max(0, min(wrong.num_bytes, 10**6) - len(payload))))


def flipped(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    bit = rng.randrange(len(data) * 8)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def swapped_pieces(target: Target, number: int, rng: random.Random) -> None:
    """The payload of the same tokens' other layer."""
    target.take(GOOD[number].header, GOOD[number ^ 1].payload)


def swapped_blocks(target: Target, number: int, rng: random.Random) -> None:
    header, payload = GOOD[rng.choice([0, 1])]
    half = len(payload) // 2
    target.take(header, payload[half:] + payload[:half])


def swapped_rows(target: Target, number: int, rng: random.Random) -> None:
    """Two rows of KV: one token's head of K or V with another."""
    header, payload = GOOD[number]
    size = 8 * 2
    a, b = rng.sample(range(len(payload) // size), 2)
    rows = [payload[at : at + size] for at in range(0, len(payload), size)]
    rows[a], rows[b] = rows[b], rows[a]
    target.take(header, b"".join(rows))


def truncated(target: Target, number: int, rng: random.Random) -> None:
    header, payload = GOOD[number]
    target.take(header, payload, num_written=rng.randrange(len(payload)))


def shortened(target: Target, number: int, rng: random.Random) -> None:
    header, payload = GOOD[number]
    num_bytes = rng.randrange(len(payload))
    target.take(replace(header, num_bytes=num_bytes), payload[:num_bytes])


def stale(target: Target, number: int, rng: random.Random) -> None:
    target.take(*STALE[number])


def stale_in_disguise(target: Target, number: int, rng: random.Random) -> None:
    """Of another attempt, under this one's epoch."""
    header, payload = STALE[number]
    target.take(replace(header, epoch=1), payload)


def other_prompt(target: Target, number: int, rng: random.Random) -> None:
    """Even when the bytes were the same, they are said to be of other tokens."""
    target.take(*LATER_PROMPT[number])


def other_content(target: Target, number: int, rng: random.Random) -> None:
    """Another hand-over's KV in the right place."""
    target.take(GOOD[number].header, OTHER_KV[number].payload)


def duplicate(target: Target, number: int, rng: random.Random) -> None:
    target.take(*GOOD[number])
    target.take(*GOOD[number])


def claimed_twice(target: Target, number: int, rng: random.Random) -> None:
    header, payload = GOOD[number]
    target.take(header, payload)
    target.take(replace(header, sequence=17, num_pieces=0, first_token=-1), payload)


FAULTS: tuple[Fault, ...] = (
    flipped_payload, flipped_payload, flipped_payload, flipped_header, swapped_pieces, swapped_blocks, swapped_rows,
    truncated, shortened, stale, stale_in_disguise, other_prompt, other_content, duplicate, claimed_twice,
)  # fmt: skip


def right_content(layout_of_target: Pool) -> bytes:
    pool, ids = (
        pool_for(layout_of_target.layout, NUM_TOKENS),
        table(layout_of_target.layout, NUM_TOKENS, seed=1),
    )
    fill(pool, ids, NUM_TOKENS, seed=0)
    header = whole(pool.layout, NUM_TOKENS, run_tokens=0)
    return b"".join(adapt.payload(pool, ids, header))


@pytest.mark.parametrize("part", range(4))
def test_each_of_ten_thousand_faults_is_noticed(part: int) -> None:
    rng = random.Random(part)
    seen: Counter[str] = Counter()
    num_completed = 0
    target = Target(rng)
    for trial in range(NUM_FAULTS // 4):
        if target.hand_over.state not in (State.RESERVED, State.RECEIVING) or trial % 3 == 0:
            target = Target(rng)
        number, fault = rng.randrange(4), rng.choice(FAULTS)
        before = set(target.hand_over._tally.done)
        if (0, number) in before:
            continue_with = [n for n in range(4) if (0, n) not in before]
            number = rng.choice(continue_with)
        try:
            fault(target, number, rng)
        except (TransferRefused, TransferError):
            seen[fault.__name__] += 1
        else:
            raise AssertionError(
                f"{fault.__name__} of piece {number} went unnoticed (seed {part}, trial {trial})"
            )
        assert target.hand_over.state is not State.VERIFIED or fault in (duplicate, claimed_twice)
        if trial % 3 == 2 and target.hand_over.state is State.RECEIVING:
            for each in GOOD:
                if (0, each.header.sequence) not in target.hand_over._tally.done:
                    target.take(*each)
            assert target.hand_over.state is State.VERIFIED
            assert target.content() == right_content(target.pool)
            num_completed += 1
    assert sum(seen.values()) == NUM_FAULTS // 4
    assert set(seen) == {fault.__name__ for fault in FAULTS}
    assert num_completed > 200
