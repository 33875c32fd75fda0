"""A streaming client of any OpenAI-compatible server that stays light beside the server it measures.

HTTP/1.1 on asyncio with httptools (the parser of uvicorn): one clock reading per read from the socket, one
JSON decoding per event. Events that arrive in one read carry the same time, as they did arrive together.

    OpenAIClient        the connections: at most `max_connections`, kept alive, all closed by `aclose`
      _Connection       one socket; carries one exchange at a time
        Answer          one response on its way in: status, SSE events, usage, error

A stream counts as whole only when a choice gave its finish reason. Status 200 alone proves nothing.
"""

import asyncio
import os
import ssl
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import urlsplit

import httptools
import httpx
import orjson

from baton.clock import Clock
from baton.errors import ConfigError
from baton_loadtest.record import ErrorKind, RequestRecord
from baton_loadtest.workload import PlannedRequest

# Servers drop idle connections after some seconds (uvicorn: 5). We drop ours sooner, so that no request is
# written into a connection that the other side is just closing.
_IDLE_S = 2.0
_MAX_ERROR_BYTES = 4096  # of an error page; the rest is read and dropped
_MAX_LINE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where an OpenAI API lives. `base_path` ends with its version, as in "/v1"."""

    host: str
    port: int
    tls: bool
    base_path: str
    root_path: str

    @classmethod
    def parse(cls, base_url: str) -> "Endpoint":
        """With or without "/v1" at the end. Raises ConfigError."""
        try:
            parts = urlsplit(base_url)
            port = parts.port
        except ValueError as error:
            raise ConfigError(f"cannot read the base URL {base_url!r}: {error}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"the base URL must look like http://127.0.0.1:8000, got {base_url!r}")
        root = parts.path.rstrip("/").removesuffix("/v1")
        tls = parts.scheme == "https"
        return cls(parts.hostname, port or (443 if tls else 80), tls, f"{root}/v1", root)

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.tls else 80) else f"{host}:{self.port}"

    def ssl_context(self) -> ssl.SSLContext | None:
        """The system's certificates, or those of SSL_CERT_FILE."""
        return ssl.create_default_context() if self.tls else None

    @property
    def root_url(self) -> str:
        return f"{'https' if self.tls else 'http'}://{self.authority}{self.root_path}"

    @property
    def base_url(self) -> str:
        return f"{'https' if self.tls else 'http'}://{self.authority}{self.base_path}"


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """What every request of a run has in common."""

    model: str
    api: str = "auto"  # chat | completions | auto: completions for token ids, chat for text
    temperature: float = 0.0
    ignore_eos: bool = False  # a field of vLLM's, sent only when it is on
    seed: int = 0  # request i samples with seed + i; sent only when the temperature is not 0

    def path_and_body(self, request: PlannedRequest) -> tuple[str, bytes]:
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": request.max_tokens,
            "temperature": self.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.ignore_eos:
            body["ignore_eos"] = True
        if self.temperature > 0:
            body["seed"] = self.seed + request.index
        if self.api == "chat" or (self.api == "auto" and isinstance(request.prompt, str)):
            body["messages"] = [{"role": "user", "content": request.prompt}]
            return "/chat/completions", orjson.dumps(body)
        body["prompt"] = request.prompt
        return "/completions", orjson.dumps(body)


class OpenAIClient:
    """One run's client; `async with` it. A request beyond `max_connections` waits, and its wait shows as lag.

    Mutable state, touched only on the event loop: `_idle` (newest last) and `_connections` (all that are
    open).
    """

    def __init__(
        self,
        endpoint: Endpoint,
        options: RequestOptions,
        clock: Clock,
        *,
        timeout_s: float,
        max_connections: int,
        api_key: str | None = None,
    ) -> None:
        self._endpoint = endpoint
        self._options = options
        self._clock = clock
        self._timeout_s = timeout_s
        self._api_key = api_key
        self._slots = asyncio.Semaphore(max_connections)
        self._ssl = endpoint.ssl_context()
        self._idle: list[_Connection] = []
        self._connections: set[_Connection] = set()
        self.num_opened = 0

    def __repr__(self) -> str:
        idle = sum(connection.reusable for connection in self._idle)
        return f"<OpenAIClient {self._endpoint.base_url} busy={len(self._connections) - idle} idle={idle}>"

    async def __aenter__(self) -> "OpenAIClient":
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Returns when every socket is closed."""
        connections = list(self._connections)
        for connection in connections:
            connection.abort()
        for connection in connections:
            await connection.closed.wait()

    async def send(self, request: PlannedRequest, planned_s: float) -> RequestRecord:
        """Start to end, inside the deadline. Failures are in the record; cancelled, it hangs up."""
        data = self._encode(request)
        answer = Answer()
        async with self._slots:
            sent_s = self._clock.now()
            try:
                async with self._clock.timeout(self._timeout_s):
                    await self._exchange(data, answer)
            except TimeoutError:
                answer.fail(ErrorKind.TIMEOUT, f"no end after {self._timeout_s:g} s")
            done_s = self._clock.now()
        return answer.record(request, planned_s=planned_s, sent_s=sent_s, done_s=done_s)

    def _encode(self, request: PlannedRequest) -> bytes:
        path, body = self._options.path_and_body(request)
        key = f"authorization: Bearer {self._api_key}\r\n" if self._api_key else ""
        head = (
            f"POST {self._endpoint.base_path}{path} HTTP/1.1\r\nhost: {self._endpoint.authority}\r\n"
            f"user-agent: baton-loadtest\r\naccept: text/event-stream\r\n{key}"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body

    async def _exchange(self, data: bytes, answer: "Answer") -> None:
        connection = self._take_idle() or await self._connect(answer)
        if connection is None:
            return
        try:
            await connection.exchange(data, answer)
        finally:
            if connection.reusable:
                connection.idle_since_s = self._clock.now()
                self._idle.append(connection)
            else:
                connection.abort()

    def _take_idle(self) -> "_Connection | None":
        oldest_s = self._clock.now() - _IDLE_S
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable and connection.idle_since_s >= oldest_s:
                return connection
            connection.abort()
        return None

    async def _connect(self, answer: "Answer") -> "_Connection | None":
        loop = asyncio.get_running_loop()
        where = self._endpoint
        try:
            _, connection = await loop.create_connection(
                lambda: _Connection(self._clock, self._connections), where.host, where.port, ssl=self._ssl
            )
        except OSError as error:  # a TimeoutError is the kernel's: our own deadline cancels here
            answer.fail(ErrorKind.CONNECT, _reason(error))
            return None
        self.num_opened += 1
        return connection


class _Connection(asyncio.Protocol):
    """Owned by whoever called `exchange` until it returns, else by the client's idle list. It adds itself to
    and removes itself from `registry`."""

    def __init__(self, clock: Clock, registry: set["_Connection"]) -> None:
        self._clock = clock
        self._registry = registry
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._answer: Answer | None = None
        self._ended: asyncio.Future[None] | None = None
        self._now_s = 0.0
        self._keep_alive = True
        self.idle_since_s = 0.0
        self.closed = asyncio.Event()

    @property
    def reusable(self) -> bool:
        open_ = self._transport is not None and not self._transport.is_closing()
        return open_ and self._keep_alive and self._answer is None

    async def exchange(self, data: bytes, answer: "Answer") -> None:
        """Write a request, read its answer to the end. Cancelled, it leaves a connection of no more use."""
        assert self._transport is not None and self._answer is None
        self._answer = answer
        self._ended = asyncio.get_running_loop().create_future()
        self._transport.write(data)
        await self._ended

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's has the methods, not the base class
        self._registry.add(self)

    def data_received(self, data: bytes) -> None:
        self._now_s = self._clock.now()
        if self._answer is None:
            self.abort()
            return
        if self._answer.first_byte_s is None:
            self._answer.first_byte_s = self._now_s
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError:
            raise  # ours; the event loop logs it and closes the connection
        except httptools.HttpParserError as error:
            self._broken(ErrorKind.PROTOCOL, f"not HTTP: {error}")

    def connection_lost(self, exc: Exception | None) -> None:
        self._registry.discard(self)
        self.closed.set()
        self._broken(ErrorKind.CUT, str(exc) if exc else "the server closed the connection")

    # httptools

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._answer is not None:
            self._answer.header(name, value)

    def on_headers_complete(self) -> None:
        if self._answer is not None:
            self._answer.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        if self._answer is not None:
            self._answer.body(body, self._now_s)

    def on_message_complete(self) -> None:
        # Never called for an answer that ends with its connection: see connection_lost.
        self._keep_alive = self._parser.should_keep_alive()
        if self._answer is not None:
            self._answer.end()
        self._end()

    def _broken(self, kind: ErrorKind, text: str) -> None:
        if self._answer is None:
            return
        self._keep_alive = False
        self._answer.broken(kind, text)
        self._end()

    def _end(self) -> None:
        self._answer = None
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)


class Answer:
    """A response while it arrives. The first failure is kept; what comes after it changes nothing."""

    def __init__(self) -> None:
        self.status: int | None = None
        self.first_byte_s: float | None = None
        self.error: ErrorKind | None = None
        self._error_text = ""
        self._content_type = b""
        self._request_id = ""
        self._buffer = b""  # an unfinished line, or the body of an answer that is no stream
        self._token_s: list[float] = []
        self._pieces: list[str] = []
        self._finish_reason: str | None = None
        self._finish_s: float | None = None
        self._usage: dict[str, Any] = {}

    def fail(self, kind: ErrorKind, text: str) -> None:
        if self.error is None:
            self.error, self._error_text = kind, text

    def header(self, name: bytes, value: bytes) -> None:
        match name.lower():
            case b"content-type":
                self._content_type = value.lower()
            case b"x-request-id":
                self._request_id = value.decode("latin-1")

    def body(self, data: bytes, now_s: float) -> None:
        if not self._is_stream:
            self._buffer += data[: _MAX_ERROR_BYTES - len(self._buffer)]
            return
        lines = (self._buffer + data).split(b"\n")
        self._buffer = lines.pop()
        for line in lines:
            if line.startswith(b"data:"):
                self._event(line[5:].strip(), now_s)
        if len(self._buffer) > _MAX_LINE_BYTES:
            self.fail(ErrorKind.PROTOCOL, f"a line of more than {_MAX_LINE_BYTES} bytes")
            self._buffer = b""

    def end(self) -> None:
        """The HTTP message is complete."""
        if self.status != 200:
            self.fail(ErrorKind.HTTP, _error_message(self._buffer))
        elif not self._is_stream:
            self.fail(ErrorKind.PROTOCOL, f"no event stream but {self._content_type.decode('latin-1')!r}")
        elif self._finish_reason is None:
            self.fail(ErrorKind.CUT, "the stream ended without a finish reason")

    def broken(self, kind: ErrorKind, text: str) -> None:
        """The connection ended. That is a good end for an answer of which the last event was seen."""
        if self.status is None:
            kind = ErrorKind.CONNECT if kind is ErrorKind.CUT else kind
            self.fail(kind, f"no answer: {text}")
        elif self.status != 200:
            self.end()
        elif self._finish_reason is None:
            self.fail(kind, text)

    def record(
        self, request: PlannedRequest, *, planned_s: float, sent_s: float, done_s: float
    ) -> RequestRecord:
        num_tokens = self._count("completion_tokens")
        if not self._token_s and self._finish_s is not None and num_tokens:
            self._token_s.append(self._finish_s)  # tokens without text: the user learns of them at the end
        if self._finish_reason and not self._token_s:
            self.fail(ErrorKind.EMPTY, f"no token, finish reason {self._finish_reason}")
        return RequestRecord(
            index=request.index,
            planned_s=planned_s,
            sent_s=sent_s,
            done_s=done_s,
            first_byte_s=self.first_byte_s,
            token_s=tuple(self._token_s),
            finish_s=self._finish_s,
            status=self.status,
            error=self.error,
            error_text=self._error_text,
            request_id=self._request_id,
            finish_reason=self._finish_reason,
            num_prompt_tokens=self._count("prompt_tokens"),
            num_cached_tokens=self._cached_tokens(),
            num_tokens=num_tokens,
            text="".join(self._pieces),
            expected=request.expected,
        )

    @property
    def _is_stream(self) -> bool:
        return self.status == 200 and self._content_type.startswith(b"text/event-stream")

    def _event(self, payload: bytes, now_s: float) -> None:
        if payload == b"[DONE]" or self.error is not None:
            return
        try:
            event = orjson.loads(payload)
            if error := event.get("error"):
                self.fail(ErrorKind.ERROR_EVENT, _message_of(error))
                return
            if not self._request_id:
                self._request_id = str(event.get("id", ""))
            if isinstance(usage := event.get("usage"), dict):
                self._usage = usage
            for choice in event.get("choices") or ():
                self._choice(choice, now_s)
        except (ValueError, AttributeError, TypeError) as error:
            self.fail(ErrorKind.PROTOCOL, f"cannot read the event {payload[:100]!r}: {error}")

    def _choice(self, choice: dict[str, Any], now_s: float) -> None:
        finish = choice.get("finish_reason")
        delta = choice.get("delta")
        if delta is None:
            text, thought, opens = choice.get("text"), None, False
        else:
            text, opens = delta.get("content"), "role" in delta
            thought = delta.get("reasoning_content") or delta.get("reasoning")
        if not isinstance(text, str | None):
            raise TypeError(f"a text is {type(text).__name__}")
        # An empty text is a token without visible characters, except in an opening or a closing event.
        if text or thought or (text == "" and not opens and not finish):
            self._token_s.append(now_s)
        if text:
            self._pieces.append(text)
        if finish:
            self._finish_reason, self._finish_s = str(finish), now_s

    def _count(self, field: str) -> int | None:
        value = self._usage.get(field)
        return value if isinstance(value, int) else None

    def _cached_tokens(self) -> int | None:
        details = self._usage.get("prompt_tokens_details")
        value = details.get("cached_tokens") if isinstance(details, dict) else None
        return value if isinstance(value, int) else None


def _reason(error: OSError) -> str:
    """The same words on every event loop."""
    return os.strerror(error.errno) if isinstance(error, ConnectionError) and error.errno else str(error)


def _error_message(body: bytes) -> str:
    """The message of an OpenAI error object, else the beginning of whatever came."""
    try:
        return _message_of(orjson.loads(body)["error"])
    except (ValueError, TypeError, KeyError):
        return body[:200].decode("utf-8", "replace")


def _message_of(error: Any) -> str:
    message = error.get("message", error) if isinstance(error, dict) else error
    return str(message)


@dataclass(frozen=True, slots=True)
class ServerInfo:
    models: tuple[str, ...]
    health: Any  # the JSON of /health where there is one; Baton names its transport there


def ask_server(endpoint: Endpoint, api_key: str | None, timeout_s: float = 10.0) -> ServerInfo:
    """Which models are served. Raises ConfigError in one line when nobody answers."""
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    verify = endpoint.ssl_context() or False
    with httpx.Client(headers=headers, timeout=timeout_s, trust_env=False, verify=verify) as http:
        try:
            models = http.get(f"{endpoint.base_url}/models")
            health = http.get(f"{endpoint.root_url}/health")
        except httpx.HTTPError as error:
            raise ConfigError(f"no server at {endpoint.base_url}: {error}") from None
    if models.status_code != 200:
        raise ConfigError(
            f"{endpoint.base_url}/models answers {models.status_code}: {_error_message(models.content)}"
        )
    try:
        names = tuple(str(model["id"]) for model in orjson.loads(models.content)["data"])
    except (ValueError, TypeError, KeyError):
        raise ConfigError(f"{endpoint.base_url}/models is no OpenAI model list") from None
    return ServerInfo(names, _json_or_none(health.content) if health.status_code == 200 else None)


def _json_or_none(body: bytes) -> Any:
    try:
        return orjson.loads(body) if len(body) <= _MAX_ERROR_BYTES else None
    except ValueError:
        return None
