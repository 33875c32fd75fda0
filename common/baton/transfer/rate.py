"""How fast KV goes over a wire, measured on what went over it.

A hand-over takes seconds = overhead + bytes / rate. On small ones the overhead (a header, an acknowledgement, two
turns of an event loop) is most of it, and bytes over seconds would say so little of the wire that nothing large is ever
sent. So both are fitted, by least squares in which new hand-overs count for more than old ones.

Where all were of much the same size there is no line to be seen in them: the fit leans towards bytes over seconds as if
LEAN of the squared mean size were spread between points of that rate.
"""

from dataclasses import dataclass

MEMORY = 0.9  # how much of what was measured counts once more was
LEAN = 0.05
MAX_BYTES_PER_S = 50e9  # no copy is faster


@dataclass(slots=True)
class Rate:
    """Weighted sums over hand-overs of x bytes that took y seconds."""

    _weight: float = 0.0
    _x: float = 0.0
    _y: float = 0.0
    _xx: float = 0.0
    _xy: float = 0.0

    def note(self, num_bytes: int, seconds: float) -> None:
        if not seconds:
            return  # nothing left
        x, y = float(num_bytes), seconds
        self._weight = MEMORY * self._weight + 1
        self._x = MEMORY * self._x + x
        self._y = MEMORY * self._y + y
        self._xx = MEMORY * self._xx + x * x
        self._xy = MEMORY * self._xy + x * y

    @property
    def bytes_per_s(self) -> float | None:
        """Without the overhead; never less than bytes over seconds. None: no bytes went."""
        if not self._x:
            return None
        mean_x, per_byte_s = self._x / self._weight, self._y / self._x
        spread = max(0.0, self._xx / self._weight - mean_x * mean_x)
        slope = self._xy / self._weight - mean_x * self._y / self._weight
        lean = LEAN * mean_x * mean_x
        fitted_s = (slope + lean * per_byte_s) / (spread + lean)
        return 1 / max(min(fitted_s, per_byte_s), 1 / MAX_BYTES_PER_S)
