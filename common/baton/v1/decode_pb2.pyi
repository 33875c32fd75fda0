from baton.v1 import request_pb2 as _request_pb2
from baton.v1 import ticket_pb2 as _ticket_pb2
from baton.v1 import worker_pb2 as _worker_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SessionRequest(_message.Message):
    __slots__ = ("submit", "cancel", "recompute")
    SUBMIT_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    RECOMPUTE_FIELD_NUMBER: _ClassVar[int]
    submit: Submit
    cancel: Cancel
    recompute: Recompute
    def __init__(self, submit: _Optional[_Union[Submit, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., recompute: _Optional[_Union[Recompute, _Mapping]] = ...) -> None: ...

class SessionResponse(_message.Message):
    __slots__ = ("ticket", "failure", "step", "received", "heartbeat", "missed")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    MISSED_FIELD_NUMBER: _ClassVar[int]
    ticket: _ticket_pb2.Ticket
    failure: Failure
    step: Step
    received: Received
    heartbeat: Heartbeat
    missed: Missed
    def __init__(self, ticket: _Optional[_Union[_ticket_pb2.Ticket, _Mapping]] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ..., step: _Optional[_Union[Step, _Mapping]] = ..., received: _Optional[_Union[Received, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., missed: _Optional[_Union[Missed, _Mapping]] = ...) -> None: ...

class Submit(_message.Message):
    __slots__ = ("handle", "request", "epoch", "remote_prefill", "deadline_s", "prefill_id")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REMOTE_PREFILL_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_ID_FIELD_NUMBER: _ClassVar[int]
    handle: int
    request: _request_pb2.Request
    epoch: int
    remote_prefill: bool
    deadline_s: float
    prefill_id: str
    def __init__(self, handle: _Optional[int] = ..., request: _Optional[_Union[_request_pb2.Request, _Mapping]] = ..., epoch: _Optional[int] = ..., remote_prefill: _Optional[bool] = ..., deadline_s: _Optional[float] = ..., prefill_id: _Optional[str] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("handle",)
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    handle: int
    def __init__(self, handle: _Optional[int] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("handle", "code", "message", "param", "retry_after_s")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    PARAM_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_S_FIELD_NUMBER: _ClassVar[int]
    handle: int
    code: str
    message: str
    param: str
    retry_after_s: float
    def __init__(self, handle: _Optional[int] = ..., code: _Optional[str] = ..., message: _Optional[str] = ..., param: _Optional[str] = ..., retry_after_s: _Optional[float] = ...) -> None: ...

class Step(_message.Message):
    __slots__ = ("handles", "first_index", "num_tokens", "token_ids", "finished_handles", "finished_reasons", "load", "logprob_rows", "logprobs", "prompt_logprob_handles", "prompt_logprobs", "cached_handles", "num_cached_tokens")
    HANDLES_FIELD_NUMBER: _ClassVar[int]
    FIRST_INDEX_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_HANDLES_FIELD_NUMBER: _ClassVar[int]
    FINISHED_REASONS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_ROWS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROB_HANDLES_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    CACHED_HANDLES_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    handles: _containers.RepeatedScalarFieldContainer[int]
    first_index: _containers.RepeatedScalarFieldContainer[int]
    num_tokens: _containers.RepeatedScalarFieldContainer[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    finished_handles: _containers.RepeatedScalarFieldContainer[int]
    finished_reasons: _containers.RepeatedScalarFieldContainer[_request_pb2.FinishReason]
    load: _worker_pb2.Load
    logprob_rows: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[_request_pb2.TokenLogprobs]
    prompt_logprob_handles: _containers.RepeatedScalarFieldContainer[int]
    prompt_logprobs: _containers.RepeatedCompositeFieldContainer[_request_pb2.PromptLogprobs]
    cached_handles: _containers.RepeatedScalarFieldContainer[int]
    num_cached_tokens: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, handles: _Optional[_Iterable[int]] = ..., first_index: _Optional[_Iterable[int]] = ..., num_tokens: _Optional[_Iterable[int]] = ..., token_ids: _Optional[_Iterable[int]] = ..., finished_handles: _Optional[_Iterable[int]] = ..., finished_reasons: _Optional[_Iterable[_Union[_request_pb2.FinishReason, str]]] = ..., load: _Optional[_Union[_worker_pb2.Load, _Mapping]] = ..., logprob_rows: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[_request_pb2.TokenLogprobs, _Mapping]]] = ..., prompt_logprob_handles: _Optional[_Iterable[int]] = ..., prompt_logprobs: _Optional[_Iterable[_Union[_request_pb2.PromptLogprobs, _Mapping]]] = ..., cached_handles: _Optional[_Iterable[int]] = ..., num_cached_tokens: _Optional[_Iterable[int]] = ...) -> None: ...

class Recompute(_message.Message):
    __slots__ = ("handle", "reason", "first_token")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    handle: int
    reason: str
    first_token: int
    def __init__(self, handle: _Optional[int] = ..., reason: _Optional[str] = ..., first_token: _Optional[int] = ...) -> None: ...

class Missed(_message.Message):
    __slots__ = ("handle", "reason")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    handle: int
    reason: str
    def __init__(self, handle: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class Received(_message.Message):
    __slots__ = ("handle", "num_blocks", "num_bytes", "seconds", "first_token")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    handle: int
    num_blocks: int
    num_bytes: int
    seconds: float
    first_token: int
    def __init__(self, handle: _Optional[int] = ..., num_blocks: _Optional[int] = ..., num_bytes: _Optional[int] = ..., seconds: _Optional[float] = ..., first_token: _Optional[int] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("load",)
    LOAD_FIELD_NUMBER: _ClassVar[int]
    load: _worker_pb2.Load
    def __init__(self, load: _Optional[_Union[_worker_pb2.Load, _Mapping]] = ...) -> None: ...

class DecodeGenerateRequest(_message.Message):
    __slots__ = ("request", "deadline_s")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    request: _request_pb2.Request
    deadline_s: float
    def __init__(self, request: _Optional[_Union[_request_pb2.Request, _Mapping]] = ..., deadline_s: _Optional[float] = ...) -> None: ...

class DecodeGenerateResponse(_message.Message):
    __slots__ = ("chunk",)
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    chunk: _request_pb2.GenerateChunk
    def __init__(self, chunk: _Optional[_Union[_request_pb2.GenerateChunk, _Mapping]] = ...) -> None: ...
