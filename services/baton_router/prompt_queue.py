"""What this router gave one worker to compute: prompts that the worker's reports may not show yet.

    held, when it is placed --> sent to the worker --> one report later: the report shows it --> computed, or given up
                                                       (unless it was made before: two reports later it surely does)

Everything is counted from the prompts that are held now, so nothing can be left behind.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from baton.request import RequestId


@dataclass(slots=True)
class _Prompt:
    num_tokens: int
    sent_at: int | None = None  # reports that had come by then


class PromptQueue:
    """Of one worker."""

    def __init__(self) -> None:
        self._prompts: dict[RequestId, _Prompt] = {}
        self._num_reports = 0

    @contextmanager
    def holding(self, request_id: RequestId, num_tokens: int) -> Iterator[None]:
        self._prompts[request_id] = _Prompt(num_tokens)
        try:
            yield
        finally:
            self.computed(request_id)

    def sent(self, request_id: RequestId) -> None:
        if (prompt := self._prompts.get(request_id)) is not None:
            prompt.sent_at = self._num_reports

    def computed(self, request_id: RequestId) -> None:
        """Or it will not be. May be said more than once."""
        self._prompts.pop(request_id, None)

    def reported(self) -> None:
        self._num_reports += 1

    def num_tokens(self, num_reported: int) -> int:
        """To be computed, where the latest report said `num_reported`."""
        latest, unseen, perhaps_seen = self._num_reports, 0, 0
        for prompt in self._prompts.values():
            if prompt.sent_at is None or prompt.sent_at == latest:
                unseen += prompt.num_tokens
            elif prompt.sent_at == latest - 1:
                perhaps_seen += prompt.num_tokens
        return unseen + max(num_reported, perhaps_seen)
