"""How fast KV goes over a wire, measured on what went over it."""

from dataclasses import dataclass

MEMORY = 0.9  # how much of what was measured counts once more was


@dataclass(slots=True)
class Rate:
    """Large hand-overs count for more than small ones, new ones for more than old ones."""

    num_bytes: float = 0.0
    seconds: float = 0.0

    def note(self, num_bytes: int, seconds: float) -> None:
        self.num_bytes = MEMORY * self.num_bytes + num_bytes
        self.seconds = MEMORY * self.seconds + seconds

    @property
    def bytes_per_s(self) -> float | None:
        return self.num_bytes / self.seconds if self.num_bytes and self.seconds else None
