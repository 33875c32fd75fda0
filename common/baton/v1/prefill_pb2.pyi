from baton.v1 import request_pb2 as _request_pb2
from baton.v1 import ticket_pb2 as _ticket_pb2
from baton.v1 import worker_pb2 as _worker_pb2
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FetchOutcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FETCH_OUTCOME_UNSPECIFIED: _ClassVar[FetchOutcome]
    FETCH_OUTCOME_OK: _ClassVar[FetchOutcome]
    FETCH_OUTCOME_EVICTED: _ClassVar[FetchOutcome]
    FETCH_OUTCOME_LATE: _ClassVar[FetchOutcome]
    FETCH_OUTCOME_FAILED: _ClassVar[FetchOutcome]
    FETCH_OUTCOME_CANCELLED: _ClassVar[FetchOutcome]
FETCH_OUTCOME_UNSPECIFIED: FetchOutcome
FETCH_OUTCOME_OK: FetchOutcome
FETCH_OUTCOME_EVICTED: FetchOutcome
FETCH_OUTCOME_LATE: FetchOutcome
FETCH_OUTCOME_FAILED: FetchOutcome
FETCH_OUTCOME_CANCELLED: FetchOutcome

class PrefillRequest(_message.Message):
    __slots__ = ("request", "ticket", "deadline_s", "source")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    request: _request_pb2.Request
    ticket: _ticket_pb2.Ticket
    deadline_s: float
    source: PrefixSource
    def __init__(self, request: _Optional[_Union[_request_pb2.Request, _Mapping]] = ..., ticket: _Optional[_Union[_ticket_pb2.Ticket, _Mapping]] = ..., deadline_s: _Optional[float] = ..., source: _Optional[_Union[PrefixSource, _Mapping]] = ...) -> None: ...

class PrefillAheadRequest(_message.Message):
    __slots__ = ("begin", "ticket")
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    begin: PrefillBegin
    ticket: PrefillTicket
    def __init__(self, begin: _Optional[_Union[PrefillBegin, _Mapping]] = ..., ticket: _Optional[_Union[PrefillTicket, _Mapping]] = ...) -> None: ...

class PrefillBegin(_message.Message):
    __slots__ = ("request",)
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    request: _request_pb2.Request
    def __init__(self, request: _Optional[_Union[_request_pb2.Request, _Mapping]] = ...) -> None: ...

class PrefillTicket(_message.Message):
    __slots__ = ("ticket",)
    TICKET_FIELD_NUMBER: _ClassVar[int]
    ticket: _ticket_pb2.Ticket
    def __init__(self, ticket: _Optional[_Union[_ticket_pb2.Ticket, _Mapping]] = ...) -> None: ...

class PrefixSource(_message.Message):
    __slots__ = ("worker_id", "address", "num_tokens", "timeout_s")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    address: str
    num_tokens: int
    timeout_s: float
    def __init__(self, worker_id: _Optional[str] = ..., address: _Optional[str] = ..., num_tokens: _Optional[int] = ..., timeout_s: _Optional[float] = ...) -> None: ...

class Fetched(_message.Message):
    __slots__ = ("outcome", "source_id", "num_tokens", "num_held_tokens", "seconds", "num_mismatches", "reason")
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    SOURCE_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_HELD_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    NUM_MISMATCHES_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    outcome: FetchOutcome
    source_id: str
    num_tokens: int
    num_held_tokens: int
    seconds: float
    num_mismatches: int
    reason: str
    def __init__(self, outcome: _Optional[_Union[FetchOutcome, str]] = ..., source_id: _Optional[str] = ..., num_tokens: _Optional[int] = ..., num_held_tokens: _Optional[int] = ..., seconds: _Optional[float] = ..., num_mismatches: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class PrefillResponse(_message.Message):
    __slots__ = ("result", "pushed")
    RESULT_FIELD_NUMBER: _ClassVar[int]
    PUSHED_FIELD_NUMBER: _ClassVar[int]
    result: PrefillResult
    pushed: Pushed
    def __init__(self, result: _Optional[_Union[PrefillResult, _Mapping]] = ..., pushed: _Optional[_Union[Pushed, _Mapping]] = ...) -> None: ...

class PrefillAheadResponse(_message.Message):
    __slots__ = ("result", "pushed")
    RESULT_FIELD_NUMBER: _ClassVar[int]
    PUSHED_FIELD_NUMBER: _ClassVar[int]
    result: PrefillResult
    pushed: Pushed
    def __init__(self, result: _Optional[_Union[PrefillResult, _Mapping]] = ..., pushed: _Optional[_Union[Pushed, _Mapping]] = ...) -> None: ...

class Pushed(_message.Message):
    __slots__ = ("reason", "num_mismatches", "num_bytes", "wire_s", "transport")
    REASON_FIELD_NUMBER: _ClassVar[int]
    NUM_MISMATCHES_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    WIRE_S_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    reason: str
    num_mismatches: int
    num_bytes: int
    wire_s: float
    transport: str
    def __init__(self, reason: _Optional[str] = ..., num_mismatches: _Optional[int] = ..., num_bytes: _Optional[int] = ..., wire_s: _Optional[float] = ..., transport: _Optional[str] = ...) -> None: ...

class PrefillResult(_message.Message):
    __slots__ = ("token_id", "finish_reason", "num_cached_tokens", "queue_s", "prefill_s", "load", "logprobs", "prompt_logprobs", "transport", "fetched")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_S_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    FETCHED_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    finish_reason: _request_pb2.FinishReason
    num_cached_tokens: int
    queue_s: float
    prefill_s: float
    load: _worker_pb2.Load
    logprobs: _request_pb2.TokenLogprobs
    prompt_logprobs: _request_pb2.PromptLogprobs
    transport: str
    fetched: Fetched
    def __init__(self, token_id: _Optional[int] = ..., finish_reason: _Optional[_Union[_request_pb2.FinishReason, str]] = ..., num_cached_tokens: _Optional[int] = ..., queue_s: _Optional[float] = ..., prefill_s: _Optional[float] = ..., load: _Optional[_Union[_worker_pb2.Load, _Mapping]] = ..., logprobs: _Optional[_Union[_request_pb2.TokenLogprobs, _Mapping]] = ..., prompt_logprobs: _Optional[_Union[_request_pb2.PromptLogprobs, _Mapping]] = ..., transport: _Optional[str] = ..., fetched: _Optional[_Union[Fetched, _Mapping]] = ...) -> None: ...
