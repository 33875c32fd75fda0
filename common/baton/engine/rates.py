"""How fast this worker is, measured on its own steps."""

_DECAY = 0.9  # per step that tells something about the rate: the last dozen of steps decide
_DECODE_DECAY = (
    0.99  # of decode steps, which are short: on a shared host a dozen of them tells of the moment only
)
_SLOPE_DECAY = 0.98  # per step of another size than usual
_MIN_SPREAD = 4.0  # squared sequences: less says nothing of what one sequence more costs
_MIN_SHARE = 0.001  # of a step: no sequence is free


class StepRates:
    """Decayed sums. A step without prompt tokens measures the decode step; of any other, what it took longer
    than a decode step (if it decoded at all) is the price of its prompt tokens. Long chunks weigh more than
    short ones.

    The time of a decode step is a line over the number of its sequences: it goes through (decode_batch_size,
    decode_step_s), with decode_seq_s for each sequence more. Steps of the usual size say nothing of the slope, and do
    not make it forgotten."""

    def __init__(self) -> None:
        self._decode_steps = self._decode_s = self._decode_seqs = 0.0
        self._spread = self._rise = 0.0  # of sequences; of sequences times seconds
        self._prefill_tokens = self._prefill_s = 0.0
        self._swap_bytes = self._swap_s = 0.0

    @property
    def decode_step_s(self) -> float:
        """0 until measured."""
        return self._decode_s / self._decode_steps if self._decode_steps else 0.0

    @property
    def num_decode_steps(self) -> float:
        """That decode_step_s was measured by; 100 of a busy worker."""
        return self._decode_steps

    @property
    def decode_batch_size(self) -> float:
        """Sequences of the steps that decode_step_s is the mean of."""
        return self._decode_seqs / self._decode_steps if self._decode_steps else 0.0

    @property
    def decode_seq_s(self) -> float:
        """0 until measured. Never so much that an empty step would take less than nothing."""
        if self._spread < _MIN_SPREAD:
            return 0.0
        step_s = self.decode_step_s
        return min(max(self._rise / self._spread, step_s * _MIN_SHARE), step_s / self.decode_batch_size)

    @property
    def num_prefill_tokens(self) -> float:
        """That prefill_tokens_per_s was measured on; not much more than a dozen of steps."""
        return self._prefill_tokens

    @property
    def prefill_tokens_per_s(self) -> float:
        """0 until measured."""
        return self._prefill_tokens / self._prefill_s if self._prefill_s > 0 else 0.0

    def prefill_s(self, num_tokens: int) -> float:
        """0 until measured."""
        rate = self.prefill_tokens_per_s
        return num_tokens / rate if rate else 0.0

    def swap_s(self, num_bytes: int) -> float:
        """0 until measured."""
        return num_bytes * self._swap_s / self._swap_bytes if self._swap_bytes else 0.0

    def note_swap(self, num_bytes: int, seconds: float) -> None:
        self._swap_bytes = self._swap_bytes * _DECAY + num_bytes
        self._swap_s = self._swap_s * _DECAY + seconds

    def note(self, num_decode_tokens: int, num_prefill_tokens: int, seconds: float) -> None:
        if num_prefill_tokens == 0:
            self._note_decode(num_decode_tokens, seconds)
            return
        # Never less than its share by tokens: a decode step measured on a busier machine must not make
        # prompts free.
        share = seconds * num_prefill_tokens / (num_prefill_tokens + num_decode_tokens)
        spent = max(share / 2, seconds - self.decode_step_s) if num_decode_tokens else seconds
        self._prefill_tokens = self._prefill_tokens * _DECAY + num_prefill_tokens
        self._prefill_s = self._prefill_s * _DECAY + spent

    def _note_decode(self, num_seqs: int, seconds: float) -> None:
        more = num_seqs - self.decode_batch_size
        if self._decode_steps and abs(more) >= 0.5:
            self._spread = self._spread * _SLOPE_DECAY + more * more
            self._rise = self._rise * _SLOPE_DECAY + more * (seconds - self.decode_step_s)
        self._decode_steps = self._decode_steps * _DECODE_DECAY + 1
        self._decode_s = self._decode_s * _DECODE_DECAY + seconds
        self._decode_seqs = self._decode_seqs * _DECODE_DECAY + num_seqs
