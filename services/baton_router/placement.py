"""Where a request goes: a pure decision over what is known of the workers. No I/O, no clock.

Every candidate pair (p, d) of a prefill and a decode worker gets a predicted cost in seconds (see `costs`):

    cost = compute(queued and uncached on p) + transfer(not held by d) + waiting_d * step_d
         + E[out] * max(0, step_d - SLOWER * fastest step) + pressure_d

What p lacks and another worker holds is fetched from there, where that is faster than computing it; then it costs its
way over the wire instead. Costs within NEAR of the cheapest are equal, as far as anybody knows. Among these, the least
loaded decode worker serves, then the prefill worker that has the fewest tokens to compute, then chance decides, so that
routers of equal views do not all choose the same.

The load of d is sequences / speed: so shares go by speed, and a measurement that is wrong by a third moves a third of
the requests, not all of them. smg's `least_load` divides what is in flight by throughput likewise; Dynamo and llm-d
count blocks and requests, and take all workers for equally fast. Speeds are compared at one batch, the mean of all, and
within NOISE they are the same: equal workers get equal shares, to the request. Only a worker that makes users wait more
than SLOWER times as long for each token also pays for it in seconds.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from baton.messages import PrefixSource, WorkerRecord
from baton.request import WorkerId
from baton.transfer.handshake import Kind, decide
from baton_router.costs import Candidate, Rates, pressure_s, step_lines

NEAR, NEAR_S = 1.05, 0.005  # times the cheapest, or a scheduler's whim
NOISE = 1.25  # between two measurements of the same: a quarter, on a shared host
SLOWER = 3.0  # neighbours on a shared host come and go, and double a step for a while
EXPECTED_OUTPUT_TOKENS = 128
FETCH_S = 0.005  # what a fetch costs beside the wire: a call, a reservation, a first piece
FETCH_SLACK_S = 0.25  # a fetch may take so much longer than computing would, before it is given up

CanFetch = Callable[[WorkerRecord, WorkerRecord, WorkerRecord], bool]
IsProven = Callable[[WorkerRecord, WorkerRecord], bool]


@dataclass(frozen=True, slots=True)
class Placement:
    """`prefill` is None when the decode worker computes the prompt itself."""

    prefill: WorkerId | None
    decode: WorkerId
    predicted_s: float
    num_new_tokens: int  # of the prompt, to be computed
    source: PrefixSource | None = None  # of what the prefill worker lacks, where fetching it is faster


class _Option(NamedTuple):
    cost_s: float
    load: float  # of the decode worker, with this request
    num_tokens: int  # to be computed until its prompt is
    num_new_tokens: int
    prefill: WorkerId | None
    decode: WorkerId
    source: PrefixSource | None = None


class _Decode(NamedTuple):
    worker: Candidate
    cost_s: float
    load: float


class _Fetch(NamedTuple):
    source: PrefixSource
    cost_s: float


def place(
    num_prompt_tokens: int,
    max_tokens: int,
    prefills: Sequence[Candidate],
    decodes: Sequence[Candidate],
    rng: random.Random,
    is_proven: IsProven,
    num_samples: int = 1,
    can_fetch: CanFetch = lambda owner, p, d: False,
) -> Placement | None:
    """None when there is no decode worker. A pair needs KV that fits (see handshake), a transport in common and a
    proof (see canary); a worker with both roles serves alone, with nothing to send. When there is neither, a decode
    worker serves alone. `can_fetch(owner, p, d)`: may p, who computes for d, take KV from that owner?"""
    rates = Rates.of(prefills, decodes)
    owners = _owners([*prefills, *decodes])
    weighed = _weighed(decodes, num_prompt_tokens, min(max_tokens, EXPECTED_OUTPUT_TOKENS), num_samples)
    options: list[_Option] = []
    for decode in weighed:
        for prefill in prefills:
            if prefill.worker_id == decode.worker.worker_id:
                options.append(_alone(decode, num_prompt_tokens, rates))
            elif num_prompt_tokens >= prefill.record.max_model_len:
                continue
            elif can_pair(prefill.record, decode.worker.record) and is_proven(
                prefill.record, decode.worker.record
            ):
                fetch = _fetch(prefill, decode.worker, owners, num_prompt_tokens, rates, can_fetch)
                options.append(_pair(prefill, decode, num_prompt_tokens, rates, fetch))
    options = options or [_alone(decode, num_prompt_tokens, rates) for decode in weighed]
    return _cheapest(options, rng) if options else None


def can_pair(prefill: WorkerRecord, decode: WorkerRecord) -> bool:
    return (
        prefill.worker_id != decode.worker_id
        and not set(prefill.transports).isdisjoint(decode.transports)
        and decide(prefill, decode).kind is not Kind.REFUSED
    )


def why_no_pair(prefill: WorkerRecord, decode: WorkerRecord) -> str:
    """For people; "" where the two fit."""
    if prefill.worker_id == decode.worker_id:
        return ""
    fit = decide(prefill, decode)
    if fit.kind is Kind.REFUSED:
        return fit.reason
    if set(prefill.transports).isdisjoint(decode.transports):
        return (
            f"{prefill.worker_id} sends over {', '.join(prefill.transports)}, {decode.worker_id} receives over "
            f"{', '.join(decode.transports)}"
        )
    return ""


def _weighed(
    decodes: Sequence[Candidate], num_prompt_tokens: int, num_output_tokens: int, num_samples: int
) -> list[_Decode]:
    """What each costs, and how loaded it would be."""
    if not decodes:
        return []
    lines = step_lines(decodes)
    steps_s = [line.seconds(d.num_seqs + num_samples) for line, d in zip(lines, decodes, strict=True)]
    same_batch = sum(decode.num_seqs for decode in decodes) / len(decodes) + num_samples
    paces_s = [line.seconds(same_batch) for line in lines]
    limit_s, same_s = SLOWER * min(steps_s), min(paces_s)
    weighed = []
    for decode, step_s, pace_s in zip(decodes, steps_s, paces_s, strict=True):
        wait_s = decode.record.load.num_waiting * step_s
        slow_s = num_output_tokens * max(0.0, step_s - limit_s)
        full_s = pressure_s(decode, num_prompt_tokens, num_output_tokens, num_samples)
        load = (decode.num_seqs + num_samples) * (pace_s if pace_s > NOISE * same_s else same_s)
        weighed.append(_Decode(decode, wait_s + slow_s + full_s, load))
    return weighed


def _cheapest(options: Sequence[_Option], rng: random.Random) -> Placement:
    best_s = min(option.cost_s for option in options)
    limit_s = max(best_s * NEAR, best_s + NEAR_S)
    near = [option for option in options if option.cost_s <= limit_s]
    least = min((option.load, option.num_tokens) for option in near)
    chosen = rng.choice([option for option in near if (option.load, option.num_tokens) == least])
    return Placement(chosen.prefill, chosen.decode, chosen.cost_s, chosen.num_new_tokens, chosen.source)


def _alone(decode: _Decode, num_prompt_tokens: int, rates: Rates) -> _Option:
    worker = decode.worker
    num_new = _num_new(worker, num_prompt_tokens)
    num_tokens = worker.num_queued_tokens + num_new
    cost_s = decode.cost_s + rates.compute_s(worker, num_tokens)
    return _Option(cost_s, decode.load, num_tokens, num_new, None, worker.worker_id)


def _pair(
    prefill: Candidate, decode: _Decode, num_prompt_tokens: int, rates: Rates, fetch: _Fetch | None
) -> _Option:
    d, source, num_new, fetch_s = decode.worker, None, _num_new(prefill, num_prompt_tokens), 0.0
    if fetch is not None:
        source, num_new, fetch_s = fetch.source, num_prompt_tokens - fetch.source.num_tokens, fetch.cost_s
    num_tokens = prefill.num_queued_tokens + num_new
    num_to_send = max(0, num_prompt_tokens - d.num_held_tokens)
    cost_s = (
        decode.cost_s + fetch_s + rates.compute_s(prefill, num_tokens) + rates.wire_s(prefill, num_to_send)
    )
    return _Option(cost_s, decode.load, num_tokens, num_new, prefill.worker_id, d.worker_id, source)


def _num_new(worker: Candidate, num_prompt_tokens: int) -> int:
    """The last token is always computed."""
    return max(1, num_prompt_tokens - worker.num_held_tokens)


def _owners(workers: Sequence[Candidate]) -> list[Candidate]:
    """Those that hold anything, the longest prefix first."""
    owners = [worker for worker in workers if worker.num_held_blocks]
    return sorted(owners, key=lambda owner: (-owner.num_held_tokens, owner.worker_id))


def _fetch(
    prefill: Candidate,
    decode: Candidate,
    owners: Sequence[Candidate],
    num_prompt_tokens: int,
    rates: Rates,
    can_fetch: CanFetch,
) -> _Fetch | None:
    """From the owner of the longest prefix that may be fetched, where that is faster than computing."""
    for owner in owners:
        there = owner.record
        # The last token is always computed, and blocks are held whole.
        num_tokens = min(
            owner.num_held_tokens, (num_prompt_tokens - 1) // there.block_size * there.block_size
        )
        num_missing = num_tokens - prefill.num_held_tokens
        if num_missing <= prefill.record.block_size:
            break
        if not can_pair(there, prefill.record) or not can_fetch(there, prefill.record, decode.record):
            continue
        cost_s, compute_s = FETCH_S + rates.wire_s(owner, num_missing), rates.compute_s(prefill, num_missing)
        if cost_s < compute_s:
            timeout_s = compute_s + FETCH_SLACK_S
            return _Fetch(PrefixSource(there.worker_id, there.address, num_tokens, timeout_s), cost_s)
    return None
