"""Two workers are compared before KV goes from one to the other, and a person is told what differs."""

from dataclasses import replace
from typing import Any

import pytest
from router_parts import ScriptedFleet, worker

from baton.errors import TransferError
from baton.messages import Compatibility, Role, WorkerRecord
from baton.transfer import framing
from baton.transfer.handshake import Kind, decide, wire_version
from baton.transfer.wire import VERSIONS
from baton_router.fleet_view import readiness

SAME = Compatibility(
    weights="aaaaaaaaaaaa", config="bbbbbbbbbbbb", tokenizer="cccccccccccc", rope="base 10000",
    layers="2 layers of 2 KV heads of 24", dtype="float32", release="1.4.0", wire_versions=(2, 3),
)  # fmt: skip


def party(name: str, role: Role, block_size: int = 16, **changes: Any) -> WorkerRecord:
    return worker(name, role, block_size=block_size, compatibility=replace(SAME, **changes))


def fit(block_size: int = 16, **changes: Any) -> tuple[Kind, str]:
    prefill, decode = party("prefill-0", Role.PREFILL, block_size, **changes), party("decode-0", Role.DECODE)
    return decide(prefill, decode)[:2]


def test_equal_workers_need_no_adapter() -> None:
    assert fit() == (Kind.EQUAL, "")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rope": "base 500000"}, "prefill-0 has RoPE base 500000, decode-0 base 10000"),
        ({"weights": "dddddddddddd"}, "prefill-0 and decode-0 have different weights (digests dddddddd and aaaaaaaa)"),
        ({"config": "d"}, "prefill-0 and decode-0 have different config.json (digests d and bbbbbbbb)"),
        ({"tokenizer": "d"}, "prefill-0 and decode-0 have different tokenizer (digests d and cccccccc)"),
        (
            {"layers": "3 layers of 2 KV heads of 24", "weights": "d"},
            "prefill-0 has 3 layers of 2 KV heads of 24, decode-0 2 layers of 2 KV heads of 24",
        ),
        (
            {"wire_versions": (4, 5), "release": "3.0.0"},
            "prefill-0 (release 3.0.0) speaks wire versions 4, 5, decode-0 (release 1.4.0) 2, 3: "
            "they have none in common",
        ),
        (
            {"arithmetic": "avx512"},
            "prefill-0 computes bit-exactly (avx512), decode-0 without bit-exact mode",
        ),
        (
            {"dtype": "int3"},
            "prefill-0 keeps KV as int3, decode-0 as float32, and nobody can convert that",
        ),
        (
            {"rope": "base 500000", "weights": "d"},
            "prefill-0 has RoPE base 500000, decode-0 base 10000; "
            "prefill-0 and decode-0 have different weights (digests d and aaaaaaaa)",
        ),
    ],
)  # fmt: skip
def test_what_would_be_wrong_is_refused_and_named(changes: dict[str, Any], reason: str) -> None:
    assert fit(**changes) == (Kind.REFUSED, reason)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"block_size": 64}, "prefill-0 has blocks of 64 tokens, decode-0 of 16"),
        ({"dtype": "bfloat16"}, "prefill-0 keeps KV as bfloat16, decode-0 as float32"),
        ({"num_shards": 2}, "prefill-0 splits its KV heads 2 ways, decode-0 1"),
        ({"release": "1.3.0", "wire_versions": (1, 2)}, ""),
    ],
)
def test_what_can_be_converted_is_said_and_allowed(changes: dict[str, Any], reason: str) -> None:
    assert fit(**changes) == (Kind.ADAPTABLE if reason else Kind.EQUAL, reason)


def test_revisions_count_where_both_are_known() -> None:
    new, old = party("p", Role.PREFILL, revision="0f3a"), party("d", Role.DECODE, revision="77b1")
    assert decide(new, old)[:2] == (Kind.REFUSED, "p has revision 0f3a of the model, d 77b1")
    assert decide(new, party("d", Role.DECODE)).kind is Kind.EQUAL


def test_a_pair_speaks_the_highest_wire_version_that_both_have() -> None:
    """Release N next to N - 1."""
    new, old = party("p", Role.PREFILL, wire_versions=(3, 2)), party("d", Role.DECODE, wire_versions=(2, 1))
    assert decide(new, old).kind is decide(old, new).kind is Kind.EQUAL
    ours, theirs = new.compatibility.wire_versions, old.compatibility.wire_versions
    assert wire_version(ours, theirs) == wire_version(theirs, ours) == 2
    assert wire_version(ours, ours) == 3
    with pytest.raises(TransferError, match="3, 2 and 1 have none in common"):
        wire_version(ours, (1,))
    assert Compatibility().wire_versions == VERSIONS


@pytest.mark.parametrize(("oldest", "newest"), [(1, 2), (2, 2), (2, 9)])
def test_a_hello_of_neighbouring_releases_is_understood(oldest: int, newest: int) -> None:
    framing.check_hello(framing.HELLO.pack(b"BATN", oldest, newest))


def test_readiness_tells_people_which_pair_does_not_fit_and_why() -> None:
    prefill, decode = party("p", Role.PREFILL, rope="base 5"), party("d", Role.DECODE)
    fleet = ScriptedFleet(
        [prefill, decode], refused={(prefill.worker_id, decode.worker_id): decide(prefill, decode).reason}
    )
    assert "p -> d carries nothing: p has RoPE base 5, d base 10000" in readiness(fleet).reasons
