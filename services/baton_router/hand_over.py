"""One request's KV on its way from a prefill to a decode worker, as the router hears of it; and its repair.

    Prefill called --> first token: into the request's stream --> the push ended: well, nothing is left to do
         |                  |                                          |
         +------------------+------- it failed, or p is lost ----------+--> repair
         d says that it failed on its side --------------------------------> repair

Repair: the decode worker is told to compute the prompt itself, with the first token if the client has it already. That
is done once; what goes wrong after it fails the attempt. Pieces that did not match their digest are told to the canary.
"""

from collections.abc import Callable
from contextlib import aclosing

from baton.clock import Clock
from baton.errors import BatonError, DeadlineExceeded, TransferError, WorkerLost
from baton.events import Emit, about
from baton.messages import PrefillCall, PrefillResult, Pushed
from baton.request import WorkerId
from baton_router.canary import Canary
from baton_router.generation import Tokens
from baton_router.prefill_stream import PrefillStream
from baton_router.session import Attempt, Session
from baton_router.workers import Link

OnResult = Callable[[PrefillResult], None]


class HandOver:
    """Of one attempt. `run` once; the attempt's own end is the pipeline's business."""

    def __init__(
        self,
        attempt: Attempt,
        session: Session,
        prefill: Link,
        decode: Link,
        canary: Canary,
        clock: Clock,
        emit: Emit,
        *,
        is_trial: bool = False,
    ) -> None:
        """A trial is never repaired: it is there to find out whether the pair works."""
        self._attempt = attempt
        self._session = session
        self._prefill = prefill
        self._decode = decode
        self._canary = canary
        self._clock = clock
        self._emit = emit
        self.is_trial = is_trial
        self.num_mismatches = 0
        self._first_token: int | None = None
        self._repaired = False
        attempt.on_missed = lambda reason: self._fail(TransferError(reason))

    @property
    def prefill_id(self) -> WorkerId:
        return self._prefill.record.worker_id

    async def run(self, stream: PrefillStream, call: PrefillCall, on_result: OnResult) -> None:
        """Until the push has ended, or is of no use any more."""
        with self._prefill.watched(self._fail):
            try:
                async with aclosing(self._prefill.prefill(stream, call)) as answers:
                    async with self._clock.timeout(call.deadline_s):
                        answer = await anext(answers)
                    if isinstance(answer, PrefillResult):
                        self._first(answer, on_result)
                        answer = await anext(answers, Pushed())
                    if isinstance(answer, Pushed):
                        self._pushed(answer)
            except TimeoutError:
                self._attempt.fail(DeadlineExceeded(f"no first token within {call.deadline_s:g} s"))
            except BatonError as error:
                self._fail(error)

    def _first(self, result: PrefillResult, on_result: OnResult) -> None:
        on_result(result)
        if self._repaired:
            return  # the decode worker draws it, too
        self._first_token = result.token_id
        logprobs = (result.logprobs,) if result.logprobs is not None else ()
        self._attempt.start_stream(
            Tokens(0, (result.token_id,), result.finish_reason, logprobs, result.prompt_logprobs)
        )

    def _pushed(self, pushed: Pushed) -> None:
        self.num_mismatches = pushed.num_mismatches
        if pushed.num_mismatches:
            self._canary.note_mismatches(
                self._prefill.record, self._decode.record, pushed.num_mismatches, is_fatal=bool(pushed.reason)
            )
        if pushed.reason:
            self._fail(TransferError(pushed.reason))

    def _fail(self, error: BatonError) -> None:
        """The KV will not come, or not the answer."""
        attempt = self._attempt
        if (
            self._repaired
            or attempt.finished.done()
            or (attempt.received.done() and self._first_token is not None)
        ):
            return
        if self.is_trial or not isinstance(error, TransferError | WorkerLost):
            attempt.fail(error)
            return
        if attempt.received.done():
            attempt.answer_lost(error)
            return
        self._repaired = True
        self._emit(
            "handover.repaired", **about(attempt.request), why=error.message,
            prefill=self._prefill.record.worker_id, decode=self._decode.record.worker_id,
            first_token=self._first_token is not None,
        )  # fmt: skip
        self._canary.note_repair(self._prefill.record, self._decode.record)
        self._session.recompute(attempt, error.message, self._first_token)
