"""How far a batch job is: a bar on a terminal, now and then a line elsewhere."""

import sys
from typing import Self, TextIO

from tqdm import tqdm

from baton.clock import Clock

LINE_EVERY_S = 10.0


class Progress:
    """Use in a `with` statement. Writes to the standard error; a job that ends within `LINE_EVERY_S` writes no line."""

    def __init__(
        self, what: str, total: int, clock: Clock, *, shown: bool = True, to: TextIO | None = None
    ) -> None:
        """`what` is counted: "prompts"."""
        self._what = what
        self._total = total
        self._clock = clock
        self._to = to if to is not None else sys.stderr
        self._started_s = self._said_s = clock.now()
        self._num_done = 0
        self._num_tokens = 0
        is_terminal = self._to.isatty()
        self._bar = tqdm(total=total, desc=what, file=self._to, disable=not (shown and is_terminal))
        self._says_lines = shown and not is_terminal

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def tokens(self, count: int) -> None:
        """So many were generated."""
        self._num_tokens += count
        if not self._bar.disable:
            self._bar.set_postfix_str(self._rate(), refresh=False)
            self._bar.update(0)
        self._say_line()

    def done(self) -> None:
        """One more has ended, however."""
        self._num_done += 1
        self._bar.update(1)
        self._say_line()

    def _say_line(self) -> None:
        now_s = self._clock.now()
        if self._says_lines and now_s - self._said_s >= LINE_EVERY_S:
            self._said_s = now_s
            self._to.write(f"{self._num_done} of {self._total} {self._what}, {self._rate()}\n")
            self._to.flush()

    def _rate(self) -> str:
        seconds = self._clock.now() - self._started_s
        return f"{self._num_tokens / seconds if seconds > 0 else 0.0:.0f} tok/s"
