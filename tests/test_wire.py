"""The wire format between pools that are not alike: every byte arrives where it belongs, bit by bit, or is refused."""

import contextlib
import itertools
import struct
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_pools import (
    IDENTITY,
    Pool,
    canonical,
    digested,
    fill,
    layout_of,
    plane_values,
    pool_for,
    request_of,
    table,
    whole,
)

from baton.clock import VirtualClock
from baton.errors import TransferError, TransferRefused
from baton.handover.receive import Receiver
from baton.kv.layout import KVLayout, LayerLayout
from baton.kv.storage import KVStorage
from baton.request import BlockId, RequestId
from baton.transfer import adapt, wire
from baton.transfer.digest import Digester, token_digests
from baton.transfer.session import State
from baton.transfer.wire import DTYPES, FIXED_BYTES, VERSION, PieceHeader

NUM_TOKENS = 147  # two blocks of 64 and a rest that is no multiple of anything
BLOCK_SIZES = (16, 32, 64)
SHARDS = (1, 2, 4)
DTYPE_PAIRS = [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "bfloat16"),
               ("float16", "float32"), ("float32", "float16")]  # fmt: skip


def receiver_of(pool: Pool) -> Receiver:
    return Receiver(pool, IDENTITY, VirtualClock(), lambda kind, /, **fields: None)


def send(sources: list[Pool], target: Pool, *, first: int = 0, num_tokens: int = NUM_TOKENS) -> Receiver:
    """All ranks of a sender hand over to one rank of a receiver, in two layer groups."""
    request, receiver = request_of(num_tokens), receiver_of(target)
    receiver.expect(request, 1, table(target.layout, num_tokens, seed=1), first, 10.0)
    sending = [source for source in sources if overlap(source, target)]
    for shard, source in enumerate(sending):
        heads = overlap(source, target)
        ids = table(source.layout, num_tokens)
        for sequence, layers in enumerate([(0, 1), (1, 3)]):
            header = whole(
                source.layout, num_tokens, first, sequence=sequence, layer_start=layers[0], layer_end=layers[1],
                head_start=heads.start, head_end=heads.stop, shard=shard, num_shards=len(sending),
                num_pieces=2 * sequence, first_token=7 if sequence else -1,
            )  # fmt: skip
            header = digested(header, source, ids, request)
            payload = b"".join(adapt.payload(source, ids, header))
            header = PieceHeader.decode(header.encode())
            at = 0
            for buffer in receiver.open(header):
                buffer[:] = payload[at : at + len(buffer)]
                at += len(buffer)
            receiver.close(header, None)
    assert receiver._expected[request.request_id].hand_over.state is State.VERIFIED
    return receiver


def overlap(source: Pool, target: Pool) -> range:
    (a, b), (c, d) = source.layout.heads, target.layout.heads
    return range(max(a, c), min(b, d))


def snapshot(pool: Pool) -> bytes:
    return bytes(pool.data)


def content(pool: Pool, num_tokens: int = NUM_TOKENS, seed: int = 1) -> bytes:
    """Of the first tokens of the hand-over, in an order that does not depend on blocks."""
    header = whole(pool.layout, num_tokens, run_tokens=0)
    return b"".join(adapt.payload(pool, table(pool.layout, NUM_TOKENS, seed), header))


@lru_cache
def ranks(block_size: int, dtype: str, num_shards: int) -> list[Pool]:
    """Read only."""
    pools = []
    for shard in range(num_shards):
        pool = pool_for(layout_of(block_size, dtype, shard=shard, num_shards=num_shards), NUM_TOKENS)
        fill(pool, table(pool.layout, NUM_TOKENS), NUM_TOKENS)
        pools.append(pool)
    return pools


@pytest.mark.parametrize(("dtype", "other_dtype"), DTYPE_PAIRS)
@pytest.mark.parametrize(("shards", "other_shards"), list(itertools.product(SHARDS, SHARDS)))
@pytest.mark.parametrize(("size", "other_size"), list(itertools.product(BLOCK_SIZES, BLOCK_SIZES)))
def test_every_layout_reads_every_other_bit_by_bit(
    size: int, other_size: int, shards: int, other_shards: int, dtype: str, other_dtype: str
) -> None:
    """These values are exact in every dtype: rounding has a test of its own."""
    sources = ranks(size, dtype, shards)
    for expected in ranks(other_size, other_dtype, other_shards):
        target = Pool(expected.layout, expected.num_blocks)
        send(sources, target)
        assert content(target) == content(expected, seed=0)


@pytest.mark.parametrize("other_size", BLOCK_SIZES)
@pytest.mark.parametrize("size", BLOCK_SIZES)
@pytest.mark.parametrize("first", [0, 16, 64, 128])
def test_nothing_but_the_tokens_of_the_hand_over_is_written(size: int, other_size: int, first: int) -> None:
    target = pool_for(layout_of(other_size), NUM_TOKENS)
    before = content(target, first)
    send(ranks(size, "float32", 1), target, first=first)
    assert content(target, first) == before
    ids = table(target.layout, NUM_TOKENS, seed=1)
    for block_id in set(range(target.num_blocks)) - set(ids):
        assert set(target.region(BlockId(block_id), 0, 3)) == {0xA5}
    if used := NUM_TOKENS % other_size:  # and not behind the prompt's last token either
        layer = np.frombuffer(target.region(ids[-1], 0, 1), np.uint8).reshape(2, other_size, -1)
        assert set(layer[:, used:].ravel().tolist()) == {0xA5}


def test_equal_layouts_send_and_receive_the_pools_own_memory() -> None:
    layout = layout_of(16, "bfloat16")
    source, target = pool_for(layout, NUM_TOKENS), pool_for(layout, NUM_TOKENS)
    header, ids = whole(layout, 128), table(layout, NUM_TOKENS)
    sent = adapt.payload(source, ids, header)
    receiver = receiver_of(target)
    receiver.expect(request_of(NUM_TOKENS), 1, ids, 0, 10.0)
    received = receiver.open(header)
    assert len(sent) == len(received) == 8  # one run of bytes for each block
    source.data[0] ^= 255
    received[0][0] = 17
    assert any(buffer.obj is source.data.obj for buffer in sent)
    assert all(buffer.obj is target.data.obj for buffer in received)
    assert 17 in set(target.data)


@pytest.mark.parametrize("target", ["float16", "bfloat16"])
def test_narrowing_rounds_as_torch_does(target: str) -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
    special = [
        0,
        1 << 31,
        0x7F800000,
        0xFF800000,
        0x7F800001,
        0xFFFFFFFF,
        0x7F7FFFFF,
        0x3F808000,
        0x3F818000,
        1,
    ]
    values = np.concatenate([np.array(special, np.uint32), bits]).view(np.float32)
    dtype = getattr(torch, target)
    expected = torch.from_numpy(values.copy()).to(dtype)
    got = torch.from_numpy(adapt._conversion("float32", target)(values).view(np.int16).copy()).view(dtype)
    assert torch.equal(torch.isnan(got), torch.isnan(expected))
    numbers = ~torch.isnan(expected)
    assert torch.equal(got[numbers].view(torch.int16), expected[numbers].view(torch.int16))
    back = adapt._conversion(target, "float32")(got.view(torch.int16).numpy().view(adapt._NUMPY[target]))
    wide = torch.from_numpy(back.copy())
    assert torch.equal(wide[numbers], expected[numbers].float())


def test_rounding_through_the_whole_path_is_torchs() -> None:
    layout, other = layout_of(32, "float32"), layout_of(16, "bfloat16")
    source, target = pool_for(layout, NUM_TOKENS), pool_for(other, NUM_TOKENS)
    source.data[:] = (
        np.random.default_rng(1).standard_normal(len(source.data) // 4).astype(np.float32).tobytes()
    )
    send([source], target)
    values = torch.frombuffer(bytearray(content(source, seed=0)), dtype=torch.float32)
    assert content(target) == values.to(torch.bfloat16).view(torch.uint8).numpy().tobytes()


def test_layers_of_different_shapes_and_latent_ones_convert_too() -> None:
    layers = (LayerLayout(4, 8, 6), LayerLayout(1, 16, 0), LayerLayout(2, 5, 5))
    source = pool_for(KVLayout(32, layers, "bfloat16", 2), NUM_TOKENS)
    target = pool_for(KVLayout(16, layers, "bfloat16", 2), NUM_TOKENS)
    source.data[:] = np.random.default_rng(2).integers(0, 256, len(source.data), dtype=np.uint8).tobytes()
    send([source], target)
    assert content(target) == content(source, seed=0)


def test_the_model_sees_what_the_wire_wrote() -> None:
    """The tensors' own view of the pool against the canonical order, so that no one is right only by himself."""
    layout = layout_of(16)
    storage = KVStorage(layout, 12)
    header, ids = whole(layout, 50), table(layout, 50)
    adapt.scatter(memoryview(canonical(header, layout, 0)), storage, ids, header)
    k, v = storage.layer_views(1)
    values = plane_values(0, 1, 1, 4, 8)
    for token in range(50):
        assert v[ids[token // 16], token % 16].numpy().tobytes() == values[token].tobytes()
    assert not torch.equal(k, v)


# --- the digest does not know layouts ---


def test_a_tokens_digest_is_the_same_in_every_layout_and_adds_up_over_heads_and_layers() -> None:
    def digests(pool: Pool, **other: int) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint64]]":
        header = whole(pool.layout, NUM_TOKENS, **other)
        payload = adapt.payload(pool, table(pool.layout, NUM_TOKENS), header)
        return token_digests(header, pool.layout, payload)

    one = digests(ranks(16, "bfloat16", 1)[0])
    assert len(set(one.tolist())) == NUM_TOKENS
    for size, shards in itertools.product((*BLOCK_SIZES, 4), SHARDS):
        parts = [
            digests(pool, layer_start=start, layer_end=end)
            for pool in ranks(size, "bfloat16", shards)
            for start, end in ((0, 1), (1, 3))
        ]
        total = np.sum(parts, axis=0, dtype=np.uint64)
        assert np.array_equal(total, one)


@pytest.mark.parametrize(
    "changed",
    [
        {"epoch": 2},
        {"sequence": 1},
        {"layer_start": 1, "layer_end": 2},
        {"head_start": 1, "head_end": 2},
        {"token_start": 16, "token_end": 32},
        {"first_token": 3},
        {"num_pieces": 1},
        {"dtype": "float16"},
        {"shard": 1},
        {"num_shards": 2},
        {"run_tokens": 8},
    ],
)
def test_the_digest_is_bound_to_everything_the_header_says(changed: dict[str, int]) -> None:
    layout = layout_of(16, "bfloat16")
    header = whole(layout, 16, layer_end=1, head_end=1)
    payload = [memoryview(bytes(range(256)) * (header.num_bytes // 256))]
    digester = Digester(IDENTITY, range(64))
    other = replace(header, **changed)  # type: ignore[arg-type]
    assert digester.digest(header, layout, payload) != digester.digest(other, layout, payload)


def test_the_digest_is_bound_to_the_model_and_to_all_tokens_before() -> None:
    layout = layout_of(16)
    header = whole(layout, 48, 32)
    payload = [memoryview(bytes(header.num_bytes))]
    prompt = list(range(60))
    digests = {Digester(IDENTITY, prompt).digest(header, layout, payload)}
    digests.add(Digester("another model", prompt).digest(header, layout, payload))
    for place in (0, 31, 47):
        other = [*prompt[:place], 999, *prompt[place + 1 :]]
        digests.add(Digester(IDENTITY, other).digest(header, layout, payload))
    assert len(digests) == 5
    behind = [*prompt[:50], 999, *prompt[51:]]
    assert Digester(IDENTITY, behind).digest(header, layout, payload) in digests


# --- headers ---


def test_a_header_is_what_the_documentation_says_byte_by_byte() -> None:
    header = PieceHeader(
        RequestId("ü"), 1, 2, 3, 4, 5, 6, 7, b"dd", num_pieces=8, first_token=-9, head_start=10, head_end=11,
        run_tokens=12, dtype="bfloat16", shard=13, num_shards=14,
    )  # fmt: skip
    data = header.encode()
    assert FIXED_BYTES == 60
    assert struct.unpack_from("<HBB", data) == (2, 1, 0)
    assert struct.unpack_from("<III", data, 4) == (1, 2, 8)
    assert struct.unpack_from("<HHHHHH", data, 16) == (13, 14, 3, 4, 10, 11)
    assert struct.unpack_from("<IIIQqHH", data, 28) == (5, 6, 12, 7, -9, 2, 2)
    assert data[60:] == "ü".encode() + b"dd"
    assert PieceHeader.decode(data) == header


def test_a_header_is_written_in_the_version_that_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """A release that has two of them next to one that has the older alone."""
    old = PieceHeader(RequestId("r"), 0, 0, 0, 1, 0, 1, 0)
    new = replace(old, version=VERSION + 1)
    with pytest.raises(
        TransferError, match=f"to be sent in wire version {VERSION + 1}, this worker speaks {VERSION}"
    ):
        new.encode()
    with monkeypatch.context() as upgraded:
        upgraded.setattr(wire, "VERSIONS", (VERSION, VERSION + 1))
        data = new.encode()
        assert PieceHeader.decode(data) == new
        assert PieceHeader.decode(old.encode()) == old
    assert PieceHeader.decode(old.encode()) == old
    with pytest.raises(TransferError, match=f"comes in wire version {VERSION + 1}"):
        PieceHeader.decode(data)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_header_or_an_error(data: bytes) -> None:
    with contextlib.suppress(TransferError):
        assert PieceHeader.decode(data).encode() == data


@given(st.integers(0, 500), st.integers(0, 100), st.integers(0, 70))
def test_runs_cut_a_piece_at_multiples_of_their_length(start: int, num_tokens: int, run_tokens: int) -> None:
    header = PieceHeader(RequestId("r"), 0, 0, 0, 1, start, start + num_tokens, 0, run_tokens=run_tokens)
    runs = header.runs()
    tokens = [token for run in runs for token in range(*run)]
    assert tokens == list(range(start, start + num_tokens))
    assert all(end % run_tokens == 0 for _, end in runs[:-1] if run_tokens)
    assert all(end - begin <= (run_tokens or num_tokens) for begin, end in runs)


def test_an_opaque_dtype_is_never_converted() -> None:
    assert [adapt.can_convert("uint8", dtype) for dtype in DTYPES] == [False, False, False, True]
    receiver = receiver_of(pool_for(layout_of(16), 16))
    receiver.expect(request_of(16), 1, [BlockId(0)], 0, 10.0)
    with pytest.raises(TransferRefused, match="uint8 cannot become float32"):
        receiver.open(whole(layout_of(16, "uint8"), 16))
