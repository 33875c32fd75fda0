"""How many tokens a step may have."""

_MAX_RETRIES = 8


class StepBudget:
    """All that are allowed; after a step that did not fit into the device's memory half of what it had, and from then
    on a little more with every one that fits. The pool of KV blocks is taken once, at the start, so what runs out is
    memory for the step's own tensors, and these grow with its tokens. Who is left out of a smaller step keeps its
    blocks and its turn."""

    def __init__(self, max_num_batched_tokens: int) -> None:
        self.num_tokens = max_num_batched_tokens
        self.num_retries = 0  # since the start
        self._most = max_num_batched_tokens
        self._in_a_row = 0

    def did_not_fit(self, num_tokens: int) -> bool:
        """False: it is no use to try again with less."""
        self._in_a_row += 1
        self.num_tokens = max(1, num_tokens // 2)
        if num_tokens == 1 or self._in_a_row > _MAX_RETRIES:
            self._in_a_row = 0
            return False
        self.num_retries += 1
        return True

    def fitted(self) -> None:
        self._in_a_row = 0
        self.num_tokens = min(self._most, self.num_tokens + max(1, self._most // 64))
