"""Remote calls between Baton's processes: the contract, in process and over gRPC.

A `Method` names a call and its message types (`baton.messages`). A server maps methods to handlers; a channel calls
them. Both implementations keep the same promises, and one contract test holds them to it:

- A `BatonError` raised by a handler is raised again at the caller, same class, message, param and retry_after_s.
  Any other exception arrives as `InternalError` and is logged where it happened.
- A dead, unreachable or closed peer raises `Unavailable` from every call in flight and every later one; a channel
  reconnects by itself when the peer is back.
- `timeout_s` is a deadline on the whole call: the caller gets `DeadlineExceeded`, the handler is cancelled.
- A caller that is cancelled, or closes the stream early (`aclose()` of the async generator), cancels the handler.
  One that is reading requests at that moment may see them end first.
- Messages of one stream arrive once and in order. A writer that is far ahead of its reader waits.
- A stream starts with the first `anext` of what `server_stream` or `bidi` returned.
- A method that streams answers to one request may be opened by `bidi` before that request is there: its handler is
  called once it has come.
- `requests` of a `bidi` is read, and closed if it is an async generator, by the channel. What it raises ends the call
  and is raised at the caller; its end tells the handler that no more requests come, and leaves the answers running.
"""

import enum
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeAlias, TypeVar

from baton import messages as m

Req = TypeVar("Req")
Res = TypeVar("Res")


Caller: TypeAlias = Literal["router", "worker", "anyone"]


class Kind(enum.Enum):
    UNARY = enum.auto()
    SERVER_STREAM = enum.auto()
    BIDI = enum.auto()


@dataclass(frozen=True, slots=True)
class Method(Generic[Req, Res]):
    """`request` and `response` are message types; a session method's are unions, carried in a oneof. `caller`: whose
    certificate a call needs, where there are certificates."""

    service: str
    name: str
    kind: Kind
    request: Any
    response: Any
    caller: Caller = "router"

    @property
    def path(self) -> str:
        return f"/{self.service}/{self.name}"


PREFILL: Method[m.PrefillCall, m.PrefillAnswer] = Method(
    "baton.v1.Prefill", "Prefill", Kind.SERVER_STREAM, m.PrefillCall, m.PrefillAnswer
)
PREFILL_AHEAD: Method[m.PrefillUp, m.PrefillAnswer] = Method(
    "baton.v1.Prefill", "PrefillAhead", Kind.BIDI, m.PrefillUp, m.PrefillAnswer
)
FETCH: Method[m.FetchCall, m.FetchResult] = Method(
    "baton.v1.Prefix", "Fetch", Kind.UNARY, m.FetchCall, m.FetchResult, "worker"
)
SESSION: Method[m.SessionUp, m.SessionDown] = Method(
    "baton.v1.Decode", "Session", Kind.BIDI, m.SessionUp, m.SessionDown
)
DECODE_GENERATE: Method[m.GenerateCall, m.GenerateChunk] = Method(
    "baton.v1.Decode", "Generate", Kind.SERVER_STREAM, m.GenerateCall, m.GenerateChunk
)
STATUS_GET: Method[m.StatusCall, m.WorkerStatus] = Method(
    "baton.v1.Status", "Get", Kind.UNARY, m.StatusCall, m.WorkerStatus
)
STATUS_WATCH: Method[m.StatusCall, m.WorkerStatus] = Method(
    "baton.v1.Status", "Watch", Kind.SERVER_STREAM, m.StatusCall, m.WorkerStatus
)
STATUS_BLOCKS: Method[m.BlocksCall, m.BlockLedger] = Method(
    "baton.v1.Status", "Blocks", Kind.UNARY, m.BlocksCall, m.BlockLedger
)
ROUTER_GENERATE: Method[m.RouterGenerateCall, m.GenerateChunk] = Method(
    "baton.v1.Router", "Generate", Kind.SERVER_STREAM, m.RouterGenerateCall, m.GenerateChunk, "anyone"
)
ROUTER_CANCEL: Method[m.CancelCall, m.CancelResult] = Method(
    "baton.v1.Router", "Cancel", Kind.UNARY, m.CancelCall, m.CancelResult, "anyone"
)
ROUTER_LIST_WORKERS: Method[m.ListWorkersCall, m.WorkerList] = Method(
    "baton.v1.Router", "ListWorkers", Kind.UNARY, m.ListWorkersCall, m.WorkerList, "anyone"
)

UnaryHandler: TypeAlias = Callable[[Any], Awaitable[Any]]
StreamHandler: TypeAlias = Callable[[Any], AsyncGenerator[Any, None]]  # SERVER_STREAM: one request in
# BIDI: an AsyncIterator of requests in; it ends when the caller has no more to say. Handlers of streams are closed
# (`aclose`) when their call ends.
Handlers: TypeAlias = dict[Method[Any, Any], UnaryHandler | StreamHandler]


async def single(request: Req) -> AsyncGenerator[Req, None]:
    yield request


class Channel(ABC):
    """Calls to one peer. Cheap to make: it connects on first use."""

    @abstractmethod
    async def unary(self, method: Method[Req, Res], request: Req, *, timeout_s: float) -> Res: ...

    def server_stream(
        self, method: Method[Req, Res], request: Req, *, timeout_s: float | None
    ) -> AsyncGenerator[Res, None]:
        """timeout_s=None only for watches that carry heartbeats of their own."""
        return self._stream(method, single(request), timeout_s)

    def bidi(
        self, method: Method[Req, Res], requests: AsyncIterator[Req], *, timeout_s: float | None = None
    ) -> AsyncGenerator[Res, None]:
        """timeout_s=None only for sessions that carry heartbeats of their own, and for what is opened long before it is
        used: whoever uses it ends it in time."""
        return self._stream(method, requests, timeout_s)

    @abstractmethod
    def _stream(
        self, method: Method[Req, Res], requests: AsyncIterator[Req], timeout_s: float | None
    ) -> AsyncGenerator[Res, None]: ...

    @abstractmethod
    async def aclose(self) -> None: ...


class Server(ABC):
    """Serves until closed. `address` is where peers reach it (host:port, with the real port)."""

    address: str

    @abstractmethod
    def set_serving(self, serving: bool) -> None:
        """What health checks see. A server starts as not serving."""

    @abstractmethod
    async def aclose(self, grace_s: float) -> None:
        """Refuse new calls, let running ones end for `grace_s` seconds, cancel the rest."""


class Rpc(ABC):
    @abstractmethod
    async def serve(self, address: str, handlers: Handlers) -> Server:
        """Bind `host:port` (port 0: any free one). Raises ConfigError when the port is taken."""

    @abstractmethod
    def connect(self, address: str) -> Channel: ...
