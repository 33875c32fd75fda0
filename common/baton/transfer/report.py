"""What became of one hand-over, told once when it has ended, by each of its two ends."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Outcome = Literal["ok", "failed", "cancelled", "expired"]


@dataclass(frozen=True, slots=True)
class TransferReport:
    direction: Literal["sent", "received"]
    outcome: Outcome
    seconds: float  # from the first piece to the last; 0 when there was none
    num_bytes: int  # of pieces that were acknowledged
    num_mismatches: int  # pieces that did not match their digest
    exposed_s: float | None = (
        None  # from the end of the prompt's computation to the end; where known: ok and sent
    )
    transport: str = ""  # that carried it, the last piece at least; empty where nothing was carried
    peer: str = ""  # worker at the other end
    num_pieces: int = 0  # that were acknowledged
    wire_s: float = 0.0  # during which at least one piece was on the wire; where known: sent


OnTransfer = Callable[[TransferReport], None]


def ignore(report: TransferReport) -> None:
    pass
