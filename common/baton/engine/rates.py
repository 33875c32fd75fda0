"""How fast this worker is, measured on its own steps."""

_DECAY = 0.9  # per step that tells something about the rate: the last dozen of steps decide


class StepRates:
    """Decayed sums. A step without prompt tokens measures the decode step; of any other, what it took longer
    than a decode step (if it decoded at all) is the price of its prompt tokens. Long chunks weigh more than
    short ones."""

    def __init__(self) -> None:
        self._decode_steps = self._decode_s = 0.0
        self._prefill_tokens = self._prefill_s = 0.0
        self._swap_bytes = self._swap_s = 0.0

    @property
    def decode_step_s(self) -> float:
        """0 until measured."""
        return self._decode_s / self._decode_steps if self._decode_steps else 0.0

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
            self._decode_steps = self._decode_steps * _DECAY + 1
            self._decode_s = self._decode_s * _DECAY + seconds
            return
        # Never less than its share by tokens: a decode step measured on a busier machine must not make
        # prompts free.
        share = seconds * num_prefill_tokens / (num_prefill_tokens + num_decode_tokens)
        spent = max(share / 2, seconds - self.decode_step_s) if num_decode_tokens else seconds
        self._prefill_tokens = self._prefill_tokens * _DECAY + num_prefill_tokens
        self._prefill_s = self._prefill_s * _DECAY + spent
