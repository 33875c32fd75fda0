"""How long at least one of several things was under way."""

from types import TracebackType

from baton.clock import Clock


class BusyTime:
    """A context manager that may be entered several times at once; what overlaps counts once."""

    def __init__(self, clock: Clock) -> None:
        self.seconds = 0.0  # until nothing was under way any more
        self._clock = clock
        self._num_inside = 0
        self._since_s = 0.0

    def __enter__(self) -> None:
        if not self._num_inside:
            self._since_s = self._clock.now()
        self._num_inside += 1

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._num_inside -= 1
        if not self._num_inside:
            self.seconds += self._clock.now() - self._since_s
