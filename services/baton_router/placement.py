"""Where a request goes: a pure decision over what is known of the workers. No I/O, no clock.

Every candidate pair (p, d) of a prefill and a decode worker gets a predicted cost in seconds and the cheapest wins:

    cost = queue_p + prefill(uncached on p) + transfer(not held by d) + wait_d
         + E[out] * max(0, step_d - fastest step) + PRESSURE_S * k_d / (1 - k_d)

with k_d the KV use of d after admission, where samples of one prompt share the blocks that it fills. What p lacks and
another worker holds is fetched from there, where that is faster than computing it; then it costs its way over the wire
instead. Rates are the workers' own measurements; until a worker has measured one, the median of the others stands in,
or a constant where nobody has. Among pairs within 5 % of the best one is drawn, so that routers of equal views do not
all choose the same.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from baton.kv.block import num_blocks_for
from baton.messages import PrefixSource, WorkerRecord
from baton.request import WorkerId
from baton.transfer.handshake import Kind, decide

PRESSURE_S = 0.15  # cost of a half-full pool; smg's least_load uses the same barrier and weight
NEAR_BEST = 1.05
FALLBACK_PREFILL_TOKENS_PER_S = 2000.0
FALLBACK_STEP_S = 0.02
FALLBACK_TRANSFER_BYTES_PER_S = 1e9
EXPECTED_OUTPUT_TOKENS = 128
FETCH_S = 0.005  # what a fetch costs beside the wire: a call, a reservation, a first piece
FETCH_SLACK_S = 0.25  # a fetch may take so much longer than computing would, before it is given up


@dataclass(frozen=True, slots=True)
class Candidate:
    """One worker as the router sees it now."""

    record: WorkerRecord
    num_held_blocks: int = 0  # leading blocks of this prompt that it is said to hold
    num_dispatched_tokens: int = 0  # sent by this router since the worker's last report


@dataclass(frozen=True, slots=True)
class Placement:
    """`prefill` is None when the decode worker computes the prompt itself."""

    prefill: WorkerId | None
    decode: WorkerId
    predicted_s: float
    source: PrefixSource | None = None  # of what the prefill worker lacks, where fetching it is faster


@dataclass(frozen=True, slots=True)
class _Rates:
    prefill_tokens_per_s: float
    step_s: float
    transfer_bytes_per_s: float


def place(
    num_prompt_tokens: int,
    max_tokens: int,
    prefills: Sequence[Candidate],
    decodes: Sequence[Candidate],
    rng: random.Random,
    is_proven: Callable[[WorkerRecord, WorkerRecord], bool],
    num_samples: int = 1,
    can_fetch: Callable[[WorkerRecord, WorkerRecord, WorkerRecord], bool] = lambda owner, p, d: False,
) -> Placement | None:
    """None when there is no decode worker. A pair needs KV that fits (see handshake), a transport in common and a
    proof (see canary); a worker with both roles serves alone, with nothing to send. When there is neither, a decode
    worker serves alone. `can_fetch(owner, p, d)`: may p, who computes for d, take KV from that owner?"""
    rates = _typical_rates([*prefills, *decodes])
    num_output_tokens = min(max_tokens, EXPECTED_OUTPUT_TOKENS)
    owners = _owners([*prefills, *decodes])
    options: list[Placement] = []
    for decode in decodes:
        wait_s = _decode_cost(decode, num_prompt_tokens, num_output_tokens, num_samples, rates)
        for prefill in prefills:
            if prefill.record.worker_id == decode.record.worker_id:
                cost = wait_s + _compute_s(decode, num_prompt_tokens, rates)
                options.append(Placement(None, decode.record.worker_id, cost))
            elif num_prompt_tokens >= prefill.record.max_model_len:
                continue
            elif can_pair(prefill.record, decode.record) and is_proven(prefill.record, decode.record):
                cost = wait_s + _prefill_cost(prefill, decode, num_prompt_tokens, rates)
                source, saved_s = _source(prefill, decode, owners, num_prompt_tokens, rates, can_fetch)
                p, d = prefill.record.worker_id, decode.record.worker_id
                options.append(Placement(p, d, cost - saved_s, source))
    if not options:
        for decode in decodes:
            cost = _decode_cost(decode, num_prompt_tokens, num_output_tokens, num_samples, rates)
            cost += _compute_s(decode, num_prompt_tokens, rates)
            options.append(Placement(None, decode.record.worker_id, cost))
    if not options:
        return None
    best = min(option.predicted_s for option in options)
    return rng.choice([option for option in options if option.predicted_s <= best * NEAR_BEST])


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


def _prefill_cost(prefill: Candidate, decode: Candidate, num_prompt_tokens: int, rates: _Rates) -> float:
    num_to_send = max(0, num_prompt_tokens - decode.num_held_blocks * decode.record.block_size)
    token_bytes = prefill.record.kv_block_bytes / prefill.record.block_size
    wire = prefill.record.load.transfer_bytes_per_s or rates.transfer_bytes_per_s
    return _compute_s(prefill, num_prompt_tokens, rates) + num_to_send * token_bytes / wire


def _compute_s(worker: Candidate, num_prompt_tokens: int, rates: _Rates) -> float:
    record = worker.record
    queued = max(record.load.num_waiting_tokens, worker.num_dispatched_tokens)
    uncached = max(1, num_prompt_tokens - worker.num_held_blocks * record.block_size)
    return (queued + uncached) / (record.load.prefill_tokens_per_s or rates.prefill_tokens_per_s)


def _owners(workers: Sequence[Candidate]) -> list[Candidate]:
    """Those that hold anything, the longest prefix first."""
    owners = [worker for worker in workers if worker.num_held_blocks]
    return sorted(owners, key=lambda owner: (-_held_tokens(owner), owner.record.worker_id))


def _held_tokens(worker: Candidate) -> int:
    return worker.num_held_blocks * worker.record.block_size


def _source(
    prefill: Candidate,
    decode: Candidate,
    owners: Sequence[Candidate],
    num_prompt_tokens: int,
    rates: _Rates,
    can_fetch: Callable[[WorkerRecord, WorkerRecord, WorkerRecord], bool],
) -> tuple[PrefixSource | None, float]:
    """The owner of the longest prefix, where fetching is faster than computing; and the seconds that it saves."""
    here = prefill.record
    for owner in owners:
        there = owner.record
        # The last token is always computed, and blocks are held whole.
        num_tokens = min(_held_tokens(owner), (num_prompt_tokens - 1) // there.block_size * there.block_size)
        num_missing = num_tokens - _held_tokens(prefill)
        if num_missing <= here.block_size:
            break
        if not can_pair(there, here) or not can_fetch(there, here, decode.record):
            continue
        num_bytes = num_missing * there.kv_block_bytes / there.block_size
        fetch_s = FETCH_S + num_bytes / (there.load.transfer_bytes_per_s or rates.transfer_bytes_per_s)
        compute_s = num_missing / (here.load.prefill_tokens_per_s or rates.prefill_tokens_per_s)
        if fetch_s < compute_s:
            timeout_s = compute_s + FETCH_SLACK_S
            return PrefixSource(there.worker_id, there.address, num_tokens, timeout_s), compute_s - fetch_s
    return None, 0.0


def _decode_cost(
    decode: Candidate, num_prompt_tokens: int, num_output_tokens: int, num_samples: int, rates: _Rates
) -> float:
    record, load = decode.record, decode.record.load
    step_s = load.decode_step_s or rates.step_s
    num_shared = num_prompt_tokens // record.block_size
    num_own = num_blocks_for(num_prompt_tokens + num_output_tokens, record.block_size) - num_shared
    num_needed = max(0, num_shared + num_samples * num_own - decode.num_held_blocks)
    num_used = record.num_blocks - load.num_free_blocks + num_needed
    use = min(num_used / max(1, record.num_blocks), 0.999)
    wait_s = load.num_waiting * step_s
    return wait_s + num_output_tokens * max(0.0, step_s - rates.step_s) + PRESSURE_S * use / (1 - use)


def _typical_rates(workers: Sequence[Candidate]) -> _Rates:
    """Prefill and wire: the median of what was measured; step: the fastest, the base that others are held against."""
    loads = [worker.record.load for worker in workers]
    prefill = [load.prefill_tokens_per_s for load in loads if load.prefill_tokens_per_s]
    step = [load.decode_step_s for load in loads if load.decode_step_s]
    wire = [load.transfer_bytes_per_s for load in loads if load.transfer_bytes_per_s]
    return _Rates(
        median(prefill) if prefill else FALLBACK_PREFILL_TOKENS_PER_S,
        min(step) if step else FALLBACK_STEP_S,
        median(wire) if wire else FALLBACK_TRANSFER_BYTES_PER_S,
    )
