"""OpenAI's endpoints, and what operators ask a router: health, readiness, metrics, how a request was served."""

import dataclasses
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import orjson
from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

import baton
from baton.errors import BatonError, Cancelled, ModelNotFound
from baton.messages import BlockLedger, WorkerRecord
from baton.request import Request as BatonRequest
from baton_router.answer import Answer
from baton_router.canary import PairCounts
from baton_router.fleet_view import FleetView, readiness, transports_in_use
from baton_router.front_door import FrontDoor
from baton_router.generation import AtOnce, never
from baton_router.openai import schema
from baton_router.openai.format import AnswerFormat
from baton_router.openai.sse import EventStream, Exchange, until_disconnect
from baton_router.openai.whole import whole_answer

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's


class _Prompt(NamedTuple):
    token_ids: Sequence[int]
    param: str  # the field it came in
    echo: str | None = None  # its text, where that is part of the answer


class Api:
    """The routes over one front door."""

    def __init__(self, door: FrontDoor, fleet: FleetView, *, max_body_bytes: int) -> None:
        self._door = door
        self._fleet = fleet
        self._max_body_bytes = max_body_bytes

    def answering(self) -> dict[str, Callable[[Request], Awaitable[Response]]]:
        """path -> endpoint of the POSTs that clients wait for: called without FastAPI, which documents them."""
        return {"/v1/chat/completions": self.chat_completions, "/v1/completions": self.completions}

    def routes(self) -> APIRouter:
        errors: dict[int | str, dict[str, Any]] = {"4XX": {"model": schema.ErrorBody}}
        errors["5XX"] = {"model": schema.ErrorBody}
        router = APIRouter(responses=errors)
        router.add_api_route(
            "/v1/chat/completions",
            self.chat_completions,
            methods=["POST"],
            response_model=schema.ChatCompletion,
            openapi_extra=_body_of(schema.ChatCompletionRequest),
        )
        router.add_api_route(
            "/v1/completions",
            self.completions,
            methods=["POST"],
            response_model=schema.Completion,
            openapi_extra=_body_of(schema.CompletionRequest),
        )
        router.add_api_route("/v1/models", self.models, response_model=schema.ModelList)
        router.add_api_route("/v1/models/{name:path}", self.model, response_model=schema.Model)
        router.add_api_route("/health", self.health)
        router.add_api_route("/ready", self.ready)
        router.add_api_route("/metrics", self.metrics)
        router.add_api_route("/version", self.version)
        router.add_api_route("/debug/blocks", self.debug_blocks)
        router.add_api_route("/debug/requests/{request_id:path}", self.debug_request)
        return router

    # --- answers ---

    async def chat_completions(self, request: Request) -> Response:
        body = schema.parse(schema.ChatCompletionRequest, await self._read_body(request))
        self._door.check_model(body.model)
        prompt = await self._door.tokenizer.encode_chat_async(body.template_messages())
        return await self._answer(request, body, _Prompt(prompt, "messages"), body.limit, None)

    async def completions(self, request: Request) -> Response:
        body = schema.parse(schema.CompletionRequest, await self._read_body(request))
        self._door.check_model(body.model)
        if isinstance(body.prompt, str):
            special = body.add_special_tokens is not False
            token_ids, text = await self._door.tokenizer.encode_async(body.prompt, special), body.prompt
        else:
            token_ids, text = body.prompt, None
        self._door.check_prompt(token_ids, "prompt")
        if body.echo:
            text = self._door.tokenizer.decode(token_ids) if text is None else text
        prompt = _Prompt(token_ids, "prompt", text if body.echo else None)
        return await self._answer(request, body, prompt, body.limit, DEFAULT_COMPLETION_TOKENS)

    async def _answer(
        self,
        http: Request,
        body: schema.ApiRequest,
        prompt: "_Prompt",
        limit: int | None,
        default: int | None,
    ) -> Response:
        door, exchange = self._door, _exchange(http)
        door.check_prompt(prompt.token_ids, prompt.param)
        door.check_stop_token_ids(body.stop_token_ids or ())
        num_prompt_tokens = len(prompt.token_ids)
        max_tokens = door.max_tokens(num_prompt_tokens, limit, default, prompt.param)
        sampling = replace(
            body.sampling(max_tokens, door.draw_seed()),
            logit_bias=body.biases,
            bad_words=door.bad_words(body.bad_words or ()),
            logprobs=body.num_logprobs,
            prompt_logprobs=body.num_of_prompt,
            grammar=body.grammar,
        )
        door.check_sampling(sampling, num_prompt_tokens)
        request = door.request(
            exchange.request_id,
            prompt.token_ids,
            sampling,
            body.cache_salt or "",
            body.priority or 0,
            http.headers.get("traceparent", ""),
        )
        user = body.user or body.safety_identifier

        def open_answer(at_once: AtOnce = never) -> Answer:
            return door.answer(
                request,
                arrival_s=exchange.arrival_s,
                user=user,
                prompt_only=body.is_about_prompt,
                operation="chat" if isinstance(body, schema.ChatCompletionRequest) else "text_completion",
                at_once=at_once,
            )

        def format_of(request: BatonRequest) -> AnswerFormat:
            return self._format(body, request, prompt.echo)

        if body.stream:
            return EventStream(open_answer, format_of)
        try:
            content = await until_disconnect(http.receive, whole_answer(open_answer(), format_of))
            return Response(content, media_type="application/json")
        except Cancelled:
            exchange.status = Cancelled.status
            raise

    def _format(self, body: schema.ApiRequest, request: BatonRequest, echo: str | None) -> AnswerFormat:
        chat = isinstance(body, schema.ChatCompletionRequest)
        return AnswerFormat(
            id=("chatcmpl-" if chat else "cmpl-") + request.request_id,
            created=int(self._door.clock.wall()),
            model=body.model,
            token_text=self._door.token_text,
            chat=chat,
            include_usage=body.include_usage,
            prompt_token_ids=request.prompt_token_ids if body.return_token_ids else None,
            num_logprobs=body.num_logprobs,
            num_prompt_logprobs=body.prompt_logprobs,
            echo=echo,
        )

    async def _read_body(self, request: Request) -> bytes:
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/json":
            raise HTTPException(415, "the content-type must be application/json")
        limit, size, parts = self._max_body_bytes, 0, []
        if int(request.headers.get("content-length", 0)) <= limit:
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise Cancelled("the client went away")
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > limit:
                    break
                if not message.get("more_body"):
                    return b"".join(parts)
        raise HTTPException(413, f"the body is larger than {limit} bytes")

    # --- models ---

    async def models(self) -> Response:
        names = self._door.served_model_names
        return _json(schema.ModelList(data=[self._model(name) for name in names]).model_dump())

    async def model(self, name: str) -> Response:
        if name not in self._door.served_model_names:
            raise ModelNotFound(f"the model {name!r} does not exist here", param="model")
        return _json(self._model(name).model_dump())

    def _model(self, name: str) -> schema.Model:
        return schema.Model(id=name, created=self._door.started_at, max_model_len=self._door.max_model_len())

    # --- operations ---

    async def health(self) -> Response:
        """200 for as long as the router itself works; what it could do is in the body."""
        fleet, state = self._fleet, readiness(self._fleet)
        ready = {link.record.worker_id for link in fleet.ready()}
        content = {
            "status": state.status,
            "reasons": state.reasons,
            "models": self._door.served_model_names,
            "transport": ", ".join(transports_in_use(fleet)) or None,
            "index": dataclasses.asdict(fleet.index_health()),
            "workers": [_worker(record, record.worker_id in ready) for record in fleet.records()],
            "pairs": [
                {
                    "prefill": p.worker_id,
                    "decode": d.worker_id,
                    "transport": fleet.transport(p.worker_id, d.worker_id),
                    "bytes_per_s": fleet.bytes_per_s(p.worker_id, d.worker_id),
                    "troubles": _troubles(fleet.pair_counts().get((p.worker_id, d.worker_id))),
                }
                for p, d in fleet.pairs()
            ],
        }
        return _json(content)

    async def ready(self) -> Response:
        """200 only when a request could be served now."""
        state = readiness(self._fleet)
        content = {"ready": state.ready, "status": state.status, "reasons": state.reasons}
        return _json(content, 200 if state.ready else 503)

    async def metrics(self) -> Response:
        self._door.metrics.observe_fleet(self._fleet)
        return Response(
            generate_latest(self._door.metrics.registry), headers={"content-type": CONTENT_TYPE_LATEST}
        )

    async def version(self) -> Response:
        return _json({"version": baton.__version__})

    async def debug_blocks(self) -> Response:
        """Who holds which KV blocks on every worker, why, and since when."""
        ledgers = await self._fleet.blocks()
        content = {worker_id: _ledger(ledger) for worker_id, ledger in ledgers.items()}
        return _json({"workers": content})

    async def debug_request(self, request_id: str) -> Response:
        """How a request was served: by its x-request-id, or the id of its answer."""
        record = self._door.generator.record(request_id.removeprefix("chatcmpl-").removeprefix("cmpl-"))
        if record is None:
            raise HTTPException(404, f"request {request_id!r} is not one of the latest")
        derived = {"ttft_s": record.ttft_s, "mean_itl_s": record.mean_itl_s}
        return _json(dataclasses.asdict(record) | derived)


def _troubles(counts: PairCounts | None) -> dict[str, int]:
    """Since the router started; empty where there were none."""
    counts = counts or PairCounts()
    found = {
        "mismatches": counts.num_mismatches,
        "repairs": counts.num_repairs,
        "quarantines": counts.num_quarantines,
    }
    return {kind: number for kind, number in found.items() if number}


def _ledger(ledger: BlockLedger | BatonError) -> dict[str, Any]:
    return {"error": ledger.message} if isinstance(ledger, BatonError) else dataclasses.asdict(ledger)


def _worker(record: WorkerRecord, ready: bool) -> dict[str, Any]:
    return {
        "id": record.worker_id,
        "ready": ready,
        "draining": record.draining,
        "roles": record.roles,
        "address": record.address,
        "transports": record.transports,
        "model": record.model,
        "max_model_len": record.max_model_len,
        "block_size": record.block_size,
        "num_blocks": record.num_blocks,
        **dataclasses.asdict(record.load),
    }


def _json(content: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(content), status, media_type="application/json")


def _exchange(request: Request) -> Exchange:
    exchange: Exchange = request.scope["baton.exchange"]
    return exchange


def _body_of(request_type: type[BaseModel]) -> dict[str, Any]:
    """The body's documentation. We read bodies ourselves: with a limit, and with errors in OpenAI's words."""
    full = request_type.model_json_schema()
    content = {"application/json": {"schema": _inline(full, full.pop("$defs", {}))}}
    return {"requestBody": {"required": True, "content": content}}


def _inline(part: Any, definitions: dict[str, Any]) -> Any:
    if isinstance(part, list):
        return [_inline(item, definitions) for item in part]
    if not isinstance(part, dict):
        return part
    if "$ref" in part:
        return _inline(definitions[part["$ref"].rpartition("/")[2]], definitions)
    return {key: _inline(value, definitions) for key, value in part.items()}
