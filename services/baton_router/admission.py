"""How many requests this router carries at once. More are refused before any work is spent on them."""

from collections.abc import Iterator
from contextlib import contextmanager

from baton.errors import Overloaded

RETRY_AFTER_S = 1.0


class Admission:
    def __init__(self, max_num_requests: int) -> None:
        self._max = max_num_requests
        self.num_running = 0

    @contextmanager
    def slot(self) -> Iterator[None]:
        """Raises Overloaded when the router is full."""
        if self.num_running >= self._max:
            raise Overloaded(f"this router carries {self._max} requests already", retry_after_s=RETRY_AFTER_S)
        self.num_running += 1
        try:
            yield
        finally:
            self.num_running -= 1
