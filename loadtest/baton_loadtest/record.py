"""What is known about one request afterwards: raw time stamps, never averages. Statistics are in `metrics`.

All times are seconds on the clock of the one who measured (monotonic; only differences mean anything):

    planned     sent        first byte    token  token  token  finish  done
    ──┬──────────┬──────────────┬───────────┬──────┬──────┬──────┬──────┬──
      └─ lag ────┘              │           ├ gap ─┴ gap ─┘      │      │
                 ├─ TTFT ───────┼───────────┘                    │      │
                 │              │           └─ TPOT, times n-1 ──┘      │
                 └─ E2E ────────┴───────────────────────────────────────┘

`lag` is the client's own delay (a busy event loop, no free connection): a large one means that the client was
measured, not the server.
"""

import enum
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise


class ErrorKind(enum.StrEnum):
    CONNECT = "connect"  # no connection, or it broke before a status line came
    HTTP = "http"  # a status other than 200
    ERROR_EVENT = "error event"  # status 200, then an error inside the stream
    CUT = "cut stream"  # status 200, then the end without a finish reason
    EMPTY = "empty answer"  # finished well, with no token at all
    TIMEOUT = "timeout"  # the request's deadline passed
    PROTOCOL = "protocol"  # not HTTP, not SSE or not JSON


@dataclass(frozen=True, slots=True)
class RequestRecord:
    index: int  # place in the workload, warm-up included
    planned_s: float
    sent_s: float  # its turn on a connection came; opening a new connection counts into TTFT, as for a user
    done_s: float
    first_byte_s: float | None = None
    token_s: tuple[float, ...] = ()  # one per event that carried tokens; an event may carry several
    finish_s: float | None = None  # the event with the finish reason; the end token has no other trace
    status: int | None = None
    error: ErrorKind | None = None
    error_text: str = ""
    request_id: str = ""  # the server's
    finish_reason: str | None = None
    num_prompt_tokens: int | None = None  # this and the next two are the server's `usage`
    num_cached_tokens: int | None = None
    num_tokens: int | None = None
    text: str = ""
    expected: str | None = None  # the answer, where it is known

    @property
    def ok(self) -> bool:
        return self.error is None

    @property
    def correct(self) -> bool | None:
        """None where nothing was expected or no whole answer came."""
        if self.expected is None or not self.ok:
            return None
        return self.text.strip() == self.expected

    @property
    def lag_s(self) -> float:
        return self.sent_s - self.planned_s

    @property
    def ttft_s(self) -> float | None:
        return self.token_s[0] - self.sent_s if self.token_s else None

    @property
    def e2e_s(self) -> float:
        return self.done_s - self.sent_s

    @property
    def num_output_tokens(self) -> int:
        """As the server counted them, else one per event."""
        return len(self.token_s) if self.num_tokens is None else self.num_tokens

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first; None where it cannot be seen: fewer than two tokens, or
        all of them in one event."""
        if self.finish_s is None or not self.token_s or self.finish_s <= self.token_s[0]:
            return None
        num_after_first = self.num_output_tokens - 1
        return (self.finish_s - self.token_s[0]) / num_after_first if num_after_first > 0 else None

    def gaps_s(self) -> Iterator[float]:
        """Inter-token latencies: between one event with tokens and the next."""
        return (later - earlier for earlier, later in pairwise(self.token_s))

    @property
    def error_label(self) -> str:
        """For counting: "http 503", "cut stream", ...; "" without an error."""
        if self.error is None:
            return ""
        return f"{self.error} {self.status}" if self.error is ErrorKind.HTTP else str(self.error)
