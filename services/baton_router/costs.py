"""What a request costs on a worker, in predicted seconds, from what the workers measured of themselves.

A prompt. (tokens before it + its own that are not held there) / rate. A rate that was measured on few tokens, like an
idle worker's on those of the canary, says little: TRUST_TOKENS at the fleet's median rate are added to them.

Likewise a step that was measured on few, perhaps while the next worker was starting: TRUST_STEPS at the median.

A decode step is a line over its sequences, so that workers measured at different batches can be compared: a busy one at
32 and an idle one that last had the canary alone are both looked at with as many sequences as they would have. Where a
worker has not measured what one sequence more adds, the others' share of a step stands in.

A pool. PRESSURE_S * k * k / (1 - k), with k the use after admission: the number that waits in a queue of that use, as
in smg's `least_load`, which counts those being served, too. Samples of one prompt share the blocks that it fills.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

from baton.kv.block import num_blocks_for
from baton.messages import Load, WorkerRecord
from baton.request import WorkerId

PRESSURE_S = 0.15  # smg's weight
TRUST_TOKENS = 2048  # a few full steps
TRUST_STEPS = 16  # the canary makes 6 with each prefill worker
FALLBACK_PREFILL_TOKENS_PER_S = 2000.0
FALLBACK_STEP_S = 0.02
FALLBACK_SEQ_SHARE = 0.05
FALLBACK_TRANSFER_BYTES_PER_S = 1e9


@dataclass(frozen=True, slots=True)
class Candidate:
    """One worker as the router sees it now: its latest report, and what this router sent since."""

    record: WorkerRecord
    num_held_blocks: int = 0  # leading blocks of this prompt that it is said to hold
    num_seqs: int = 0  # running, waiting, or on the way there
    num_queued_tokens: int = 0  # of prompts that it has to compute, likewise
    num_unseen_tokens: int = 0  # that it will take blocks for as soon as it can, and its report does not show

    @property
    def worker_id(self) -> WorkerId:
        return self.record.worker_id

    @property
    def num_held_tokens(self) -> int:
        return self.num_held_blocks * self.record.block_size


class StepLine(NamedTuple):
    """Seconds of a decode step over the number of its sequences."""

    one_s: float
    more_s: float  # for each after the first

    def seconds(self, num_seqs: float) -> float:
        return self.one_s + self.more_s * max(0.0, num_seqs - 1)


@dataclass(frozen=True, slots=True)
class Rates:
    """Of the fleet, for those who have not measured theirs yet."""

    prefill_tokens_per_s: float
    transfer_bytes_per_s: float

    @classmethod
    def of(cls, prefills: Sequence[Candidate], decodes: Sequence[Candidate]) -> "Rates":
        """The median of what was measured. What decode workers computed was short, and they may be other machines."""
        prefill = _measured([w.record.load.prefill_tokens_per_s for w in prefills or decodes])
        wire = _measured([w.record.load.transfer_bytes_per_s for w in (*prefills, *decodes)])
        return cls(
            median(prefill) if prefill else FALLBACK_PREFILL_TOKENS_PER_S,
            median(wire) if wire else FALLBACK_TRANSFER_BYTES_PER_S,
        )

    def compute_s(self, worker: Candidate, num_tokens: int) -> float:
        """Of that many tokens of prompts."""
        load = worker.record.load
        if not load.prefill_tokens_per_s:
            return num_tokens / self.prefill_tokens_per_s
        measured_s = load.num_measured_tokens / load.prefill_tokens_per_s
        trusted_s = TRUST_TOKENS / self.prefill_tokens_per_s
        return num_tokens * (measured_s + trusted_s) / (load.num_measured_tokens + TRUST_TOKENS)

    def wire_s(self, sender: Candidate, num_tokens: int) -> float:
        """To send the KV of that many."""
        record = sender.record
        num_bytes = num_tokens * record.kv_block_bytes / record.block_size
        return num_bytes / (record.load.transfer_bytes_per_s or self.transfer_bytes_per_s)


def _measured(rates: Sequence[float]) -> list[float]:
    return [rate for rate in rates if rate]


def step_lines(decodes: Sequence[Candidate]) -> list[StepLine]:
    """One for each."""
    loads = [decode.record.load for decode in decodes]
    shares = [load.decode_seq_s / _line(load, 0.0).one_s for load in loads if load.decode_seq_s]
    share = median(shares) if shares else FALLBACK_SEQ_SHARE
    measured = [_line(load, share) for load in loads if load.decode_step_s]
    usual_s = median(line.one_s for line in measured) if measured else FALLBACK_STEP_S
    return [_trusted(load, share, usual_s) for load in loads]


def _trusted(load: Load, share: float, usual_s: float) -> StepLine:
    if not load.decode_step_s:
        return StepLine(usual_s, usual_s * share)
    line, num_steps = _line(load, share), load.num_measured_steps
    one_s = (num_steps * line.one_s + TRUST_STEPS * usual_s) / (num_steps + TRUST_STEPS)
    return StepLine(one_s, load.decode_seq_s or one_s * share)


def _line(load: Load, share: float) -> StepLine:
    """Through what was measured; `share` of the first sequence's step for each more, where that was not."""
    num_more = max(0.0, load.decode_batch_size - 1)
    if load.decode_seq_s:
        return StepLine(
            max(load.decode_step_s - load.decode_seq_s * num_more, load.decode_seq_s), load.decode_seq_s
        )
    one_s = load.decode_step_s / (1 + share * num_more)
    return StepLine(one_s, one_s * share)


def pressure_s(decode: Candidate, num_prompt_tokens: int, num_output_tokens: int, num_samples: int) -> float:
    record = decode.record
    num_shared = num_prompt_tokens // record.block_size
    num_own = num_blocks_for(num_prompt_tokens + num_output_tokens, record.block_size) - num_shared
    num_needed = max(0, num_shared + num_samples * num_own - decode.num_held_blocks)
    num_unseen = num_blocks_for(decode.num_unseen_tokens, record.block_size)
    num_used = record.num_blocks - record.load.num_free_blocks + num_unseen + num_needed
    use = min(num_used / max(1, record.num_blocks), 0.999)
    return PRESSURE_S * use * use / (1 - use)
