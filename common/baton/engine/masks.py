"""Computes the grammars' masks of a step beside its forward pass, in a thread of its own.

A mask depends on the tokens that its state has been told, which do not change while a step runs. llguidance releases
the GIL, so that the model's thread goes on meanwhile.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from baton.engine.sampling_state import SamplingState


def _make(states: list[SamplingState]) -> None:
    for state in states:
        state.mask()


class MaskMaker:
    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "baton-masks")

    @contextmanager
    def beside(self, states: Iterable[SamplingState | None]) -> Iterator[None]:
        """What the block does not wait for is there when it is left; until then nobody else may use the states."""
        constrained = [state for state in states if state is not None and state.matcher is not None]
        if not constrained:
            yield
            return
        making = self._thread.submit(_make, constrained)
        try:
            yield
        finally:
            making.exception()  # waits for it
        making.result()

    def close(self) -> None:
        self._thread.shutdown()
