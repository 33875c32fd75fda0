"""May this prefill worker hand its KV to that decode worker? Decided before any traffic, with a reason for people.

Phase 1: each worker says in its record, and each decode worker again in every ticket, what its KV is made of
         (`messages.Compatibility`). A transport's hello says the wire versions once more.
Phase 2: `decide` compares the two. The router pairs by it, and the prefill worker checks each ticket by it.

    must be equal   layers and heads, RoPE, weights, config, tokenizer, revision where both know theirs, and the
                    arithmetic where the last bit counts
    may differ      block size, dtype, the split of KV heads over ranks: the receiver converts (transfer.adapt);
                    the release, as long as the two have a wire version in common

Every piece is then written in `wire_version` of the two sides.

Digests of KV are bound to `Compatibility.identity`, so a piece of another model is found out even if nobody had asked.
"""

import enum
from collections.abc import Collection
from functools import lru_cache
from typing import NamedTuple, Protocol

from baton.errors import TransferError
from baton.messages import Compatibility
from baton.request import WorkerId
from baton.transfer.wire import DTYPES


class Kind(enum.Enum):
    EQUAL = enum.auto()  # bytes go from pool to pool as they are
    ADAPTABLE = enum.auto()  # the receiver converts
    REFUSED = enum.auto()


class Fit(NamedTuple):
    kind: Kind
    reason: str = ""  # what differs, for people


_EQUAL = Fit(Kind.EQUAL)


class Party(Protocol):
    """A WorkerRecord or a Ticket."""

    @property
    def worker_id(self) -> WorkerId: ...

    @property
    def block_size(self) -> int: ...

    @property
    def compatibility(self) -> Compatibility: ...


def wire_version(ours: Collection[int], theirs: Collection[int]) -> int:
    """The highest that both sides have. Raises TransferError where there is none."""
    common = set(ours) & set(theirs)
    if not common:
        raise TransferError(f"wire versions {_listed(ours)} and {_listed(theirs)} have none in common")
    return max(common)


def decide(prefill: Party, decode: Party) -> Fit:
    """Asked for every pair of every placement: most are equal, and the others are remembered."""
    a, b = prefill.compatibility, decode.compatibility
    if a == b and prefill.block_size == decode.block_size and a.wire_versions:
        return _EQUAL
    return _decide(prefill.worker_id, prefill.block_size, a, decode.worker_id, decode.block_size, b)


@lru_cache(maxsize=4096)
def _decide(p: str, p_size: int, a: Compatibility, d: str, d_size: int, b: Compatibility) -> Fit:
    if not set(a.wire_versions) & set(b.wire_versions):
        return Fit(
            Kind.REFUSED,
            f"{p} (release {a.release}) speaks wire versions {_listed(a.wire_versions)}, {d} (release {b.release}) "
            f"{_listed(b.wire_versions)}: they have none in common",
        )
    if differences := _refused(p, a, d, b):
        return Fit(Kind.REFUSED, "; ".join(differences))
    differences = _adapted(p, p_size, a, d, d_size, b)
    kind = Kind.ADAPTABLE if differences else Kind.EQUAL
    return Fit(kind, "; ".join(differences))


def _refused(p: str, a: Compatibility, d: str, b: Compatibility) -> list[str]:
    if a.layers != b.layers:  # everything else differs then, too
        return [f"{p} has {a.layers}, {d} {b.layers}"]
    found = []
    if a.rope != b.rope:
        found.append(f"{p} has RoPE {a.rope}, {d} {b.rope}")
    if a.revision and b.revision and a.revision != b.revision:
        found.append(f"{p} has revision {a.revision} of the model, {d} {b.revision}")
    for what, one, other in (
        ("weights", a.weights, b.weights),
        ("config.json", a.config, b.config),
        ("tokenizer", a.tokenizer, b.tokenizer),
    ):
        if one != other:
            found.append(f"{p} and {d} have different {what} (digests {one[:8]} and {other[:8]})")
    if a.arithmetic != b.arithmetic:
        found.append(f"{p} computes {_arithmetic(a)}, {d} {_arithmetic(b)}")
    if a.dtype != b.dtype and not {a.dtype, b.dtype} <= set(DTYPES) - {"uint8"}:
        found.append(f"{p} keeps KV as {a.dtype}, {d} as {b.dtype}, and nobody can convert that")
    return found


def _adapted(p: str, p_size: int, a: Compatibility, d: str, d_size: int, b: Compatibility) -> list[str]:
    found = []
    if p_size != d_size:
        found.append(f"{p} has blocks of {p_size} tokens, {d} of {d_size}")
    if a.dtype != b.dtype:
        found.append(f"{p} keeps KV as {a.dtype}, {d} as {b.dtype}")
    if a.num_shards != b.num_shards:
        found.append(f"{p} splits its KV heads {a.num_shards} ways, {d} {b.num_shards}")
    return found


def _arithmetic(of: Compatibility) -> str:
    return f"bit-exactly ({of.arithmetic})" if of.arithmetic else "without bit-exact mode"


def _listed(versions: Collection[int]) -> str:
    return ", ".join(map(str, versions)) or "none"
