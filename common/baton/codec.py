"""Messages to bytes and back: the one place where Baton's dataclasses meet protobuf.

A dataclass and its proto message have the same field names, so a `_Plan` per dataclass, made once from
its type hints, goes both ways. What differs is written out: the pairs in `Step.finished` travel as two
columns; messages that are one of several on a stream, or answer several calls, travel inside the message
that the proto gives to the call.

Form is checked here, meaning is not. A value that its field cannot hold, an unknown enum value, a
required field that is missing, a number that is not finite: `InvalidRequest`, whose `param` is the path
of the field. An absent field takes the dataclass's default.
"""

import dataclasses
import enum
import functools
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from baton import messages as m
from baton.errors import BatonError, InternalError, InvalidRequest, from_code
from baton.request import (
    FinishReason,
    Grammar,
    PromptLogprobs,
    Request,
    SamplingParams,
    TokenBias,
    TokenLogprobs,
    TokenSequence,
)
from baton.v1 import (
    decode_pb2,
    error_pb2,
    prefill_pb2,
    prefix_pb2,
    request_pb2,
    router_pb2,
    status_pb2,
    ticket_pb2,
    worker_pb2,
)

MAX_ERROR_CHARS = 1000  # an error travels in HTTP/2 trailers; many clients refuse more than 8 KiB of them


def encode(message: Any) -> bytes:
    route = _ROUTES[type(message)]
    ((name, message_class),) = route.choices
    try:
        values = _plan(message_class).to_pb(message)
        return _build(route.pb_class, name, values, PROTOS[message_class]).SerializeToString()
    except _BadFieldError as error:
        raise error.named(route.pb_class) from None


def decode(expected: Any, data: bytes) -> Any:
    """`expected` is a message type, or the union of those that share a stream."""
    route = _ROUTES[expected]
    try:
        pb = route.pb_class.FromString(data)
        return _read(route, pb)
    except DecodeError as error:
        raise InvalidRequest(f"this is not a {route.pb_class.DESCRIPTOR.full_name}: {error}") from None
    except _BadFieldError as error:
        raise error.named(route.pb_class) from None


def encode_error(error: BatonError) -> bytes:
    return error_pb2.Error(
        code=error.code,
        message=short_text(error.message, MAX_ERROR_CHARS),
        param=None if error.param is None else short_text(error.param, MAX_ERROR_CHARS),
        retry_after_s=error.retry_after_s,
    ).SerializeToString()


def decode_error(data: bytes) -> BatonError:
    try:
        pb = error_pb2.Error.FromString(data)
    except DecodeError:
        return InternalError("the peer reported an error that cannot be read")
    param = pb.param if pb.HasField("param") else None
    retry_after_s = pb.retry_after_s if pb.HasField("retry_after_s") else None
    return from_code(pb.code, pb.message, param, retry_after_s)


def short_text(text: str, max_chars: int) -> str:
    if len(text) > max_chars:
        text = text[: max_chars - 1] + "…"
    return text.encode(errors="replace").decode()  # half of a surrogate pair is no text


class _BadFieldError(Exception):
    """`path` grows from the inside out."""

    def __init__(self, why: str, *path: str) -> None:
        super().__init__(why)
        self.why = why
        self.path = path

    def inside(self, name: str) -> "_BadFieldError":
        return _BadFieldError(self.why, name, *self.path)

    def named(self, pb_class: type[Message]) -> InvalidRequest:
        path = ".".join(self.path)
        return InvalidRequest(f"{path or pb_class.DESCRIPTOR.name}: {self.why}", param=path or None)


def _build(
    pb_class: type[Message], name: str | None, values: dict[str, Any], inner_class: type[Message]
) -> Message:
    try:
        return pb_class(**values) if name is None else pb_class(**{name: values})
    except (ValueError, TypeError) as error:
        raise _blame(inner_class.DESCRIPTOR, values, str(error)) from None


def _blame(descriptor: Any, values: dict[str, Any], why: str) -> _BadFieldError:
    """Which field protobuf refused; it does not say so itself."""
    pb_class = GetMessageClass(descriptor)
    for name, value in values.items():
        try:
            pb_class(**{name: value})
        except (ValueError, TypeError) as error:
            nested = descriptor.fields_by_name[name].message_type
            if nested is None:
                return _BadFieldError(str(error), name)
            for inner in value if isinstance(value, list) else [value]:
                blamed = _blame(nested, inner, str(error))
                if blamed.path:
                    return blamed.inside(name)
    return _BadFieldError(why)


# --- plans: one per dataclass ---


class _Field(NamedTuple):
    """`to_pb` and `from_pb` are None where the value passes as it is."""

    name: str
    to_pb: Callable[[Any], Any] | None
    from_pb: Callable[[Any], Any] | None
    has_presence: bool
    absent: Callable[[], Any]


class _Plan:
    """How one dataclass travels. Outwards as a dict of keywords, which nest: the outermost protobuf message
    is filled in one go, without copies."""

    def __init__(self, message_class: type) -> None:
        self._message_class = message_class
        hints = typing.get_type_hints(message_class)
        descriptors = PROTOS[message_class].DESCRIPTOR.fields_by_name
        self._fields = [
            _field(field, hints[field.name], descriptors[field.name])
            for field in dataclasses.fields(message_class)
        ]

    def to_pb(self, message: Any) -> dict[str, Any]:
        values = {}
        for name, to_pb, _, _, _ in self._fields:
            value = getattr(message, name)
            try:
                if value is not None:
                    values[name] = value if to_pb is None else to_pb(value)
            except _BadFieldError as error:
                raise error.inside(name) from None
        return values

    def from_pb(self, pb: Any) -> Any:
        values = []
        for name, _, from_pb, has_presence, absent in self._fields:
            try:
                if has_presence and not pb.HasField(name):
                    values.append(absent())
                else:
                    value = getattr(pb, name)
                    values.append(value if from_pb is None else from_pb(value))
            except _BadFieldError as error:
                raise error.inside(name) from None
        return self._message_class(*values)


def _field(field: "dataclasses.Field[Any]", hint: Any, descriptor: Any) -> _Field:
    to_pb, from_pb = _converters(hint, descriptor)
    return _Field(field.name, to_pb, from_pb, descriptor.has_presence, _absent(field, hint))


def _absent(field: "dataclasses.Field[Any]", hint: Any) -> Callable[[], Any]:
    def missing() -> Any:
        raise _BadFieldError("is missing")

    if isinstance(hint, types.UnionType):  # X | None
        return lambda: None
    if field.default is not dataclasses.MISSING:
        return lambda: field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory
    if hint in PROTOS and all(inner.default is not dataclasses.MISSING for inner in dataclasses.fields(hint)):
        return typing.cast(Callable[[], Any], hint)  # nothing in it is required
    return missing


_Converter = Callable[[Any], Any] | None


def _converters(hint: Any, descriptor: Any) -> tuple[_Converter, _Converter]:
    """To and from protobuf, for the field of that descriptor."""
    hint = getattr(hint, "__supertype__", hint)
    if isinstance(hint, types.UnionType):
        return _converters(hint.__args__[0], descriptor)
    if typing.get_origin(hint) is tuple:
        to_pb, from_pb = _converters(hint.__args__[0], descriptor)
        return _each(list, to_pb), _each(tuple, from_pb) or _column
    if hint in PROTOS:
        plan = _plan(hint)
        return plan.to_pb, plan.from_pb
    if issubclass(hint, enum.Enum):
        numbers = _enum_numbers(hint, descriptor.enum_type)
        return _look_up(numbers), _look_up({number: member for member, number in numbers.items()})
    return (_finite, _finite) if hint is float else (None, None)


def _column(values: Any) -> tuple[Any, ...]:
    return tuple(values[:])  # a slice comes faster than an iteration


def _each(container: Callable[[Any], Any], convert: _Converter) -> _Converter:
    return None if convert is None else lambda values: container(map(convert, values))


def _finite(value: float) -> float:
    try:
        if math.isfinite(value):
            return value
    except (OverflowError, TypeError):
        pass
    raise _BadFieldError(f"{value!r:.40} is not a finite number")


def _enum_numbers(members: type[enum.Enum], descriptor: Any) -> dict[Any, int]:
    prefix = descriptor.values_by_number[0].name.removesuffix("UNSPECIFIED")
    return {member: descriptor.values_by_name[prefix + member.name].number for member in members}


def _look_up(table: Mapping[Any, Any]) -> Callable[[Any], Any]:
    def look_up(key: Any) -> Any:
        if key not in table:
            raise _BadFieldError(f"{key!r:.40} is not a known value")
        return table[key]

    return look_up


class _PromptLogprobsPlan(_Plan):
    def from_pb(self, pb: Any) -> PromptLogprobs:
        if len(pb.ranks) != len(pb.logprobs):
            raise _BadFieldError("columns of different lengths", "ranks")
        if len(pb.top_logprobs) != len(pb.top_token_ids) or len(pb.top_token_ids) % max(1, len(pb.logprobs)):
            raise _BadFieldError("not as many for each token", "top_token_ids")
        said: PromptLogprobs = super().from_pb(pb)
        return said


class _StepPlan(_Plan):
    """One of these travels per engine step, and its pair of columns is no field of the dataclass."""

    def __init__(self, message_class: type) -> None:
        self._load = _plan(m.Load)
        self._logprobs = _plan(TokenLogprobs)
        self._prompt_logprobs = _plan(PromptLogprobs)
        self._numbers = _enum_numbers(FinishReason, request_pb2.FinishReason.DESCRIPTOR)
        self._reason = _look_up({number: reason for reason, number in self._numbers.items()})

    def to_pb(self, message: m.Step) -> dict[str, Any]:
        values = {
            "handles": message.handles,
            "first_index": message.first_index,
            "num_tokens": message.num_tokens,
            "token_ids": message.token_ids,
            "finished_handles": [handle for handle, _ in message.finished],
            "finished_reasons": [self._numbers[reason] for _, reason in message.finished],
            "load": self._load.to_pb(message.load),
            "logprob_rows": message.logprob_rows,
            "logprobs": [self._logprobs.to_pb(each) for each in message.logprobs],
        }
        if message.prompt_logprobs:
            values["prompt_logprob_handles"] = message.prompt_logprob_handles
            values["prompt_logprobs"] = [
                self._prompt_logprobs.to_pb(each) for each in message.prompt_logprobs
            ]
        if message.cached_handles:
            values["cached_handles"] = message.cached_handles
            values["num_cached_tokens"] = message.num_cached_tokens
        return values

    def from_pb(self, pb: Any) -> m.Step:
        handles, first_index = _column(pb.handles), _column(pb.first_index)
        num_tokens, token_ids = _column(pb.num_tokens), _column(pb.token_ids)
        if not len(handles) == len(first_index) == len(num_tokens):
            raise _BadFieldError("columns of different lengths", "handles")
        if sum(num_tokens) != len(token_ids):
            raise _BadFieldError(f"{len(token_ids)} where the rows have {sum(num_tokens)}", "token_ids")
        finished, load = self._finished(pb), self._read_load(pb.load)
        if not (pb.logprob_rows or pb.prompt_logprob_handles or pb.cached_handles):
            return m.Step(handles, first_index, num_tokens, token_ids, finished, load)
        said = *self._of_rows(pb, num_tokens), *self._of_prompts(pb), *self._cached(pb)
        return m.Step(handles, first_index, num_tokens, token_ids, finished, load, *said)

    def _of_rows(
        self, pb: Any, num_tokens: tuple[int, ...]
    ) -> tuple[tuple[int, ...], tuple[TokenLogprobs, ...]]:
        rows = _column(pb.logprob_rows)
        if rows and max(rows) >= len(num_tokens):
            raise _BadFieldError(f"there is no row {max(rows)}", "logprob_rows")
        if sum(num_tokens[row] for row in rows) != len(pb.logprobs):
            raise _BadFieldError(f"{len(pb.logprobs)} are not one per token of their rows", "logprobs")
        try:
            return rows, tuple(map(self._logprobs.from_pb, pb.logprobs))
        except _BadFieldError as error:
            raise error.inside("logprobs") from None

    def _of_prompts(self, pb: Any) -> tuple[tuple[int, ...], tuple[PromptLogprobs, ...]]:
        if len(pb.prompt_logprob_handles) != len(pb.prompt_logprobs):
            raise _BadFieldError("columns of different lengths", "prompt_logprob_handles")
        try:
            said = tuple(map(self._prompt_logprobs.from_pb, pb.prompt_logprobs))
        except _BadFieldError as error:
            raise error.inside("prompt_logprobs") from None
        return _column(pb.prompt_logprob_handles), said

    def _cached(self, pb: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if len(pb.cached_handles) != len(pb.num_cached_tokens):
            raise _BadFieldError("columns of different lengths", "cached_handles")
        return _column(pb.cached_handles), _column(pb.num_cached_tokens)

    def _finished(self, pb: Any) -> tuple[tuple[int, FinishReason], ...]:
        if len(pb.finished_handles) != len(pb.finished_reasons):
            raise _BadFieldError("columns of different lengths", "finished_handles")
        try:
            return tuple(zip(pb.finished_handles, map(self._reason, pb.finished_reasons), strict=True))
        except _BadFieldError as error:
            raise error.inside("finished_reasons") from None

    def _read_load(self, pb: Any) -> m.Load:
        try:
            load: m.Load = self._load.from_pb(pb)
        except _BadFieldError as error:
            raise error.inside("load") from None
        return load


class _RouterGeneratePlan(_Plan):
    def from_pb(self, pb: Any) -> m.RouterGenerateCall:
        call: m.RouterGenerateCall = super().from_pb(pb)
        if (call.prompt is None) == (not call.prompt_token_ids):
            raise _BadFieldError("exactly one of prompt and prompt_token_ids must be given", "prompt")
        return call


@functools.cache
def _plan(message_class: type) -> _Plan:
    return _WRITTEN_OUT.get(message_class, _Plan)(message_class)


_WRITTEN_OUT: Mapping[type, type[_Plan]] = {
    m.Step: _StepPlan,
    m.RouterGenerateCall: _RouterGeneratePlan,
    PromptLogprobs: _PromptLogprobsPlan,
}

PROTOS: Mapping[type, type[Message]] = {
    TokenBias: request_pb2.TokenBias,
    TokenSequence: request_pb2.TokenSequence,
    TokenLogprobs: request_pb2.TokenLogprobs,
    PromptLogprobs: request_pb2.PromptLogprobs,
    Grammar: request_pb2.Grammar,
    SamplingParams: request_pb2.SamplingParams,
    Request: request_pb2.Request,
    m.GenerateChunk: request_pb2.GenerateChunk,
    m.Load: worker_pb2.Load,
    m.Compatibility: worker_pb2.Compatibility,
    m.WorkerRecord: worker_pb2.WorkerRecord,
    m.Ticket: ticket_pb2.Ticket,
    m.Submit: decode_pb2.Submit,
    m.Cancel: decode_pb2.Cancel,
    m.Recompute: decode_pb2.Recompute,
    m.Failure: decode_pb2.Failure,
    m.Step: decode_pb2.Step,
    m.Received: decode_pb2.Received,
    m.Heartbeat: decode_pb2.Heartbeat,
    m.Missed: decode_pb2.Missed,
    m.GenerateCall: decode_pb2.DecodeGenerateRequest,
    m.PrefillCall: prefill_pb2.PrefillRequest,
    m.PrefillBegin: prefill_pb2.PrefillBegin,
    m.PrefillTicket: prefill_pb2.PrefillTicket,
    m.PrefillResult: prefill_pb2.PrefillResult,
    m.Pushed: prefill_pb2.Pushed,
    m.PrefixSource: prefill_pb2.PrefixSource,
    m.Fetched: prefill_pb2.Fetched,
    m.FetchCall: prefix_pb2.FetchRequest,
    m.FetchResult: prefix_pb2.FetchResponse,
    m.WorkerStatus: status_pb2.WorkerStatus,
    m.StatusCall: status_pb2.StatusGetRequest,  # and StatusWatchRequest, which reads the same
    m.Holder: status_pb2.Holder,
    m.BlocksCall: status_pb2.BlocksRequest,
    m.BlockLedger: status_pb2.BlocksResponse,
    m.RouterGenerateCall: router_pb2.RouterGenerateRequest,
    m.CancelCall: router_pb2.CancelRequest,
    m.CancelResult: router_pb2.CancelResponse,
    m.ListWorkersCall: router_pb2.ListWorkersRequest,
    m.WorkerList: router_pb2.ListWorkersResponse,
}


# --- routes: which proto message of a call carries which of ours ---


class _Route(NamedTuple):
    """`choices` are (field, message type); the field is None where the call's message is ours itself."""

    pb_class: type[Message]
    choices: tuple[tuple[str | None, type], ...]
    missing: str


def _read(route: _Route, pb: Message) -> Any:
    for name, message_class in route.choices:
        if name is None:
            return _plan(message_class).from_pb(pb)
        if pb.HasField(name):
            return _plan(message_class).from_pb(getattr(pb, name))
    raise _BadFieldError(f"none of {', '.join(str(name) for name, _ in route.choices)} is set", route.missing)


def _make_routes() -> dict[Any, _Route]:
    routes: dict[Any, _Route] = {
        cls: _Route(pb_class, ((None, cls),), "") for cls, pb_class in PROTOS.items()
    }
    # Also what RouterGenerateResponse, StatusWatchResponse and PrefillAheadResponse look like on the wire.
    chunk = (("chunk", m.GenerateChunk),)
    routes[m.GenerateChunk] = _Route(decode_pb2.DecodeGenerateResponse, chunk, "chunk")
    routes[m.WorkerStatus] = _Route(status_pb2.StatusGetResponse, (("status", m.WorkerStatus),), "status")
    for union, pb_class in (
        (m.SessionUp, decode_pb2.SessionRequest),
        (m.SessionDown, decode_pb2.SessionResponse),
        (m.PrefillUp, prefill_pb2.PrefillAheadRequest),
        (m.PrefillAnswer, prefill_pb2.PrefillResponse),
    ):
        names = (cls.__name__.removeprefix("Prefill").lower() for cls in typing.get_args(union))
        choices = tuple(zip(names, typing.get_args(union), strict=True))
        routes[union] = _Route(pb_class, choices, "message")
        routes.update((cls, _Route(pb_class, ((name, cls),), "message")) for name, cls in choices)
    return routes


_ROUTES: Mapping[Any, _Route] = _make_routes()
