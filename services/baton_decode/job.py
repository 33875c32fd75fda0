"""A request on this worker as its session knows it, and what the router is told of it.

Job: one request, from Submit until its last sample ended
Sample: one of its n sequences in the engine, each under a handle of its own
"""

import asyncio
from dataclasses import dataclass, field
from typing import NamedTuple

from baton.engine.batch import SequenceOutput
from baton.errors import BatonError
from baton.messages import Failure, Load, Recompute, Step
from baton.request import Request, RequestId
from baton.tracing import Phases


@dataclass(slots=True, eq=False)
class Job:
    """One request."""

    handle: int  # of the first sample, and of what concerns the request
    request_ids: tuple[RequestId, ...]  # of all samples; the first is the request's own
    num_running: int  # samples that have not ended
    request: Request
    trace: Phases
    admitted: asyncio.Event = field(default_factory=asyncio.Event)
    starting: asyncio.Task[None] | None = None  # until it runs by itself in the engine
    recompute: asyncio.Future[Recompute] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    @property
    def request_id(self) -> RequestId:
        return self.request_ids[0]


class Sample(NamedTuple):
    job: Job
    request_id: RequestId
    handle: int


def step_of(told: list[tuple[Sample, SequenceOutput]], load: Load) -> Step:
    """One message for all rows of an engine step that this router is to hear of."""
    cached = [
        (sample.handle, row.prompt.num_cached_tokens)
        for sample, row in told
        if row.prompt is not None and row.prompt.num_cached_tokens and sample.handle == sample.job.handle
    ]
    of_prompts = [(s.handle, row.prompt_logprobs) for s, row in told if row.prompt_logprobs is not None]
    return Step(
        handles=tuple([sample.handle for sample, _ in told]),
        first_index=tuple([row.first_index for _, row in told]),
        num_tokens=tuple([len(row.token_ids) for _, row in told]),
        token_ids=tuple([token for _, row in told for token in row.token_ids]),
        finished=tuple([(s.handle, row.finish_reason) for s, row in told if row.finish_reason]),
        load=load,
        logprob_rows=tuple([i for i, (_, row) in enumerate(told) if row.logprobs]),
        logprobs=tuple([each for _, row in told for each in row.logprobs]),
        prompt_logprob_handles=tuple([handle for handle, _ in of_prompts]),
        prompt_logprobs=tuple([said for _, said in of_prompts]),
        cached_handles=tuple([handle for handle, _ in cached]),
        num_cached_tokens=tuple([num_tokens for _, num_tokens in cached]),
    )


def failure_of(handle: int, error: BatonError) -> Failure:
    return Failure(handle, error.code, error.message, error.param, error.retry_after_s)
