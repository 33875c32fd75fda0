"""The Router service, for platform teams: the same requests as over HTTP, as typed streams."""

import dataclasses
import math
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from baton.errors import BatonError, InvalidRequest
from baton.messages import (
    CancelCall,
    CancelResult,
    GenerateChunk,
    ListWorkersCall,
    RouterGenerateCall,
    WorkerList,
)
from baton.request import SamplingParams
from baton.rpc import ROUTER_CANCEL, ROUTER_GENERATE, ROUTER_LIST_WORKERS, Handlers
from baton.tracing import CALLER
from baton_router.answer import CLIENT_GONE
from baton_router.app import REQUEST_ID
from baton_router.fleet_view import FleetView
from baton_router.front_door import FrontDoor
from baton_router.openai.schema import MAX_SALT_CHARACTERS, SamplingFields, validate

ENDPOINT = "baton.v1.Router/Generate"


class RouterService:
    """Handlers over one front door."""

    def __init__(self, door: FrontDoor, fleet: FleetView) -> None:
        self._door = door
        self._fleet = fleet

    def handlers(self) -> Handlers:
        return {
            ROUTER_GENERATE: self.generate,
            ROUTER_CANCEL: self.cancel,
            ROUTER_LIST_WORKERS: self.list_workers,
        }

    async def generate(self, call: RouterGenerateCall) -> AsyncGenerator[GenerateChunk, None]:
        status = CLIENT_GONE
        try:
            async with aclosing(self._generate(call)) as chunks:
                async for chunk in chunks:
                    yield chunk
            status = 200
        except BatonError as error:
            status = error.status
            raise
        finally:
            self._door.metrics.count(ENDPOINT, status)

    async def _generate(self, call: RouterGenerateCall) -> AsyncGenerator[GenerateChunk, None]:
        arrival_s = self._door.clock.now()
        self._check(call)
        prompt = await self._prompt(call)
        sampling = self._sampling(call.sampling, len(prompt))
        request = self._door.request(
            call.request_id or self._door.draw_id(),
            prompt,
            sampling,
            call.cache_salt,
            call.priority,
            CALLER.get(),
        )
        timeout_s = min(call.deadline_s, self._door.request_timeout_s)
        async with self._door.answer(request, arrival_s=arrival_s, timeout_s=timeout_s) as answer:
            async for items in answer.tokens:
                is_first = not answer.num_output_tokens
                for choice, (text, token_ids, finish_reason) in answer.read(items):
                    first_index = choice.num_output_tokens - len(token_ids)
                    prompt_logprobs = answer.prompt_logprobs if is_first and not choice.index else None
                    yield GenerateChunk(
                        first_index, token_ids, finish_reason, text, choice.logprobs, prompt_logprobs,
                        choice.index,
                    )  # fmt: skip
                if not answer.num_running:
                    break

    async def cancel(self, call: CancelCall) -> CancelResult:
        return CancelResult(self._door.generator.cancel(call.request_id))

    async def list_workers(self, call: ListWorkersCall) -> WorkerList:
        return WorkerList(tuple(self._fleet.records()))

    def _check(self, call: RouterGenerateCall) -> None:
        self._door.check_model(call.model)
        if call.request_id and REQUEST_ID.fullmatch(call.request_id) is None:
            raise InvalidRequest(
                "request_id: must be 1 to 128 letters, digits or ._~:/+=@-", param="request_id"
            )
        if len(call.cache_salt) > MAX_SALT_CHARACTERS:
            raise InvalidRequest(
                f"cache_salt: must have at most {MAX_SALT_CHARACTERS} characters", param="cache_salt"
            )
        if not (call.deadline_s > 0 and math.isfinite(call.deadline_s)):
            raise InvalidRequest("deadline_s: must be a number of seconds above 0", param="deadline_s")
        if (call.prompt is None) == (not call.prompt_token_ids):
            raise InvalidRequest("exactly one of prompt and prompt_token_ids must be given", param="prompt")

    async def _prompt(self, call: RouterGenerateCall) -> Sequence[int]:
        if call.prompt is None:
            prompt: Sequence[int] = call.prompt_token_ids
            self._door.check_prompt(prompt, "prompt_token_ids")
        else:
            prompt = await self._door.tokenizer.encode_async(call.prompt)
            self._door.check_prompt(prompt, "prompt")
        return prompt

    def _sampling(self, asked: SamplingParams, num_prompt_tokens: int) -> SamplingParams:
        """Held to the limits of the HTTP API."""
        values = {field.name: getattr(asked, field.name) for field in dataclasses.fields(asked)}
        known = {name: _as_json(values.pop(name)) for name in SamplingFields.model_fields}
        known["seed"] = None  # any 64 bits are right
        known["allowed_token_ids"] = known["allowed_token_ids"] or None
        fields = validate(SamplingFields, known)
        self._door.check_stop_token_ids(asked.stop_token_ids)
        max_tokens = self._door.max_tokens(num_prompt_tokens, asked.max_tokens, None, "prompt")
        seed = self._door.draw_seed() if asked.seed is None else asked.seed
        sampling = dataclasses.replace(fields.sampling(max_tokens, seed), **values)
        self._door.check_sampling(sampling, num_prompt_tokens)
        return sampling


def _as_json(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
