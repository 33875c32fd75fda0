"""`baton generate`: a file of OpenAI requests, answered in this process without servers.

    requests.jsonl -> the router's HTTP application -> pipeline -> one decode worker -> requests.out.jsonl

All of it is what a fleet runs, over in-process RPC, so that a request means here exactly what it means over HTTP, and
is refused with the same words. Only so many requests are in flight as keep the engine busy.
"""

import asyncio
import contextlib
import random
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import orjson
from prometheus_client import CollectorRegistry

from baton.clock import Clock, SystemClock
from baton.config import GenerateConfig, RouterConfig, TransferConfig
from baton.engine.model_runner import load_runner
from baton.errors import BatonError, ConfigError, InvalidRequest
from baton.messages import Role
from baton.model_files import TOKENIZER_FILES, resolve_model
from baton.progress import Progress
from baton.request import WorkerId
from baton.rpc import InprocRpcNetwork
from baton.tokenizer import load_tokenizer
from baton.transfer.inproc import InprocNetwork, InprocTransport
from baton_cli.batch_file import AnswerFile, RequestFile
from baton_loadtest.local_fleet import LocalFleet
from baton_router.app import create_app
from baton_router.front_door import FrontDoor
from baton_router.metrics import RouterMetrics
from baton_router.openai.errors import error_body

URLS = ("/v1/chat/completions", "/v1/completions")
REQUEST_TIMEOUT_S = 86_400.0  # nobody waits for a single answer
WORKER = WorkerId("generate")


@dataclass(slots=True)
class Summary:
    """Of one run, and what earlier ones left."""

    num_before: int
    num_failed_before: int
    num_ok: int = 0
    num_failed: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        rate = self.num_output_tokens / self.seconds if self.seconds else 0.0
        before = (
            f"; before: {self.num_before}, {self.num_failed_before} of them failed" if self.num_before else ""
        )
        return (
            f"{self.num_ok} answered, {self.num_failed} failed; {self.num_prompt_tokens} tokens in, "
            f"{self.num_output_tokens} out in {self.seconds:.1f} s, {rate:.1f} out/s{before}"
        )

    @property
    def all_ok(self) -> bool:
        return not (self.num_failed or self.num_failed_before)


def output_path(requests: Path) -> Path:
    return requests.with_name(requests.name.removesuffix(".jsonl") + ".out.jsonl")


def generate(config: GenerateConfig, requests_path: Path, answers_path: Path) -> Summary:
    """Raises ConfigError before anything is computed, KeyboardInterrupt when it is told to stop: what was answered by
    then is in the file."""
    requests = RequestFile(requests_path)
    if answers_path.exists() and answers_path.samefile(requests_path):
        raise ConfigError(f"{answers_path} is the file with the requests: give another with --output")
    with AnswerFile(answers_path) as answers:
        ours = [is_ok for custom_id, is_ok in answers.answered.items() if custom_id in requests.custom_ids]
        summary = Summary(num_before=len(ours), num_failed_before=ours.count(False))
        if summary.num_before < len(requests.custom_ids):
            try:
                asyncio.run(_answer_file(config, requests, answers, summary))
            except asyncio.CancelledError:
                raise KeyboardInterrupt from None
    return summary


async def _answer_file(
    config: GenerateConfig, requests: RequestFile, answers: AnswerFile, summary: Summary
) -> None:
    _end_on_sigterm()
    clock = SystemClock()
    async with _application(config, clock) as http:
        num_left = len(requests.custom_ids) - summary.num_before
        with Progress("requests", num_left, clock) as progress:
            batch = Batch(http, answers, summary, progress)
            started_s = clock.now()
            try:
                await batch.run(requests, 2 * config.engine.max_num_seqs)
            finally:
                summary.seconds = clock.now() - started_s


def _end_on_sigterm() -> None:
    """Like SIGINT does."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)


@contextlib.asynccontextmanager
async def _application(config: GenerateConfig, clock: Clock) -> AsyncIterator[httpx.AsyncClient]:
    """The router's HTTP application over one worker in this process."""
    model = config.model
    directory = resolve_model(model.model, model.revision, TOKENIZER_FILES)
    loaded = await asyncio.to_thread(load_runner, model, config.engine)
    fleet = LocalFleet(
        clock, InprocRpcNetwork(clock), _ignore,
        router=RouterConfig(model=model), engine=config.engine, transfer=TransferConfig(), index_lease_s=10.0, seed=0,
    )  # fmt: skip
    async with fleet.routing():
        transport = InprocTransport(InprocNetwork(clock), clock, WORKER)
        worker = await fleet.start_worker(
            WORKER, (Role.DECODE,), loaded.runner, transport, loaded.fingerprint
        )
        await fleet.ready()
        door = FrontDoor(
            fleet.pipeline,
            load_tokenizer(directory, clock),
            model.served_model_name or (model.model,),
            lambda: worker.record.max_model_len,
            clock,
            random.SystemRandom(),
            RouterMetrics(CollectorRegistry()),
            request_timeout_s=REQUEST_TIMEOUT_S,
        )
        app = httpx.ASGITransport(create_app(door, fleet.fleet))
        async with httpx.AsyncClient(transport=app, base_url="http://baton", timeout=None) as http:
            yield http


def _ignore(kind: str, /, **fields: object) -> None:
    pass


class Batch:
    """One run over a file: owns the number of requests in flight."""

    def __init__(
        self, http: httpx.AsyncClient, answers: AnswerFile, summary: Summary, progress: Progress
    ) -> None:
        self._http = http
        self._answers = answers
        self._summary = summary
        self._progress = progress
        self._num_in_flight = 0
        self._one_ended = asyncio.Event()

    async def run(self, requests: RequestFile, max_in_flight: int) -> None:
        slots = asyncio.Semaphore(max_in_flight)

        async def one(line: dict[str, Any]) -> None:
            try:
                self._note(line["custom_id"], await self._answer(line))
            finally:
                slots.release()

        try:
            async with asyncio.TaskGroup() as tasks:
                for line in requests:
                    if line["custom_id"] not in self._answers.answered:
                        await slots.acquire()
                        tasks.create_task(one(line))
        except ExceptionGroup as group:  # such as a full disk
            raise group.exceptions[0] from None

    async def _answer(self, line: dict[str, Any]) -> dict[str, Any]:
        """The line's answer, but for its custom_id."""
        request_id = f"{random.getrandbits(128):032x}"
        try:
            url, body = _checked(line)
            response = await self._post(url, orjson.dumps(body), request_id)
            status, content = response.status_code, orjson.loads(response.content)
        except BatonError as error:
            status, content = error.status, orjson.loads(error_body(error))
        response_fields = {"status_code": status, "request_id": request_id, "body": content}
        return {"id": f"batch_req_{request_id}", "response": response_fields, "error": None}

    async def _post(self, url: str, body: bytes, request_id: str) -> httpx.Response:
        """Again where there was no room, as long as others leave some."""
        headers = {"content-type": "application/json", "x-request-id": request_id}
        while True:
            self._num_in_flight += 1
            refused = False
            try:
                response = await self._http.post(url, content=body, headers=headers)
                refused = response.status_code == 429 and self._num_in_flight > 1
            finally:
                self._num_in_flight -= 1
                if not refused:  # who was refused leaves no room: waking the others for that would never end
                    self._one_ended.set()
            if not refused:
                return response
            self._one_ended.clear()
            await self._one_ended.wait()

    def _note(self, custom_id: str, answer: dict[str, Any]) -> None:
        self._answers.append({"id": answer["id"], "custom_id": custom_id, **answer})
        response = answer["response"]
        if response["status_code"] == 200:
            self._summary.num_ok += 1
            usage = response["body"]["usage"]
            self._summary.num_prompt_tokens += usage["prompt_tokens"]
            self._summary.num_output_tokens += usage["completion_tokens"]
            self._progress.tokens(usage["completion_tokens"])
        else:
            self._summary.num_failed += 1
        self._progress.done()


def _checked(line: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Where it goes and what is sent. Raises InvalidRequest for what only a batch can get wrong."""
    unknown = sorted(line.keys() - {"custom_id", "method", "url", "body"})
    if unknown:
        raise InvalidRequest(f"{unknown[0]} is not a field of a batch request", param=unknown[0])
    if line.get("method", "POST") != "POST":
        raise InvalidRequest("method: must be POST", param="method")
    url, body = line.get("url"), line.get("body")
    if url not in URLS:
        raise InvalidRequest(f"url: must be {' or '.join(URLS)}", param="url")
    if not isinstance(body, dict):
        raise InvalidRequest("body: must be a JSON object", param="body")
    if body.get("stream"):
        raise InvalidRequest("stream: an answer in a file cannot be streamed", param="stream")
    return url, body
