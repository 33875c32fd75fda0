"""Several answers to one prompt: one sequence is computed, or reserved, and the others are forks of it."""

from collections.abc import Callable

from baton.engine.engine import Engine
from baton.errors import BatonError, InvalidRequest
from baton.request import Request, RequestId


def begin_samples(
    engine: Engine, request: Request, begin: Callable[[Request], None]
) -> tuple[RequestId, ...]:
    """`begin` (the engine's add or reserve) with the first, fork the others. All of them or, raising BatonError,
    none. The names under which the engine knows them, in order."""
    check_num_samples(engine, request.sampling.n)
    first, *others = request.samples()
    begin(first)
    names = [first.request_id]
    try:
        for other in others:
            engine.fork(first.request_id, other)
            names.append(other.request_id)
    except BatonError:
        for name in names:
            engine.abort(name)
        raise
    return tuple(names)


def check_num_samples(engine: Engine, num_samples: int) -> None:
    """Raises InvalidRequest."""
    if not 1 <= num_samples <= engine.max_num_seqs:
        raise InvalidRequest(
            f"n must be 1 to {engine.max_num_seqs}, the worker's max_num_seqs; {num_samples} were asked for",
            param="n",
        )
